// The open conversation: what is asked, what is answered, and what can be done with it. One run a conversation; runs of
// conversations that are not on the screen go on.

import { Composer } from "./composer.js";
import { find } from "./dom.js";
import { newHead } from "./library.js";
import { Log } from "./log.js";
import { models } from "./models.js";
import { Run } from "./run.js";
import { titleOf } from "./titles.js";
import { toast } from "./toast.js";
import { hush, readAloud } from "./voice.js";
import { changed, say } from "./words.js";

/** Dispatches "open" when another conversation is on the screen, "run" when an answer begins or ends. */
export class Chat extends EventTarget {
  head = null;
  messages = [];
  #library = null;
  #runs = new Map();
  #editing = null;
  #log = new Log((idea) => this.send(idea));
  #composer = new Composer({
    send: (text) => this.send(text),
    stop: () => this.#run?.stop(),
    cancelEdit: () => this.#cancelEdit(),
  });

  constructor() {
    super();
    changed.addEventListener("change", () => this.#show());
    models.addEventListener("choose", () => this.#chooseModel());
  }

  get #run() {
    return this.#runs.get(this.head?.id);
  }

  running = (id) => this.#runs.has(id);

  use(library) {
    this.#library = library;
    this.fresh();
  }

  /** An empty conversation, stored when something is said in it. */
  fresh() {
    if (!this.head || this.messages.length) this.#put(newHead(models.chosen), []);
  }

  async open(id) {
    const run = this.#runs.get(id);
    if (run) return this.#put(run.head, run.messages);
    const [head, messages] = await Promise.all([this.#library.head(id), this.#library.messages(id)]);
    if (head) this.#put(head, messages);
  }

  /** Everything off the screen and out of memory; runs end. */
  close() {
    for (const run of this.#runs.values()) run.discard();
    this.#runs.clear();
    this.#library = null;
    this.#composer.forget();
    this.#put(newHead(null), []);
  }

  send(text) {
    if (this.#run) return;
    const question = { role: "user", text };
    if (this.#editing !== null) this.#cut(this.#editing);
    this.#cancelEdit(false);
    this.messages.push(question);
    this.#log.add(question, this.#acts(question));
    if (!this.head.title) this.head.title = titleOf(text);
    this.#answer();
  }

  async rename(id, title) {
    const head = this.#mine(id) ?? (await this.#library.head(id));
    head.title = title;
    await this.#library.save(head);
    if (head === this.head) this.#showTitle();
  }

  /** Deletes, with a moment to think better of it. */
  async remove(id) {
    await this.#runs.get(id)?.discard();
    const [head, messages] = [await this.#library.head(id), await this.#library.messages(id)];
    if (!head) return;
    const library = this.#library;
    await library.remove(id);
    if (this.head.id === id) this.fresh();
    const act = () => library.save(head, messages);
    toast(say("deleted", { title: head.title }), { action: { label: say("undo"), act } });
  }

  async tune(settings) {
    this.head.settings = settings;
    if (this.messages.length) await this.#library.save(this.head);
  }

  focus() {
    if (matchMedia("(hover: hover)").matches) this.#composer.focus(); // on a phone the keyboard would cover the page
  }

  #mine = (id) => this.#runs.get(id)?.head ?? (this.head?.id === id ? this.head : null);

  #put(head, messages) {
    Object.assign(this, { head, messages });
    this.#cancelEdit(false);
    this.#composer.open(head.id);
    models.choose(head.model);
    hush();
    this.#show();
    this.dispatchEvent(new Event("open"));
  }

  #show() {
    if (!this.head) return;
    this.#log.show(this.messages, (message) => this.#acts(message), this.#run);
    this.#showState();
  }

  #showState() {
    const busy = Boolean(this.#run);
    this.#composer.busy(busy);
    this.#log.busy(busy);
    this.#showTitle();
  }

  #showTitle() {
    find("more").disabled = !this.messages.length;
    find("title").textContent = this.head.title || say("untitled");
    document.title = this.head.title ? `${this.head.title} – Flask LLM` : "Flask LLM";
  }

  #acts(message) {
    return { edit: () => this.#edit(message), retry: () => this.#retry(), goOn: () => this.send(say("go.on")) };
  }

  #edit(message) {
    this.#editing = this.messages.indexOf(message);
    this.#composer.edit(true, message.text);
  }

  #cut(count) {
    this.messages.length = count;
    this.#log.cut(count);
  }

  #cancelEdit(clear = true) {
    if (this.#editing === null) return;
    this.#editing = null;
    this.#composer.edit(false, clear ? "" : null);
  }

  #retry() {
    this.#cut(this.messages.length - 1);
    this.#answer();
  }

  async #answer() {
    const { head, messages } = this;
    head.model = models.chosen;
    head.updated = Date.now();
    messages.push({ role: "assistant", text: "", reasoning: "", model: head.model });
    const run = new Run(this.#library, head, messages);
    this.#runs.set(head.id, run);
    this.#log.add(run.message, this.#acts(run.message), run);
    this.#showState();
    run.save.now();
    readAloud(run, () => this.head !== head);
    this.dispatchEvent(new Event("run"));
    run.addEventListener("change", () => models.look(), { once: true }); // the first question makes a model load
    await run.start();
    this.#ended(run);
  }

  #ended(run) {
    if (this.#runs.get(run.head.id) === run) this.#runs.delete(run.head.id);
    if (this.head === run.head) this.#showState();
    this.dispatchEvent(new Event("run"));
    models.look();
  }

  async #chooseModel() {
    this.head.model = models.chosen;
    if (this.messages.length) await this.#library.save(this.head);
  }
}
