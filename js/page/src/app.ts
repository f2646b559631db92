/** The page: its tabs, its tools, and what is kept of them. */

import { IndexedStorage } from "../../src/browser.js";
import { fetchNode, type NodeAbout } from "./about.js";
import { ask, confirmed } from "./dialogs.js";
import { byId, el, set } from "./dom.js";
import { takeFragment } from "./fragment.js";
import { fragmentLink, fragmentOf, type Grant, GRANTS_MAX, grantOf, grantText } from "./grants.js";
import { Home, type Opener } from "./home.js";
import { Keys } from "./keys.js";
import { Menu, type MenuItem } from "./menu.js";
import type { ParsedLink } from "../../src/links.js";
import {
  FONT_MAX_PX,
  FONT_MIN_PX,
  keepSettings,
  type KeptRow,
  loadSettings,
  type Settings,
  Store,
  storedSettings,
} from "./store.js";
import { type Aim, type Around, Tab } from "./tab.js";
import { ago, othersText, troubleText } from "./texts.js";

const QUIET_MS = 1_000;
const LINKS_SHOWN = 3;
const TITLE = "Sterna";

export class App implements Around, Opener {
  readonly settings: Settings = loadSettings(storedSettings(), matchMedia("(max-width: 600px)").matches);
  readonly tabs: Tab[] = [];
  readonly keys: Keys;
  private active: Tab | null = null;
  private readonly store = new Store();
  private readonly home: Home;
  private node: NodeAbout = { id: null, name: "", version: "" };
  private readonly prefersDark = matchMedia("(prefers-color-scheme: dark)");
  private timer: ReturnType<typeof setTimeout> | undefined;
  private restoring = true;
  private offlineSince = navigator.onLine ? null : Date.now();

  constructor() {
    const press = (text: string): void => this.active?.press(text);
    this.keys = new Keys(
      byId("keys"),
      press,
      () => this.active?.screen.terminal.modes.applicationCursorKeysMode ?? false,
    );
    this.home = new Home(this);
    this.configure();
    this.prefersDark.addEventListener("change", () => this.configure());
    matchMedia("(prefers-contrast: more)").addEventListener("change", () => this.configure());
    byId("tab-home").addEventListener("click", () => this.activate(null));
    byId("forget-key").addEventListener("click", () => void this.forgetKey());
    this.listenTabs();
    this.listenTools();
    document.addEventListener("keydown", (event) => this.shortcut(event), true);
    document.addEventListener("visibilitychange", () => document.hidden || this.active?.seen());
    addEventListener("online", () => this.network());
    addEventListener("offline", () => this.network());
    addEventListener("resize", () => this.showHead());
    addEventListener("hashchange", () => this.followFragment());
  }

  /** Opens what the fragment names, and what was open before. */
  async start(fragment: string): Promise<void> {
    const asked = fetchNode().then((node) => {
      this.node = node;
      this.status();
    });
    await this.store.load();
    this.home.restore(await this.store.list());
    const { tabs, active } = await this.store.opened();
    for (const { grant, session, name, mode } of tabs) {
      const found = this.store.grants.get(grant);
      if (found !== undefined) this.add({ grant: found, session, agent: found.agent, name, mode, create: false });
    }
    if (!fragment || this.store.grants.size) {
      const only = [...this.store.grants.values()];
      const wanted =
        this.tabs.find((tab) => tab.aim.session === active) ?? (active === null ? null : (this.tabs[0] ?? null));
      const one = !fragment && active === null && !tabs.length && only.length === 1;
      if (wanted === null && one && only[0].session !== null)
        this.openGrant(only[0]);
      else this.activate(wanted);
    }
    this.restoring = false;
    // Tabs in the background attach, too; their terminals take the size of the one that is seen.
    for (const tab of this.tabs) if (!tab.started) this.startHidden(tab);
    this.keepTabs();
    if (!fragment) return;
    await asked;
    await this.takeLink(fragment);
  }

