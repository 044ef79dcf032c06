"""Write a dataset of any format as tar shards, which shards.py reads: `prepare_data.py --shards FOLDER`.

A shard has its name only when it is whole, a line in progress.jsonl follows, and the manifest comes last, in place of
that file: whatever ends the work, an unfinished folder is no dataset yet, and the next run goes on. What is in a shard
follows from the dataset alone, bit for bit, however many processes work and however often they were stopped.
"""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch.utils.data
from filelock import FileLock
from PIL import Image

from captioning.common.files import write_atomically
from captioning.common.progress import progress_bar
from captioning.data import sources
from captioning.data.conventions import IMAGE_SUFFIXES, SPLITS
from captioning.data.shards import reading
from captioning.images import tar_members

FORMAT = 1  # of the manifest and of what is in the shards
PHOTOS_PER_SHARD = 1000  # at 100 kB a photo a shard has 100 MB
FAULTS_SHOWN = 10


def write_shards(
    data_dir, folder, photos_per_shard=PHOTOS_PER_SHARD, captions_file=None, image_dir=None, num_workers=0
):
    """Write the dataset that `sources.load` finds as tar shards to `folder`, with a manifest -> the manifest.

    The files of the photos go in as they are; those that cannot be decoded, and rows that training could not use, are
    counted, named and left out. Training photos are shuffled once, because in training a buffer mixes only what is
    near. With `num_workers` processes; 0 works in this one. Raises what `sources.load` raises, FileExistsError when the
    folder holds something else, ValueError when its shards are of another dataset or no photo can be read.
    """
    folder = Path(folder)
    if photos_per_shard < 1:
        raise ValueError(f"photos_per_shard {photos_per_shard}: at least 1")
    begun = [folder / name for name in (reading.PROGRESS_FILE, reading.MANIFEST_FILE) if (folder / name).is_file()]
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()) and not begun:
        raise FileExistsError(f"{folder} holds something other than shards: give another folder with --to")
    reading.library()  # before any work
    df = sources.drop_unusable(
        sources.load(data_dir, captions_file, image_dir), captions_file or sources.find_captions(data_dir)
    )
    plan = _plan(df, photos_per_shard)
    content = json.dumps([FORMAT, {name: [sample[:1] + sample[2:] for sample in plan[name]] for name in plan}])
    source = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second run waits, and then has nothing to do
        done = _done(folder, begun, source)
        made = _write_missing(folder, plan, done, source, num_workers)
        manifest = _manifest(plan, done, source)
        if not manifest["photos"]:
            raise ValueError(f"{data_dir}: none of its photos can be read; the first: {manifest['left_out'][0]}")
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / reading.MANIFEST_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        (folder / reading.PROGRESS_FILE).unlink(missing_ok=True)
    print(f"{folder}: {len(plan):,} shards, {made:,} of them written now")
    for split, totals in manifest["splits"].items():
        print(
            f"    {split}: {totals['photos']:,} photos with {totals['captions']:,} captions, {totals['bytes']:,} bytes"
        )
    faults = manifest["left_out"]
    if faults:
        print(f"warning: {len(faults):,} photos cannot be read and are left out:")
        more = [f"and {len(faults) - FAULTS_SHOWN:,} more"] if len(faults) > FAULTS_SHOWN else []
        print("\n".join(f"    {fault}" for fault in faults[:FAULTS_SHOWN] + more))
    return manifest


def _plan(df, photos_per_shard):
    """{shard name: [(key, path, captions, prompts), ...]} for a frame of `sources.load`."""
    keys, plan = _keys(df["image"].unique()), {}
    prompts = df["prompt"] if "prompt" in df else [""] * len(df)
    texts = {}
    for image, caption, prompt in zip(df["image"], df["caption"], prompts, strict=True):
        texts.setdefault(image, []).append((caption, prompt or ""))
    for split in SPLITS:
        images = df["image"][df["split"] == split].unique()
        order = np.random.default_rng(0).permutation(len(images)) if split == "train" else range(len(images))
        samples = [(keys[images[i]], images[i], *map(list, zip(*texts[images[i]], strict=True))) for i in order]
        for number, start in enumerate(range(0, len(samples), photos_per_shard)):
            plan[f"{split}-{number:06d}.tar"] = samples[start : start + photos_per_shard]
    return plan


def _keys(images):
    """Paths of photos -> {path: what its members are called}: its name without dots, which would end the key; with its
    number where two photos have the same name."""
    stems = {image: Path(image).stem.replace(".", "_") for image in images}
    count, keys, used = Counter(stems.values()), {}, set()
    for number, (image, stem) in enumerate(stems.items()):
        key = stem if count[stem] == 1 else f"{stem}_{number:09d}"
        while key in used or key.startswith("__"):
            key = f"photo_{key}"
        keys[image] = key
        used.add(key)
    return keys


