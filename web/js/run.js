// One answer being generated for one conversation, whether it is on the screen or not.

import { throttled } from "./dom.js";
import { Stream } from "./stream.js";

const SAVE = 2000; // milliseconds between two savings of a text that grows
const TURNS = 250; // the service takes 256 messages
const SHORTEST = 256; // tokens of answer that are worth leaving old messages out for

/** Dispatches "change" with every event and "end" once. `message` is what has been said so far. */
export class Run extends EventTarget {
  waiting = { stage: "sent" };
  ended = false;
  #stream = new Stream();
  #began = performance.now();
  #first = null;
  #thinking = null;
  #tokens = 0;

  constructor(library, head, messages) {
    super();
    Object.assign(this, { library, head, messages, message: messages.at(-1) });
    this.save = throttled(() => library.save(head, messages).catch(() => {}), SAVE);
  }

  stop() {
    return this.#stream.stop();
  }

  /** Stops, and saves nothing any more: the conversation is gone. */
  discard() {
    this.save = Object.assign(() => {}, { now() {} });
    return this.stop();
  }

  /** Returns when the answer has ended, well or not. */
  async start() {
    try {
      await this.#answer();
    } catch (error) {
      this.message.error = plain(error);
    }
    this.ended = true;
    this.head.updated = Date.now();
    await this.save.now(); // a reload from here on finds all of it
    this.dispatchEvent(new Event("change"));
    this.dispatchEvent(new Event("end"));
  }

  /** A conversation that is too long is asked again for a shorter answer, then without its oldest half. */
  async #answer() {
    let turns = history(this.messages.slice(0, -1));
    let maxTokens = this.head.settings.max_new_tokens;
    for (;;) {
      try {
        return await this.#listen(body(this.head, turns, maxTokens));
      } catch (error) {
        if (error.code !== "context_length_exceeded" || this.#first !== null) throw error;
        if (error.param === "max_new_tokens" && maxTokens > SHORTEST) maxTokens = Math.max(SHORTEST, Math.floor(maxTokens / 2));
        else if (turns.length > 1) turns = turns.slice(Math.ceil(turns.length / 4) * 2);
        else if (maxTokens > 1) maxTokens = Math.floor(maxTokens / 2);
        else throw error;
        this.message.shortened = turns.length < this.messages.length - 1 || undefined;
      }
    }
  }

  async #listen(request) {
    for await (const { name, data } of this.#stream.events(request)) {
      if (name === "status") this.waiting = data;
      else if (name === "text") this.#add(data);
      else if (name === "done") this.#close(data);
      this.dispatchEvent(new Event("change"));
    }
  }

  #add({ text, channel }) {
    const now = performance.now();
    this.#first ??= now;
    this.#tokens += 1;
    this.waiting = null;
    if (channel === "reasoning") {
      this.#thinking ??= now;
      this.message.reasoning += text;
      this.message.thought = (now - this.#thinking) / 1000;
    } else {
      this.message.text += text;
    }
    this.save();
  }

  #close({ finish_reason, usage, cached = false, served_by, sanitised = 0 }) {
    const tokens = usage?.completion_tokens ?? this.#tokens;
    const seconds = (performance.now() - (this.#first ?? this.#began)) / 1000;
    const first = ((this.#first ?? performance.now()) - this.#began) / 1000;
    const speed = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
    this.waiting = null;
    const stats = { tokens, first, speed, cached };
    Object.assign(this.message, { finish: finish_reason, stats, served: served_by, sanitised });
  }
}

/** The turns that the service is sent: no reasoning, no question that got no answer. */
function history(messages) {
  const turns = [];
  for (const { role, text } of messages) {
    if (role === "assistant" && !text) turns.pop();
    else turns.push({ role, content: text });
  }
  return turns.slice(-TURNS + (turns.length % 2 ? 1 : 0));
}

function body({ model, settings }, turns, maxTokens) {
  const { system, temperature, top_p, seed } = settings;
  const messages = system.trim() ? [{ role: "system", content: system }, ...turns] : turns;
  return {
    messages,
    temperature,
    top_p,
    max_new_tokens: maxTokens,
    ...(model && { model }),
    ...(seed !== null && { seed }),
  };
}

/** An error as it can be stored. */
function plain({ status = null, code = null, param = null, retryAfter = null, requestId = null, message }) {
  return { status, code, param, retryAfter, requestId, message };
}
