// The session. Tokens live in this module's memory alone; over a reload the service worker's memory carries them
// (handover.js). They are never stored.

import { ApiError } from "./errors.js";
import { putAside, takeBack } from "./handover.js";

const MARGIN = 30; // seconds before its end that an access token counts as spent
const QUICK = 15_000; // milliseconds that anything but a stream may take

/** Dispatches "end" when the service no longer knows the session. */
class Session extends EventTarget {
  user = null;
  #access = null;
  #refresh = null;
  #expires = 0;
  #renewing = null;

  get signedIn() {
    return this.#refresh !== null;
  }

  async login(username, password) {
    const body = JSON.stringify({ username, password });
    const headers = { "Content-Type": "application/json" };
    this.#take(await send("login", { method: "POST", headers, body }).then(json));
    this.user = username;
  }

  /** Goes on where the page before the reload stopped. */
  async resume() {
    const kept = await takeBack();
    if (kept) ({ user: this.user, refresh: this.#refresh } = kept);
    return this.signedIn;
  }

  putAside() {
    if (this.signedIn && !this.#renewing) putAside({ user: this.user, refresh: this.#refresh });
  }

  async logout() {
    await this.fetch("logout", { method: "POST" }).catch(() => {}); // offline it ends here all the same
    this.#forget();
  }

  /** As fetch, in the user's name. Throws ApiError for everything that is no success. */
  async fetch(path, options = {}) {
    if (Date.now() > this.#expires) await this.#renew();
    try {
      return await this.#send(path, options);
    } catch (error) {
      if (error.status !== 401) throw error;
      await this.#renew();
      return this.#send(path, options);
    }
  }

  #send(path, options) {
    return send(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${this.#access}` } });
  }

  /** One at a time: a refresh token that is used twice ends the session. */
  #renew() {
    this.#renewing ??= this.#renewOnce().finally(() => (this.#renewing = null));
    return this.#renewing;
  }

  async #renewOnce() {
    if (!this.#refresh) throw new ApiError(401, { code: "unauthorized" });
    try {
      const headers = { Authorization: `Bearer ${this.#refresh}` };
      this.#take(await send("refresh", { method: "POST", headers }).then(json));
    } catch (error) {
      if (error.status === 401) this.#end();
      throw error;
    }
  }

  #take({ access_token, refresh_token, expires_in }) {
    this.#access = access_token;
    this.#refresh = refresh_token;
    this.#expires = Date.now() + (expires_in - MARGIN) * 1000;
  }

  #end() {
    this.#forget();
    this.dispatchEvent(new Event("end"));
  }

  #forget() {
    this.#access = this.#refresh = null;
    this.#expires = 0;
  }
}

async function send(path, options) {
  const signal = options.signal ?? AbortSignal.timeout(QUICK);
  let response;
  try {
    const credentials = path.endsWith("login") ? "same-origin" : "omit"; // a cookie tells the login guard a known device
    response = await fetch(path, { cache: "no-store", credentials, ...options, signal });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw ApiError.offline();
  }
  if (!response.ok) throw await ApiError.from(response);
  return response;
}

const json = (response) => response.json();

export const session = new Session();