def _done(folder, begun, source):
    """{shard name: entry} of the shards that are written already. Raises ValueError when they are of another
    dataset."""
    for draft in folder.glob(".*.tar.part"):
        draft.unlink()  # of a run that was killed
    done = {}
    for path in begun:
        if path.name == reading.MANIFEST_FILE:
            manifest = json.loads(path.read_bytes())
            entries, of = list(manifest["shards"].items()), manifest.get("source")
        else:
            lines = path.read_bytes().splitlines(keepends=True)
            (_, of), *entries = [json.loads(line) for line in lines if line.endswith(b"\n")] or [("source", source)]
        if of != source:
            raise ValueError(
                f"{path}: the shards there are of another dataset, or have another number of photos each: give another "
                "folder with --to"
            )
        done |= entries
    return {
        name: entry
        for name, entry in done.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
    }


def _write_missing(folder, plan, done, source, num_workers):
    """Write what is missing, and add its entries to `done` -> how many shards that were."""
    missing = [name for name in plan if name not in done]
    if not missing:
        return 0
    lines = "".join(json.dumps(line) + "\n" for line in [("source", source), *done.items()])
    write_atomically(folder / reading.PROGRESS_FILE, lambda path: path.write_text(lines))
    (folder / reading.MANIFEST_FILE).unlink(missing_ok=True)
    jobs = _Writing([(folder / name, plan[name]) for name in missing])
    loader = torch.utils.data.DataLoader(
        jobs, batch_size=None, num_workers=min(num_workers, len(missing)), generator=torch.Generator()
    )
    bar = progress_bar(sum(len(plan[name]) for name in missing), "photos")
    try:
        with (folder / reading.PROGRESS_FILE).open("a") as progress:
            for name, (entry, error) in zip(missing, loader, strict=True):
                if error:
                    raise OSError(error)
                done[name] = entry
                progress.write(json.dumps([name, entry]) + "\n")
                progress.flush()
                bar.update(len(plan[name]))
    finally:
        bar.close()
    return len(missing)


def _manifest(plan, done, source):
    """Entries of all shards -> the content of manifest.json."""
    entries = {name: done[name] for name in plan}
    splits = {}
    for name, entry in entries.items():
        totals = splits.setdefault(name.partition("-")[0], dict(shards=0, photos=0, captions=0, bytes=0))
        totals["shards"] += 1
        totals["photos"] += entry["samples"]
        totals["captions"] += sum(int(count) * photos for count, photos in entry["captions"].items())
        totals["bytes"] += entry["bytes"]
    return {
        "format": FORMAT,
        "source": source,  # hash of what was to be written
        "photos": sum(totals["photos"] for totals in splits.values()),
        "splits": splits,
        "left_out": [fault for entry in entries.values() for fault in entry["left_out"]],
        "shards": entries,
    }


class _Writing(torch.utils.data.Dataset):
    """[(path of a shard, its samples), ...]; an item writes the shard -> (its entry, ""), or (None, why it failed).

    A `Dataset`, because data workers are processes that end with the one that started them, however that ends.
    """

    def __init__(self, jobs):
        self.jobs = jobs

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, i):
        try:
            return write_shard(*self.jobs[i]), ""
        except OSError as error:  # of a full disk
            return None, str(error)


def write_shard(path, samples):
    """Write one shard, samples = [(key, path of the photo, captions, prompts), ...] -> its entry in the manifest."""
    entry = {}

    def write(draft):
        captions, left_out = Counter(), []
        with open(draft, "wb") as file, reading.library().TarWriter(
            file, user="", group="", mode=0o644, encoder=False, mtime=0, format="PAX_FORMAT"
        ) as tar:  # fmt: skip
            for key, photo, texts, prompts in samples:
                try:
                    content, suffix = _decodable(photo)
                except (OSError, ValueError) as error:
                    left_out.append(f"{Path(photo).name}: {error}")
                    continue
                record = {"image": Path(photo).name, "captions": texts}
                if any(prompts):
                    record["prompts"] = prompts
                text = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")
                tar.write({"__key__": key, suffix: content, "json": text})
                captions[len(texts)] += 1
        with open(draft, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {str(count): photos for count, photos in sorted(captions.items())}
        entry.update(
            bytes=draft.stat().st_size, sha256=digest, samples=sum(captions.values()), captions=counts,
            left_out=left_out,
        )  # fmt: skip

    write_atomically(path, write)
    return entry


def _decodable(photo):
    """-> (content of the photo's file, what its member ends with, by its content). Every photo is decoded here, so that
    a broken one is found now and not in a long run: raises OSError or ValueError that says what is wrong with it."""
    try:
        content = tar_members.read_bytes(photo)
    except FileNotFoundError:
        raise FileNotFoundError("no such image") from None
    reading.decode(content)
    with Image.open(io.BytesIO(content)) as image:
        suffix = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tiff"}.get(image.format, image.format.lower())
    return content, suffix if f".{suffix}" in IMAGE_SUFFIXES else "jpg"  # its content tells what it is
