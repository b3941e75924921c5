// Puts the page together: the user, the open conversation, and the parts that act on them.

import { accountMenu, conversationMenu } from "./account.js";
import { Chat } from "./chat.js";
import { find } from "./dom.js";
import { Library, wipeOthers } from "./library.js";
import { hideLogin, prepareLogin, showLogin } from "./login.js";
import { openMenu, prepareMenu } from "./menu.js";
import { models } from "./models.js";
import { isKept, preferences, prefer } from "./preferences.js";
import { session } from "./session.js";
import { Sidebar } from "./sidebar.js";
import { prepareImport } from "./files.js";
import { openTuning } from "./tuning.js";
import { keepUpdated } from "./updates.js";
import { changed, language, say, speak } from "./words.js";

const here = { user: null, library: null };
const chat = new Chat();
const sidebar = new Sidebar({
  open: (id) => open(id),
  menu: (head) => conversationMenu(head, here.library, chat),
  running: chat.running,
  current: () => chat.head?.id,
});
const tabs = new BroadcastChannel("flask-llm");

async function begin() {
  const chosen = preferences().language ?? navigator.language;
  speak(chosen.startsWith("zh") ? "zh" : "en");
  prepareMenu();
  prepareLogin(enter);
  prepareImport(() => here.library);
  wire();
  const { user } = preferences();
  const known = (await session.resume()) || (user && !(await reachable()));
  if (known) await enter(session.user ?? user);
  else showLogin();
  await keepUpdated();
}

/** Shows the page to `user`: just logged in, back after a reload, or reading offline what is kept here. */
async function enter(user) {
  const asked = location.hash.slice(1);
  if (here.user !== user) {
    leave();
    await wipeOthers(user, isKept);
    here.library = await Library.open(user);
    here.user = user;
    chat.use(here.library);
    sidebar.use(here.library);
    await chat.open(asked);
  }
  prefer({ user });
  if (isKept(user)) navigator.storage?.persist?.(); // what was to be kept is not thrown out when the disk is short
  find("account").querySelector(".name").textContent = user;
  find("account").querySelector(".avatar").textContent = [...user][0].toUpperCase();
  find("app").hidden = false;
  hideLogin();
  notice();
  models.look();
  if (session.signedIn) await models.load().catch(() => {});
  chat.focus();
}

/** Takes everything of a user off the page. */
function leave() {
  find("app").hidden = true;
  here.library?.close();
  here.library = here.user = null;
  find("toasts").replaceChildren();
  chat.close();
  sidebar.empty();
}

async function logout() {
  const { user, library } = here;
  chat.close();
  await session.logout();
  tabs.postMessage({ left: user });
  if (!isKept(user)) {
    await library.wipe();
    here.library = null;
  }
  prefer({ user: undefined });
  leave();
  showLogin();
}

function wire() {
  find("new").addEventListener("click", fresh);
  find("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address belongs to the conversation
    find("prompt").focus();
  });
  find("account").addEventListener("click", () => openMenu(find("account"), accountMenu(here, logout)));
  find("more").addEventListener("click", () => openMenu(find("more"), conversationMenu(chat.head, here.library, chat)));
  find("tune").addEventListener("click", () => openTuning(chat.head.settings, (settings) => chat.tune(settings)));
  for (const name of ["open", "run"]) chat.addEventListener(name, moved);
  models.addEventListener("reach", reached);
  session.addEventListener("end", () => showLogin(say("login.again")));
  changed.addEventListener("change", translated);
  tabs.addEventListener("message", ({ data }) => data.left === here.user && elsewhereLeft());
  window.addEventListener("popstate", () => here.user && goTo(location.hash.slice(1)));
  window.addEventListener("pagehide", () => session.putAside());
  document.addEventListener("visibilitychange", () => document.hidden || models.look());
  document.addEventListener("keydown", shortcut);
}

function elsewhereLeft() {
  session.logout();
  leave();
  showLogin();
}

function translated() {
  models.show();
  notice();
  if (here.library) sidebar.refresh();
  find("login-language").textContent = say("language.other");
  find("login-language").lang = language() === "zh" ? "en" : "zh-CN";
}

async function open(id) {
  await chat.open(id);
  sidebar.toggle(false);
  chat.focus();
}

/** The address says which conversation is open, for reloading and for going back. */
function moved() {
  sidebar.refresh();
  const place = chat.messages.length ? `#${chat.head.id}` : "";
  if (place === location.hash) return;
  const address = location.pathname + place;
  if (chat.messages.length && location.hash) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

const goTo = (id) => (id ? chat.open(id) : chat.fresh());

function fresh() {
  chat.fresh();
  sidebar.toggle(false);
  chat.focus();
}

/** The line above the messages: what is missing just now. */
function notice() {
  const line = find("notice");
  const words = !models.reachable ? say("notice.offline") : session.signedIn ? "" : say("notice.reader");
  line.hidden = !words || !here.user;
  line.replaceChildren(words);
  if (!models.reachable || session.signedIn) return;
  const button = document.createElement("button");
  button.textContent = say("notice.login");
  button.className = "small";
  button.addEventListener("click", () => showLogin());
  line.append(" ", button);
}

function shortcut(event) {
  if (!here.user || !find("login").hidden || !(event.ctrlKey || event.metaKey)) return;
  const key = event.key.toLowerCase();
  if (key === "k") sidebar.focusSearch();
  else if (key === "o" && event.shiftKey) fresh();
  else return;
  event.preventDefault();
}

function reached() {
  notice();
  if (models.reachable && session.signedIn) models.load().catch(() => {});
}

async function reachable() {
  return fetch("healthz", { cache: "no-store", signal: AbortSignal.timeout(2000) }).then(
    (answer) => answer.ok,
    () => false,
  );
}

begin();
