// The page: ties the conversation, the box, the list and the server together.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, icon } from "./dom.js";
import { banner, connect, setUpHeader } from "./header.js";
import { Run } from "./run.js";
import { drawList, setUpSidebar, slide } from "./sidebar.js";
import { listHeads, load, newId, remove, save } from "./store.js";
import { exportAll, importFile } from "./transfer.js";

const SAVE_MS = 3000; // between saves of an answer that is coming
const TITLE_CHARACTERS = 60;

/**
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {import("./store.js").Head} Head
 */

/** @type {Conversation} */
let current = newConversation();
/** @type {Map<string, {run: Run, conversation: Conversation}>} answers that are coming, by conversation */
const runs = new Map();

const chat = new Chat({ edit: editQuestion, retry });
const composer = new Composer({ send, cancel: () => runs.get(current.id)?.run.stop() });

/** @returns {Conversation} */
function newConversation() {
  return { id: newId(), title: "", updated: 0, messages: [] };
}

/** @param {string} text @param {import("./store.js").Picture[]} pictures */
function send(text, pictures) {
  const conversation = current;
  conversation.messages.push({ role: "user", text, pictures });
  conversation.title ||= [...text].slice(0, TITLE_CHARACTERS).join("") || pictures[0].name || "Picture";
  if (location.hash !== `#${conversation.id}`) history.pushState(null, "", `#${conversation.id}`);
  answer(conversation);
}

/** @param {Conversation} conversation */
async function answer(conversation) {
  const { id, messages } = conversation;
  banner();
  const run = new Run({ role: "assistant", text: "", state: "running" });
  const asked = [...messages];
  messages.push(run.answer);
  runs.set(id, { run, conversation });
  if (conversation === current) showCurrent();
  keep(conversation);
  const timer = setInterval(() => keep(conversation, false), SAVE_MS);
  await run.ask(asked, () => chat.refresh(run.answer));
  clearInterval(timer);
  if (run.status === 0 || run.status === 401) connect();
  if (runs.get(id)?.run !== run) return; // deleted, or asked again
  runs.delete(id);
  if (conversation === current) composer.setAnswering(false);
  await keep(conversation);
}

/** Asks again from the question at `index`, changed. What followed is dropped. */
function editQuestion(index, text, pictures) {
  cutAt(index);
  send(text, pictures);
  composer.area.focus();
}

/** @param {number} index  of the answer */
function retry(index) {
  cutAt(index);
  answer(current);
  composer.area.focus();
}

/** @param {number} index */
function cutAt(index) {
  forgetRun(current.id);
  current.messages.length = index;
}

/** @param {string} id */
function forgetRun(id) {
  const run = runs.get(id)?.run;
  runs.delete(id);
  run?.stop();
}

/** Saves a conversation. @param {Conversation} conversation @param {boolean} [isNews]  whether the list changes */
async function keep(conversation, isNews = true) {
  if (isNews) conversation.updated = Date.now();
  try {
    await save(conversation);
    if (isNews) await refreshList();
  } catch (error) {
    banner(`This conversation can’t be kept: ${error?.message ?? "the browser refuses storage"}.`);
  }
}

async function refreshList() {
  drawList(await listHeads(), current.id, { rename, remove: removeConversation });
}

/** @param {Head} head @param {string} title */
async function rename(head, title) {
  if (current.id === head.id) current.title = title;
  const running = runs.get(head.id)?.conversation;
  if (running) running.title = title;
  await save({ ...(running ?? (await load(head))), title });
  await refreshList();
  showTitle();
  if (document.activeElement === document.body) document.querySelector(`[href="#${head.id}"]`)?.focus();
}

/** @param {Head} head */
async function removeConversation(head) {
  forgetRun(head.id);
  await remove(head.id);
  if (current.id === head.id) location.hash = "";
  await refreshList();
  composer.area.focus();
}

function showCurrent() {
  showTitle();
  chat.show(current);
  composer.setAnswering(runs.has(current.id));
}

function showTitle() {
  document.title = current.title ? `${current.title} · mlxvlm` : "mlxvlm";
}

/** Opens the conversation that the address names; a new one without a name. */
async function openFromAddress() {
  slide(false);
  const id = location.hash.slice(1);
  const heads = await listHeads().catch(() => []);
  const head = heads.find((each) => each.id === id);
  const found = runs.get(id)?.conversation ?? (head ? await load(head) : newConversation());
  if (location.hash.slice(1) !== id) return; // the reader went on meanwhile, or asked already
  current = found;
  for (const message of current.messages) markInterrupted(message);
  showCurrent();
  drawList(heads, current.id, { rename, remove: removeConversation });
  composer.area.focus();
}

/** An answer that nobody is reading any more was cut off when the page was left. */
function markInterrupted(message) {
  if (message.state !== "running" || runs.get(current.id)?.run.answer === message) return;
  message.state = "failed";
  message.error = "The page was left before the answer was complete.";
}

function setUpFiles() {
  const hasFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").hidden = true;
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    byId("drop").hidden = true;
    composer.attach(event.dataTransfer.files);
  });
  byId("export").addEventListener("click", exportAll);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async ({ target }) => {
    try {
      const count = await importFile(target.files[0]);
      banner(count === 1 ? "One conversation was added." : `${count} conversations were added.`);
    } catch (error) {
      banner(error.message);
    }
    target.value = "";
    await refreshList();
  });
}

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
byId("composer").append(composer.node);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  composer.area.focus();
});
byId("new-chat").addEventListener("click", (event) => {
  // The address of a new chat may be the present one, which is no change.
  if (location.hash) return;
  event.preventDefault();
  openFromAddress();
});
addEventListener("hashchange", openFromAddress);
setUpHeader();
setUpSidebar();
setUpFiles();
connect();
openFromAddress();
