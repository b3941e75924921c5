// Turns a model's Markdown into a fragment that is safe to show: marked makes HTML, DOMPurify removes what could act.
// HTML that the model writes stays text, and images become links, so that nothing is requested from elsewhere.

import DOMPurify from "../vendor/dompurify/purify.es.mjs";
import { Marked } from "../vendor/marked/marked.esm.js";
import { mathBlock, mathInline } from "./mathtext.js";

const names = (text) => text.trim().split(/\s+/);
const TAGS = names(`
  p br strong em del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 hr table thead tbody tr th td a input div span
  figure figcaption`);
const ATTRIBUTES = names("class start align type checked disabled");
const MATH = names(`
  math semantics mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd
  mstyle mpadded mphantom menclose mmultiscripts mprescripts none merror`);
const MATH_ATTRIBUTES = names(`
  class display displaystyle scriptlevel mathvariant stretchy fence separator form lspace rspace minsize maxsize symmetric
  largeop movablelimits accent accentunder linethickness width height depth voffset columnalign rowspacing columnspacing
  columnlines rowlines notation`);
const SCHEMES = /^(?:https?|mailto):/i;

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

export const marked = new Marked({ gfm: true, breaks: true, async: false });
marked.use({
  extensions: [mathBlock(escaped), mathInline(escaped)],
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    code({ text, lang }) {
      const language = /^[\w+#-]+/.exec(lang ?? "")?.[0] ?? "";
      const name = language ? ` class="language-${language}"` : "";
      return `<figure class="code"><figcaption>${language}</figcaption><pre><code${name}>${escaped(text)}</code></pre></figure>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A" || !element.hasAttribute("href")) return;
  element.setAttribute("target", "_blank");
  element.setAttribute("rel", "noopener noreferrer nofollow");
});

const RULES = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", ...ATTRIBUTES],
  ADD_URI_SAFE_ATTR: ATTRIBUTES, // every other value has to be an address of SCHEMES
  ALLOWED_URI_REGEXP: SCHEMES,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const MATH_RULES = { ...RULES, ALLOWED_TAGS: MATH, ALLOWED_ATTR: MATH_ATTRIBUTES, ADD_URI_SAFE_ATTR: MATH_ATTRIBUTES };

/** Markdown as a fragment. */
export const render = (text) => clean(marked.parse(text));

/** HTML that a library made of a model's text, as a fragment. */
export const clean = (html) => DOMPurify.sanitize(html, RULES);
export const cleanMath = (html) => DOMPurify.sanitize(html, MATH_RULES);
