"""Write a dataset of any format as tar shards, which reading.py reads: `prepare_data.py --shards FOLDER`.

A shard gets its name only when it is whole, then its line in progress.jsonl, and the manifest replaces that file at the
end: whatever ends the work, an unfinished folder is not a dataset yet, and the next run goes on. The content of a shard
follows from the dataset alone, bit for bit, however many processes work and however often they were stopped.
"""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np

from captioning.common.files import read_json, write_atomically
from captioning.common.form import check
from captioning.common.locks import LOCK_FILE, after_other_writers
from captioning.common.printable import printable
from captioning.common.text import with_markup
from captioning.data import resumable_work, sources
from captioning.data.conventions import IMAGE_SUFFIXES, SPLITS
from captioning.data.shards import reading
from captioning.data.unreadable_photos import print_left_out
from captioning.images import tar_members
from captioning.images.preprocessing import open_image

ENTRY = reading.ENTRY | {"sha256": str, "left_out": [str]}  # of a shard that this file has written
SHARDS_FORMAT = 1  # of the manifest and the content of shards
PHOTOS_PER_SHARD = 1000  # at 100 kB a photo a shard has 100 MB


def write_shards(
    data_dir,
    folder,
    photos_per_shard=PHOTOS_PER_SHARD,
    captions_file=None,
    image_dir=None,
    num_workers=0,
    unescape=True,
):
    """Write the dataset that `sources.load` finds as tar shards to `folder`, with a manifest -> the manifest.

    The files of the photos go in as they are; those that cannot be decoded, and rows that training could not use, are
    counted, named and left out. Training photos are shuffled once, because the buffer in training mixes only photos
    that are near each other. With `num_workers` processes; 0 works in this one. `unescape` as in `sources.load`, whose
    errors are raised,
    FileExistsError when the folder holds something else, ValueError when its shards are of another dataset or no photo
    can be read.
    """
    folder = Path(folder)
    if photos_per_shard < 1:
        raise ValueError(f"photos_per_shard {photos_per_shard}: at least 1")
    records = [folder / name for name in (reading.PROGRESS_FILE, reading.MANIFEST_FILE) if (folder / name).is_file()]
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()) and not records:
        raise FileExistsError(f"{folder} holds something other than shards: give another folder with --to")
    reading.import_webdataset()  # before any work
    df = sources.drop_unusable(
        sources.load(data_dir, captions_file, image_dir, unescape=unescape, case="keep"),
        captions_file or sources.find_captions(data_dir, image_dir),
    )
    for column in {"caption", "prompt"} & set(df.columns) if unescape else ():
        df[column] = df[column].map(with_markup)  # the shards are read as any dataset is
    plan = _plan(df, photos_per_shard)
    source_hash = _hash_of(plan)
    folder.mkdir(parents=True, exist_ok=True)
    with after_other_writers(folder / LOCK_FILE):  # a second run waits, and then has nothing to do
        written = _written_shards(folder, records, source_hash)
        missing = [name for name in plan if name not in written]
        if missing:
            _write_missing(folder, plan, missing, written, source_hash, num_workers)
        manifest = _manifest(plan, written, source_hash)
        if not manifest["photos"]:
            raise ValueError(f"{data_dir}: none of its photos can be read; the first: {manifest['left_out'][0]}")
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        # Half a surrogate pair, in a stranger's records, becomes its escape, which is JSON as well.
        content = text.encode("utf-8", "backslashreplace")
        write_atomically(folder / reading.MANIFEST_FILE, lambda path: path.write_bytes(content))
        (folder / reading.PROGRESS_FILE).unlink(missing_ok=True)
    print(f"{folder}: {len(plan):,} shards, {len(missing):,} of them written now")
    for split, totals in manifest["splits"].items():
        print(
            f"    {split}: {totals['photos']:,} photos with {totals['captions']:,} captions, {totals['bytes']:,} bytes"
        )
    print_left_out(manifest["left_out"])
    return manifest


# --- the plan: which samples in which shard ---------------------------------------------------------------------------


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
    """Paths of photos -> {path: key, the name of its members}: the photo's name without dots, which would end the key;
    with its number where two photos have the same name."""
    stems = {image: Path(image).stem.replace(".", "_") for image in images}
    count, keys, used = Counter(stems.values()), {}, set()
    for number, (image, stem) in enumerate(stems.items()):
        key = stem if count[stem] == 1 else f"{stem}_{number:09d}"
        while key in used or key.startswith("__"):
            key = f"photo_{key}"
        keys[image] = key
        used.add(key)
    return keys


def _hash_of(plan):
    """A hash of everything that is to be written, except where the photos lie: other datasets have another one."""
    samples_of = {name: [(key, *texts) for key, _, *texts in samples] for name, samples in plan.items()}
    content = json.dumps([SHARDS_FORMAT, samples_of])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


