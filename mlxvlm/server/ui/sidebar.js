// The list of conversations: open, rename, delete. On narrow screens it slides over the chat.

import { byId, h, iconButton } from "./dom.js";

/**
 * @typedef {import("./store.js").Head} Head
 * @typedef {{rename: (head: Head, title: string) => void, remove: (head: Head) => void}} Actions
 */

/** @param {Head[]} heads @param {string} currentId @param {Actions} actions */
export function drawList(heads, currentId, actions) {
  const list = byId("conversations");
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  if (focused?.localName === "input") return; // a title is being written
  const place = [...(focused?.parentNode.children ?? [])].indexOf(focused);
  list.replaceChildren(...heads.map((head) => item(head, head.id === currentId, actions)));
  if (focused) list.querySelector(`[data-id="${focused.parentNode.dataset.id}"]`)?.children[place].focus();
}

/** @param {Head} head @param {boolean} isCurrent @param {Actions} actions */
function item(head, isCurrent, actions) {
  const { id, title } = head;
  const link = h("a", { href: `#${id}`, dir: "auto", title, "aria-current": isCurrent ? "page" : null }, title);
  const rename = iconButton("pencil", `Rename ${title}`, () => {
    node.replaceChildren(titleBox(title, (text) => actions.rename(head, text)));
    node.querySelector("input").select();
  });
  const remove = iconButton("trash", `Delete ${title}`, () => confirmDelete(title, () => actions.remove(head)));
  const node = h("li", { "data-id": id }, link, rename, remove);
  return node;
}

/** An input in the title's place: Enter or leaving it keeps the text, Escape does not. */
function titleBox(title, done) {
  const box = h("input", { value: title, "aria-label": "New title", dir: "auto", maxlength: "200" });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") box.value = title;
    if (event.key === "Escape" || (event.key === "Enter" && !event.isComposing)) box.blur();
  });
  box.addEventListener("blur", () => done(box.value.trim() || title), { once: true });
  return box;
}

/** @param {string} title @param {() => void} onyes */
function confirmDelete(title, onyes) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = `Delete “${title}”?`;
  dialog.returnValue = "";
  dialog.onclose = () => dialog.returnValue === "yes" && onyes();
  dialog.showModal();
}

/** @param {boolean} isOpen */
export function slide(isOpen) {
  document.body.classList.toggle("sidebar-open", isOpen);
  byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
  byId("stage").inert = isOpen;
  if (isOpen) byId("close-sidebar").focus();
}

export function setUpSidebar() {
  byId("open-sidebar").addEventListener("click", () => slide(true));
  const close = () => {
    slide(false);
    byId("open-sidebar").focus();
  };
  byId("close-sidebar").addEventListener("click", close);
  byId("shade").addEventListener("click", close);
  byId("sidebar").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.body.classList.contains("sidebar-open")) close();
  });
}
