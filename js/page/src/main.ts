/** Starts the page. */

import { App } from "./app.js";
import { takeFragment } from "./fragment.js";
import { defineStyleElement } from "./style-element.js";

// Before anything else happens.
const fragment = takeFragment();

/** The page is as high as what the on-screen keyboard leaves. */
function followKeyboard(): void {
  const view = window.visualViewport;
  if (!view) return;
  const follow = (): void => {
    if (view.scale > 1.01) return; // the user has zoomed in
    document.documentElement.style.setProperty("--height", `${view.height}px`);
    document.documentElement.style.setProperty("--top", `${view.offsetTop}px`);
  };
  view.addEventListener("resize", follow);
  view.addEventListener("scroll", follow);
  follow();
}

const REFUSED = "sterna.worker-refused";
const AGAIN_MS = 86_400_000;

/** Keeps the page's shell for starts without a network; a browser that does not trust the certificate refuses that. */
async function install(): Promise<void> {
  if (!isSecureContext || !("serviceWorker" in navigator)) return;
  try {
    // Browsers write each refusal to their console: once a day is enough.
    if (Date.now() - Number(localStorage.getItem(REFUSED) ?? 0) < AGAIN_MS) return;
    await navigator.serviceWorker.register("/sw.js").catch(() => localStorage.setItem(REFUSED, String(Date.now())));
  } catch {
    // Storage is forbidden here.
  }
}

defineStyleElement();
followKeyboard();
const app = new App();
Object.defineProperty(globalThis, "sterna", {
  value: Object.freeze({
    get tabs() {
      return app.tabs.map((tab) =>
        Object.freeze({
          uid: tab.aim.session,
          name: tab.name,
          state: tab.state,
          session: tab.session,
          terminal: tab.screen.terminal,
          renderer: tab.screen.renderer,
          others: [...tab.others],
          active: app.isActive(tab),
        }),
      );
    },
  }),
});
void app.start(fragment);
addEventListener("load", () => void install());
