// Files that are saved and chosen: the page's side of transfer.js.

import { find } from "./dom.js";
import { toast } from "./toast.js";
import { download, read, toJson, toMarkdown } from "./transfer.js";
import { say } from "./words.js";

const TYPES = { json: "application/json", md: "text/markdown" };

export async function saveOne(library, head, kind) {
  const messages = await library.messages(head.id);
  const text = kind === "md" ? toMarkdown(head, messages) : toJson([{ head, messages }]);
  download(text, `${head.title || "conversation"}.${kind}`, TYPES[kind]);
}

export async function saveAll(library) {
  const heads = await library.list();
  const all = await Promise.all(heads.map(async (head) => ({ head, messages: await library.messages(head.id) })));
  download(toJson(all), `flask-llm ${new Date().toISOString().slice(0, 10)}.json`, TYPES.json);
}

export const askForFiles = () => find("import").click();

export function prepareImport(library) {
  const input = find("import");
  input.addEventListener("change", async () => {
    for (const file of input.files) await take(file, library());
    input.value = "";
  });
}

async function take(file, library) {
  try {
    const found = read(await file.text(), file.name);
    for (const { head, messages } of found) await library.save(head, messages);
    toast(say("imported", { count: found.length }));
  } catch {
    toast(say("import.failed", { name: file.name }));
  }
}
