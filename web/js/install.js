// Installing the page as an app, where the browser offers it.

import { say } from "./words.js";

let offer = null;
addEventListener("beforeinstallprompt", (event) => {
  event.preventDefault(); // not now and not as a banner: the menu has it
  offer = event;
});
addEventListener("appinstalled", () => (offer = null));

/** An entry for the menu, or null. */
export const installItem = () => offer && { icon: "app", label: say("menu.install"), act: () => offer.prompt() };
