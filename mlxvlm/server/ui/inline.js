// Markdown inside a line to DOM nodes: code, emphasis, links. Everything else, HTML and math too, stays text.
// One pass over tokens; every repetition is bounded, so that no text takes more than linear time.

import { h } from "./dom.js";

const TOKENS = new RegExp(
  [
    /(?<code>`{1,3})(?!`)(?<inside>[^`](?:[^\n]{0,1000}?[^`])?)\k<code>(?!`)/,
    /(?<math>\$\$[^$]{1,1000}\$\$|\$(?=\S)[^$\n]{0,500}?[^$\s\\]\$(?!\d)|\\\([^\n]{1,500}?\\\)|\\\[[^\n]{1,500}?\\\])/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<image>!?)\[(?<label>(?:[^[\]\\]|\\.|\[[^[\]]{0,200}\]){0,1000})\]\(\s?<?(?<target>[^\s<>()]{0,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,2000})?)>?(?:\s"[^"\n]{0,500}")?\s?\)/,
    /<(?<angled>https?:\/\/[^\s<>]{1,2000})>/,
    /(?<bare>https?:\/\/[^\s<>"`*]{1,2000})/,
    /(?<break><br ?\/?>| {2,9}\n|\\\n)/,
    /(?<run>\*{1,3}|_{1,3}|~~)/,
  ]
    .map((part) => part.source)
    .join("|"),
  "gu",
);

const ELEMENTS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

/** @param {string} text @param {boolean} [isInLink]  links in it stay text @returns {DocumentFragment} */
export function inline(text, isInLink = false) {
  const line = new Line();
  let end = 0;
  for (const match of text.matchAll(TOKENS)) {
    line.add(text.slice(end, match.index));
    end = match.index + match[0].length;
    const { run, bare } = /** @type {Record<string, string>} */ (match.groups);
    if (run) {
      line.mark(run, text[match.index - 1] ?? " ", text[end] ?? " ");
    } else if (bare && !isInLink) {
      const url = withoutPunctuation(bare);
      end = match.index + url.length;
      line.add(link(url, url));
    } else {
      line.add(node(match, isInLink));
    }
  }
  line.add(text.slice(end));
  return line.close();
}

/** The node of any token but emphasis and bare addresses. @param {RegExpMatchArray} match @param {boolean} isInLink */
function node(match, isInLink) {
  const { inside, escaped, label, target, image, angled, break: lineBreak } = match.groups;
  if (inside !== undefined) return h("code", {}, inside.length > 2 ? inside.replace(/^ (.*) $/, "$1") : inside);
  if (escaped) return escaped;
  if (lineBreak) return h("br");
  if (isInLink || (!angled && target === undefined)) return match[0];
  if (angled) return link(angled, angled);
  // A picture of the web is never loaded: that would tell its server what the model wrote.
  if (image) return link(target, label || target, match[0]);
  return link(target, inline(label, true), match[0]);
}

/**
 * A link to http or https; anything else stays the text it was.
 * @param {string} target @param {string | DocumentFragment} content @param {string} [source]
 */
function link(target, content, source = target) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return source;
  return h("a", { href: target, title: target, target: "_blank", rel: "noopener noreferrer" }, content);
}

/** An address without the punctuation of the sentence around it. @param {string} url */
function withoutPunctuation(url) {
  const bare = url.replace(/[.,;:!?'_~\]]{1,100}$/, "");
  return bare.endsWith(")") && !bare.includes("(") ? withoutPunctuation(bare.slice(0, -1)) : bare;
}

/** Nodes of a line and the emphasis that is open at its end; each mark is open once at most. */
class Line {
  constructor() {
    /** @type {{mark: string, parent: DocumentFragment | HTMLElement}[]} */
    this.open = [];
    this.top = document.createDocumentFragment();
  }

  /** @param {Node | string} content */
  add(content) {
    if (content !== "") this.top.append(content);
  }

  /** A run of `*`, `_` or `~` between two characters: closes what it can, then opens. */
  mark(run, before, after) {
    const isWord = /[\p{L}\p{N}]/u;
    const isUnderscore = run[0] === "_";
    const mayClose = !/\s/.test(before) && !(isUnderscore && isWord.test(after));
    const mayOpen = !/\s/.test(after) && !(isUnderscore && isWord.test(before));
    let rest = run;
    while (rest && mayClose) {
      const entry = this.open.findLast(({ mark }) => rest.startsWith(mark));
      if (!entry) break;
      this.shut(entry);
      rest = rest.slice(entry.mark.length);
    }
    while (rest && mayOpen) {
      const mark = rest.length > 1 ? rest.slice(0, 2) : rest;
      if (this.open.some((entry) => entry.mark === mark)) break;
      this.open.push({ mark, parent: this.top });
      this.top = document.createDocumentFragment();
      rest = rest.slice(mark.length);
    }
    this.add(rest);
  }

  /** Closes an open mark; those opened inside it and never closed are text. */
  shut(entry) {
    while (this.open.at(-1) !== entry) this.undo();
    this.open.pop();
    const content = this.top;
    this.top = entry.parent;
    this.top.append(h(ELEMENTS[entry.mark], {}, content));
  }

  undo() {
    const { mark, parent } = this.open.pop();
    parent.append(mark, this.top);
    this.top = parent;
  }

  /** @returns {DocumentFragment} */
  close() {
    while (this.open.length) this.undo();
    return this.top;
  }
}
