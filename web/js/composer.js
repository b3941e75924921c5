// The message field: Enter sends, Shift+Enter breaks the line, Escape stops.

import { find } from "./dom.js";

const GROWS = CSS.supports("field-sizing", "content");

export class Composer {
  #field = find("prompt");
  #send = find("send");
  #stop = find("stop");
  #editing = find("editing");
  #drafts = new Map();
  #place = null;
  #busy = false;

  /** `acts`: send(text), stop(), cancelEdit(). */
  constructor(acts) {
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(acts);
    });
    this.#stop.addEventListener("click", acts.stop);
    find("edit-cancel").addEventListener("click", acts.cancelEdit);
    this.#field.addEventListener("input", () => this.#changed());
    this.#field.addEventListener("keydown", (event) => this.#key(event, acts));
  }

  /** Shows the draft of another conversation. */
  open(place) {
    this.#drafts.set(this.#place, this.#editing.hidden ? this.#field.value : "");
    this.#place = place;
    this.write(this.#drafts.get(place) ?? "");
    this.edit(false);
  }

  write(text) {
    this.#field.value = text;
    this.#changed();
  }

  edit(yes, text = null) {
    this.#editing.hidden = !yes;
    if (text !== null) this.write(text);
    if (yes) this.focus();
  }

  busy(yes) {
    const focused = document.activeElement === (yes ? this.#send : this.#stop);
    this.#busy = yes;
    this.#send.hidden = yes;
    this.#stop.hidden = !yes;
    if (focused) (yes ? this.#stop : this.#field).focus();
  }

  focus() {
    this.#field.focus({ preventScroll: true });
  }

  forget() {
    this.#drafts.clear();
    this.#place = null;
    this.write("");
    this.edit(false);
  }

  #submit(acts) {
    const text = this.#field.value;
    if (!text.trim() || this.#busy) return;
    this.write("");
    acts.send(text);
  }

  #key(event, acts) {
    if (event.isComposing || event.keyCode === 229) return; // Enter belongs to the input method, which chooses a word
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#submit(acts);
    } else if (event.key === "Escape" && this.#busy) {
      acts.stop();
    } else if (event.key === "Escape" && !this.#editing.hidden) {
      acts.cancelEdit();
    }
  }

  #changed() {
    this.#send.disabled = !this.#field.value.trim();
    if (GROWS) return;
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
  }
}
