// Exports conversations as JSON or Markdown, and imports them. An imported file is not trusted: it is checked field by
// field and gets new ids.

import { h } from "./dom.js";
import { DEFAULTS, newHead } from "./library.js";
import { titleOf } from "./titles.js";
import { say } from "./words.js";

const FORMAT = "flask-llm conversations 1";
const HEADING = /^## .* <!-- (user|assistant|reasoning) -->$/;
const MAX_ITEMS = 10_000; // messages in one conversation, and conversations in one file

/** Every conversation given, [{head, messages}], as one JSON text. */
export const toJson = (conversations) => JSON.stringify({ format: FORMAT, conversations }, null, 2);

/** One conversation as Markdown that reads well, and that can be read back. */
export function toMarkdown(head, messages) {
  const part = (role, name, text) => `## ${name} <!-- ${role} -->\n\n${guarded(text)}\n`;
  const parts = messages.flatMap(({ role, text, reasoning }) => [
    ...(reasoning ? [part("reasoning", say("thinking").replace(/…$/, ""), reasoning)] : []),
    part(role, say(role === "user" ? "you" : "assistant"), text),
  ]);
  return [`# ${head.title || say("untitled")}\n`, ...parts].join("\n");
}

/** The conversations in a file's text. Throws when there are none. */
export function read(text, name) {
  const found = name.toLowerCase().endsWith(".json") ? fromJson(text) : [fromMarkdown(text)];
  if (!found.length) throw new Error("nothing in it");
  return found;
}

export function download(text, name, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  h("a", {
    href: address,
    download: name
      .replace(/[\\/:*?"<>|\p{C}]+/gu, " ")
      .trim()
      .slice(0, 80),
  }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function fromJson(text) {
  const { format, conversations } = JSON.parse(text);
  if (format !== FORMAT || !Array.isArray(conversations) || conversations.length > MAX_ITEMS) throw new Error("not ours");
  return conversations.map(({ head, messages }) => ({
    head: checkedHead(head, messages),
    messages: checked(messages),
  }));
}

function fromMarkdown(text) {
  const messages = [];
  let [title, role, lines, reasoning] = ["", null, [], ""];
  const close = () => {
    const said = lines
      .join("\n")
      .trim()
      .replace(/^\\(?=\\*## )/gm, "");
    if (role === "reasoning") reasoning = said;
    else if (role) messages.push({ role, text: said, ...(role === "assistant" && { reasoning, finish: "stop" }) });
    if (role !== "reasoning") reasoning = "";
    lines = [];
  };
  for (const line of text.split(/\r?\n/)) {
    const heading = HEADING.exec(line);
    if (heading) {
      close();
      role = heading[1];
    } else if (!role && line.startsWith("# ")) title = line.slice(2);
    else lines.push(line);
  }
  if (!role) [role, title] = ["user", title || titleOf(text)]; // any other Markdown: one message
  close();
  return { head: checkedHead({ title }, messages), messages: checked(messages) };
}

const guarded = (text) => text.replace(/^(\\*)## /gm, "\\$1## ");
const word = (value, max = 200) => (typeof value === "string" ? value.slice(0, max) : "");
const within = (value, low, high, otherwise) =>
  Number.isFinite(value) && value >= low && value <= high ? value : otherwise;

function checkedHead(given, messages) {
  const head = newHead(word(given?.model) || null);
  const { system, temperature, top_p, max_new_tokens, seed } = given?.settings ?? {};
  head.title = word(given?.title, 120) || titleOf(messages?.[0]?.text ?? "");
  head.created = within(given?.created, 0, head.created, head.created);
  head.updated = within(given?.updated, 0, head.updated, head.updated);
  head.settings = {
    system: word(system, 20_000),
    temperature: within(temperature, 0, 2, DEFAULTS.temperature),
    top_p: within(top_p, 0.01, 1, DEFAULTS.top_p),
    max_new_tokens: Math.round(within(max_new_tokens, 1, 1 << 20, DEFAULTS.max_new_tokens)),
    seed: Number.isSafeInteger(seed) ? seed : null,
  };
  return head;
}

function checked(messages) {
  if (!Array.isArray(messages) || messages.length > MAX_ITEMS) throw new Error("not messages");
  return messages.map(({ role, text, reasoning, thought, finish }) => {
    if (!["user", "assistant"].includes(role) || typeof text !== "string") throw new Error("not a message");
    if (role === "user") return { role, text };
    return {
      role,
      text,
      reasoning: word(reasoning, 1e6),
      thought: within(thought, 0, 1e6, undefined),
      finish: word(finish) || "stop",
    };
  });
}