# --- the work ---------------------------------------------------------------------------------------------------------


def _written_shards(folder, records, source_hash):
    """{shard name: entry} of the shards that are written already, by their `records`: progress file or manifest. Raises
    ValueError when they are of another dataset."""
    for draft in folder.glob(".*.tar.part"):
        draft.unlink()  # of a run that was killed
    written, sizes = {}, {}
    for path in records:
        try:
            if path.name == reading.MANIFEST_FILE:
                manifest = read_json(path)
                check(manifest, {"shards": {str: dict}})
                found_hash, entries = manifest.get("source"), manifest["shards"]
            else:
                lines = resumable_work.read_index(path) or [["source", source_hash]]
                check(lines, [list])
                (_, found_hash), *entries = lines
                entries = dict(entries)
            for name, entry in entries.items():
                reading.check_entry(name, entry, ENTRY)
            sizes |= {name: entry["bytes"] for name, entry in entries.items()}
        except (TypeError, ValueError) as error:  # TypeError: what cannot be a key
            reason = printable(error).removeprefix(f"{path}: ")[:300]
            raise ValueError(f"{path}: damaged ({reason}); remove it, and give the command again") from error
        if found_hash != source_hash:
            raise ValueError(
                f"{path}: the shards there are of another dataset, or have another number of photos each: give another "
                "folder with --to"
            )
        written |= entries
    return {
        name: entry
        for name, entry in written.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == sizes[name]
    }


def _write_missing(folder, plan, missing, written, source_hash, num_workers):
    """Write the missing shards, and add their entries to `written`."""
    entries = [("source", source_hash), *written.items()]
    with resumable_work.open_index(folder / reading.PROGRESS_FILE, entries) as progress:
        (folder / reading.MANIFEST_FILE).unlink(missing_ok=True)
        jobs = [(folder / name, plan[name]) for name in missing]
        results = resumable_work.run_jobs(_write_job, jobs, num_workers, "photos", images_of=lambda job: len(job[1]))
        for (path, _), entry in results:
            written[path.name] = entry
            resumable_work.add_entries(progress, [path.name, entry])


def _write_job(job):
    return write_shard(*job)


def write_shard(path, samples):
    """Write one shard, samples = [(key, path of the photo, captions, prompts), ...] -> its entry in the manifest."""
    captions, left_out = Counter(), []

    def write(draft):
        layout = dict(user="", group="", mode=0o644, mtime=0, format="PAX_FORMAT")  # nothing of this machine or time
        with open(draft, "wb") as file, reading.import_webdataset().TarWriter(file, encoder=False, **layout) as tar:
            for key, photo, texts, prompts in samples:
                try:
                    content, suffix = _read_decodable(photo)
                except (OSError, ValueError) as error:
                    left_out.append(printable(f"{Path(photo).name}: {error}"))
                    continue
                record = {"image": Path(photo).name, "captions": texts}
                if any(prompts):
                    record["prompts"] = prompts
                text = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")
                tar.write({"__key__": key, suffix: content, "json": text})
                captions[len(texts)] += 1

    write_atomically(path, write)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(
        bytes=path.stat().st_size,
        sha256=digest,
        samples=sum(captions.values()),
        captions={str(count): photos for count, photos in sorted(captions.items())},
        left_out=left_out,
    )


def _read_decodable(photo):
    """-> (bytes of the photo's file, suffix of its member, by its content). Decodes the photo, so that a broken one is
    found now and not in a long run. Raises OSError or ValueError that says what is wrong with it."""
    try:
        content = tar_members.read_bytes(photo)
    except FileNotFoundError:
        raise FileNotFoundError("no such image") from None
    reading.decode_photo(content)
    with open_image(io.BytesIO(content)) as image:
        suffix = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tiff"}.get(image.format, image.format.lower())
    return content, suffix if f".{suffix}" in IMAGE_SUFFIXES else "jpg"  # readers go by the content anyway


def _manifest(plan, entries, source_hash):
    """Entries of all shards -> the content of manifest.json."""
    entries = {name: entries[name] for name in plan}
    splits = {}
    for name, entry in entries.items():
        totals = splits.setdefault(name.partition("-")[0], dict(shards=0, photos=0, captions=0, bytes=0))
        totals["shards"] += 1
        totals["photos"] += entry["samples"]
        totals["captions"] += sum(int(count) * photos for count, photos in entry["captions"].items())
        totals["bytes"] += entry["bytes"]
    return {
        "format": SHARDS_FORMAT,
        "source": source_hash,
        "photos": sum(totals["photos"] for totals in splits.values()),
        "splits": splits,
        "left_out": [fault for entry in entries.values() for fault in entry["left_out"]],
        "shards": entries,
    }
