/** Keeps the page's own files, and nothing else, so that it starts without a network. */

/** The page's files and what each has to be: an answer of something else, such as a proxy's own page, is not kept. */
declare const SHELL: { [path: string]: string };
declare const VERSION: string;

interface Extendable extends Event {
  waitUntil(what: Promise<unknown>): void;
}
interface Fetching extends Extendable {
  readonly request: Request;
  respondWith(answer: Promise<Response>): void;
}

const NAME = `sterna-${VERSION}`;
const worker = globalThis as unknown as {
  addEventListener(type: "install" | "activate", listen: (event: Extendable) => void): void;
  addEventListener(type: "fetch", listen: (event: Fetching) => void): void;
  skipWaiting(): Promise<void>;
};

worker.addEventListener("install", (event) => {
  const fresh = Object.entries(SHELL).map(([path, integrity]) => new Request(path, { cache: "no-cache", integrity }));
  event.waitUntil(
    caches
      .open(NAME)
      .then((cache) => cache.addAll(fresh))
      .then(() => worker.skipWaiting()),
  );
});

worker.addEventListener("activate", (event) => {
  const clear = async (): Promise<void> => {
    for (const name of await caches.keys()) if (name.startsWith("sterna-") && name !== NAME) await caches.delete(name);
  };
  event.waitUntil(clear());
});

worker.addEventListener("fetch", (event) => {
  const { origin, pathname } = new URL(event.request.url);
  if (event.request.method !== "GET" || origin !== location.origin || !Object.hasOwn(SHELL, pathname)) return;
  const answer = async (): Promise<Response> =>
    (await (await caches.open(NAME)).match(pathname)) ?? fetch(event.request);
  event.respondWith(answer());
});
