// Copying text, also on plain http, where browsers withhold the clipboard.

import { h, icon } from "./dom.js";
import { say } from "./words.js";

const SHOWN = 1500; // milliseconds

export async function copyText(text, button) {
  const done = navigator.clipboard
    ? await navigator.clipboard.writeText(text).then(
        () => true,
        () => false,
      )
    : false;
  if (done || copyByHand(text)) confirm(button);
}

function copyByHand(text) {
  const field = h("textarea.unseen", { "aria-hidden": true });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

function confirm(button) {
  const before = button.getAttribute("aria-label");
  show(button, "check", say("copied"));
  setTimeout(show, SHOWN, button, "copy", before);
  button.focus({ preventScroll: true });
}

function show(button, name, label) {
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", label);
  button.title = label;
}
