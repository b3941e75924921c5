// The service worker's life from the page's side: registered, looked after, and its successor announced.

import { toast } from "./toast.js";
import { registerWorker } from "./trusted.js";
import { say } from "./words.js";

const HOUR = 3_600_000;

/** Without service workers (plain http) the page works as well, but only online. */
export async function keepUpdated() {
  if (!navigator.serviceWorker) return;
  const registration = await registerWorker().catch(() => null);
  if (!registration) return;
  if (registration.waiting) announce(registration.waiting);
  registration.addEventListener("updatefound", () => watch(registration.installing));
  setInterval(() => registration.update().catch(() => {}), HOUR);
}

function watch(worker) {
  const update = Boolean(navigator.serviceWorker.controller); // the first one of all replaces nothing
  worker.addEventListener("statechange", () => worker.state === "installed" && update && announce(worker));
}

function announce(worker) {
  const reload = () => {
    navigator.serviceWorker.addEventListener("controllerchange", () => location.reload(), { once: true });
    worker.postMessage({ kind: "replace" });
  };
  toast(say("update.ready"), { action: { label: say("update.reload"), act: reload }, lasting: true });
}
