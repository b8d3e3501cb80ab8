// Files to pictures that the server can read.

const PLAIN = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // what every server decodes
const MAX_SIDE = 4096; // pixels; models see far fewer
const MAX_BYTES = 20 << 20;

/**
 * @param {File} file
 * @returns {Promise<import("./store.js").Picture>}
 * @throws {Error} for the reader, when this browser can't decode the file
 */
export async function pictureOf(file) {
  const bitmap = await decode(file);
  const { width, height } = bitmap;
  const isFine = PLAIN.includes(file.type) && file.size <= MAX_BYTES && Math.max(width, height) <= MAX_SIDE;
  try {
    if (isFine) return { name: file.name, url: await dataUrl(file), width, height };
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return { name: file.name, url: canvas.toDataURL("image/jpeg", 0.92), width: canvas.width, height: canvas.height };
  } finally {
    bitmap.close();
  }
}

/** @param {File} file */
async function decode(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    if (/hei[cf]/i.test(file.type) || /\.hei[cf]$/i.test(file.name)) {
      throw new Error(`${file.name}: this browser can’t read HEIC. Export it as JPEG (Preview, File, Export).`);
    }
    throw new Error(`${file.name || "The file"} is not a picture that this browser can read.`);
  }
}

/** @param {Blob} blob @returns {Promise<string>} */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new Error("The picture could not be read."));
    reader.readAsDataURL(blob);
  });
}
