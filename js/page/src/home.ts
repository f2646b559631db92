/** The list of sessions: what the invites allow to see, to open, to start, to rename, to end. */

import { type Caller, connectCaller, type SternaError } from "../../src/browser.js";
import { Code } from "../../src/errors.js";
import { asked, confirmed } from "./dialogs.js";
import { button, byId, el, set } from "./dom.js";
import { type Grant, pastedLink } from "./grants.js";
import type { ParsedLink } from "../../src/links.js";
import type { Aim } from "./tab.js";
import { ago } from "./texts.js";

const REFRESH_MS = 4_000;
const PAGES_MAX = 50;

interface Listed {
  name: string;
  uid: string;
  agent: string;
  state: string;
  changed: number;
  attached: number;
}

interface Agent {
  name: string;
  kind: string;
  ready: boolean;
}

interface Answer {
  sessions: Listed[];
  agents: Agent[];
  next?: number;
}

/** What the list needs of the page around it. */
export interface Opener {
  address(): string;
  grants(): Grant[];
  open(aim: Aim): void;
  useLink(link: ParsedLink): void;
  forget(grant: Grant): void;
  renamed(uid: string, name: string): void;
  /** The ticket is of no use; returns the older one that it replaced, if any. */
  older(grant: Grant): Grant | null;
  /** The ticket works. */
  proven(grant: Grant): void;
}

const STATES: { [state: string]: string } = {
  connecting: "starting",
  active: "in use",
  suspended: "waiting",
  exited: "ended",
};

export class Home {
  private readonly callers = new Map<string, Promise<Caller>>();
  private readonly problems = new Map<string, SternaError>();
  private timer: ReturnType<typeof setTimeout> | undefined;
  private running = false;
  private loaded = false;
  private rows: { grant: Grant; listed: Listed }[] = [];
  private agents: { grant: Grant; agent: Agent }[] = [];
  private shown = "";

  constructor(private readonly around: Opener) {
    byId("link-form").addEventListener("submit", (event) => this.paste(event));
    byId("new-form").addEventListener("submit", (event) => this.create(event));
    document.addEventListener("visibilitychange", () => this.visible && this.refresh());
  }

  private get visible(): boolean {
    return !document.hidden && !byId("home").hidden;
  }

  private lists(): Grant[] {
    return this.around.grants().filter((grant) => grant.session === null);
  }

  /** Asks the node now, and again while the list is looked at. */
  async refresh(): Promise<void> {
    clearTimeout(this.timer);
    this.draw();
    if (this.running) return;
    this.running = true;
    try {
      await Promise.all(this.lists().map((grant) => this.load(grant)));
    } finally {
      this.running = false;
    }
    this.draw();
    if (this.visible) this.timer = setTimeout(() => this.visible && void this.refresh(), REFRESH_MS);
  }

  private async call(grant: Grant, method: string, params: { [key: string]: unknown }): Promise<unknown> {
    const { ticket, node, mode } = grant;
    let caller = this.callers.get(ticket);
    if (caller === undefined) {
      caller = connectCaller({ url: this.around.address(), node, token: ticket, mode });
      this.callers.set(ticket, caller);
    }
    return (await caller).call(method, params);
  }

  private async load(grant: Grant): Promise<void> {
    try {
      const sessions: Listed[] = [];
      let agents: Agent[] = [];
      let after = 0;
      for (let page = 0; page < PAGES_MAX; page++) {
        const answer = (await this.call(grant, "list", { after })) as Answer;
        sessions.push(...answer.sessions);
        if (page === 0) agents = answer.agents;
        if (!answer.next || answer.next <= after) break;
        after = answer.next;
      }
      this.problems.delete(grant.id);
      this.loaded = true;
      if (grant.previous !== null) this.around.proven(grant);
      this.rows = this.rows.filter((row) => row.grant.id !== grant.id);
      this.agents = this.agents.filter((row) => row.grant.id !== grant.id);
      for (const listed of sessions) {
        this.rows.push({ grant, listed });
        this.around.renamed(listed.uid, listed.name);
      }
      for (const agent of agents) this.agents.push({ grant, agent });
    } catch (error) {
      const lost = (error as SternaError).code === Code.TIMEOUT;
      if (!lost) this.callers.delete(grant.ticket);
      const older = lost ? null : this.around.older(grant);
      if (older !== null) await this.load(older);
      else this.problems.set(grant.id, error as SternaError);
    }
  }

  // ---- what is shown -----------------------------------------------------------------------------------------