  private startHidden(tab: Tab): void {
    tab.panel.classList.add("measured");
    tab.panel.hidden = false;
    void tab.start();
    tab.panel.hidden = true;
    tab.panel.classList.remove("measured");
  }

  // ---- links -------------------------------------------------------------------------------------------------

  private followFragment(): void {
    const fragment = takeFragment();
    if (fragment) void this.takeLink(fragment);
  }

  /** Any web site can send this browser to a link: beside what is known already it is used only if that is wanted. */
  private async takeLink(fragment: string): Promise<void> {
    try {
      await this.store.load();
      await this.useLink(fragmentLink(location.host, fragment), (grant) => this.wanted(grant));
    } catch (error) {
      this.activate(null);
      byId("link-error").textContent = (error as Error).message;
    }
  }

  /** Uses a share link; one for another address is opened there. */
  async useLink(link: ParsedLink, wanted?: (grant: Grant) => Promise<boolean>): Promise<void> {
    const elsewhere = link.host !== location.hostname.replace(/^\[|\]$/g, "");
    const port = Number(location.port) || 443;
    if (link.scheme === "https" && (elsewhere || link.port !== port)) {
      const host = link.host.includes(":") ? `[${link.host}]` : link.host;
      location.assign(`https://${host}:${link.port}/${fragmentOf(link)}`);
      return;
    }
    const grant = await grantOf(link, this.node.id, Date.now());
    if (grant === null) throw new Error("There is no ticket in this link: copy it again as a whole.");
    const { grants } = this.store;
    const known = grants.get(grant.id);
    if (known === undefined) {
      if (grants.size >= GRANTS_MAX)
        throw new Error(`This browser keeps ${GRANTS_MAX} links: forget one of them, then open this one again.`);
      if (grants.size && wanted !== undefined && !(await wanted(grant))) return;
      this.store.keep(grant);
    }
    this.openGrant(known ?? grant);
  }

  /** Asks, naming what there is and what would come. */
  private async wanted(grant: Grant): Promise<boolean> {
    if (document.getElementById("add-link") !== null) return false; // one question at a time
    const have = this.grants().map((one) => `${grantText(one)}, since ${ago(one.added / 1_000, Date.now())}`);
    const more = have.length > LINKS_SHOWN ? `, and ${have.length - LINKS_SHOWN} more` : "";
    const content = [
      el("p", {}, `It came from outside this page, and opens ${grantText(grant)}: perhaps somebody else's.`),
      el("p", {}, `This browser has ${have.slice(0, LINKS_SHOWN).join("; ")}${more}. That stays as it is.`),
    ];
    return (await ask("add-link", "Add this link?", content, [{ label: "Add it", value: true }], "Not now")) === true;
  }

  private openGrant(grant: Grant): void {
    const { session, agent, name, mode } = grant;
    if (session === null) this.activate(null);
    else this.open({ grant, session, agent, name, mode, create: false });
  }

  grants(): Grant[] {
    return [...this.store.grants.values()].sort((a, b) => b.added - a.added);
  }

  forget(grant: Grant): void {
    this.store.forget(grant.id);
    for (const tab of this.tabs.filter((one) => one.aim.grant.id === grant.id)) this.leave(tab);
    void this.home.refresh();
  }

  busy(): boolean {
    return this.tabs.length > 0;
  }

  /** Makes this browser a new device: one that was revoked gets in by no link. */
  async forgetKey(): Promise<void> {
    const text = "No link that this browser opened lets it in any more: open a new one then. The sessions go on.";
    if (!(await confirmed("Forget this browser\u2019s key?", text, "Forget the key"))) return;
    for (const tab of [...this.tabs]) this.leave(tab);
    await this.store.clear();
    await new IndexedStorage().forget();
    location.reload();
  }

  /** The address of the node's WebSocket. */
  address(): string {
    return `${location.protocol === "http:" ? "ws" : "wss"}://${location.host}/ws`;
  }

  // ---- tabs --------------------------------------------------------------------------------------------------

