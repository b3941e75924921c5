// A conversation's first title: the beginning of its first message.

const LONGEST = 60;

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/^#+ /, "").trim();
  if (line.length <= LONGEST) return line;
  const cut = line.slice(0, LONGEST);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), LONGEST - 15)).trim()}…`;
}
