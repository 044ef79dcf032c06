// A captioner in the browser: from a photo to its caption, with the files that export_onnx.py wrote beside this one.

import * as ort from "./onnxruntime.js";

ort.env.wasm.wasmPaths = { wasm: new URL("onnxruntime.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1; // more need headers (cross-origin isolation) that a plain static server does not send

const LARGEST = 100e6; // pixels of a photo

export class Captioner {
  // Raises an Error that names a file which is missing.
  static async load() {
    const captioner = new Captioner();
    captioner.about = await (await read("captioner.json")).json();
    captioner.encoder = await session("encoder.onnx");
    captioner.decoder = await session("decoder.onnx");
    return captioner;
  }

  // A photo (Blob) -> its caption: the likeliest token every time.
  async caption(photo) {
    const { img_size: size, resample, depth, heads, head_dim, bos, eos, max_tokens, max_length } = this.about;
    const { pixels, width, height } = await rgb(photo);
    const small = resize(pixels, width, height, size, resample);
    const { image } = await this.encoder.run({ pixels: new ort.Tensor("uint8", small, [size, size, 3]) });
    let past = new ort.Tensor("float32", new Float32Array(0), [1, depth, 2, heads, 0, head_dim]);
    const ids = [];
    let newest = bos;
    while (ids.length < Math.min(max_tokens, max_length - 1)) {
      const tokens = new ort.Tensor("int64", BigInt64Array.of(BigInt(newest)), [1, 1]);
      const { logits, present } = await this.decoder.run({ tokens, past, image });
      newest = logits.data.reduce((best, value, i, all) => (value > all[best] ? i : best), 0);
      if (newest === eos) break;
      ids.push(newest);
      past = present;
    }
    return this.text(ids);
  }

  // The text of a token is a string of bytes, one a character; joined they are UTF-8.
  text(ids) {
    const bytes = ids.map((id) => this.about.tokens[id]).join("");
    return new TextDecoder().decode(Uint8Array.from(bytes, (character) => character.charCodeAt(0))).trim();
  }
}

async function read(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: the server answers ${response.status}`);
  return response;
}

async function session(name) {
  const graph = new Uint8Array(await (await read(name)).arrayBuffer());
  return ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
}

// A photo (Blob) -> { pixels: bytes (height * width * 3), width, height }, upright, transparent parts on white.
export async function rgb(photo) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(photo, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("not a photo that this browser can read");
  }
  const { width, height } = bitmap;
  if (width * height > LARGEST) throw new Error(`the photo has ${width} x ${height} pixels, which is too large`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height); // four bytes a pixel
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    pixels[j++] = data[i];
    pixels[j++] = data[i + 1];
    pixels[j++] = data[i + 2];
  }
  return { pixels, width, height };
}

// Antialiased resizing to size x size, to the byte what Pillow does: the model was trained with it, and a canvas scales
// in another way in each browser. First along the rows, then along the columns, with 8 bits in between.
export function resize(pixels, width, height, size, resample) {
  const narrow = resizeLines(pixels, width, height, size, resample, 3, width * 3); // (height, size, 3)
  return resizeLines(narrow, height, size, size, resample, size * 3, 3); // (size, size, 3)
}

const PRECISION = 2 ** 22; // Pillow's weights are integers, in units of 1 / PRECISION

// `lines` lines of `length` pixels -> lines of `size` pixels. From pixel to pixel of a line it is `step` bytes in the
// input; from line to line it is `stride` bytes.
function resizeLines(pixels, length, lines, size, resample, step, stride) {
  if (length === size) return pixels;
  const alongRows = step === 3;
  const output = new Uint8Array(lines * size * 3);
  const outStep = alongRows ? 3 : lines * 3, outStride = alongRows ? size * 3 : 3;
  for (const [i, { first, weights }] of windows(length, size, resample).entries()) {
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = PRECISION / 2; // rounds
        let at = line * stride + first * step + channel;
        for (const weight of weights) {
          sum += weight * pixels[at];
          at += step;
        }
        const value = Math.floor(sum / PRECISION);
        output[line * outStride + i * outStep + channel] = Math.min(255, Math.max(0, value));
      }
    }
  }
  return output;
}

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, at: cubic },
};

// Keys 1981, with a = -0.5 as in Pillow.
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// For each of `size` pixels: the first of the `length` pixels it is made of, and their weights.
function windows(length, size, resample) {
  const { support, at } = FILTERS[resample];
  const scale = length / size, stretch = Math.max(scale, 1);
  return Array.from({ length: size }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support * stretch + 0.5));
    const end = Math.min(length, Math.trunc(centre + support * stretch + 0.5));
    const weights = Array.from({ length: end - first }, (_, j) => at((j + first - centre + 0.5) * (1 / stretch)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return {
      first,
      weights: weights.map((weight) => {
        const exact = (weight / total) * PRECISION;
        return Math.trunc(exact + (exact < 0 ? -0.5 : 0.5));
      }),
    };
  });
}
