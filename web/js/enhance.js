// What is added to rendered Markdown: copy buttons, colours in code, typeset formulas, tables that scroll.
// The two large libraries are loaded when the first code block or formula is there, and never before.

import { copyText } from "./clipboard.js";
import { h, iconButton } from "./dom.js";
import { clean, cleanMath } from "./markdown.js";
import { loadTemml } from "./trusted.js";
import { say } from "./words.js";

const LARGEST = 60_000; // characters; longer code stays uncoloured, or the page would stop for it

const STYLE = / style="[^"]*"/g; // the policy forbids them, and a browser would complain of each

let highlighter, temml;
const loadHighlighter = () =>
  (highlighter ??= import("../vendor/highlight/highlight.min.js").then((module) => module.default));
const loadMath = () => (temml ??= loadTemml());

/** Enhances what lies below `nodes`, now where the libraries are there and soon where they are not. */
export function enhance(nodes) {
  const all = (selector) =>
    nodes.flatMap((node) =>
      node.matches ? [...(node.matches(selector) ? [node] : []), ...node.querySelectorAll(selector)] : [],
    );
  all("figure.code").forEach(codeBlock);
  all("table").forEach(tableFrame);
  const formulas = all(".math");
  if (formulas.length)
    loadMath().then(
      (library) => formulas.forEach((each) => typeset(each, library)),
      () => {},
    );
}

function codeBlock(figure) {
  const code = figure.querySelector("code");
  const button = iconButton("copy", say("code.copy"), () => copyText(code.textContent, button));
  figure.querySelector("figcaption").append(button);
  figure.querySelector("pre").tabIndex = 0;
  const language = code.className.replace("language-", "");
  if (language && code.textContent.length < LARGEST)
    loadHighlighter().then(
      (library) => colour(code, language, library),
      () => {},
    );
}

function colour(code, language, library) {
  if (!library.getLanguage(language)) return;
  code.replaceChildren(clean(library.highlight(code.textContent, { language, ignoreIllegals: true }).value));
}

function typeset(element, library) {
  const tex = element.textContent;
  try {
    const display = element.tagName === "DIV";
    const math = library.renderToString(tex, {
      displayMode: display,
      throwOnError: true,
      trust: false,
      maxExpand: 200,
      maxSize: [20, 20],
    });
    element.replaceChildren(cleanMath(math.replace(STYLE, "")));
    element.setAttribute("title", tex);
  } catch {
    element.classList.add("source"); // not TeX after all: it stays as it was written
  }
}

function tableFrame(table) {
  const frame = h("div.table", { tabindex: 0, role: "region", "aria-label": say("table") });
  table.replaceWith(frame);
  frame.append(table);
}
