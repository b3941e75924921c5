// Carries a session over a reload in the service worker's memory: put aside when a page goes, taken back, once, by
// the page that comes next in the same tab. Without a service worker (plain http) the user logs in again.

const WAIT = 400; // milliseconds; a worker that has to start takes some 50

/** This tab, not a secret: sessionStorage is the one place that outlives a reload and belongs to one tab. */
function tab() {
  let id = sessionStorage.getItem("tab");
  if (!id) sessionStorage.setItem("tab", (id = String(crypto.getRandomValues(new Uint32Array(2)))));
  return id;
}

export function putAside(secret) {
  navigator.serviceWorker?.controller?.postMessage({ kind: "put", tab: tab(), secret });
}

export async function takeBack() {
  const worker = navigator.serviceWorker?.controller ?? (await navigator.serviceWorker?.getRegistration())?.active;
  if (!worker) return null;
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = ({ data }) => resolve(data);
    setTimeout(resolve, WAIT, null);
    worker.postMessage({ kind: "take", tab: tab() }, [port2]);
  });
}
