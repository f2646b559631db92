/** A menu under a button (ARIA Authoring Practices, "Menu Button"). */

import { el, set } from "./dom.js";

export interface MenuItem {
  id: string;
  text: string;
  hint?: string;
  act: () => void;
  /** Of a choice: whether it is on; items of one group exclude each other. */
  checked?: boolean;
  group?: string;
  off?: boolean;
  /** The menu stays open after it. */
  stays?: boolean;
  /** A line follows. */
  line?: boolean;
}

export class Menu {
  private open: HTMLElement | null = null;
  private before: HTMLElement | null = null;

  constructor(
    private readonly opener: HTMLElement,
    private readonly items: () => MenuItem[],
  ) {
    set(opener, { "aria-haspopup": "menu", "aria-expanded": "false" });
    opener.addEventListener("click", () => (this.open === null ? this.show() : this.hide(true)));
    document.addEventListener("pointerdown", (event) => {
      const target = event.target as Node;
      if (this.open !== null && !this.open.contains(target) && !opener.contains(target)) this.hide(false);
    });
  }

  private show(): void {
    const menu = el("div", { id: "menu", class: "menu", role: "menu", "aria-label": "Menu" });
    for (const item of this.items()) {
      const role = item.checked === undefined ? "menuitem" : item.group ? "menuitemradio" : "menuitemcheckbox";
      const made = el(
        "button",
        {
          type: "button",
          class: "item",
          role,
          "data-item": item.id,
          tabindex: -1,
          disabled: item.off,
          "aria-checked": item.checked === undefined ? null : String(item.checked),
        },
        el("span", { class: "item-text" }, item.text),
        item.hint ? el("kbd", {}, item.hint) : null,
      );
      made.addEventListener("click", () => {
        if (!item.stays) this.hide(true);
        item.act();
      });
      menu.append(made);
      if (item.line) menu.append(el("hr", { role: "separator" }));
    }
    menu.addEventListener("keydown", (event) => this.key(event));
    this.before = document.activeElement instanceof HTMLElement ? document.activeElement : null;
    this.opener.after(menu);
    this.open = menu;
    set(this.opener, { "aria-expanded": "true" });
    this.focus(0);
  }

  private all(): HTMLElement[] {
    return [...(this.open?.querySelectorAll<HTMLElement>(".item:not([disabled])") ?? [])];
  }

  private focus(at: number): void {
    const all = this.all();
    all[(at + all.length) % all.length]?.focus();
  }

  private key(event: KeyboardEvent): void {
    const at = this.all().indexOf(document.activeElement as HTMLElement);
    if (event.key === "ArrowDown") this.focus(at + 1);
    else if (event.key === "ArrowUp") this.focus(at - 1);
    else if (event.key === "Home") this.focus(0);
    else if (event.key === "End") this.focus(-1);
    else if (event.key === "Escape" || event.key === "Tab") this.hide(true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  private hide(focus: boolean): void {
    this.open?.remove();
    this.open = null;
    set(this.opener, { "aria-expanded": "false" });
    if (focus) (this.before ?? this.opener).focus();
  }
}
