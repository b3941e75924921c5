// The page in two languages. Each words/*.js holds one; a key that is missing in one is a test's failure.

import { prefer } from "./preferences.js";
import en from "./words/en.js";
import zh from "./words/zh.js";

const LANGUAGES = { en, zh };
export const OTHER = { en: "zh", zh: "en" };

export const changed = new EventTarget();
export const language = () => (document.documentElement.lang.startsWith("zh") ? "zh" : "en");

/** The words for `key`, with {names} filled in. */
export function say(key, values = {}) {
  const words = LANGUAGES[language()][key] ?? en[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function speak(name) {
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
  translate();
  changed.dispatchEvent(new Event("change"));
}

export function chooseLanguage(name) {
  prefer({ language: name === "zh" ? "zh-CN" : "en" });
  speak(name);
}

/** Fills every element below `root` that names its words. */
export function translate(root = document) {
  for (const element of root.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of root.querySelectorAll("[data-say-hint]")) element.placeholder = say(element.dataset.sayHint);
  for (const element of root.querySelectorAll("[data-say-label]")) {
    const label = say(element.dataset.sayLabel);
    element.setAttribute("aria-label", label);
    if (element.tagName === "BUTTON") element.title = label;
  }
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(document.documentElement.lang, { maximumFractionDigits: digits }).format(value);
