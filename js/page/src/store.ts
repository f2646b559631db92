/** What this browser keeps: tickets and open sessions (IndexedDB), a tab's sessions (sessionStorage), settings. */

import type { Grant, Mode } from "./grants.js";
import type { Listed } from "./home.js";

/** One open session, as it is kept to be opened again. */
export interface Opened {
  grant: string;
  session: string;
  name: string;
  mode: Mode;
}

/** One session of the list, as the node told it, and the grant that it was seen by. */
export interface KeptRow {
  grant: string;
  listed: Listed;
}

export interface OpenedTabs {
  tabs: Opened[];
  active: string | null;
}

const DATABASE = "sterna-page";
const TABS = "sterna.tabs";
const TABS_MAX = 32;
const LIST = "sterna.list";
const ROWS_MAX = 200;

/** Grants by id. Where the browser keeps nothing, they last as long as the page. */
export class Store {
  readonly grants = new Map<string, Grant>();
  private database: IDBDatabase | null = null;

  async load(): Promise<void> {
    try {
      this.database ??= await open();
      const all = await done<Grant[]>(this.database.transaction("grants").objectStore("grants").getAll());
      for (const grant of all) this.grants.set(grant.id, grant);
    } catch {
      this.database = null;
    }
  }

  keep(grant: Grant): void {
    this.grants.set(grant.id, grant);
    this.change("grants", (store) => store.put(grant));
  }

  /** Keeps the name of a grant's session, unless another tab has forgotten the grant: in one transaction. */
  rename(id: string, name: string): void {
    const known = this.grants.get(id);
    if (known === undefined || known.name === name) return;
    this.grants.set(id, { ...known, name });
    this.change("grants", (store) => {
      const found = store.get(id) as IDBRequest<Grant | undefined>;
      found.onsuccess = () => found.result !== undefined && store.put({ ...found.result, name });
    });
  }

  forget(id: string): void {
    this.grants.delete(id);
    this.change("grants", (store) => store.delete(id));
  }

  /** Forgets every grant, and what they showed; resolves once the browser did. */
  async clear(): Promise<void> {
    this.grants.clear();
    this.change("state", (store) => store.clear());
    const store = this.database?.transaction("grants", "readwrite").objectStore("grants");
    if (store !== undefined) await done(store.clear());
  }

  /** Keeps the list of sessions, to be shown while the node cannot be reached. */
  keepList(rows: KeptRow[]): void {
    this.change("state", (store) => store.put(rows.slice(0, ROWS_MAX), LIST));
  }

  async list(): Promise<KeptRow[]> {
    const rows = await this.state(LIST);
    return Array.isArray(rows) ? rows : [];
  }

  private async state(key: string): Promise<unknown> {
    try {
      if (this.database === null) return undefined;
      return await done(this.database.transaction("state").objectStore("state").get(key));
    } catch {
      return undefined;
    }
  }

  /** Returns what was open in this tab, else what was open last anywhere. */
  async opened(): Promise<OpenedTabs> {
    try {
      const own = sessionStorage.getItem(TABS);
      return checked(own === null ? await this.state(TABS) : JSON.parse(own));
    } catch {
      return { tabs: [], active: null };
    }
  }

  keepOpened(opened: OpenedTabs): void {
    try {
      sessionStorage.setItem(TABS, JSON.stringify(opened));
    } catch {
      // Storage is full or forbidden: the tabs are forgotten with the page.
    }
    this.change("state", (store) => store.put(opened, TABS));
  }

  private change(name: "grants" | "state", what: (store: IDBObjectStore) => void): void {
    try {
      if (this.database !== null) what(this.database.transaction(name, "readwrite").objectStore(name));
    } catch {
      // As above.
    }
  }
}

function checked(value: unknown): OpenedTabs {
  const { tabs, active } = (value ?? {}) as Partial<OpenedTabs>;
  if (!Array.isArray(tabs)) return { tabs: [], active: null };
  const good = tabs.filter((tab) => typeof tab?.grant === "string" && /^[0-9a-f]{32}$/.test(tab.session));
  return { tabs: good.slice(0, TABS_MAX), active: typeof active === "string" ? active : null };
}

function open(): Promise<IDBDatabase> {
  const asked = indexedDB.open(DATABASE, 1);
  asked.onupgradeneeded = () => {
    asked.result.createObjectStore("grants", { keyPath: "id" });
    asked.result.createObjectStore("state");
  };
  return done(asked);
}

function done<T>(asked: IDBRequest): Promise<T> {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result as T);
    asked.onerror = () => reject(asked.error);
  });
}

// ---- settings --------------------------------------------------------------------------------------------------

export interface Settings {
  theme: "system" | "light" | "dark";
  fontSize: number;
  screenReader: boolean;
  keys: "auto" | "shown" | "hidden";
}

export const FONT_MIN_PX = 8;
export const FONT_MAX_PX = 32;
const SETTINGS = "sterna.settings";

/** Returns the settings of this browser; what is damaged is as if it had never been set. */
export function loadSettings(text: string | null, phone: boolean): Settings {
  let found: Partial<Settings> = {};
  try {
    found = (JSON.parse(text ?? "{}") ?? {}) as Partial<Settings>;
  } catch {
    // It is written anew with the next change.
  }
  const size = Number(found.fontSize);
  return {
    theme: found.theme === "light" || found.theme === "dark" ? found.theme : "system",
    fontSize: size >= FONT_MIN_PX && size <= FONT_MAX_PX ? size : phone ? 12 : 14,
    screenReader: found.screenReader === true,
    keys: found.keys === "shown" || found.keys === "hidden" ? found.keys : "auto",
  };
}

export function storedSettings(): string | null {
  try {
    return localStorage.getItem(SETTINGS);
  } catch {
    return null;
  }
}

export function keepSettings(settings: Settings): void {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // As above.
  }
}
