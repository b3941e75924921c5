// What this device remembers between visits: theme, language, the last user's name. Never anything secret.

const NAME = "flask-llm";

/** @returns {{theme?: string, language?: string, user?: string, kept?: string[]}} */
export function preferences() {
  try {
    return JSON.parse(localStorage.getItem(NAME) ?? "{}");
  } catch {
    return {};
  }
}

export function prefer(change) {
  try {
    localStorage.setItem(NAME, JSON.stringify({ ...preferences(), ...change }));
  } catch {
    // A browser that keeps nothing: the choice holds until the page is closed.
  }
}

/** Whether the conversations of this user outlive a logout on this device. */
export const isKept = (user) => (preferences().kept ?? []).includes(user);

export function keep(user, yes) {
  const others = (preferences().kept ?? []).filter((name) => name !== user);
  prefer({ kept: yes ? [...others, user] : others });
}

export function setTheme(theme) {
  prefer({ theme });
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