  private draw(): void {
    const lists = this.lists();
    const singles = this.around.grants().filter((grant) => grant.session !== null);
    byId("sessions").hidden = !lists.length;
    byId("links").hidden = !singles.length;
    byId("welcome").hidden = Boolean(lists.length || singles.length);
    const rows = this.distinct();
    const content = JSON.stringify([
      rows.map((row) => [row.listed, row.grant.id]),
      this.agents,
      singles,
      this.loaded,
      [...this.problems.values()].map(String),
      Math.floor(Date.now() / 10_000),
    ]);
    if (content === this.shown) return;
    this.shown = content;
    const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.focus : undefined;
    byId("session-rows").replaceChildren(...rows.map(({ grant, listed }) => this.row(grant, listed)));
    byId("no-sessions").hidden = rows.length > 0 || this.problems.size > 0 || !this.loaded;
    byId("link-rows").replaceChildren(...singles.map((grant) => this.single(grant)));
    this.drawAgents();
    const problems = lists.filter((grant) => this.problems.has(grant.id));
    byId("problems").replaceChildren(...problems.map((grant) => this.problem(grant, this.problems.get(grant.id)!)));
    if (focused) document.querySelector<HTMLElement>(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  private distinct(): { grant: Grant; listed: Listed }[] {
    const seen = new Map<string, { grant: Grant; listed: Listed }>();
    for (const row of this.rows) {
      const known = seen.get(row.listed.uid);
      if (known === undefined || (known.grant.mode === "watch" && row.grant.mode === "drive"))
        seen.set(row.listed.uid, row);
    }
    return [...seen.values()].sort((a, b) => b.listed.changed - a.listed.changed);
  }

  private row(grant: Grant, listed: Listed): HTMLElement {
    const { uid, name, agent, state, attached, changed } = listed;
    const aim: Aim = { grant, session: uid, agent, name, mode: grant.mode, create: false };
    const open = button({ class: "open", "data-focus": `open-${uid}` }, name, () => this.around.open(aim));
    const cells = [
      el("td", { class: "c-name" }, open),
      el("td", { class: "c-agent" }, agent),
      el("td", { class: "c-state" }, el("span", { class: "state", "data-state": state }, STATES[state] ?? state)),
      el("td", { class: "c-attached" }, attached ? `${attached} attached` : "\u2013"),
      el("td", { class: "c-changed" }, ago(changed, Date.now())),
    ];
    const acts = el("td", { class: "c-acts" });
    if (grant.mode === "drive")
      acts.append(
        button(
          { class: "plain small", "data-act": "rename", "data-focus": `rename-${uid}`, "aria-label": `Rename ${name}` },
          "Rename",
          () => void this.rename(grant, listed),
        ),
        button(
          { class: "plain small", "data-act": "end", "data-focus": `end-${uid}`, "aria-label": `End ${name}` },
          "End",
          () => void this.end(grant, listed),
        ),
      );
    return el("tr", { "data-uid": uid }, ...cells, acts);
  }

  private single(grant: Grant): HTMLElement {
    const { session, agent, name, mode } = grant;
    const shown = name || agent || "session";
    const aim: Aim = { grant, session, agent, name, mode, create: false };
    return el(
      "li",
      { "data-uid": session },
      button({ class: "open", "data-focus": `link-${grant.id}` }, shown, () => this.around.open(aim)),
      el("span", { class: "faint" }, mode === "watch" ? "watch only" : ""),
      button(
        { class: "plain small", "data-focus": `forget-${grant.id}`, "aria-label": `Forget ${shown}` },
        "Forget",
        () => this.around.forget(grant),
      ),
    );
  }

  private problem(grant: Grant, error: SternaError): HTMLElement {
    const lost = error.code === Code.TIMEOUT;
    const text = lost ? `${error.message} Trying again.` : error.message;
    const forget = button({ class: "plain small" }, "Forget this invite", () => this.around.forget(grant));
    return el("p", { class: "problem" }, text, lost ? null : forget);
  }

  private drawAgents(): void {
    const usable = this.agents.filter(({ grant, agent }) => grant.mode === "drive" && agent.ready);
    const select = byId("new-agent") as HTMLSelectElement;
    const chosen = select.value;
    const names = [...new Set(usable.map(({ agent }) => agent.name))];
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
    byId("new-form").hidden = !names.length;
    set(select, { disabled: names.length < 2 });
  }

  // ---- what is done ------------------------------------------------------------------------------------------

  private create(event: Event): void {
    event.preventDefault();
    const agent = (byId("new-agent") as HTMLSelectElement).value;
    const field = byId("new-name") as HTMLInputElement;
    const found = this.agents.find((row) => row.agent.name === agent && row.grant.mode === "drive");
    if (found === undefined) return;
    this.around.open({
      grant: found.grant,
      session: null,
      agent,
      name: field.value.trim(),
      mode: "drive",
      create: true,
    });
    field.value = "";
  }

  private async rename(grant: Grant, { uid, name }: Listed): Promise<void> {
    const wanted = await asked("Rename session", "Name", name);
    if (wanted && wanted !== name) await this.act(grant, "rename", { session: uid, name: wanted });
  }

  private async end(grant: Grant, { uid, name }: Listed): Promise<void> {
    const text = "Its program is ended, on all devices. What it did not save is lost.";
    if (await confirmed(`End ${name}?`, text, "End session")) await this.act(grant, "close", { session: uid });
  }

  private async act(grant: Grant, method: string, params: { [key: string]: unknown }): Promise<void> {
    try {
      await this.call(grant, method, params);
      byId("home-error").textContent = "";
    } catch (error) {
      byId("home-error").textContent = (error as Error).message;
    }
    await this.refresh();
  }

  private paste(event: Event): void {
    event.preventDefault();
    const field = byId("link-field") as HTMLInputElement;
    const error = byId("link-error");
    try {
      const link = pastedLink(field.value);
      field.value = error.textContent = "";
      this.around.useLink(link);
    } catch (problem) {
      error.textContent = (problem as Error).message;
    }
  }
}
