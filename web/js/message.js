// One message on the screen: what was said, how long it was thought about, what can be done with it.

import { copyText } from "./clipboard.js";
import { h, icon, iconButton } from "./dom.js";
import { explain } from "./errors.js";
import { LiveText } from "./livetext.js";
import { number, say } from "./words.js";

const PAUSE = 40; // milliseconds between two showings at least; a slow one makes the next wait longer
const SHARE = 4; // showing may take one in so many of the page's milliseconds

/** A message as an element. `acts`: retry(), goOn(), edit(). `run` while it is still being made. */
export function messageView(message, acts, run = null) {
  return message.role === "user" ? userView(message, acts) : new AnswerView(message, acts, run).element;
}

function userView(message, acts) {
  const copy = iconButton("copy", say("copy"), () => copyText(message.text, copy));
  const edit = iconButton("edit", say("edit"), acts.edit);
  edit.classList.add("begin");
  return h(
    "article.message.user",
    { "aria-label": say("you") },
    h("div.bubble", {}, message.text),
    h("div.tools", {}, copy, edit),
  );
}

class AnswerView {
  #message;
  #acts;
  #run;
  #text = h("div.prose");
  #reasoning = h("div.prose");
  #summary = h("span");
  #thinking = h("details.thinking", { hidden: true }, h("summary", {}, icon("think"), this.#summary), this.#reasoning);
  #wait = h("p.wait", { hidden: true });
  #foot = h("div.foot");
  #live = new LiveText(this.#text);
  #liveReasoning = new LiveText(this.#reasoning);
  #timer = 0;
  #pause = PAUSE;
  #shown = "";

  constructor(message, acts, run) {
    [this.#message, this.#acts, this.#run] = [message, acts, run];
    const parts = [this.#thinking, this.#wait, this.#text, this.#foot];
    this.element = h("article.message.answer", { "aria-label": say("assistant") }, ...parts);
    if (!run || run.ended) return this.#finish();
    this.element.setAttribute("aria-busy", "true");
    this.#thinking.addEventListener("toggle", () => this.#soon());
    run.addEventListener("change", () => this.#soon());
    run.addEventListener("end", () => this.#finish());
    this.#grow();
  }

  #soon() {
    if (this.#timer || this.#run.ended || !this.element.isConnected) return;
    this.#timer = setTimeout(() => requestAnimationFrame(() => this.#grow()), this.#pause);
  }

  #grow() {
    this.#timer = 0;
    if (this.#run.ended) return;
    const began = performance.now();
    this.#showState();
    if (this.#message.text !== this.#shown) this.#live.update((this.#shown = this.#message.text));
    if (this.#thinking.open) this.#liveReasoning.update(this.#message.reasoning);
    this.#pause = Math.max(PAUSE, (performance.now() - began) * SHARE);
  }

  #showState() {
    const { reasoning, text, thought } = this.#message;
    this.#thinking.hidden = !reasoning;
    const over = text || this.#message.finish || this.#message.error;
    this.#thinking.classList.toggle("busy", !over);
    this.#summary.textContent = over
      ? say("thought", { seconds: number(Math.max(thought ?? 0, 0.1), 1) })
      : say("thinking");
    this.#wait.hidden = !this.#run?.waiting || this.#run.ended;
    if (!this.#wait.hidden) this.#wait.replaceChildren(h("span.pulse"), waitWords(this.#run.waiting));
  }

  #finish() {
    clearTimeout(this.#timer);
    this.element.removeAttribute("aria-busy");
    this.#showState();
    this.#wait.hidden = true;
    this.#live.finish(this.#message.text);
    if (this.#message.reasoning) this.#liveReasoning.finish(this.#message.reasoning);
    this.#foot.replaceChildren(...this.#ending());
  }

  #ending() {
    const { text, error, finish, shortened, sanitised, served, stats } = this.#message;
    const copy = iconButton("copy", say("copy"), () => copyText(text, copy));
    const retry = iconButton("retry", say("retry"), this.#acts.retry);
    retry.classList.add("begin");
    const failed = error ?? (finish ? null : { status: 0, code: "cut" }); // the page was closed in the middle
    return [
      shortened && h("p.aside", {}, say("shortened")),
      sanitised > 0 && h("p.aside", {}, say("sanitised", { count: number(sanitised) })),
      served === "offline" && h("p.aside", {}, say("offlined")),
      failed && h("div.alert", { role: "alert" }, h("p", {}, explain(failed)), button("retry", this.#acts.retry)),
      finish === "cancelled" && h("p.aside", {}, say("stopped")),
      finish === "length" && h("p.aside", {}, say("cut"), " ", button("cut.more", this.#acts.goOn)),
      h("div.tools", {}, text && copy, !failed && retry, stats && h("span.stats", {}, statsWords(stats))),
    ].filter(Boolean);
  }
}

const button = (key, onclick) => h("button.small.begin", { type: "button", onclick }, say(key));

function waitWords({ stage, position, percent, eta_seconds }) {
  if (stage === "queued") {
    const eta = eta_seconds ? `, ${say("wait.eta", { seconds: number(Math.ceil(eta_seconds)) })}` : "";
    return say("wait.queued", { position }) + eta;
  }
  const key = { loading: "wait.loading", fetching: "wait.fetching", prefill: "wait.prefill" }[stage] ?? "wait.sent";
  return say(key, { percent: percent ?? 0 });
}

function statsWords({ tokens, first, speed, cached }) {
  if (cached) return say("stats.cached", { tokens: number(tokens) });
  const values = {
    tokens: number(tokens),
    first: number(first, 2),
    speed: speed === null ? "–" : number(speed, speed < 100 ? 1 : 0),
  };
  return say("stats", values);
}
