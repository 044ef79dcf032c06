"""Public datasets: download, verify and unpack them into the layout that `sources` reads.

A download that broke off goes on where it stopped, an unpacking that was interrupted starts again, and finished files,
which `prepared.json` in the dataset's folder lists, stay as they are.
"""

import csv
import json
import os
import shutil
import stat
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from captioning.common.files import read_json, write_atomically
from captioning.common.form import misfit
from captioning.common.printable import printable
from captioning.common.stopping import stop_if_asked

MANIFEST_FILE = "prepared.json"
ATTEMPTS = 5  # in a row without a new byte, before a download is given up
PAUSE = 2.0  # seconds before the second attempt; before each further one it is that much longer
TIMEOUT = (15, 60)  # seconds to connect, and between two chunks of an answer
ENCRYPTED = 1  # a bit of the flags of a zip's member
CHUNK_BYTES = 1 << 16  # written at once; a broken connection loses at most as many
TEMPORARY_FAILURES = (408, 429)  # of the 4xx answers of a server; the others will be the same tomorrow
FLICKR8K_LISTS = ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt")

# --- how a downloaded file becomes part of a dataset: unpack(file, folder) --------------------------------------------


def extract(archive, folder, targets):
    """Unpack the part of a zip archive that `targets` names, {file or "folder/" in the archive: target in `folder`}.

    Raises ValueError that names the archive when it is damaged, lacks one of these files, or holds a link or a name
    that leads out of the folder; OSError when the disk is too small.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            chosen = {}
            for member in opened.infolist():
                _refuse_unsafe(member, archive)
                target = _target(member.filename, targets)
                if target and not member.is_dir():
                    chosen[target] = member
            for inside, wanted in targets.items():
                if not any(name == wanted or (wanted.endswith("/") and name.startswith(wanted)) for name in chosen):
                    raise ValueError(f"{archive}: holds no {inside}")
            _require_space(folder, sum(member.file_size for member in chosen.values()), f"to unpack {archive}")
            for name, member in _bar(chosen.items(), desc=f"unpack {archive.name}", unit=" files"):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as file:
                    for part in _content(opened, member):
                        file.write(part)
                stop_if_asked()
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{archive}: not a usable zip archive ({printable(error)}); remove it and run the command again"
        ) from error


def _content(opened, member):
    """Yields the bytes of a member of a `ZipFile`, a part at a time. Raises BadZipFile for any damage: the libraries
    that decompress it raise classes of their own, OSError among them."""
    try:
        with opened.open(member) as source:
            while part := source.read(1 << 20):
                yield part
    except Exception as error:
        raise zipfile.BadZipFile(str(error)) from error


def _refuse_unsafe(member, archive):
    """Raise ValueError for a member that is encrypted or not a plain file or folder, or whose name leads out of the
    target folder on any operating system."""
    if member.flag_bits & ENCRYPTED:
        raise ValueError(f"{archive}: refused, for it is encrypted; nothing was unpacked: get it from its publisher")
    mode = stat.S_IFMT(member.external_attr >> 16)
    for path in (PurePosixPath(member.filename), PureWindowsPath(member.filename)):
        if path.anchor or ".." in path.parts or mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(
                f"{archive}: refused, for it holds {member.filename!r}, a link or a name that leads out; nothing was "
                "unpacked: get the archive from its publisher"
            )


def _target(name, targets):
    """The name that a member of the archive gets in the folder, or None when it is not wanted."""
    for inside, target in targets.items():
        if name == inside:
            return target
        if inside.endswith("/") and name.startswith(inside):
            return target + name[len(inside) :]
    return None


def unpack_flickr8k_text(archive, folder):
    """Captions and split lists; captions of photos that are in no list are left out.

    They are 91 photos that no published score counts, and one (2258277193_586949ec62.jpg.1) that does not exist.
    """
    names = ("Flickr8k.token.txt", *FLICKR8K_LISTS)
    extract(archive, folder, {name: name for name in names})
    listed = {name for file in FLICKR8K_LISTS for name in (folder / file).read_bytes().split()}
    captions = folder / names[0]
    lines = captions.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.split(b"#")[0] in listed]
    captions.write_bytes(b"".join(kept))
    print(f"{captions.name}: left out {len(lines) - len(kept):,} of {len(lines):,} captions, of photos in no split")


def unpack_flickr30k_captions(table, folder):
    """The CSV (columns filename, split, raw: a JSON list of captions) -> a Karpathy file, captions included."""
    with open(table, encoding="utf-8", newline="") as file:
        images = [
            {
                "filename": row["filename"],
                "split": row["split"],
                "sentences": [{"raw": caption} for caption in json.loads(row["raw"])],
            }
            for row in csv.DictReader(file)
        ]
    content = {"dataset": "flickr30k", "images": images}
    (folder / "dataset_flickr30k.json").write_text(json.dumps(content), encoding="utf-8")


# --- the datasets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    url: str
    size: int  # bytes
    hash: str  # "sha256:..." or "md5:...", whichever its publisher or its users have published
    unpacked: int  # bytes on the disk, approximately
    unpack: Callable  # unpack(downloaded file, folder to write into)

    @property
    def name(self):
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class PublicDataset:
    licence: str
    downloads: tuple[Download, ...]


GITHUB_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
# A revision by its hash never changes, unlike "main".
HUB_FLICKR30K = "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/2b239befc81b6e3f035ce6bd52f5f4d60f5625f7/"
COCO = "http://images.cocodataset.org/"  # HTTPS fails there, with another host's certificate; the hashes protect
FLICKR_LICENCE = "the photos belong to their authors: research use only, and they may not be republished"

DATASETS = {
    "flickr8k": PublicDataset(
        FLICKR_LICENCE,
        (
            Download(
                GITHUB_FLICKR8K + "Flickr8k_text.zip",
                2_340_801,
                "md5:bf6c1abcb8e4a833b7f922104de18627",
                4_000_000,
                unpack_flickr8k_text,
            ),
            Download(
                GITHUB_FLICKR8K + "Flickr8k_Dataset.zip",
                1_115_419_746,
                "md5:f18a1e2920de5bd84dae7cf08ec78978",
                1_150_000_000,
                partial(extract, targets={"Flicker8k_Dataset/": "images/"}),  # spelt so by its publisher
            ),
        ),
    ),
    "flickr30k": PublicDataset(
        FLICKR_LICENCE,
        (
            Download(
                HUB_FLICKR30K + "flickr_annotations_30k.csv",
                12_896_305,
                "sha256:395990db603ab8bafd5c7ab2746b22058bb1e75b78b3eb56ad755931364ac137",
                15_000_000,
                unpack_flickr30k_captions,
            ),
            Download(
                HUB_FLICKR30K + "flickr30k-images.zip",
                4_390_240_817,
                "sha256:2ce2420c0d17f0531deaa89ac657b4d5067ec519da16ff1ea12acbf5619c7391",
                4_450_000_000,
                partial(extract, targets={"flickr30k-images/": "flickr30k_images/"}),
            ),
        ),
    ),
    "coco2017": PublicDataset(
        "captions CC BY 4.0; the photos belong to their authors, under the Flickr licence that each has chosen",
        (
            Download(
                COCO + "annotations/annotations_trainval2017.zip",
                252_907_541,
                "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
                100_000_000,
                partial(
                    extract,
                    targets={name: name for name in map("annotations/captions_{}2017.json".format, ("train", "val"))},
                ),
            ),
            Download(
                COCO + "zips/val2017.zip",
                815_585_330,
                "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
                830_000_000,
                partial(extract, targets={"val2017/": "val2017/"}),
            ),
            Download(
                COCO + "zips/train2017.zip",
                19_336_861_798,
                "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
                19_600_000_000,
                partial(extract, targets={"train2017/": "train2017/"}),
            ),
        ),
    ),
}


def fetch_dataset(name, folder, keep_archives=False):
    """Make the public dataset `name` (a key of `DATASETS`) complete in `folder`; a second call does nothing.

    Only what is missing is downloaded and unpacked; other files in `folder` stay. Archives are removed once unpacked
    unless `keep_archives`. Raises ValueError or OSError that says what is wrong and names the address: unknown name,
    disk too small, network down, wrong size or hash, unsafe archive. Bytes that have arrived by then are kept.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    folder = Path(folder)
    finished = _read_manifest(folder)
    missing = [part for part in DATASETS[name].downloads if not _is_complete(folder, finished.get(part.name))]
    if not missing:
        print(f"{name}: all is there, in {folder}")
        return
    _require_space(folder, sum(_bytes_to_come(part, folder) for part in missing), f"for {name}")
    print(f"{name}: {DATASETS[name].licence}")
    folder.mkdir(parents=True, exist_ok=True)
    for part in missing:
        archive = folder / part.name
        download(part.url, archive, part.size, part.hash)
        finished[part.name] = _unpack(part, archive, folder)
        _write_manifest(folder, finished)
        if not keep_archives:
            archive.unlink()
    print(f"{name}: ready in {folder}")


