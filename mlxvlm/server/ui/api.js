// The server's OpenAI-compatible API, same origin. Knows nothing of the page.

import { preferences } from "./preferences.js";

/** What went wrong, in words for the reader. `status` is 0 when the server was not reached. */
export class ApiError extends Error {
  /** @param {string} message @param {number} [status] */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** @returns {Promise<string[]>} the models' names, the default first */
export async function listModels() {
  const response = await call("v1/models", {});
  return (await response.json()).data.map((/** @type {{id: string}} */ model) => model.id);
}

/**
 * Chunks of a streamed chat completion. Ends at `[DONE]`; throws ApiError, or AbortError when stopped.
 * @param {object} body @param {AbortSignal} signal
 */
export async function* streamChat(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server reported an error.", response.status);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer was complete.");
}

/** @param {string} path @param {RequestInit} options */
async function call(path, options) {
  const headers = new Headers(options.headers);
  if (preferences.key) headers.set("Authorization", `Bearer ${preferences.key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can’t be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Response} response */
async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

/**
 * The `data` of each server-sent event; comments, which keep the connection alive, are dropped.
 * @param {ReadableStream<Uint8Array>} stream
 */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await readChunk(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) {
        // Each event of this API is one line of JSON.
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {ReadableStreamDefaultReader<string>} reader */
async function readChunk(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server was lost.");
  }
}
