// Shows openapi.json as a page. Sends nothing and loads nothing from elsewhere.

const element = (tag, text = "", className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });

const schemaOf = (content) => Object.values(content ?? {})[0]?.schema;

/** The schema with its references replaced by what they name. */
function resolved(schema, document_, depth = 0) {
  if (Array.isArray(schema)) return schema.map((item) => resolved(item, document_, depth));
  if (schema === null || typeof schema !== "object" || depth > 8) return schema;
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return resolved(document_.components.schemas[name], document_, depth + 1);
  }
  const kept = Object.entries(schema).filter(([key]) => key !== "$defs" && key !== "title");
  return Object.fromEntries(kept.map(([key, value]) => [key, resolved(value, document_, depth + 1)]));
}

function block(title, value) {
  const part = element("div");
  part.append(element("h3", title), element("pre", JSON.stringify(value, null, 2)));
  return part;
}

function operation(method, path, found, document_) {
  const details = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("code", path), " ", found.summary ?? "");
  if (found.security) summary.append(element("span", " (token)", "lock"));
  details.append(summary);
  if (found.description) details.append(element("p", found.description));
  for (const parameter of found.parameters ?? []) {
    details.append(element("p", `${parameter.in}: ${parameter.name}`));
  }
  const body = schemaOf(found.requestBody?.content);
  if (body) details.append(block("Body", resolved(body, document_)));
  for (const [status, answer] of Object.entries(found.responses ?? {})) {
    const schema = schemaOf(answer.content);
    if (schema && status < 400) details.append(block(`Answer ${status}`, resolved(schema, document_)));
    else details.append(element("p", `${status} ${answer.description ?? ""}`));
  }
  return details;
}

const main = document.getElementById("operations");
const document_ = await (await fetch("openapi.json")).json();
const groups = new Map();
for (const [path, methods] of Object.entries(document_.paths)) {
  for (const [method, found] of Object.entries(methods)) {
    const name = found.tags?.[0] ?? "Other";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(operation(method, path, found, document_));
  }
}
for (const [name, operations] of groups) main.append(element("h2", name), ...operations);
