// Helpers that make elements. Text given here is always text, never HTML.

export const find = (id) => document.getElementById(id);

/** An element: h("button.icon", {type: "button", onclick: go}, "Go"). Attributes that are false or null are left out. */
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows an icon and says `label` to those who do not see it. */
export function iconButton(name, label, onclick) {
  return h("button.icon", { type: "button", "aria-label": label, title: label, onclick }, icon(name));
}

/** A unique id that need not be secret; crypto.randomUUID is missing on plain http. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Calls `act` at most once in `milliseconds`, and once more at the end. */
export function throttled(act, milliseconds) {
  let timer = 0;
  const run = () => {
    timer = 0;
    return act();
  };
  const later = () => (timer ||= setTimeout(run, milliseconds));
  later.now = () => {
    clearTimeout(timer);
    return run();
  };
  return later;
}