  /** Opens a session in a tab, or goes to the tab where it is. */
  open(aim: Aim): void {
    const known = this.tabs.find(
      (tab) => aim.session !== null && tab.aim.session === aim.session && tab.aim.mode === aim.mode,
    );
    if (known === undefined) this.activate(this.add(aim));
    else {
      const failed = known.state === "failed";
      if (failed) known.aim = { ...known.aim, grant: aim.grant };
      this.activate(known);
      if (failed) void known.start();
    }
    this.keepTabs();
  }

  private add(aim: Aim): Tab {
    const tab = new Tab(aim, this);
    this.tabs.push(tab);
    byId("tabs").append(tab.head);
    byId("panels").append(tab.panel);
    return tab;
  }

  isActive(tab: Tab): boolean {
    return this.active === tab;
  }

  activate(tab: Tab | null): void {
    this.active = tab;
    for (const each of this.tabs) {
      const on = each === tab;
      each.panel.hidden = !on;
      set(each.handle, { "aria-selected": String(on), tabindex: on ? 0 : -1 });
      each.head.classList.toggle("active", on);
    }
    byId("home").hidden = tab !== null;
    set(byId("tab-home"), { "aria-selected": String(tab === null), tabindex: tab === null ? 0 : -1 });
    byId("tab-home").parentElement!.classList.toggle("active", tab === null);
    document.body.dataset.view = tab === null ? "home" : "session";
    this.keys.release();
    if (tab === null) void this.home.refresh();
    else {
      tab.screen.open();
      if (!tab.started) void tab.start();
      tab.screen.refit();
      tab.seen();
      // On a touch screen that would bring up the keyboard, which may not be wanted yet.
      if (!matchMedia("(pointer: coarse)").matches) tab.focus();
      this.showHead();
    }
    this.status();
    this.keepTabs();
  }

