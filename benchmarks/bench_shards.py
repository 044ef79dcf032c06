"""How many photos a second does one core write to tar shards, count in them, and read as training does (undecoded)?

    OMP_NUM_THREADS=1 python benchmarks/bench_shards.py

The photos are the synthetic ones of bench_data.py from a photo store, a few of them many times. Times are processor
time of this process: the files are in the disk cache, so a disk only has to be faster than this. docs/SCALING.md is
based on these numbers.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"))

import torch

from bench_data import SIZES, write_photos
from captioning.data import sources
from captioning.data.shards import reading, streaming, writing
from timing import machine, median_and_range

DISTINCT_PHOTOS = 20
CAPTIONS = ["a dog runs across the green grass in front of an old house"] * 5
SHUFFLED = 1_000_000  # indices sent through the shuffle buffer


def write(path, photos, count):
    """Write one shard of `count` photos -> bytes a photo on top of the photo's own."""
    samples = [(f"{i:06d}", photos[i % len(photos)], CAPTIONS, [""] * 5) for i in range(count)]
    entry = writing.write_shard(path, samples)
    return (entry["bytes"] - sum(sample[1].stat().st_size for sample in samples)) / count


def stream(shards, count):
    """Make the batches of an epoch as data workers get them. Raises ValueError when photos are missing."""
    unreadable_photos = streaming.UnreadableSamples(shards[0].path.parent, count, 0)
    dataset = SimpleNamespace(captions_per_image=5, seed=0, unreadable_photos=unreadable_photos)
    batches = list(streaming.ShardBatchSampler(shards, dataset, 160, buffer=500, window=16))
    if sum(group is not None for batch in batches for group in batch) != count:
        raise ValueError("photos are missing")


def shuffle():
    for _ in streaming.buffered_order(SHUFFLED, 5000, random.Random(0)):
        pass


def resident_bytes():
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000, help="photos of a shard (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{machine()}; seconds of the processor\n")
    print(f"    python benchmarks/bench_shards.py --photos {args.photos} --rounds {args.rounds}\n")
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):  # no progress bars
        folder = Path(temporary) / "shards"
        folder.mkdir()
        _, photos, _ = write_photos(Path(temporary), SIZES[0], DISTINCT_PHOTOS)
        kilobytes = sum(path.stat().st_size for path in photos) / len(photos) / 1000
        train, val = folder / "train-000000.tar", folder / "val-000000.tar"
        extra, _ = (write(path, photos, args.photos) for path in (train, val))
        shards = reading.training_shards(folder)
        works = {
            "written, each decoded once": (args.photos, lambda: write(val, photos, args.photos)),
            "counted": (args.photos, lambda: reading.count_shard(train)),
            "read, grouped, shuffled": (args.photos, lambda: stream(shards, args.photos)),
            "indices through the shuffle buffer": (SHUFFLED, shuffle),
        }
        seconds = {work: [] for work in works}
        for number in range(args.rounds + 1):  # the first does not count
            for work, (_, run) in works.items():
                start = time.process_time()
                run()
                seconds[work] += [time.process_time() - start] * (number > 0)
        before = resident_bytes()
        frames = [sources.load(folder) for _ in range(8)]
        row = (resident_bytes() - before) / sum(map(len, frames))
        print(f"photos of {kilobytes:.0f} kB with 5 captions\n\n| work | a second |\n| --- | --- |")
        for work, (count, _) in works.items():
            print(f"| {work} | {median_and_range([count / time for time in seconds[work]])} |")
        print(f"\nheaders, padding and captions of a photo: {extra:,.0f} bytes")
        print(f"a row of the caption frame in memory: {row:,.0f} bytes")


if __name__ == "__main__":
    main()
