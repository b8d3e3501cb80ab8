// Conversations in IndexedDB. Titles and messages lie apart: the list is read without the pictures.

/**
 * @typedef {{name: string, url: string, width: number, height: number}} Picture  url: a data: URL
 * @typedef {"running" | "done" | "stopped" | "failed"} State
 * @typedef {{prompt: number, cached: number, completion: number, rate: number | null, firstToken: number | null}} Figures
 * @typedef {{role: "user", text: string, pictures: Picture[]}} Question
 * @typedef {{role: "assistant", text: string, state: State, error?: string, isCut?: boolean, figures?: Figures}} Answer
 * @typedef {{id: string, title: string, updated: number}} Head
 * @typedef {Head & {messages: (Question | Answer)[]}} Conversation
 */

const VERSION = 1;

/** @returns {string} 128 random bits; crypto.randomUUID exists on https and localhost only */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(36)).join("-");
}

/** @type {Promise<IDBDatabase> | undefined} */
let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mlxvlm", VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("messages");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/**
 * Runs `work` in one transaction over both stores.
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(heads: IDBObjectStore, messages: IDBObjectStore) => IDBRequest<T>} work
 * @returns {Promise<T>} the result of the request that `work` returned
 */
async function transact(mode, work) {
  const transaction = (await open()).transaction(["heads", "messages"], mode);
  const request = work(transaction.objectStore("heads"), transaction.objectStore("messages"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** @returns {Promise<Head[]>} the latest first */
export async function listHeads() {
  const heads = await transact("readonly", (store) => store.getAll());
  return heads.sort((a, b) => b.updated - a.updated);
}

/** @param {Head} head @returns {Promise<Conversation>} */
export async function load(head) {
  return { ...head, messages: (await transact("readonly", (_, store) => store.get(head.id))) ?? [] };
}

/** @param {Conversation} conversation */
export function save({ messages, ...head }) {
  return transact("readwrite", (heads, bodies) => {
    bodies.put(messages, head.id);
    return heads.put(head);
  });
}

/** @param {string} id */
export function remove(id) {
  return transact("readwrite", (heads, messages) => {
    messages.delete(id);
    return heads.delete(id);
  });
}
