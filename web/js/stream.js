// One answer as it comes: POST /stream, read as server-sent events.

import { createParser } from "../vendor/eventsource-parser/index.js";
import { newId } from "./dom.js";
import { ApiError } from "./errors.js";
import { session } from "./session.js";

const PATIENCE = 1500; // milliseconds that a cancelled stream gets to send its last event
const SILENCE = 30_000; // milliseconds without a byte (the service sends one every 5 s) until the line counts as cut

/** An answer under way. `stop` frees its place at the service at once. */
export class Stream {
  #id = newId();
  #line = new AbortController();
  #stopped = false;

  /** Yields {name, data}: "text", "status", and "done" at the end. Throws ApiError. */
  async *events(body) {
    const headers = { "Content-Type": "application/json", "X-Request-Id": this.#id };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal: this.#line.signal };
    try {
      const response = await session.fetch("stream", options);
      yield* this.#read(response.body.getReader());
    } catch (error) {
      if (this.#stopped && !(error instanceof ApiError)) yield { name: "done", data: { finish_reason: "cancelled" } };
      else throw error instanceof ApiError ? error : ApiError.cut();
    }
  }

  async stop() {
    this.#stopped = true;
    const deadline = setTimeout(() => this.#line.abort(), PATIENCE);
    try {
      await session.fetch(`requests/${this.#id}`, { method: "DELETE" });
    } catch {
      clearTimeout(deadline);
      this.#line.abort(); // not begun yet, or out of reach: hanging up says the same
    }
  }

  async *#read(reader) {
    const decoder = new TextDecoder();
    const arrived = [];
    const parser = createParser({ onEvent: (event) => arrived.push(event) });
    for (;;) {
      const { value, done } = await this.#next(reader);
      parser.feed(done ? "\n\n" : decoder.decode(value, { stream: true }));
      for (const event of arrived.splice(0)) {
        const data = JSON.parse(event.data);
        if (event.event === "error") throw new ApiError(503, data.error);
        yield { name: event.event ?? "text", data };
        if (event.event === "done") return;
      }
      if (done) throw ApiError.cut();
    }
  }

  async #next(reader) {
    const silence = setTimeout(() => this.#line.abort(), SILENCE);
    try {
      return await reader.read();
    } finally {
      clearTimeout(silence);
    }
  }
}
