// A growing Markdown text as DOM: blocks that are finished stay as they are, only the open end is rendered again.

import { splitBlocks } from "./blocks.js";

export class MarkdownView {
  /**
   * @param {HTMLElement} root
   * @param {(node: Node) => void} [onfinished]  told each block once nothing can change it any more
   */
  constructor(root, onfinished = () => {}) {
    this.root = root;
    this.onfinished = onfinished;
    this.finished = 0; // characters in finished blocks
    /** @type {{source: string, node: Node}[]} */
    this.open = [];
  }

  /** Shows `text`, which begins with what was shown before. @param {string} text */
  update(text) {
    const lines = text.slice(this.finished).split("\n");
    this.draw(splitBlocks(lines).map(({ kind, start, end }) => ({ kind, lines: lines.slice(start, end) })));
    // The last line may still grow, so the last block that whole lines make can still change; those before cannot.
    const stable = splitBlocks(lines.slice(0, -1));
    if (stable.length < 2) return;
    const count = stable.length - 1;
    for (const { node } of this.open.splice(0, count)) this.onfinished(node);
    this.finished += lines.slice(0, stable[count].start).join("\n").length + 1;
  }

  /** Nothing follows. */
  finish() {
    for (const { node } of this.open.splice(0)) this.onfinished(node);
  }

  /** @param {{kind: import("./blocks.js").Kind, lines: string[]}[]} blocks */
  draw(blocks) {
    const before = this.open;
    this.open = blocks.map(({ kind, lines }, i) => {
      const source = lines.join("\n");
      if (before[i]?.source === source) return before[i];
      const node = kind.render(lines, 0);
      if (before[i]) this.root.replaceChild(node, before[i].node);
      else this.root.append(node);
      return { source, node };
    });
    for (const { node } of before.slice(blocks.length)) this.root.removeChild(node);
  }
}
