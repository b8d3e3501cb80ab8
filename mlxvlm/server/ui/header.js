// The bar over the chat: which model, light or dark, settings; and the line that says what is wrong with the server.

import { listModels } from "./api.js";
import { byId, h, icon } from "./dom.js";
import { preferences } from "./preferences.js";
import { switchTheme, systemIsDark, theme } from "./theme.js";

const RETRY_MS = 3000;

let isConnecting = false;

/** Fetches the models' names, again and again until the server answers. */
export async function connect() {
  if (isConnecting) return;
  isConnecting = true;
  for (;;) {
    try {
      showModels(await listModels());
      banner();
      break;
    } catch (error) {
      if (error.status === 401) {
        banner("This server asks for an API key.", "Enter the key", openSettings);
        break;
      }
      banner(`${error.message} Trying again …`);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
  isConnecting = false;
}

/** @param {string[]} names */
function showModels(names) {
  const select = byId("model");
  if (!names.includes(preferences.model)) preferences.model = names[0] ?? "";
  select.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === preferences.model }, name)));
}

/** Shows a line over the chat, none without a text. @param {string} [text] @param {string} [label] @param {() => void} [onclick] */
export function banner(text = "", label = "", onclick = () => {}) {
  const line = byId("banner");
  if (line.textContent === text + label) return; // a screen reader would say it again
  const button = label ? h("button", { type: "button", onclick }, label) : null;
  line.replaceChildren(text, button ?? "");
}

export function setUpHeader() {
  byId("model").addEventListener("change", () => {
    preferences.model = byId("model").value;
    preferences.keep();
  });
  byId("theme").addEventListener("click", () => {
    switchTheme();
    drawTheme();
  });
  systemIsDark.addEventListener("change", drawTheme);
  drawTheme();
  byId("open-settings").addEventListener("click", openSettings);
  // Enter in a field submits with the form's first submit button, so this one is none.
  byId("cancel-settings").addEventListener("click", () => byId("settings").close());
  byId("settings").addEventListener("close", closeSettings);
}

function drawTheme() {
  const label = theme() === "dark" ? "Use light colours" : "Use dark colours";
  byId("theme").replaceChildren(icon(theme() === "dark" ? "sun" : "moon"));
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function openSettings() {
  const dialog = byId("settings");
  for (const field of fields()) field.value = field.name === "key" ? preferences.key : preferences.settings[field.name];
  dialog.returnValue = "";
  dialog.showModal();
}

function closeSettings() {
  if (byId("settings").returnValue !== "save") return;
  for (const field of fields()) {
    if (field.name === "key") preferences.key = field.value.trim();
    else preferences.settings[field.name] = field.value;
  }
  preferences.keep();
  connect();
}

/** @returns {HTMLInputElement[]} */
const fields = () => [...byId("settings").querySelectorAll("[name]")];
