// One message of the chat: a question with its pictures, or an answer with its figures.

import { Composer } from "./composer.js";
import { byId, copyButton, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/**
 * @typedef {import("./store.js").Question} Question
 * @typedef {import("./store.js").Answer} Answer
 * @typedef {import("./store.js").Picture} Picture
 */

export class QuestionView {
  /** @param {Question} question @param {(text: string, pictures: Picture[]) => void} onedit */
  constructor(question, onedit) {
    this.question = question;
    this.onedit = onedit;
    this.node = h("article", { class: "question", "aria-label": "You" });
    this.show();
  }

  show() {
    const { text, pictures } = this.question;
    this.node.replaceChildren();
    if (pictures.length) this.node.append(h("div", { class: "pictures" }, ...pictures.map(enlargeable)));
    this.pencil = iconButton("pencil", "Edit and ask again", () => this.edit());
    this.node.append(h("div", { class: "actions" }, this.pencil));
    if (text) this.node.append(h("p", { class: "bubble", dir: "auto" }, text));
  }

  edit() {
    const cancel = () => {
      this.show();
      this.pencil.focus();
    };
    const composer = new Composer({ send: this.onedit, cancel }, this.question);
    this.node.replaceChildren(composer.node);
    composer.refresh(); // its height is known now
    composer.area.focus();
  }
}

/** @param {Picture} picture */
function enlargeable({ url, name, width, height }) {
  const enlarge = () => {
    const viewer = byId("viewer");
    viewer.querySelector("img")?.remove();
    viewer.append(h("img", { src: url, alt: name }));
    viewer.showModal();
  };
  const image = h("img", { src: url, alt: name || "Picture", width: String(width), height: String(height) });
  return h("button", { type: "button", class: "picture", title: "Enlarge", onclick: enlarge }, image);
}

export class AnswerView {
  /** @param {Answer} answer @param {() => void} onretry @param {(node: Node) => void} [announce]  told finished blocks */
  constructor(answer, onretry, announce) {
    this.answer = answer;
    this.body = h("div", { class: "markdown" });
    this.markdown = new MarkdownView(this.body, announce);
    this.foot = h("div", {});
    const copy = copyButton("Copy the answer", () => answer.text);
    const retry = iconButton("retry", "Ask again", onretry);
    retry.classList.add("retry");
    this.figures = h("span", { class: "figures" });
    this.actions = h("div", { class: "actions" }, copy, retry, this.figures);
    this.node = h("article", { class: "answer", "aria-label": "Answer" }, this.body, this.foot, this.actions);
    this.refresh();
  }

  refresh() {
    const { text, state, figures } = this.answer;
    this.markdown.update(text);
    const isRunning = state === "running";
    if (!isRunning) this.markdown.finish();
    this.node.setAttribute("aria-busy", String(isRunning));
    this.node.classList.toggle("waiting", isRunning && !text);
    this.actions.hidden = isRunning;
    this.foot.replaceChildren(...this.remarks());
    this.figures.textContent = figures ? figuresText(figures) : "";
  }

  remarks() {
    const { state, error, isCut } = this.answer;
    if (state === "failed") return [h("p", { class: "problem", role: "alert" }, error ?? "")];
    if (state === "stopped") return [h("p", { class: "note" }, "Stopped.")];
    return isCut ? [h("p", { class: "note" }, "The answer reached the most tokens allowed.")] : [];
  }
}

/** @param {import("./store.js").Figures} figures */
function figuresText({ prompt, cached, completion, rate, firstToken }) {
  const parts = [`${prompt} prompt tokens${cached ? ` (${cached} cached)` : ""}`, `${completion} answer tokens`];
  if (rate) parts.push(`${rate.toFixed(1)} tok/s`);
  if (firstToken) parts.push(`first after ${firstToken.toFixed(2)} s`);
  return parts.join(" · ");
}
