// Markdown that grows: shown while it streams, without flicker and without doing finished blocks again.
// Only the last blocks are parsed anew with each piece; those before a blank line are done and stay as they are.

import { enhance } from "./enhance.js";
import { marked, render } from "./markdown.js";

const SURE = 12; // characters of the next block after which the one before cannot change any more ("2" may become "2.")
const REFERENCE = /^ {0,3}\[[^\]\n]+\]:/m; // a link's address further down changes what stands above

export class LiveText {
  #container;
  #done = 0; // characters of the text that stand finished in the page
  #tail = []; // nodes that may still change

  constructor(container) {
    this.#container = container;
  }

  /** Shows `given`, which begins with what was shown before. */
  update(given) {
    const text = plain(given);
    const sure = this.#sure(text.slice(this.#done));
    if (sure) this.#settle(text.slice(this.#done, this.#done + sure));
    this.#replaceTail(render(mended(text.slice(this.#done))));
  }

  /** Shows the whole text, done. */
  finish(given) {
    const text = plain(given);
    if (REFERENCE.test(text)) {
      this.#container.replaceChildren();
      [this.#done, this.#tail] = [0, []];
    }
    this.#settle(text.slice(this.#done));
  }

  /** How many characters of `tail` make blocks that stay. */
  #sure(tail) {
    const blocks = marked.lexer(tail);
    let end = 0;
    let sure = 0;
    blocks.forEach(({ type, raw }, index) => {
      end += raw.length;
      if (type === "space" && index && tail.length - end >= SURE) sure = end;
    });
    return sure;
  }

  #settle(text) {
    this.#replaceTail(render(text));
    enhance(this.#tail);
    this.#done += text.length;
    this.#tail = [];
  }

  #replaceTail(fragment) {
    const next = [...fragment.childNodes];
    const same = next.findIndex((node, index) => !this.#tail[index]?.isEqualNode(node));
    const kept = same < 0 ? next.length : same;
    for (const node of this.#tail.slice(kept)) node.remove();
    const added = next.slice(kept);
    this.#container.append(...added);
    this.#tail = [...this.#tail.slice(0, kept), ...added];
  }
}

/** With the line ends that marked counts in. */
const plain = (text) => text.replace(/\r\n?/g, "\n");

/** Closes the emphasis or code that the last line has opened so far, or it would flicker when its end comes. */
function mended(text) {
  const line = text.slice(text.lastIndexOf("\n") + 1);
  if (/^ {0,3}(```|~~~)/.test(line)) return text;
  if ((line.match(/`/g) ?? []).length % 2) return `${text}\``;
  return (line.match(/\*\*/g) ?? []).length % 2 && !line.endsWith("*") ? `${text}**` : text;
}
