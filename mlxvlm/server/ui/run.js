// One answer on its way: asks the server, grows the message, measures.

import { ApiError, streamChat } from "./api.js";
import { preferences } from "./preferences.js";

/**
 * @typedef {import("./store.js").Answer} Answer
 * @typedef {import("./store.js").Question} Question
 */

export class Run {
  /** @param {Answer} answer  grows in place */
  constructor(answer) {
    this.answer = answer;
    this.abort = new AbortController();
    this.status = 200; // 0: the server was not reached
  }

  stop() {
    this.abort.abort();
  }

  /** @param {(Question | Answer)[]} messages @param {() => void} onchange  called at each change */
  async ask(messages, onchange) {
    const { answer } = this;
    try {
      await this.read(requestOf(messages), onchange);
      answer.state = "done";
    } catch (error) {
      if (error.name === "AbortError") {
        answer.state = "stopped";
      } else {
        answer.state = "failed";
        answer.error = error instanceof ApiError ? error.message : `The answer can’t be read: ${error.message}`;
        this.status = error.status ?? 200;
      }
    }
    onchange();
  }

  /** @param {object} body @param {() => void} onchange */
  async read(body, onchange) {
    const { answer } = this;
    const begun = performance.now();
    let first = 0;
    for await (const { choices, usage } of streamChat(body, this.abort.signal)) {
      const text = choices?.[0]?.delta?.content;
      if (text) {
        first ||= performance.now();
        answer.text += text;
      }
      if (choices?.[0]?.finish_reason === "length") answer.isCut = true;
      if (usage) answer.figures = figuresOf(usage, first && (first - begun) / 1000, (performance.now() - first) / 1000);
      onchange();
    }
  }
}

/** The request, with the settings that the reader made. @param {(Question | Answer)[]} messages */
function requestOf(messages) {
  const { system, ...numbers } = preferences.settings;
  const given = Object.entries(numbers).filter(([, value]) => value !== "");
  const head = system.trim() ? [{ role: "system", content: system }] : [];
  return {
    model: preferences.model || "default",
    messages: [...head, ...turns(messages).map(turnOf)],
    ...Object.fromEntries(given.map(([name, value]) => [name, Number(value)])),
  };
}

/** Turns that alternate, as chat templates demand: questions whose answer never came are asked with the next one. */
function turns(messages) {
  const merged = /** @type {(Question | Answer)[]} */ ([]);
  for (const message of messages) {
    const last = merged.at(-1);
    if (message.role === "user" && last?.role === "user") {
      const text = [last.text, message.text].filter(Boolean).join("\n\n");
      merged[merged.length - 1] = { ...last, text, pictures: [...last.pictures, ...message.pictures] };
    } else if (message.role === "user" || message.text) {
      merged.push(message);
    }
  }
  return merged;
}

/** @param {Question | Answer} message */
function turnOf(message) {
  const { role, text } = message;
  if (role === "assistant" || !message.pictures.length) return { role, content: text };
  const parts = message.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role, content: text ? [...parts, { type: "text", text }] : parts };
}

/** The server's own measurements where it gives them, else what the page saw. */
function figuresOf(usage, firstToken, decode) {
  const rate = usage.avg_compl_tok_per_sec ?? (firstToken && decode ? (usage.completion_tokens - 1) / decode : null);
  return {
    prompt: usage.prompt_tokens ?? 0,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    completion: usage.completion_tokens ?? 0,
    rate: rate || null,
    firstToken: usage.time_to_first_token_sec ?? (firstToken || null),
  };
}
