// Short notes at the edge of the screen, each with at most one thing to do about it.

import { find, h, iconButton } from "./dom.js";
import { say } from "./words.js";

const SHOWN = 6000; // milliseconds

/** `action`: {label, act}. `lasting` stays until it is dismissed. */
export function toast(text, { action = null, lasting = false } = {}) {
  const gone = () => note.remove();
  const act = () => {
    gone();
    action.act();
  };
  const button = action && h("button.small", { type: "button", onclick: act }, action.label);
  const note = h("div.toast", {}, h("span", {}, text), button, iconButton("close", say("dismiss"), gone));
  find("toasts").append(note);
  if (!lasting) setTimeout(gone, SHOWN);
}
