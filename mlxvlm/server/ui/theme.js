// Light or dark: the system's choice until the reader makes one. Runs before the first paint.

import { preferences } from "./preferences.js";

export const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"light" | "dark"} */
export function theme() {
  if (preferences.theme === "light" || preferences.theme === "dark") return preferences.theme;
  return systemIsDark.matches ? "dark" : "light";
}

export function switchTheme() {
  preferences.theme = theme() === "dark" ? "light" : "dark";
  preferences.keep();
  apply();
}

function apply() {
  document.documentElement.dataset.theme = theme();
}

systemIsDark.addEventListener("change", apply);
apply();
