/** Questions to the user, in the page's own dialogs: every text is text. */

import { button, byId, type Child, el, set } from "./dom.js";
import { pasteRisk, visible, withoutControls } from "./input.js";

const SHOWN_MAX_CHARS = 4_000;

interface Answer<T> {
  label: string;
  value: T;
  primary?: boolean;
  danger?: boolean;
  /** What has to be done first; false: the dialog stays. */
  before?: () => Promise<boolean>;
}

/** Shows a dialog; resolves with the answer chosen, or null when it was left. */
export function ask<T>(
  id: string,
  title: string,
  content: Child[],
  answers: Answer<T>[],
  away = "Cancel",
): Promise<T | null> {
  return new Promise((resolve) => {
    let chosen: T | null = null;
    const heading = el("h2", { id: `${id}-title` }, title);
    const row = el("div", { class: "answers" });
    const dialog = el(
      "dialog",
      { id, class: "dialog", "aria-labelledby": `${id}-title` },
      el("form", { method: "dialog" }, heading, ...content, row),
    );
    const choose = (value: T | null): void => {
      chosen = value;
      dialog.close();
    };
    row.append(button({ class: "plain", "data-answer": "cancel" }, away, () => choose(null)));
    for (const { label, value, primary, danger, before } of answers) {
      const kind = danger ? "danger" : primary ? "primary" : "plain";
      const attributes = { class: kind, "data-answer": "yes", type: primary ? "submit" : "button" };
      const act = async (event: Event): Promise<void> => {
        event.preventDefault();
        if (before === undefined || (await before())) choose(value);
      };
      row.append(button(attributes, label, (event) => void act(event)));
    }
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(chosen);
    });
    document.body.append(dialog);
    dialog.showModal();
    // What cannot be undone is never one key away.
    const first = ["input[type=text]", ".primary", ".plain"].map((one) => dialog.querySelector<HTMLElement>(one));
    first.find((one) => one !== null)?.focus();
  });
}

/** Asks before something that cannot be undone. */
export async function confirmed(title: string, text: string, label: string): Promise<boolean> {
  return (await ask("confirm", title, [el("p", {}, text)], [{ label, value: true, danger: true }])) === true;
}

/** Asks before a session is ended. */
export function confirmEnd(name: string): Promise<boolean> {
  const text = "Its program is ended, on all devices. What it did not save is lost.";
  return confirmed(`End ${name}?`, text, "End session");
}

/** Asks for another name of a session until `save` takes it, or the user gives up. */
export async function askName(name: string, save: (name: string) => Promise<unknown>): Promise<void> {
  const rules = byId("new-name");
  const field = el("input", { type: "text", id: "asked", value: name, autocomplete: "off", spellcheck: "false" });
  for (const rule of ["pattern", "title", "maxlength"]) set(field, { [rule]: rules.getAttribute(rule) });
  const problem = el("p", { class: "problem", role: "alert" });
  const before = async (): Promise<boolean> => {
    const wanted = field.value.trim();
    if (!field.reportValidity()) return false;
    try {
      if (wanted && wanted !== name) await save(wanted);
      return true;
    } catch (error) {
      problem.textContent = (error as Error).message;
      return false;
    }
  };
  const content = [el("label", { for: "asked" }, "Name"), field, problem];
  await ask("ask", "Rename session", content, [{ label: "Save", value: true, primary: true, before }]);
}

/** What a user decided about a paste: the text to paste, and whether to ask again. */
export interface PasteAnswer {
  text: string;
  always: boolean;
}

/** Returns what is to be pasted after a question, if it deserves one; null: nothing. */
export async function guardedPaste(text: string, trusting: boolean): Promise<PasteAnswer | null> {
  const risk = pasteRisk(text);
  if (risk === null || (trusting && !risk.controls)) return { text, always: trusting };
  const always = el("input", { type: "checkbox", id: "paste-always" });
  const shown = visible(text);
  const cut = shown.length > SHOWN_MAX_CHARS;
  const pre = el("pre", { id: "paste-text", tabindex: 0 }, cut ? `${shown.slice(0, SHOWN_MAX_CHARS)}\n…` : shown);
  const what = risk.controls
    ? "Paste control characters?"
    : risk.lines > 1
      ? `Paste ${risk.lines} lines?`
      : "Paste a whole line?";
  const why = risk.controls
    ? "It contains control characters, which a program may take for keys."
    : "A line may be run as a command as soon as it is pasted.";
  const content: Child[] = [el("p", {}, why), pre];
  if (!risk.controls) content.push(el("label", { class: "check" }, always, " Do not ask again in this tab"));
  const answers = risk.controls
    ? [
        { label: "Paste as it is", value: "raw", danger: true },
        { label: "Paste without them", value: "clean", primary: true },
      ]
    : [{ label: "Paste", value: "raw", primary: true }];
  const answer = await ask("paste", what, content, answers);
  if (answer === null) return null;
  return { text: answer === "clean" ? withoutControls(text) : text, always: trusting || always.checked };
}

/** Shows text that can be selected and copied where the terminal itself cannot be (touch screens, screen readers). */
export async function showText(text: string): Promise<void> {
  const pre = el("pre", { id: "as-text", tabindex: 0 }, text);
  const shown = ask(
    "text",
    "Text of the terminal",
    [pre],
    [{ label: "Copy all", value: true, primary: true }],
    "Close",
  );
  pre.scrollTop = pre.scrollHeight;
  if (await shown) await navigator.clipboard?.writeText(text).catch(() => undefined);
}
