// The two menus: of the open conversation, and of the account.

import { askForFiles, saveAll, saveOne } from "./files.js";
import { installItem } from "./install.js";
import { isKept, keep, preferences, setTheme } from "./preferences.js";
import { openRename } from "./tuning.js";
import { OTHER, chooseLanguage, language, say } from "./words.js";

const NEXT_THEME = { "": "light", light: "dark", dark: "" };

export function conversationMenu(head, library, chat) {
  return [
    { icon: "edit", label: say("rename"), act: () => openRename(head.title, (title) => chat.rename(head.id, title)) },
    { icon: "save", label: say("menu.markdown"), act: () => saveOne(library, head, "md") },
    { icon: "save", label: say("menu.json"), act: () => saveOne(library, head, "json") },
    { icon: "trash", label: say("delete"), danger: true, act: () => chat.remove(head.id) },
  ];
}

export function accountMenu({ user, library }, logout) {
  const theme = preferences().theme ?? "";
  return [
    { icon: "sun", label: say("theme", { theme: say(`theme.${theme}`) }), act: () => setTheme(NEXT_THEME[theme]) },
    { icon: "word", label: say("language.other"), act: () => chooseLanguage(OTHER[language()]) },
    { icon: "load", label: say("menu.import"), act: askForFiles },
    { icon: "save", label: say("menu.export"), act: () => saveAll(library) },
    { icon: "keep", label: say("keep"), checked: isKept(user), act: () => keep(user, !isKept(user)) },
    installItem(),
    { icon: "out", label: say("logout"), act: logout },
    matchMedia("(hover: hover)").matches && say("menu.keys"),
  ];
}
