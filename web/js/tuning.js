// The settings of one conversation, and its name, each in a dialog.

import { find, h, iconButton } from "./dom.js";
import { DEFAULTS } from "./library.js";
import { number, say } from "./words.js";

const SEED = 9_007_199_254_740_991;

/** Asks for settings; `save(settings)` is called when they are confirmed. */
export function openTuning(settings, save) {
  const form = tuningForm({ ...DEFAULTS, ...settings });
  show("tuning", "tune", form, () => save(read(form)));
}

/** Asks for a title; `save(title)` is called with one that is not blank. */
export function openRename(title, save) {
  const field = h("input", {
    name: "title",
    value: title,
    maxlength: 120,
    required: true,
    "aria-label": say("rename.title"),
  });
  const form = h("form", {}, field, h("footer", {}, h("button.primary", {}, say("save"))));
  show("rename", "rename.title", form, () => field.value.trim() && save(field.value.trim()));
  field.select();
}

function show(id, title, form, confirmed) {
  const dialog = find(id);
  const close = iconButton("close", say("close"), () => dialog.close());
  dialog.replaceChildren(h("header", {}, h("h2", { id: `${id}-title` }, say(title)), close), form);
  form.addEventListener("submit", (event) => {
    event.preventDefault(); // the policy allows no form to go anywhere
    confirmed();
    dialog.close();
  });
  dialog.onclick = ({ target }) => {
    if (target === dialog) dialog.close(); // beside the form; an arrow that returned false would cancel every click
  };
  dialog.showModal();
}

function tuningForm(settings) {
  const system = h(
    "textarea",
    { name: "system", rows: 4, maxlength: 20_000, placeholder: say("tune.system.hint") },
    settings.system,
  );
  const form = h(
    "form",
    {},
    h("label.field", {}, h("span", {}, say("tune.system")), system),
    slider("temperature", "tune.temperature", { min: 0, max: 2, step: 0.05, value: settings.temperature }),
    slider("top_p", "tune.top_p", { min: 0.05, max: 1, step: 0.05, value: settings.top_p }),
    h(
      "div.pair",
      {},
      field("tune.max", {
        name: "max_new_tokens",
        type: "number",
        min: 1,
        max: 1_048_576,
        required: true,
        value: settings.max_new_tokens,
      }),
      field("tune.seed", { name: "seed", type: "number", min: 0, max: SEED, step: 1, value: settings.seed ?? "" }),
    ),
    h(
      "footer",
      {},
      h("button.plain", { type: "button", onclick: () => write(form, DEFAULTS) }, say("tune.defaults")),
      h("button.primary", {}, say("tune.done")),
    ),
  );
  return form;
}

function field(key, attributes) {
  const hint = `${key}.hint`;
  const words = say(hint) === hint ? null : h("small.quiet", {}, say(hint));
  return h("label.field", {}, h("span", {}, say(key)), h("input", attributes), words);
}

function slider(name, key, range) {
  const output = h("output", {}, number(range.value, 2));
  const input = h("input", { name, type: "range", ...range, oninput: () => (output.value = number(input.value, 2)) });
  return h("label.field", {}, h("span.spread", {}, say(key), output), input, h("small.quiet", {}, say(`${key}.hint`)));
}

function write(form, settings) {
  for (const [name, value] of Object.entries(settings)) form.elements[name].value = value ?? "";
  for (const input of form.querySelectorAll("[type=range]")) input.dispatchEvent(new Event("input"));
}

function read(form) {
  const { system, temperature, top_p, max_new_tokens, seed } = Object.fromEntries(new FormData(form));
  return {
    system,
    temperature: Number(temperature),
    top_p: Number(top_p),
    max_new_tokens: Number(max_new_tokens),
    seed: seed === "" ? null : Number(seed),
  };
}
