/** The list of sessions: what the invites allow to see, to open, to start, to rename, to end. */

import { type Caller, connectCaller, type SternaError } from "../../src/browser.js";
import { Code, isFinal } from "../../src/errors.js";
import { askName, confirmed, confirmEnd } from "./dialogs.js";
import { button, byId, el, set } from "./dom.js";
import { type Grant, grantText, pastedLink } from "./grants.js";
import type { ParsedLink } from "../../src/links.js";
import type { KeptRow } from "./store.js";
import type { Aim } from "./tab.js";
import { ago, FORGET_KEY, REVOKED } from "./texts.js";

const REFRESH_MS = 4_000;
const PAGES_MAX = 50;
const LOOPBACK = ["localhost", "127.0.0.1", "[::1]"];

export interface Listed {
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
  useLink(link: ParsedLink): Promise<void>;
  forget(grant: Grant): void;
  forgetKey(): Promise<void>;
  /** Whether any session is open in a tab. */
  busy(): boolean;
  renamed(uid: string, name: string): void;
  keepList(rows: KeptRow[]): void;
}

export class Home {
  private readonly callers = new Map<string, Promise<Caller>>();
  private readonly problems = new Map<string, SternaError>();
  private timer: ReturnType<typeof setTimeout> | undefined;
  private running = false;
  private loaded = false;
  private rows: { grant: Grant; listed: Listed }[] = [];
  private agents: { grant: Grant; agent: Agent }[] = [];
  private shown = "";
  /** The grants by which the node was asked and answered. */
  private readonly told = new Set<string>();
  private kept = "";

