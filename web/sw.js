// Keeps the page's own files, so that it opens without a network. Never touches the API or a stream.
// The service writes `const SHELL = {version, files}` above this line (api/routes/page.py); a changed file is a new
// worker. Everything is relative to this file's own address, because the page may lie under a path of a larger site.
/* global SHELL */
"use strict";

const OURS = `flask-llm-${new URL("./", location).pathname}-`; // caches belong to a whole origin
const CACHE = OURS + SHELL.version;
const FILES = new Set(SHELL.files.map((file) => new URL(file, location).pathname));
const MAX_AGE = 30_000; // milliseconds that a session may lie between two pages

const aside = new Map();

addEventListener("install", (event) => event.waitUntil(keepAll()));
addEventListener("activate", (event) => event.waitUntil(dropOlder().then(() => clients.claim())));

addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  if (event.request.method !== "GET" || origin !== location.origin || !FILES.has(pathname)) return;
  event.respondWith(fromCache(event.request, pathname));
});

addEventListener("message", ({ data, ports }) => {
  if (data.kind === "put") aside.set(data.tab, { secret: data.secret, at: Date.now() });
  if (data.kind === "take") ports[0].postMessage(take(data.tab));
  if (data.kind === "replace") skipWaiting();
});

async function keepAll() {
  const cache = await caches.open(CACHE);
  await cache.addAll(SHELL.files.map((file) => new Request(file, { cache: "reload" })));
}

async function dropOlder() {
  const names = await caches.keys();
  await Promise.all(
    names.filter((name) => isOurs(name) && name !== CACHE).map((name) => caches.delete(name)),
  );
}

/** Until version 1.0 the name had no path. */
const isOurs = (name) => name.startsWith(OURS) || /^flask-llm-[0-9a-f]+$/.test(name);

/** All files of a page come from one version; the network is for what a browser threw out. */
async function fromCache(request, pathname) {
  const cache = await caches.open(CACHE);
  return (await cache.match(pathname)) ?? fetch(request);
}

/** Once, and not for long. */
function take(tab) {
  const found = aside.get(tab);
  aside.delete(tab);
  return found && Date.now() - found.at < MAX_AGE ? found.secret : null;
}