  private showHead(): void {
    this.active?.head.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  leave(tab: Tab): void {
    const at = this.tabs.indexOf(tab);
    if (at < 0) return;
    this.tabs.splice(at, 1);
    tab.leave();
    if (this.active === tab) this.activate(this.tabs[Math.min(at, this.tabs.length - 1)] ?? null);
    this.keepTabs();
  }

  attached(tab: Tab): void {
    const { grant, name, session, mode } = tab.aim;
    const twin = this.tabs.find((one) => one !== tab && one.aim.session === session && one.aim.mode === mode);
    if (twin !== undefined) {
      // A name that was asked for is that of a session which is open already.
      this.leave(tab);
      this.activate(twin);
      return;
    }
    if (grant.session !== null) this.store.rename(grant.id, name);
    this.keepTabs();
    this.status();
  }

  renamed(uid: string, name: string): void {
    for (const tab of this.tabs) if (tab.aim.session === uid) tab.renamed(name);
  }

  keepList(rows: KeptRow[]): void {
    this.store.keepList(rows);
  }

  private keepTabs(): void {
    if (this.restoring) return;
    const tabs = this.tabs
      .filter((tab) => tab.aim.session !== null && tab.state !== "ended")
      .map(({ aim: { grant, session, name, mode } }) => ({ grant: grant.id, session: session!, name, mode }));
    this.store.keepOpened({ tabs, active: this.active?.aim.session ?? null });
  }

  private listenTabs(): void {
    const list = byId("tabs");
    list.addEventListener("click", (event) => {
      const tab = this.tabs.find((one) => one.handle.contains(event.target as Node));
      if (tab !== undefined) this.activate(tab);
    });
    list.addEventListener("auxclick", (event) => {
      const tab = this.tabs.find((one) => one.head.contains(event.target as Node));
      if (tab !== undefined && event.button === 1) this.leave(tab);
    });
    list.addEventListener("keydown", (event) => {
      const all = [null, ...this.tabs];
      const at = all.indexOf(this.active);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
      if (to !== undefined) {
        this.activate(all[(to + all.length) % all.length]);
        this.handleOf(this.active).focus();
      } else if (event.key === "ArrowDown" || event.key === "Enter" || event.key === " ") this.enter();
      else if (event.key === "Delete" && this.active !== null) {
        this.leave(this.active);
        this.handleOf(this.active).focus();
      } else return;
      event.preventDefault();
    });
  }

  private handleOf(tab: Tab | null): HTMLElement {
    return tab === null ? byId("tab-home") : tab.handle;
  }

  private enter(): void {
    if (this.active !== null) this.active.focus();
    else byId("home").querySelector<HTMLElement>("button:not([hidden]), input")?.focus();
  }

  // ---- keys --------------------------------------------------------------------------------------------------

  /** Ctrl+Shift with Enter, letters and digits: terminals cannot tell them from those without Shift. */
  private shortcut(event: KeyboardEvent): void {
    if (!event.ctrlKey || !event.shiftKey || event.altKey || event.metaKey || document.querySelector("dialog[open]"))
      return;
    const tab = this.active;
    const digit = /^Digit([0-9])$/.exec(event.code)?.[1];
    if (event.key === "Enter") this.handleOf(tab).focus();
    else if (digit !== undefined) {
      const chosen = digit === "0" ? null : this.tabs[Number(digit) - 1];
      if (chosen !== undefined) this.activate(chosen);
    } else if (event.code === "KeyF" && tab !== null) tab.find.show();
    else if (event.code === "KeyC" && tab !== null) void tab.copy();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // ---- tools -------------------------------------------------------------------------------------------------

  private listenTools(): void {
    byId("tool-search").addEventListener("click", () => this.active?.find.show());
    byId("tool-smaller").addEventListener("click", () => this.fontSize(this.settings.fontSize - 1));
    byId("tool-larger").addEventListener("click", () => this.fontSize(this.settings.fontSize + 1));
    byId("presence").addEventListener("mousedown", (event) => event.preventDefault());
    byId("presence").addEventListener("click", () => this.active?.say(`Also here: ${this.active.others.join(", ")}`));
    new Menu(byId("tool-menu"), () => this.menu());
    // A tool that is used by pointer leaves the focus where it is: the next key is for the program.
    byId("tools").addEventListener("mousedown", (event) => event.preventDefault());
  }

  private menu(): MenuItem[] {
    const { settings, active: tab } = this;
    const terminal: MenuItem[] =
      tab === null
        ? []
        : [
            { id: "copy", text: "Copy", hint: "Ctrl+Shift+C", act: () => void tab.copy() },
            {
              id: "paste",
              text: "Paste",
              hint: "Ctrl+Shift+V",
              act: () => void tab.pasteClipboard(),
              off: tab.watching,
            },
            { id: "text", text: "Show as text", act: () => tab.asText() },
            { id: "search", text: "Search", hint: "Ctrl+Shift+F", act: () => tab.find.show() },
            {
              id: "rename",
              text: "Rename session",
              act: () => void tab.rename(),
              off: tab.watching || tab.session === null,
            },
            { id: "leave", text: "Leave (it goes on)", act: () => this.leave(tab) },
            {
              id: "end",
              text: "End session",
              act: () => void tab.end(),
              off: tab.watching || tab.session === null,
              line: true,
            },
          ];
    const theme = (value: Settings["theme"], text: string): MenuItem => ({
      id: `theme-${value}`,
      text,
      group: "theme",
      checked: settings.theme === value,
      act: () => this.change({ theme: value }),
    });
    return [
      ...terminal,
      { id: "larger", text: "Larger text", act: () => this.fontSize(settings.fontSize + 1), stays: true },
      { id: "smaller", text: "Smaller text", act: () => this.fontSize(settings.fontSize - 1), stays: true, line: true },
      theme("system", "As the system"),
      theme("light", "Light"),
      { ...theme("dark", "Dark"), line: true },
      {
        id: "keys",
        text: "Row of keys",
        checked: this.keysShown,
        act: () => this.change({ keys: this.keysShown ? "hidden" : "shown" }),
      },
      {
        id: "reader",
        text: "Screen reader mode",
        checked: settings.screenReader,
        act: () => this.change({ screenReader: !settings.screenReader }),
      },
    ];
  }

  private get keysShown(): boolean {
    const { keys } = this.settings;
    return keys === "shown" || (keys === "auto" && matchMedia("(pointer: coarse)").matches);
  }

  fontSize(px: number): void {
    this.change({ fontSize: Math.min(FONT_MAX_PX, Math.max(FONT_MIN_PX, px)) });
  }

  private change(changed: Partial<Settings>): void {
    Object.assign(this.settings, changed);
    keepSettings(this.settings);
    this.configure();
    this.active?.say(changed.fontSize === undefined ? "" : `Text of ${changed.fontSize} px`);
  }

  get dark(): boolean {
    return this.settings.theme === "dark" || (this.settings.theme === "system" && this.prefersDark.matches);
  }

  private configure(): void {
    const root = document.documentElement;
    root.dataset.theme = this.dark ? "dark" : "light";
    document.querySelector("meta[name=theme-color]")?.setAttribute("content", this.dark ? "#1b1f26" : "#eef0f3");
    byId("keys").hidden = !this.keysShown;
    for (const tab of this.tabs) tab.screen.configure(this.settings, this.dark);
  }

  // ---- what is said ------------------------------------------------------------------------------------------

  private network(): void {
    this.offlineSince = navigator.onLine ? null : (this.offlineSince ?? Date.now());
    this.status();
  }

  changed(tab: Tab): void {
    if (tab.state === "ended") {
      // A link for a session that is over opens nothing any more.
      const { session } = tab.aim.grant;
      for (const one of this.grants()) if (session !== null && one.session === session) this.store.forget(one.id);
      this.keepTabs();
    }
    this.status();
  }

  /** Shows how things are with the tab that is seen; what has lasted less than a second is not worth a word. */
  private status(): void {
    clearTimeout(this.timer);
    const tab = this.active;
    const message = byId("message");
    const since = this.troubledSince(tab);
    let text = "";
    let kind = "";
    if (since !== null) {
      const ms = Date.now() - since;
      if (ms >= QUIET_MS) {
        const [connecting, watching] = [tab?.state === "connecting", tab === null || tab.watching];
        text = troubleText({ connecting, online: this.offlineSince === null, ms, watching });
        kind = "trouble";
      }
      this.timer = setTimeout(() => this.status(), ms < QUIET_MS ? QUIET_MS - ms : 1_000 - (ms % 1_000));
    }
    if (!text && tab !== null) text = tab.said;
    // That it still lasts is not said aloud every second.
    set(message, { "aria-live": kind && message.dataset.kind === kind ? "off" : null, "data-kind": kind || null });
    if (message.textContent !== text) message.textContent = text;
    this.facts(tab);
    const marks = this.tabs.filter((one) => one.marked).length;
    const name = tab === null ? this.node.name || location.hostname : tab.name;
    const title = `${marks ? `(${marks}) ` : ""}${name} \u2013 ${TITLE}`;
    if (document.title !== title) document.title = title;
  }

  /** Since when there is no connection, as far as the tab or the browser knows, or null. */
  private troubledSince(tab: Tab | null): number | null {
    const over = tab?.state === "ended" || tab?.state === "failed";
    const times = [over ? null : (tab?.since ?? null), this.offlineSince].filter((time) => time !== null);
    return times.length ? Math.min(...times) : null;
  }

  private facts(tab: Tab | null): void {
    const foreign = tab?.foreign ?? null;
    byId("watching").hidden = tab === null || !tab.watching;
    byId("presence").textContent = tab === null ? "" : othersText(tab.others.length);
    set(byId("presence"), { title: tab?.others.join(", ") || null });
    const size = byId("size");
    if (tab === null)
      size.textContent = this.node.version ? `${this.node.name || location.hostname} \u00b7 ${this.node.version}` : "";
    else {
      const { cols, rows } = tab.screen.terminal;
      const whose = foreign === null ? "" : ` by another device${tab.screen.cut ? " \u2013 scroll" : ""}`;
      size.textContent = `${cols}\u00d7${rows}${whose}`;
    }
    set(size, { title: foreign === null || tab?.watching ? null : "It takes this window's size as soon as you type" });
  }
}
