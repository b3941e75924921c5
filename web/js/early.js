// Before the first paint: the theme and the language that were chosen here, so that nothing flashes.
// The only script that is no module, because modules wait for the whole page.
"use strict";
try {
  const chosen = JSON.parse(localStorage.getItem("flask-llm") ?? "{}");
  if (chosen.theme) document.documentElement.dataset.theme = chosen.theme;
  if (chosen.language) document.documentElement.lang = chosen.language;
} catch {
  // Storage that is closed or holds something else: the page starts as it does the first time.
}