def _unpack(part, archive, folder):
    """Unpack under a temporary name, then put everything in its place -> {file in `folder`: bytes}."""
    draft = folder / f".{archive.name}.unpacking"
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    draft.mkdir()
    try:
        part.unpack(archive, draft)
        files = {
            path.relative_to(draft).as_posix(): path.stat().st_size
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        _move_into(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return files


def _move_into(source, target):
    """Move the entries of `source` into `target`; what else lies there stays."""
    for entry in source.iterdir():
        if entry.is_dir() and (target / entry.name).is_dir():
            _move_into(entry, target / entry.name)
        else:
            os.replace(entry, target / entry.name)


def _read_manifest(folder):
    """{name of a finished download: {file: bytes}}; empty when none is finished, or the manifest is damaged."""
    try:
        content = read_json(folder / MANIFEST_FILE)
    except (FileNotFoundError, ValueError):
        return {}
    return {} if misfit(content, {"finished": {str: {str: int}}}) else content["finished"]


def _write_manifest(folder, finished):
    text = json.dumps({"finished": finished}, indent=0)
    write_atomically(folder / MANIFEST_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _is_complete(folder, files):
    """Whether every file is there in its full size."""
    try:
        return bool(files) and all(os.stat(folder / name).st_size == size for name, size in files.items())
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


# --- disk space -------------------------------------------------------------------------------------------------------


def _bytes_to_come(part, folder):
    """Bytes that a part still needs on the disk: the rest of its download, and its unpacked files."""
    arrived = sum(path.stat().st_size for path in (folder / part.name, _part_file(folder / part.name)) if path.exists())
    return max(0, part.size - arrived) + part.unpacked


def _require_space(folder, needed, purpose):
    """Raises OSError when `folder`'s disk has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{folder}: not enough disk space {purpose}: {needed / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free"
        )


# --- one file ---------------------------------------------------------------------------------------------------------


def download(url, path, size, known_hash):
    """Download `url` to the file `path` unless it is there; an earlier attempt, in `path`.part, is continued.

    `size` in bytes; `known_hash` is "sha256:..." or "md5:...". Raises ValueError when the file at the address has
    another size or hash (it is then removed), OSError when the server refuses or the network stays down (what has
    arrived is then kept). Both name the address.
    """
    import pooch  # here, like requests below, so that a run without downloads does not wait for it

    pooch.get_logger().setLevel("WARNING")  # the progress bar says the rest
    path = Path(path)
    part = _part_file(path)
    scratch = path.with_name(f".{path.name}.download")  # removed as a whole, with what a killed process left
    scratch.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, scratch / path.name)  # pooch takes it if its hash is right
    try:
        pooch.retrieve(url, known_hash, path.name, scratch, downloader=ResumingDownloader(part, size))
        os.replace(scratch / path.name, path)
        part.unlink(missing_ok=True)
        shutil.rmtree(scratch)
    except ValueError as error:
        part.unlink(missing_ok=True)
        shutil.rmtree(scratch)
        raise ValueError(f"{url}: {error}") from error
    finally:
        with suppress(OSError):
            scratch.rmdir()  # unless it holds something


def _part_file(path):
    return path.with_name(path.name + ".part")


class ResumingDownloader:
    """A downloader for pooch that collects the file in `part`, over as many connections as it takes."""

    def __init__(self, part, size):
        self.part, self.size = part, size

    def __call__(self, url, output_file, pooch):
        self._fetch(url)
        os.remove(output_file)
        try:
            # pooch removes its file when it is interrupted, and taking the hash of 19 GB lasts: `part` outlives that.
            os.link(self.part, output_file)
        except OSError:  # a disk without links
            os.replace(self.part, output_file)

    def _fetch(self, url):
        """Try until the file is complete; give up after ATTEMPTS in a row without a new byte."""
        import requests

        failures, most_arrived = 0, 0
        while True:
            try:
                return self._fetch_rest(url)
            except requests.RequestException as error:
                status = error.response.status_code if error.response is not None else None
                if status and 400 <= status < 500 and status not in TEMPORARY_FAILURES:
                    raise OSError(f"{url}: the server answers {status} {error.response.reason}") from error
                arrived = self._arrived()
                failures = 1 if arrived > most_arrived else failures + 1
                most_arrived = max(most_arrived, arrived)
                reason = _reason(error)
                if failures >= ATTEMPTS:
                    raise OSError(
                        f"{url}: given up after {ATTEMPTS} attempts ({reason}); {arrived:,} of {self.size:,} bytes are "
                        "here, and running the same command again goes on from there"
                    ) from error
                print(f"{url}: {reason}; trying again", file=sys.stderr)
                time.sleep(PAUSE * failures)

    def _fetch_rest(self, url):
        """Append the bytes that `part` lacks. Raises requests.RequestException when the connection fails, ValueError
        when the file at the address has another size."""
        import requests

        arrived = self._arrived()
        if arrived == self.size:
            return
        # Compressed on its way, a file would have another length.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={arrived}-"} if arrived else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != requests.codes.requested_range_not_satisfiable:  # then the file there is shorter
                response.raise_for_status()
            total = _total_size(response)
            if total not in (None, self.size):
                raise ValueError(f"wrong size: {total:,} bytes where {self.size:,} are expected; nothing of it is kept")
            if response.status_code == requests.codes.ok:
                arrived = 0  # the server ignores the range and sends everything
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {arrived}-"):
                self.part.unlink(missing_ok=True)
                raise requests.ConnectionError(f"the server does not go on from byte {arrived:,}; starting over")
            name = url.rsplit("/", 1)[-1]
            with (
                open(self.part, "ab" if arrived else "wb") as file,
                _bar(desc=name, total=self.size, initial=arrived, unit="B", unit_scale=True) as bar,
            ):
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
                    stop_if_asked()
        if self._arrived() != self.size:
            raise requests.ConnectionError(f"the connection ended after {self._arrived():,} of {self.size:,} bytes")

    def _arrived(self):
        return self.part.stat().st_size if self.part.exists() else 0


def _total_size(response):
    """Bytes of the whole file by the headers of the response, or None."""
    size = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None


def _reason(error):
    """The innermost cause: "Connection refused" instead of three libraries' wrappings of it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error) or type(error).__name__


def _bar(*args, **options):
    """A progress bar; in a log file it prints only every 30 seconds."""
    return tqdm(*args, **options, mininterval=0.2 if sys.stderr.isatty() else 30)
