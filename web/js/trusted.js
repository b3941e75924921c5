// The two places where a string becomes a script's address. Both addresses are written here and nowhere else: the
// Content-Security-Policy forbids all others (trusted-types).

const ADDRESSES = { worker: "sw.js", temml: "web/vendor/temml/temml.min.js" };
const policy = globalThis.trustedTypes?.createPolicy("page", { createScriptURL: (name) => ADDRESSES[name] });
const address = (name) => policy?.createScriptURL(name) ?? ADDRESSES[name];

export const registerWorker = () => navigator.serviceWorker.register(address("worker"), { updateViaCache: "none" });

/** Temml is no module: it leaves a global behind. */
export function loadTemml() {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.onload = () => resolve(globalThis.temml);
    script.onerror = reject;
    script.src = address("temml");
    document.head.append(script);
  });
}
