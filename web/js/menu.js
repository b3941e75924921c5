// One menu for the whole page, opened beside the button that asked for it. Arrow keys, Escape and a click elsewhere work.

import { find, h, icon } from "./dom.js";

const GAP = 6; // pixels

/** Shows `items`, each {icon, label, act, checked?, danger?} or a string that is only read. */
export function openMenu(anchor, items) {
  const menu = find("menu");
  menu.replaceChildren(
    ...items.filter(Boolean).map((item) => (typeof item === "string" ? note(item) : entry(menu, item))),
  );
  menu.setAttribute("aria-label", anchor.getAttribute("aria-label") ?? anchor.textContent.trim());
  anchor.setAttribute("aria-expanded", "true");
  menu.addEventListener("toggle", (event) => event.newState === "closed" && closed(anchor), {
    once: false,
    signal: lifetime(),
  });
  menu.showPopover();
  place(menu, anchor.getBoundingClientRect());
  menu.querySelector("button")?.focus();
}

export function prepareMenu() {
  find("menu").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const entries = [...event.currentTarget.querySelectorAll("button")];
    const at = entries.indexOf(document.activeElement);
    entries.at((at + step) % entries.length).focus();
  });
}

let current = new AbortController();

/** Ends the listener of the menu before. */
function lifetime() {
  current.abort();
  current = new AbortController();
  return current.signal;
}

function closed(anchor) {
  anchor.setAttribute("aria-expanded", "false");
  if (find("menu").contains(document.activeElement) || document.activeElement === document.body) anchor.focus();
}

const note = (text) => h("p.note", { role: "presentation" }, text);

function entry(menu, { icon: name, label, act, checked, danger }) {
  const chosen = checked !== undefined;
  const choose = () => {
    menu.hidePopover();
    act();
  };
  return h(
    danger ? "button.danger" : "button",
    {
      type: "button",
      role: chosen ? "menuitemcheckbox" : "menuitem",
      "aria-checked": chosen ? String(checked) : null,
      onclick: choose,
    },
    icon(name),
    h("span", {}, label),
    checked && icon("check"),
  );
}

function place(menu, { left, right, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = menu;
  const below = bottom + GAP + height <= innerHeight;
  const x = left + width + GAP <= innerWidth ? left : right - width;
  menu.style.left = `${Math.max(GAP, Math.min(x, innerWidth - width - GAP))}px`;
  menu.style.top = `${Math.max(GAP, below ? bottom + GAP : top - GAP - height)}px`;
}
