// The models, and the state of the service: polled, and more often while it is changing.

import { find } from "./dom.js";
import { openMenu } from "./menu.js";
import { session } from "./session.js";
import { number, say } from "./words.js";

const SOON = 1000; // milliseconds until the next look while a model loads
const AWAY = 4000; // … while the service cannot be reached
const CALM = 30_000;
const CHANGING = new Set(["fetching", "loading", "stopping", "stalled"]);

/** Dispatches "reach" when the service is found or lost, and "choose" when another model is. */
class Models extends EventTarget {
  names = [];
  chosen = null;
  reachable = true;
  #timer = 0;
  #state = { stage: "unknown", percent: 0 };

  constructor() {
    super();
    find("model").addEventListener("click", () => this.#offer());
    for (const name of ["online", "offline", "focus"]) window.addEventListener(name, () => this.look());
  }

  /** Asks for the names, which takes a session. */
  async load() {
    const { data } = await session.fetch("v1/models").then((response) => response.json());
    this.names = data.map((model) => model.id);
    if (!this.names.includes(this.chosen)) this.chosen = this.names[0] ?? null;
    this.show();
  }

  choose(name) {
    if (name && (!this.names.length || this.names.includes(name))) this.chosen = name;
    this.show();
  }

  /** Looks at the service now, and goes on looking. */
  async look() {
    clearTimeout(this.#timer);
    const found = await state();
    this.#state = found ?? { stage: "unknown", percent: 0 };
    this.#reached(found !== null);
    this.show();
    const pause = found === null ? AWAY : CHANGING.has(found.stage) ? SOON : CALM;
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), pause);
  }

  show() {
    const { stage, percent } = this.#state;
    const words = stage === "ready" ? "" : say(`model.${stage}`, { percent: number(percent ?? 0) });
    find("model").querySelector(".name").textContent = this.chosen ?? say("model");
    find("model").querySelector(".stage").textContent = words;
    find("model").querySelector(".dot").dataset.stage = stage;
    find("model").setAttribute("aria-label", `${say("model")}: ${this.chosen ?? "–"}, ${words || say("model.ready")}`);
  }

  #reached(yes) {
    if (yes === this.reachable) return;
    this.reachable = yes;
    this.dispatchEvent(new Event("reach"));
  }

  #offer() {
    const { stage, percent, reason } = this.#state;
    const words = reason && stage !== "ready" ? reason : say(`model.${stage}`, { percent: number(percent ?? 0) });
    openMenu(find("model"), [
      ...this.names.map((name) => ({
        icon: "think",
        label: name,
        checked: name === this.chosen,
        act: () => this.#pick(name),
      })),
      words,
    ]);
  }

  #pick(name) {
    this.choose(name);
    this.dispatchEvent(new Event("choose"));
  }
}

/** What /readyz says, or null when the service cannot be reached. A 503 is an answer too: not yet. */
async function state() {
  try {
    const answer = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    const body = await answer.json();
    return body.stage ? body : null;
  } catch {
    return null;
  }
}

export const models = new Models();
