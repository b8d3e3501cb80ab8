// The messages of the conversation that is shown. Draws at most once a frame and follows the end of the text
// until the reader scrolls up.

import { byId, h } from "./dom.js";
import { AnswerView, QuestionView } from "./message.js";

const NEAR_END = 48; // pixels from the end that still count as there

/**
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {object} Actions
 * @property {(index: number, text: string, pictures: import("./store.js").Picture[]) => void} edit
 * @property {(index: number) => void} retry
 */

export class Chat {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.scroller = byId("scroller");
    this.list = byId("messages");
    this.latest = byId("latest");
    this.views = new Map();
    this.changed = new Set();
    this.isFollowing = true;
    this.lastTop = 0;
    this.scroller.addEventListener("scroll", () => this.onscroll());
    this.latest.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.isFollowing && this.toEnd()).observe(this.list);
  }

  /** Shows a conversation; what is shown of it already stays. @param {Conversation} conversation */
  show({ messages }) {
    for (const [message, view] of this.views) {
      if (messages.includes(message)) continue;
      view.node.remove();
      this.views.delete(message);
    }
    messages.forEach((message, i) => this.views.has(message) || this.add(message, i));
    byId("live").replaceChildren();
    byId("welcome").hidden = messages.length > 0;
    this.follow();
  }

  add(message, i) {
    const view =
      message.role === "user"
        ? new QuestionView(message, (text, pictures) => this.actions.edit(i, text, pictures))
        : new AnswerView(message, () => this.actions.retry(i), message.state === "running" ? announce : undefined);
    this.views.set(message, view);
    this.list.append(view.node);
  }

  /** An answer changed: it is drawn in the next frame. @param {import("./store.js").Answer} answer */
  refresh(answer) {
    if (!this.changed.size) requestAnimationFrame(() => this.draw());
    this.changed.add(answer);
  }

  draw() {
    for (const answer of this.changed) this.views.get(answer)?.refresh();
    this.changed.clear();
    this.latest.hidden = this.isFollowing;
  }

  follow() {
    this.isFollowing = true;
    this.latest.hidden = true;
    this.toEnd();
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.lastTop = this.scroller.scrollTop;
  }

  onscroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
    // Text that grows moves the end away without a scroll: only going up means that the reader wants to stay.
    if (isAtEnd) this.isFollowing = true;
    else if (scrollTop < this.lastTop) this.isFollowing = false;
    this.lastTop = scrollTop;
    this.latest.hidden = this.isFollowing || isAtEnd;
  }
}

/** Lets a screen reader read a finished block, not each token. @param {Node} node */
function announce(node) {
  byId("live").append(h("p", {}, node.textContent));
}
