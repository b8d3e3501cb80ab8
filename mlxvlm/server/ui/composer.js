// The box in which a question is written: text and pictures. Used below the chat and to edit an earlier question.

import { h, icon, iconButton } from "./dom.js";
import { pictureOf } from "./pictures.js";

/**
 * @typedef {import("./store.js").Picture} Picture
 * @typedef {object} Actions
 * @property {(text: string, pictures: Picture[]) => void} send
 * @property {() => void} cancel  stops the answer, or leaves the edit
 */

export class Composer {
  /** @param {Actions} actions @param {{text: string, pictures: Picture[]}} [question]  to edit */
  constructor(actions, question) {
    this.actions = actions;
    this.isEdit = Boolean(question);
    this.isAnswering = false;
    this.pending = 0; // pictures that are being read
    /** @type {Picture[]} */
    this.pictures = [...(question?.pictures ?? [])];
    this.build();
    this.area.value = question?.text ?? "";
    this.refresh();
  }

  build() {
    const label = this.isEdit ? "Edit the message" : "Message";
    this.area = h("textarea", { rows: "1", dir: "auto", "aria-label": label, placeholder: "Ask something" });
    this.area.addEventListener("input", () => this.refresh());
    this.area.addEventListener("keydown", (event) => this.onkey(event));
    this.area.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.attach(event.clipboardData.files);
    });
    this.thumbs = h("ul", { class: "thumbs", "aria-label": "Attached pictures" });
    this.problem = h("p", { class: "problem", role: "alert" });
    this.picker = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, "aria-label": "Pictures to attach" });
    this.picker.addEventListener("change", () => {
      this.attach(this.picker.files);
      this.picker.value = "";
    });
    const attach = iconButton("attach", "Attach pictures", () => this.picker.click());
    const cancel = this.isEdit ? h("button", { type: "button", onclick: () => this.actions.cancel() }, "Cancel") : null;
    this.button = h("button", { type: "button", class: "send", onclick: () => (this.isAnswering ? this.actions.cancel() : this.send()) });
    const row = h("div", { class: "row" }, attach, this.area, cancel, this.button);
    this.node = h("div", { class: "composer" }, this.thumbs, this.problem, row, this.picker);
  }

  /** @param {KeyboardEvent} event */
  onkey(event) {
    // Enter that ends the input of a Chinese or Japanese word sends nothing.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape" && (this.isEdit || this.isAnswering)) {
      this.actions.cancel();
    }
  }

  send() {
    const text = this.area.value.trim();
    if (this.isAnswering || this.pending || (!text && !this.pictures.length)) return;
    const { pictures } = this;
    this.area.value = "";
    this.pictures = [];
    this.problem.textContent = "";
    this.refresh();
    this.actions.send(text, pictures);
  }

  /** @param {Iterable<File>} files */
  async attach(files) {
    this.problem.textContent = "";
    for (const file of [...files]) {
      this.pending += 1;
      try {
        this.pictures.push(await pictureOf(file));
      } catch (error) {
        this.problem.textContent = error.message;
      }
      this.pending -= 1;
      this.refresh();
    }
    this.area.focus();
  }

  /** @param {boolean} isAnswering  then the button stops the answer */
  setAnswering(isAnswering) {
    this.isAnswering = isAnswering;
    this.refresh();
  }

  refresh() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    const label = this.isAnswering ? "Stop" : "Send";
    this.button.disabled = !this.isAnswering && !this.area.value.trim() && !this.pictures.length;
    if (this.button.title !== label) {
      this.button.title = label;
      this.button.setAttribute("aria-label", label);
      this.button.replaceChildren(icon(this.isAnswering ? "stop" : "send"));
    }
    this.thumbs.replaceChildren(...this.pictures.map((picture, i) => this.thumb(picture, i)));
  }

  /** @param {Picture} picture @param {number} i */
  thumb({ url, name, width, height }, i) {
    const drop = iconButton("close", `Remove ${name || "the picture"}`, () => {
      this.pictures.splice(i, 1);
      this.refresh();
      this.area.focus();
    });
    return h("li", { title: `${name}, ${width} × ${height}` }, h("img", { src: url, alt: name || "Picture" }), drop);
  }
}
