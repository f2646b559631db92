/** As much of a browser as the page's modules use, for tests without one: elements, events, a clipboard, windows. */

class Element extends EventTarget {
  parent = null;
  childNodes = [];
  dataset = {};
  style = {};
  attributes = new Map();
  #classes = new Set();

  constructor(tag) {
    super();
    this.tag = tag;
    this.classList = {
      add: (name) => this.#classes.add(name),
      remove: (name) => this.#classes.delete(name),
      contains: (name) => this.#classes.has(name),
      toggle: (name, on = !this.#classes.has(name)) => (on ? this.#classes.add(name) : this.#classes.delete(name)),
    };
  }

  get children() {
    return this.childNodes.filter((node) => node instanceof Element);
  }

  get textContent() {
    return this.childNodes.map((node) => (node instanceof Element ? node.textContent : node)).join("");
  }

  set textContent(text) {
    this.replaceChildren(text);
  }

  get hidden() {
    return this.attributes.has("hidden");
  }

  set hidden(on) {
    if (on) this.setAttribute("hidden", "");
    else this.removeAttribute("hidden");
  }

  setAttribute(name, value) {
    this.attributes.set(name, String(value));
    if (name === "class") for (const one of String(value).split(" ")) this.#classes.add(one);
    if (name.startsWith("data-")) this.dataset[name.slice(5)] = String(value);
    if (name === "id") this.id = String(value);
  }

  getAttribute(name) {
    return this.attributes.get(name) ?? null;
  }

  removeAttribute(name) {
    this.attributes.delete(name);
  }

  append(...nodes) {
    for (const node of nodes) if (node instanceof Element) node.parent = this;
    this.childNodes.push(...nodes);
  }

  replaceChildren(...nodes) {
    this.childNodes = [];
    this.append(...nodes);
  }

  remove() {
    if (this.parent !== null) this.parent.childNodes = this.parent.childNodes.filter((node) => node !== this);
    this.parent = null;
  }

  /** Of selectors: `tag`, `.class`, `#id`, `[attribute=value]`. */
  querySelector(selector) {
    for (const child of this.children) {
      const found = child.matches(selector) ? child : child.querySelector(selector);
      if (found !== null) return found;
    }
    return null;
  }

  matches(selector) {
    const [, tag, mark, name, attribute, value] = /^([a-z]*)(?:([.#])([\w-]+))?(?:\[([\w-]+)=(\w+)\])?$/.exec(selector);
    if (tag && tag !== this.tag) return false;
    if (mark && !(mark === "." ? this.classList.contains(name) : this.id === name)) return false;
    return !attribute || this.getAttribute(attribute) === value;
  }

  focus() {}

  showModal() {}

  close() {
    this.dispatchEvent(new Event("close"));
  }

  click() {
    this.dispatchEvent(new Event("click", { cancelable: true }));
  }
}

/** Makes the globals of a browser; returns what tests look at. */
export function browserGlobals() {
  const body = new Element("body");
  const seen = { body, clipboard: [], opened: [], visited: [] };
  const document = Object.assign(new EventTarget(), {
    body,
    hidden: false,
    createElement: (tag) => new Element(tag),
    createElementNS: (_space, tag) => new Element(tag),
    getElementById: (id) => body.querySelector(`#${id}`),
  });
  const clipboard = { writeText: async (text) => void seen.clipboard.push(text) };
  const globals = {
    document,
    navigator: { userAgent: "Chrome/140 Linux", maxTouchPoints: 0, onLine: true, clipboard },
    window: { open: (...words) => void seen.opened.push(words) },
    history: { replaceState: (...words) => void seen.visited.push(words) },
    location: { hash: "", pathname: "/", search: "", protocol: "https:", host: "host:7222", hostname: "host" },
    matchMedia: () => Object.assign(new EventTarget(), { matches: false }),
    requestAnimationFrame: () => 0,
    ResizeObserver: class {
      observe() {}
      disconnect() {}
    },
  };
  for (const [name, value] of Object.entries(globals))
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  return seen;
}