  constructor(private readonly around: Opener) {
    // A node that only this machine reaches makes links for this machine only when it is told so.
    if (LOOPBACK.includes(location.hostname)) byId("share-command").append(" --local");
    byId("link-form").addEventListener("submit", (event) => void this.paste(event));
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
      const open = this.lists().filter((grant) => !this.refused(grant));
      await Promise.all(open.map((grant) => this.load(grant)));
    } finally {
      this.running = false;
    }
    this.draw();
    this.keep();
    if (this.visible) this.timer = setTimeout(() => this.visible && void this.refresh(), REFRESH_MS);
  }

  /** Shows what was there when the node was last reached, until it answers. */
  restore(rows: KeptRow[]): void {
    const lists = new Map(this.lists().map((grant) => [grant.id, grant]));
    for (const { grant: id, listed } of rows) {
      const grant = lists.get(id);
      if (grant !== undefined) this.rows.push({ grant, listed });
    }
  }

  private keep(): void {
    const rows = this.rows.map(({ grant, listed }) => ({ grant: grant.id, listed }));
    const kept = JSON.stringify(rows);
    if (kept !== this.kept) this.around.keepList(rows);
    this.kept = kept;
  }

  /** Whether the node refused a ticket for good. */
  private refused(grant: Grant): boolean {
    return isFinal(this.problems.get(grant.id)?.code ?? Code.OK);
  }

  private trouble(grant: Grant, error: SternaError): void {
    this.problems.set(grant.id, error);
    if (!isFinal(error.code)) return;
    this.rows = this.rows.filter((row) => row.grant.id !== grant.id);
    this.agents = this.agents.filter((row) => row.grant.id !== grant.id);
  }

  private async call(grant: Grant, method: string, params: { [key: string]: unknown }): Promise<unknown> {
    const { ticket, node, mode } = grant;
    let caller = this.callers.get(ticket);
    if (caller === undefined) {
      caller = connectCaller({ url: this.around.address(), node, token: ticket, mode });
      this.callers.set(ticket, caller);
      const told = (error: SternaError): void => {
        this.trouble(grant, error);
        this.draw();
      };
      void caller.then((made) => (made.onrefused = told)).catch(() => undefined);
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
      this.told.add(grant.id);
      this.loaded = true;
      this.rows = this.rows.filter((row) => row.grant.id !== grant.id);
      this.agents = this.agents.filter((row) => row.grant.id !== grant.id);
      for (const listed of sessions) {
        this.rows.push({ grant, listed });
        this.around.renamed(listed.uid, listed.name);
      }
      for (const agent of agents) this.agents.push({ grant, agent });
    } catch (error) {
      if ((error as SternaError).code !== Code.TIMEOUT) this.callers.delete(grant.ticket);
      this.trouble(grant, error as SternaError);
    }
  }

  // ---- what is shown -----------------------------------------------------------------------------------------

  private draw(): void {
    const lists = this.lists();
    const singles = this.around.grants().filter((grant) => grant.session !== null);
    byId("sessions").hidden = !lists.length;
    byId("links").hidden = !singles.length;
    byId("welcome").hidden = Boolean(lists.length || singles.length) || this.around.busy();
    const kept = new Set(lists.map((grant) => grant.id));
    this.rows = this.rows.filter((row) => kept.has(row.grant.id));
    this.agents = this.agents.filter((row) => kept.has(row.grant.id));
    const rows = this.distinct();
    const content = JSON.stringify([
      rows.map((row) => [row.listed, row.grant.id]),
      this.agents,
      lists,
      singles,
      this.loaded,
      [...this.told],
      [...this.problems.values()].map(String),
      Math.floor(Date.now() / 10_000),
    ]);
    if (content === this.shown) return;
    this.shown = content;
    const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.focus : undefined;
    byId("session-rows").replaceChildren(...rows.map(({ grant, listed }) => this.row(grant, listed)));
    byId("session-table").hidden = !rows.length;
    byId("no-sessions").hidden = rows.length > 0 || this.problems.size > 0 || !this.loaded;
    byId("invites").replaceChildren(...(lists.length > 1 ? lists.map((grant) => this.invite(grant)) : []));
    byId("link-rows").replaceChildren(...singles.map((grant) => this.single(grant)));
    this.drawAgents();
    const problems = lists.filter((grant) => this.problems.has(grant.id));
    byId("problems").replaceChildren(...problems.map((grant) => this.problem(grant, this.problems.get(grant.id)!)));
    if (focused) document.querySelector<HTMLElement>(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  private distinct(): { grant: Grant; listed: Listed }[] {
    const seen = new Map<string, { grant: Grant; listed: Listed }>();
    for (const row of [...this.rows].sort((a, b) => a.grant.added - b.grant.added)) {
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
      el("td", { class: "c-state" }, el("span", { class: "state", "data-state": state }, state)),
      el("td", { class: "c-attached" }, attached ? `${attached} attached` : "\u2013"),
      el("td", { class: "c-changed" }, ago(changed, Date.now())),
    ];
    const acts = el("td", { class: "c-acts" });
    const away = this.problems.has(grant.id) || !this.told.has(grant.id);
    const ending = state === "exited" ? "Remove" : "End";
    if (grant.mode === "drive")
      acts.append(
        button(
          {
            class: "plain small",
            "data-act": "rename",
            "data-focus": `rename-${uid}`,
            "aria-label": `Rename ${name}`,
            disabled: away,
          },
          "Rename",
          () => void this.rename(grant, listed),
        ),
        button(
          {
            class: "plain small",
            "data-act": "end",
            "data-focus": `end-${uid}`,
            "aria-label": `${ending} ${name}`,
            disabled: away,
          },
          ending,
          () => void this.end(grant, listed),
        ),
      );
    return el("tr", { "data-uid": uid, class: away && "away" }, ...cells, acts);
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

  /** One of several links that the list joins: which is which, and how to be rid of it. */
  private invite(grant: Grant): HTMLElement {
    const count = this.rows.filter((row) => row.grant.id === grant.id).length;
    const added = ago(grant.added / 1_000, Date.now());
    const shown = `Link to ${grantText(grant)}, added ${added}: ${count} session${count === 1 ? "" : "s"}`;
    return el(
      "li",
      {},
      el("span", { class: "faint" }, shown),
      button(
        { class: "plain small", "data-focus": `forget-${grant.id}`, "aria-label": `Forget: ${shown}` },
        "Forget",
        () => this.around.forget(grant),
      ),
    );
  }

  private problem(grant: Grant, error: SternaError): HTMLElement {
    const lost = error.code === Code.TIMEOUT;
    const revoked = error.code === Code.REVOKED;
    const text = lost ? `${error.message} Trying again.` : revoked ? REVOKED : error.message;
    const forget = revoked
      ? button({ class: "plain small", "data-act": "key" }, FORGET_KEY, () => void this.around.forgetKey())
      : button({ class: "plain small" }, "Forget this link", () => this.around.forget(grant));
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
    // Where two links have agents of the same name, the one that was here first counts.
    const first = [...this.agents].sort((a, b) => a.grant.added - b.grant.added);
    const found = first.find((row) => row.agent.name === agent && row.grant.mode === "drive");
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
    await askName(name, (wanted) => this.call(grant, "rename", { session: uid, name: wanted }));
    await this.refresh();
  }

  private async end(grant: Grant, { uid, name, state }: Listed): Promise<void> {
    const sure =
      state === "exited"
        ? await confirmed(`Remove ${name}?`, "Its last output is removed with it.", "Remove")
        : await confirmEnd(name);
    if (!sure) return;
    try {
      await this.call(grant, "close", { session: uid });
      byId("home-error").textContent = "";
    } catch (error) {
      byId("home-error").textContent = (error as Error).message;
    }
    await this.refresh();
  }

  private async paste(event: Event): Promise<void> {
    event.preventDefault();
    const field = byId("link-field") as HTMLInputElement;
    const error = byId("link-error");
    try {
      const link = pastedLink(field.value);
      field.value = error.textContent = "";
      await this.around.useLink(link);
    } catch (problem) {
      error.textContent = (problem as Error).message;
    }
  }
}
