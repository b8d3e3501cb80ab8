// What the browser keeps of the settings. A browser that refuses storage gets the defaults each time.

/** @typedef {{system: string, temperature: string, top_p: string, max_tokens: string, seed: string}} Settings */

/** @type {Settings} empty: the server decides */
const DEFAULTS = { system: "", temperature: "", top_p: "", max_tokens: "", seed: "" };

/** @param {"localStorage" | "sessionStorage"} place @param {string} name */
function read(place, name) {
  try {
    return window[place].getItem(`mlxvlm.${name}`) ?? "";
  } catch {
    return "";
  }
}

/** @param {"localStorage" | "sessionStorage"} place @param {string} name @param {string} value */
function write(place, name, value) {
  try {
    window[place].setItem(`mlxvlm.${name}`, value);
  } catch {
    // Storage is full or refused: the choice holds until the page is left.
  }
}

/** @returns {Settings} */
function stored() {
  try {
    return { ...DEFAULTS, ...JSON.parse(read("localStorage", "settings") || "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export const preferences = {
  settings: stored(),
  model: read("localStorage", "model"),
  theme: read("localStorage", "theme"),
  key: read("sessionStorage", "key"),

  keep() {
    write("localStorage", "settings", JSON.stringify(this.settings));
    write("localStorage", "model", this.model);
    write("localStorage", "theme", this.theme);
    write("sessionStorage", "key", this.key);
  },
};
