// The login form: alone on the page at first, over the conversation when a session has ended.

import { find } from "./dom.js";
import { explain } from "./errors.js";
import { isKept, keep, preferences } from "./preferences.js";
import { session } from "./session.js";
import { OTHER, chooseLanguage, language, say } from "./words.js";

const form = find("login-form");
const alert = find("login-error");

/** `entered(user)` is called after each login. */
export function prepareLogin(entered) {
  find("login-language").addEventListener("click", () => chooseLanguage(OTHER[language()]));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    await attempt(form.elements, entered);
  });
}

/** Asks for name and password; `words` say why, when it is not for the first time. */
export function showLogin(words = "") {
  const { username, password, keep: box } = form.elements;
  username.value = preferences().user ?? "";
  box.checked = isKept(username.value);
  tell(words);
  find("login-language").textContent = say("language.other");
  find("login").hidden = false;
  find("app").inert = true;
  (username.value ? password : username).focus();
}

export function hideLogin() {
  find("login").hidden = true;
  find("app").inert = false;
}

async function attempt({ username, password, keep: box }, entered) {
  const button = form.querySelector(".primary");
  button.disabled = true;
  tell("");
  try {
    await session.login(username.value, password.value);
    password.value = "";
    keep(username.value, box.checked);
    await entered(username.value);
  } catch (error) {
    tell(explain(error));
    password.focus();
  } finally {
    button.disabled = false;
  }
}

function tell(words) {
  alert.textContent = words;
  alert.hidden = !words;
}
