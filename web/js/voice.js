// Gives a growing answer to screen readers, in whole sentences, through one polite live region.

import { find, h } from "./dom.js";
import { say } from "./words.js";

const PAUSE = 2500; // milliseconds between two readings
const MAX_PARAGRAPHS = 30; // paragraphs kept
const SENTENCE = /^[^]*(?:[.!?:;。！？：；]["')\]]?(?:\s|$)|\n)/;

/** Follows `run` until it ends, or until `quiet()` says that it is no longer on the screen. */
export function readAloud(run, quiet) {
  let read = 0;
  const next = (end) => {
    if (quiet()) return;
    const rest = run.message.text.slice(read);
    const sentences = end ? rest : (SENTENCE.exec(rest)?.[0] ?? "");
    read += sentences.length;
    if (sentences.trim()) utter(sentences.trim());
  };
  utter(say("voice.start"));
  const timer = setInterval(next, PAUSE, false);
  run.addEventListener("end", () => {
    clearInterval(timer);
    next(true);
    if (!quiet()) utter(say("voice.end"));
  });
}

export const hush = () => find("voice").replaceChildren();

function utter(text) {
  const voice = find("voice");
  voice.append(h("p", {}, text));
  while (voice.children.length > MAX_PARAGRAPHS) voice.firstChild.remove();
}
