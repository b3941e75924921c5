// The conversation on the screen: its messages, or a greeting; follows the newest words unless the user scrolled up.

import { find, h } from "./dom.js";
import { messageView } from "./message.js";
import { say } from "./words.js";

const NEAR = 80; // pixels from the end within which one is still following

export class Log {
  #log = find("log");
  #list = find("messages");
  #hello = find("hello");
  #latest = find("latest");
  #following = true;

  constructor(onSuggestion) {
    this.onSuggestion = onSuggestion;
    this.#log.addEventListener("scroll", () => this.#look(), { passive: true });
    this.#latest.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#following && this.#toEnd()).observe(this.#list);
    new ResizeObserver(() => this.#following && this.#toEnd()).observe(this.#log);
  }

  /** Shows these messages instead of what was there. `acts(message)` says what can be done with one. */
  show(messages, acts, run) {
    const views = messages.map((message) => messageView(message, acts(message), run?.message === message ? run : null));
    this.#list.replaceChildren(...views);
    this.#greet(!messages.length);
    this.follow();
  }

  add(message, acts, run = null) {
    this.#list.append(messageView(message, acts, run));
    this.#greet(false);
    this.follow();
  }

  /** Keeps the first `count` messages. */
  cut(count) {
    for (const view of [...this.#list.children].slice(count)) view.remove();
  }

  /** While an answer is being made, nothing else is begun. */
  busy(yes) {
    this.#list.classList.toggle("busy", yes);
  }

  follow() {
    this.#following = true;
    this.#latest.hidden = true;
    this.#toEnd();
  }

  #toEnd() {
    this.#log.scrollTop = this.#log.scrollHeight;
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#log;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#latest.hidden = this.#following;
  }

  #greet(yes) {
    this.#hello.hidden = !yes;
    if (!yes) return;
    const ideas = [1, 2, 3, 4].map((number) => say(`hello.${number}`));
    const buttons = ideas.map((idea) =>
      h("button.idea", { type: "button", onclick: () => this.onSuggestion(idea) }, idea),
    );
    this.#hello.replaceChildren(h("h2", {}, say("hello.title")), h("div.ideas", {}, ...buttons));
  }
}
