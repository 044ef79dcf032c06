"""How many photos a second does one core write to tar shards, count there, and read as training does, without decoding?

    OMP_NUM_THREADS=1 python benchmarks/bench_shards.py

Photos are synthetic ones of bench_data.py from a photo store, few of them many times. Seconds are the processor's, of
this process: files that were just written are in the disk cache, so this is what is left for a disk to be faster than.
docs/scaling.md reckons with these numbers.
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

DIFFERENT_PHOTOS = 20
CAPTIONS = ["a dog runs across the green grass in front of an old house"] * 5
PLACES = 1_000_000


def write(path, photos, count):
    """One shard of `count` photos -> bytes a photo that are not the photo's."""
    samples = [(f"{i:06d}", photos[i % len(photos)], CAPTIONS, [""] * 5) for i in range(count)]
    entry = writing.write_shard(path, samples)
    return (entry["bytes"] - sum(sample[1].stat().st_size for sample in samples)) / count


def stream(found, count):
    """An epoch of batches as data workers get them. Raises ValueError when photos are missing."""
    unreadable_photos = streaming.UnreadableSamples(found[0].path.parent, count, 0)
    dataset = SimpleNamespace(captions_per_image=5, seed=0, unreadable_photos=unreadable_photos)
    batches = list(streaming.ShardBatchSampler(found, dataset, 160, buffer=500, window=16))
    if sum(group is not None for batch in batches for group in batch) != count:
        raise ValueError("photos are missing")


def places():
    for _ in streaming.buffered_order(PLACES, 5000, random.Random(0)):
        pass


def resident_bytes():
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000, help="of a shard (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{machine()}; seconds of the processor\n")
    print(f"    python benchmarks/bench_shards.py --photos {args.photos} --rounds {args.rounds}\n")
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):  # no progress bars
        folder = Path(place) / "shards"
        folder.mkdir()
        _, photos, _ = write_photos(Path(place), SIZES[0], DIFFERENT_PHOTOS)
        kilobytes = sum(path.stat().st_size for path in photos) / len(photos) / 1000
        train, val = folder / "train-000000.tar", folder / "val-000000.tar"
        extra, _ = (write(path, photos, args.photos) for path in (train, val))
        found = reading.training_shards(folder)
        works = {
            "written, each decoded once": (args.photos, lambda: write(val, photos, args.photos)),
            "counted": (args.photos, lambda: reading.count_shard(train)),
            "read, grouped, shuffled": (args.photos, lambda: stream(found, args.photos)),
            "places of the shuffle buffer": (PLACES, places),
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
