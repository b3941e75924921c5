// Where TeX stands in Markdown: $…$ and \(…\) within a line, $$…$$ and \[…\] as a block.

const BLOCK = /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\]) *(?:\n|$)/;
// As pandoc has it: no space inside the signs, no digit behind them, so that $5 and $6 stay money.
const INLINE = /^(?:\$\$([^$\n]+?)\$\$|\$(?! )((?:\\.|[^\\$\n])+?)(?<! )\$(?!\d)|\\\(([^\n]+?)\\\)|\\\[([^\n]+?)\\\])/;
const BEGIN = /\$|\\[([]/;

const found = (match) =>
  match
    .slice(1)
    .find((part) => part !== undefined)
    .trim();

export const mathBlock = (escaped) => ({
  name: "mathBlock",
  level: "block",
  start: (source) => source.match(/\n {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const match = BLOCK.exec(source);
    if (match) return { type: "mathBlock", raw: match[0], text: found(match) };
  },
  renderer: ({ text }) => `<div class="math">${escaped(text)}</div>`,
});

export const mathInline = (escaped) => ({
  name: "mathInline",
  level: "inline",
  start: (source) => source.match(BEGIN)?.index,
  tokenizer(source) {
    const match = INLINE.exec(source);
    if (match) return { type: "mathInline", raw: match[0], text: found(match) };
  },
  renderer: ({ text }) => `<span class="math">${escaped(text)}</span>`,
});
