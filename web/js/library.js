// Conversations on this device: IndexedDB, one database a user, so that wiping one touches no other.
// What is listed is kept apart from the texts, which are read one at a time.

import { deleteDB, openDB } from "../vendor/idb/index.js";
import { newId } from "./dom.js";

const PREFIX = "flask-llm:";
export const DEFAULTS = { system: "", temperature: 0.6, top_p: 0.95, max_new_tokens: 1024, seed: null };

/** One user's conversations. Dispatches "change" when they changed, in this tab or another. */
export class Library extends EventTarget {
  #db;
  #others;
  #release = () => {};

  static async open(user) {
    const library = new Library();
    const blocking = (_current, _blocked, event) => event.target.close(); // another tab wipes: let it
    library.#db = await openDB(PREFIX + user, 1, { upgrade, blocking });
    library.#hold(PREFIX + user);
    library.#others = new BroadcastChannel(PREFIX + user);
    library.#others.onmessage = () => library.dispatchEvent(new Event("change"));
    return library;
  }

  /** The newest first, without their messages. */
  async list() {
    return (await this.#db.getAllFromIndex("heads", "updated")).reverse();
  }

  head = (id) => this.#db.get("heads", id);
  messages = async (id) => (await this.#db.get("texts", id))?.messages ?? [];

  async save(head, messages) {
    const change = this.#db.transaction(["heads", "texts"], "readwrite");
    change.objectStore("heads").put(head);
    if (messages) change.objectStore("texts").put({ id: head.id, messages });
    await change.done;
    this.#changed();
  }

  async remove(id) {
    const change = this.#db.transaction(["heads", "texts"], "readwrite");
    change.objectStore("heads").delete(id);
    change.objectStore("texts").delete(id);
    await change.done;
    this.#changed();
  }

  /** The heads that say `wanted` in their title or text, the newest first, each with the words around it. */
  async search(wanted) {
    const needle = wanted.toLocaleLowerCase();
    const found = [];
    for (const head of await this.list()) {
      const texts = [head.title, ...(await this.messages(head.id)).map((message) => message.text)];
      const text = texts.find((each) => each.toLocaleLowerCase().includes(needle));
      if (text !== undefined) found.push({ ...head, excerpt: around(text, needle) });
    }
    return found;
  }

  close() {
    this.#release();
    this.#others.close();
    this.#db.close();
  }

  async wipe() {
    const change = this.#db.transaction(["heads", "texts"], "readwrite");
    await Promise.all([change.objectStore("heads").clear(), change.objectStore("texts").clear(), change.done]);
    const { name } = this.#db;
    this.#changed();
    this.close();
    await deleteDB(name);
  }

  /** Tells other tabs, as long as this one is open, that these conversations are being looked at. */
  #hold(name) {
    const until = new Promise((release) => (this.#release = release));
    navigator.locks?.request(name, { mode: "shared" }, () => until);
  }

  #changed() {
    this.#others.postMessage("changed");
    this.dispatchEvent(new Event("change"));
  }
}

/** A conversation that has no messages yet. */
export function newHead(model) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model, settings: { ...DEFAULTS } };
}

/** Deletes what other users left here, unless they chose to keep it or are here, in another tab. */
export async function wipeOthers(user, isKept) {
  const here = new Set((await navigator.locks?.query())?.held.map((lock) => lock.name));
  const names = ((await indexedDB.databases?.()) ?? []).map((each) => each.name);
  const left = (name) => name.startsWith(PREFIX) && name !== PREFIX + user && !here.has(name);
  await Promise.all(
    names.filter((name) => left(name) && !isKept(name.slice(PREFIX.length))).map((name) => deleteDB(name)),
  );
}

function upgrade(db) {
  db.createObjectStore("heads", { keyPath: "id" }).createIndex("updated", "updated");
  db.createObjectStore("texts", { keyPath: "id" });
}

function around(text, needle) {
  const at = text.toLocaleLowerCase().indexOf(needle);
  const start = Math.max(0, at - 24);
  const plain = text.slice(start, at + needle.length + 60).replace(/[*#`|]+/g, "");
  return (start ? "…" : "") + plain.replace(/\s+/g, " ").trim();
}
