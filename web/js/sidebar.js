// The list of conversations, by day, with search.

import { find, h, iconButton, throttled } from "./dom.js";
import { openMenu } from "./menu.js";
import { language, say } from "./words.js";

const DAY = 86_400_000;
const TYPING = 120; // milliseconds
const NARROW = matchMedia("(max-width: 820px)"); // as css/layout.css has it

export class Sidebar {
  #list = find("conversations");
  #search = find("search");
  #library = null;
  #acts;
  #turn = 0;

  /** `acts`: open(id), menu(head), running(id), current(). */
  constructor(acts) {
    this.#acts = acts;
    this.refresh = throttled(() => this.#show(), TYPING);
    this.#search.addEventListener("input", () => this.refresh());
    this.#search.addEventListener("keydown", (event) => event.key === "Escape" && this.#clear());
    find("open-sidebar").addEventListener("click", () => this.toggle(true));
    for (const id of ["close-sidebar", "scrim"]) find(id).addEventListener("click", () => this.toggle(false));
    find("sidebar").addEventListener("keydown", (event) => event.key === "Escape" && this.toggle(false));
  }

  use(library) {
    this.#library = library;
    library.addEventListener("change", () => this.refresh());
    this.#clear();
  }

  empty() {
    this.#library = null;
    this.#list.replaceChildren();
    this.#search.value = "";
  }

  focusSearch() {
    this.toggle(true);
    this.#search.focus();
    this.#search.select();
  }

  /** On a narrow screen the list lies over the page. */
  toggle(open) {
    const over = open && NARROW.matches;
    if (over === document.body.classList.contains("listing")) return;
    document.body.classList.toggle("listing", over);
    find("main").inert = over;
    find(over ? "close-sidebar" : "open-sidebar").focus();
  }

  #clear() {
    this.#search.value = "";
    this.refresh.now();
  }

  async #show() {
    const turn = ++this.#turn;
    const wanted = this.#search.value.trim();
    const heads = (await (wanted ? this.#library?.search(wanted) : this.#library?.list())) ?? [];
    if (turn !== this.#turn || !this.#library) return; // overtaken by a later letter
    if (!heads.length)
      return this.#list.replaceChildren(h("p.quiet.none", {}, say(wanted ? "search.none" : "list.none")));
    const focused = this.#list.contains(document.activeElement) && document.activeElement.closest("li")?.dataset.id;
    this.#list.replaceChildren(...this.#groups(heads, wanted));
    if (focused) this.#list.querySelector(`[data-id="${focused}"] button`)?.focus();
  }

  #groups(heads, wanted) {
    return [...Map.groupBy(heads, age)].flatMap(([key, members]) => [
      h("h2", { id: `g-${key}` }, say(`when.${key}`)),
      h("ul", { "aria-labelledby": `g-${key}`, lang: language() }, ...members.map((head) => this.#row(head, wanted))),
    ]);
  }

  #row(head, wanted) {
    const open = h(
      "button.open",
      {
        type: "button",
        "aria-current": this.#acts.current() === head.id ? "page" : null,
        onclick: () => this.#acts.open(head.id),
      },
      this.#acts.running(head.id) && h("span.pulse"),
      h("span.name", {}, head.title || say("untitled")),
      head.excerpt && h("small", {}, ...marked(head.excerpt, wanted)),
    );
    const more = iconButton("more", `${say("more")}: ${head.title}`, () => openMenu(more, this.#acts.menu(head)));
    more.setAttribute("aria-haspopup", "menu");
    return h("li", { "data-id": head.id }, open, more);
  }
}

/** Which heading a conversation stands under. */
function age({ updated }) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "today";
  if (updated >= midnight - DAY) return "yesterday";
  return updated >= midnight - 7 * DAY ? "week" : "older";
}

/** `text` with what was searched for marked. */
function marked(text, wanted) {
  const at = text.toLocaleLowerCase().indexOf(wanted.toLocaleLowerCase());
  if (at < 0) return [text];
  const end = at + wanted.length;
  return [text.slice(0, at), h("mark", {}, text.slice(at, end)), text.slice(end)];
}
