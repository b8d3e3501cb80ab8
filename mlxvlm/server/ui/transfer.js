// Conversations to and from a JSON file. What comes in is checked field by field: a file may come from anywhere.

import { listHeads, load, newId, save } from "./store.js";

const FORMAT = "mlxvlm conversations 1";

/** Offers all conversations as a download. */
export async function exportAll() {
  const conversations = await Promise.all((await listHeads()).map(load));
  const url = URL.createObjectURL(new Blob([JSON.stringify({ format: FORMAT, conversations }, null, 1)]));
  const link = document.createElement("a");
  link.href = url;
  link.download = `mlxvlm-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Adds a file's conversations to those here; throws an Error for the reader. @param {File} file @returns {Promise<number>} how many */
export async function importFile(file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not a JSON file.`);
  }
  if (content?.format !== FORMAT || !Array.isArray(content.conversations)) {
    throw new Error(`${file.name} holds no conversations of this page.`);
  }
  const conversations = content.conversations.map(conversation);
  for (const each of conversations) await save(each);
  return conversations.length;
}

const string = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : 0);
const list = (value) => (Array.isArray(value) ? value : []);

/** @returns {import("./store.js").Conversation} */
function conversation(value) {
  return {
    id: newId(),
    title: string(value?.title) || "Imported",
    updated: number(value?.updated),
    messages: list(value?.messages).map(message),
  };
}

/** @returns {import("./store.js").Question | import("./store.js").Answer} */
function message(value) {
  const text = string(value?.text);
  if (value?.role !== "assistant") return { role: "user", text, pictures: list(value?.pictures).flatMap(picture) };
  return { role: "assistant", text, state: "done" };
}

/** @returns {import("./store.js").Picture[]} none if it isn't one */
function picture(value) {
  if (!string(value?.url).startsWith("data:image/")) return [];
  return [{ name: string(value.name), url: value.url, width: number(value.width), height: number(value.height) }];
}
