"""Caption photos with the captioner in this folder, by onnxruntime, NumPy and Pillow.

pip install onnxruntime numpy pillow
python example_onnx.py photo.jpg another.png
python example_onnx.py photo.jpg --beams 4    beam search instead of the likeliest token every time
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would read others, too, and run programs for some


def read_photo(source):
    """A path, an opened file or a PIL image -> upright 8-bit RGB image, transparent parts on white."""
    photo = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    photo = ImageOps.exif_transpose(photo)  # phones store the turn beside the pixels
    if photo.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        photo = Image.fromarray((np.clip(np.array(photo), 0, 65535) // 257).astype(np.uint8))
    elif photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


class Captioner:
    def __init__(self, folder, threads=0):
        """`threads` of onnxruntime; 0: as many as the machine has cores."""
        folder, options = Path(folder), onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            for name in ("encoder.onnx", "decoder.onnx")
        )
        description = json.loads((folder / "captioner.json").read_text(encoding="utf-8"))
        self.size, self.resample = description["img_size"], Image.Resampling[description["resample"].upper()]
        self.bos, self.eos, self.tokens = description["bos"], description["eos"], description["tokens"]
        self.max_tokens, self.max_length = description["max_tokens"], description["max_length"]
        self.no_past = np.zeros((1, description["depth"], 2, description["heads"], 0, description["head_dim"]), "f")

    def caption(self, photo, beams=1, prompt=()):
        """A path or PIL image -> its caption. `prompt`: token ids that the caption begins with, which stand in it."""
        image, start = self.encode(photo), [self.bos, *prompt]
        most = min(self.max_tokens, self.max_length - len(start))
        ids = self.greedy(image, start, most) if beams == 1 else self.beam_search(image, start, most, beams)
        return self.text(ids[1:])

    def pixels(self, photo):
        """-> (H, W, 3) uint8: the whole photo, squeezed into a square."""
        return np.array(read_photo(photo).resize((self.size, self.size), self.resample))

    def encode(self, photo):
        """-> what the decoder reads of the photo, (depth, 2, heads, N, head_dim)."""
        return self.encoder.run(None, {"pixels": self.pixels(photo)})[0]

    def step(self, tokens, past, image):
        """The newest tokens (rows, T) of growing captions -> logits of the next (rows, vocab_size), and the new `past`,
        the keys and values of all tokens so far; before the first step it is None."""
        past = self.no_past if past is None else past
        return self.decoder.run(None, {"tokens": np.array(tokens, dtype=np.int64), "past": past, "image": image})

    def greedy(self, image, start, max_tokens):
        """-> the ids `start` and up to `max_tokens` more, the likeliest every time."""
        ids, new, past = list(start), start, None
        for _ in range(max_tokens):
            logits, past = self.step([new], past, image)
            new = [int(logits[0].argmax())]
            ids += new
            if new[0] == self.eos:
                break
        return ids

    def beam_search(self, image, start, max_tokens, beams):
        """-> the ids `start` and up to `max_tokens` more, the best that beam search finds.

        The score of a caption is its log-probability divided by its number of new tokens, the end included.
        """
        logits, past = self.step([start], None, image)
        captions, scores = [list(start)], np.zeros(1, dtype=np.float32)  # unfinished, the best first
        finished = []  # (score, ids), the best first
        for new in range(1, max_tokens + 1):
            totals = scores[:, None] + log_softmax(logits)  # (captions, vocab_size)
            candidates, continued = best_of(totals, 2 * beams), []  # enough, even if `beams` of them end
            for rank, (row, token) in enumerate(candidates):
                ids, score = [*captions[row], token], totals[row, token]
                if token != self.eos and new < max_tokens:
                    continued.append((score, row, ids))
                elif rank < beams:
                    finished.append((score / np.float32(new), ids))
            finished = sorted(finished, key=lambda pair: pair[0], reverse=True)[:beams]
            continued = continued[:beams]
            if not continued or (len(finished) == beams and continued[0][0] / np.float32(new) <= finished[-1][0]):
                break  # none can become better than the worst of those that are finished
            scores = np.array([score for score, _, _ in continued])
            captions = [ids for _, _, ids in continued]
            past = past[[row for _, row, _ in continued]]
            logits, past = self.step([ids[-1:] for ids in captions], past, image)
        return finished[0][1]

    def text(self, ids):
        """Token ids -> text. The text of a token is a string of bytes, one a character; joined they are UTF-8."""
        return "".join(self.tokens[i] for i in ids).encode("latin-1").decode(errors="replace").strip()


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def best_of(table, count):
    """-> (row, column) of the `count` largest values of a table, the largest first."""
    flat = table.ravel()
    best = np.argpartition(-flat, min(count, flat.size) - 1)[:count]
    return [divmod(int(i), table.shape[1]) for i in best[np.argsort(-flat[best], kind="stable")]]


def visible(text):
    """The text with its control characters written out: a terminal would obey those of a stranger's tokens."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--beams", type=int, default=1, choices=range(1, 33), metavar="1..32")
    args = parser.parse_args()
    captioner = Captioner(Path(__file__).resolve().parent)
    failed = False
    for photo in args.photos:
        try:
            print(f"{photo}: {visible(captioner.caption(photo, args.beams))}")
        except Exception as error:  # a decoder may stumble over a damaged file in any way
            print(f"error: {photo}: not a readable photo ({error})", file=sys.stderr)
            failed = True
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
