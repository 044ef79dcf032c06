"""How many photos a second does one core load and preprocess for training and validation: from the original photos,
from JPEGs decoded at a fraction of their size, from a photo store?

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/bench_data.py

The photos are synthetic: noise whose spectrum falls with frequency as in photos, shapes with sharp edges and camera
grain, as JPEGs of quality 92. Those of 500 x 375 have about 100 kB, Flickr30k's 140 kB, so decoding is if anything too
fast here. The large ones stand for photos straight from a camera. All ways are measured in turns in one process with
one thread, and each starts from the path of a file in the disk cache. "Decoded at a fraction" keeps twice the pixels
that the model sees: at 500 x 375 it changes nothing. Training decodes so, validation never does; its row only shows
what that would gain.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"))

import numpy as np
import torch
from PIL import Image, ImageDraw

from captioning.data.photo_store import SIDE, UNCOMPRESSED, shrink
from captioning.images.preprocessing import load_image
from MyLLM_Vit_gpt2_captioning import build_transforms
from timing import interleaved, machine, median_and_range

SIZES = [(500, 375), (2048, 1536)]  # width, height
QUALITY = 92
GRAIN = 6  # standard deviation of the noise of each pixel, of 255 levels
IMG_SIZE = 224


def draw_photo(seed, width, height):
    """-> an RGB image that compresses and decodes like a photo."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))  # (height, width // 2 + 1)
    frequency[0, 0] = np.inf  # no constant part

    def noise(power):
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**power
        texture = np.fft.irfft2(spectrum, (height, width))
        return texture / texture.std()

    light = 45 * noise(1.1)
    pixels = np.stack([120 + light + 15 * noise(1.4) for _ in range(3)], axis=-1)  # colours vary more slowly than light
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.uniform(0, 1, 4) * (width, height, width / 4, width / 4)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    pixels = np.asarray(image) + rng.normal(0, GRAIN, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(folder, size, count):
    """Write `count` photos -> (their paths, those of the same photos in a store, in an uncompressed store)."""
    folders = folder / "photos", folder / "store", folder / "uncompressed"
    for subfolder in folders:
        subfolder.mkdir(parents=True)
    photos, small, uncompressed = ([subfolder / f"{number}.jpg" for number in range(count)] for subfolder in folders)
    for number, photo in enumerate(photos):
        draw_photo(number, *size).save(photo, quality=QUALITY)
        small[number].write_bytes(shrink(photo, SIDE))
        uncompressed[number].write_bytes(shrink(photo, SIDE, UNCOMPRESSED))
    return photos, small, uncompressed


def preprocess_all(paths, tfms, least_side):
    """Load and transform the photos as `Dataset` does. Raises ValueError when a tensor is not valid model input."""
    for number, path in enumerate(paths):
        pixels = np.asarray(load_image(path, least_side))
        tensor = tfms(image=pixels, captions=["a dog"], seed=[0, 0, number])["image"]
        if tensor.shape != (3, IMG_SIZE, IMG_SIZE) or not tensor.isfinite().all():
            raise ValueError(f"{path}: {tuple(tensor.shape)}, or not finite")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=40, help="photos of 500 x 375 a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{machine()}\n\n    python benchmarks/bench_data.py --photos {args.photos} --rounds {args.rounds}\n")
    print("| photos | for | way | photos/s | faster |\n| --- | --- | --- | --- | --- |")
    # As in training, pixels stay uint8 and are normalised on the device.
    transforms = dict(zip(("training", "validation"), build_transforms(IMG_SIZE, normalized=False), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            count = max(2, args.photos * SIZES[0][0] * SIZES[0][1] // (width * height))
            photos, small, uncompressed = write_photos(Path(folder) / f"{width}", (width, height), count)
            kilobytes = [
                sum(path.stat().st_size for path in paths) / count / 1000 for paths in (photos, small, uncompressed)
            ]
            ways = {
                "as they are": (photos, None),
                "decoded at a fraction": (photos, transforms["training"].least_side),
                f"from a store ({kilobytes[1]:.0f} kB)": (small, None),
                f"from an uncompressed store ({kilobytes[2]:.0f} kB)": (uncompressed, None),
            }
            seconds = interleaved(
                {
                    (use, way): lambda tfms=tfms, paths=paths, least=least: preprocess_all(paths, tfms, least)
                    for use, tfms in transforms.items()
                    for way, (paths, least) in ways.items()
                },
                args.rounds,
            )
            for (use, way), times in seconds.items():
                plain = seconds[use, "as they are"]
                faster = [slow / fast for slow, fast in zip(plain, times, strict=True)]
                print(
                    f"| {width} x {height}, {kilobytes[0]:.0f} kB | {use} | {way} | "
                    f"{median_and_range([count / time for time in times])} | {statistics.median(faster):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
