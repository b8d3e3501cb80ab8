// Markdown's blocks. A block is decided by its lines from the top, one line of look-ahead at most: once another block
// follows, no later line changes it. MarkdownView relies on that.

import { copyButton, h } from "./dom.js";
import { inline } from "./inline.js";

/**
 * @typedef {object} Kind
 * @property {(lines: string[], i: number) => boolean} starts  whether a block of this kind starts at line i
 * @property {(lines: string[], i: number) => number} end      the line after it
 * @property {(lines: string[], depth: number) => Node} render its lines to a node
 * @typedef {{kind: Kind, start: number, end: number}} Block
 */

const MAX_DEPTH = 6; // of lists and quotes in each other
const FENCE = /^\s*(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?!\S)(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)(?:([-*+•])|(\d{1,9})[.)])(\s+|$)/;
const DELIMITER = /^:?-+:?$/;
const MATH = [
  { open: /^\s*\$\$/, close: /\$\$\s*$/ },
  { open: /^\s*\\\[/, close: /\\\]\s*$/ },
];

const isBlank = (/** @type {string | undefined} */ line) => line !== undefined && !line.trim();
const indent = (/** @type {string} */ line) => line.length - line.trimStart().length;

/** The first line from i on that `isEnd` accepts, or the number of lines. */
function until(lines, i, isEnd) {
  while (i < lines.length && !isEnd(lines[i], i)) i += 1;
  return i;
}

/** @type {Kind} */
const fence = {
  starts: (lines, i) => FENCE.test(lines[i]),
  end(lines, i) {
    const mark = FENCE.exec(lines[i])[1];
    return until(lines, i + 1, (line) => closes(line, mark)) + 1;
  },
  render(lines) {
    const [, mark, info] = FENCE.exec(lines[0]);
    const language = info.trim().split(/\s/)[0] || null;
    const shift = new RegExp(`^\\s{0,${indent(lines[0])}}`);
    const isClosed = lines.length > 1 && closes(lines.at(-1), mark);
    const code = lines.slice(1, isClosed ? -1 : undefined).map((line) => line.replace(shift, "")).join("\n");
    const pre = h("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, h("code", {}, code));
    return h("div", { class: "code", dir: "ltr" }, h("div", {}, language, copyButton("Copy the code", () => code)), pre);
  },
};

const closes = (line, mark) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");

/** @type {Kind} */
const math = {
  starts: (lines, i) => MATH.some(({ open }) => open.test(lines[i])),
  end(lines, i) {
    const { open, close } = MATH.find((each) => each.open.test(lines[i]));
    if (close.test(lines[i].replace(open, ""))) return i + 1;
    const end = until(lines, i + 1, (line) => close.test(line) || isBlank(line));
    return isBlank(lines[end]) ? end : end + 1;
  },
  render: (lines) => h("p", { class: "math", dir: "ltr" }, lines.join("\n")),
};

/** @type {Kind} */
const heading = {
  starts: (lines, i) => HEADING.test(lines[i]),
  end: (_, i) => i + 1,
  render([line]) {
    const [, marks, text] = HEADING.exec(line);
    // The page's own name is the only first-level heading.
    return h(`h${Math.min(marks.length + 1, 6)}`, { dir: "auto" }, inline(text.trim().replace(/ #+$/, "").trim()));
  },
};

/** @type {Kind} */
const rule = {
  starts: (lines, i) => RULE.test(lines[i]),
  end: (_, i) => i + 1,
  render: () => h("hr"),
};

/** @type {Kind} */
const quote = {
  starts: (lines, i) => QUOTE.test(lines[i]),
  end: (lines, i) => until(lines, i, (line) => !QUOTE.test(line)),
  render: (lines, depth) => h("blockquote", { dir: "auto" }, ...render(lines.map((line) => line.replace(QUOTE, "")), depth + 1)),
};

/** @type {Kind} */
const table = {
  starts: (lines, i) =>
    lines[i].includes("|") &&
    i + 1 < lines.length &&
    cells(lines[i + 1]).every((cell) => DELIMITER.test(cell)) &&
    cells(lines[i]).length === cells(lines[i + 1]).length,
  end: (lines, i) => until(lines, i + 2, (line) => isBlank(line) || !line.includes("|")),
  render(lines) {
    const aligns = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
    const row = (line, tag) =>
      h("tr", {}, ...aligns.map((align, i) => h(tag, { class: align, dir: "auto" }, inline(cells(line)[i] ?? ""))));
    const body = lines.slice(2).map((line) => row(line, "td"));
    const content = h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, ...body));
    return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, content);
  },
};

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** @type {Kind} */
const list = {
  starts: (lines, i) => ITEM.test(lines[i]) && !RULE.test(lines[i]),
  end(lines, first) {
    const [, base, bullet] = ITEM.exec(lines[first]);
    return until(lines, first + 1, (line, i) => {
      if (isBlank(line) || indent(line) >= base.length + 2) return false;
      if (list.starts(lines, i)) return !ITEM.exec(line)[2] !== !bullet;
      // A paragraph goes on without indentation until a blank line or another block.
      return isBlank(lines[i - 1]) || KINDS.some((kind) => kind.starts(lines, i));
    });
  },
  render(lines, depth) {
    const [, base, bullet, number] = ITEM.exec(lines[0]);
    const items = /** @type {string[][]} */ ([]);
    for (const line of lines) {
      const match = indent(line) < base.length + 2 && !RULE.test(line) ? ITEM.exec(line) : null;
      if (match) items.push([line.slice(match[0].length)]);
      else items.at(-1).push(line.slice(Math.min(indent(line), base.length + (bullet ? 2 : number.length + 2))));
    }
    const isTight = !items.some((item) => item.some((line, i) => i && isBlank(line) && i + 1 < item.length));
    const nodes = items.map((item) => listItem(item, depth, isTight));
    return bullet ? h("ul", { dir: "auto" }, ...nodes) : h("ol", { start: number, dir: "auto" }, ...nodes);
  },
};

function listItem(lines, depth, isTight) {
  const box = /^\[([ xX])\]\s+/;
  const isTask = box.exec(lines[0])?.[1];
  const content = [lines[0].replace(box, isTask === " " ? "☐ " : "☑ "), ...lines.slice(1)];
  const nodes = render(content, depth + 1).map((node) => (isTight && node.nodeName === "P" ? [...node.childNodes] : [node]));
  return h("li", {}, ...nodes.flat());
}

/** @type {Kind} */
const paragraph = {
  starts: () => true,
  end: (lines, first) =>
    until(lines, first + 1, (line, i) => {
      if (isBlank(line)) return true;
      // "1986. was" in the middle of a sentence is no list.
      const isItem = list.starts(lines, i);
      return isItem ? /^[^\d]|^1\D/.test(line.trim()) : KINDS.some((kind) => kind.starts(lines, i));
    }),
  render: (lines) => h("p", { dir: "auto" }, inline(lines.map((line) => line.trimStart()).join("\n").trimEnd())),
};

const KINDS = [fence, math, heading, rule, quote, list, table];

/** @param {string[]} lines @returns {Block[]} */
export function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const kind = KINDS.find((each) => each.starts(lines, i)) ?? paragraph;
    const end = Math.min(kind.end(lines, i), lines.length);
    blocks.push({ kind, start: i, end });
    i = end;
  }
  return blocks;
}

/** @param {string[]} lines @param {number} [depth] @returns {Node[]} */
export function render(lines, depth = 0) {
  if (depth > MAX_DEPTH) return [paragraph.render(lines, depth)];
  return splitBlocks(lines).map(({ kind, start, end }) => kind.render(lines.slice(start, end), depth));
}
