/** What xterm.js has in place of its style elements, whose text a strict Content-Security-Policy refuses. */

class StyleElement extends HTMLElement {
  private readonly sheet = new CSSStyleSheet();

  override get textContent(): string {
    return "";
  }

  override set textContent(css: string) {
    this.sheet.replaceSync(css);
  }

  connectedCallback(): void {
    if (!document.adoptedStyleSheets.includes(this.sheet)) document.adoptedStyleSheets.push(this.sheet);
  }

  disconnectedCallback(): void {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((sheet) => sheet !== this.sheet);
  }
}

/** Makes it known; before any terminal is made. */
export function defineStyleElement(): void {
  customElements.define("sterna-style", StyleElement);
}
