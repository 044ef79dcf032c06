"""Datasets are fetched, verified and unpacked against a loopback server that misbehaves; a check finds each damage."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import prepare_data
from captioning.data import downloads, shapes, sources
from conftest import make_flickr

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server:
    """Serves `files` ({"/name": bytes}) on the loopback; `cuts` ({"/name": bytes}) ends a connection early, once."""

    def __init__(self):
        self.files, self.cuts, self.ignores_range = {}, {}, False
        self.requests, self.sent = [], 0  # (path, Range header or None); bytes of content
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                server.requests.append((self.path, wanted))
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and not server.ignores_range else 0
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                body = content[start:][: server.cuts.pop(self.path, None)]
                server.sent += len(body)
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def sha256(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def photo_bytes(seed, size=(40, 48), kind="jpeg"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def zip_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.files["/big.zip"], server.cuts["/big.zip"] = CONTENT, len(CONTENT) // 2
    target = tmp_path / "big.zip"
    downloads.download(f"{server.url}/big.zip", target, len(CONTENT), sha256(CONTENT))
    assert target.read_bytes() == CONTENT
    (_, first), (_, second) = server.requests
    assert first is None
    assert (
        len(CONTENT) // 2 - downloads.CHUNK_BYTES <= int(second.removeprefix("bytes=").rstrip("-")) <= len(CONTENT) // 2
    )
    assert server.sent <= len(CONTENT) + downloads.CHUNK_BYTES
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_download_goes_on_in_the_next_run(server, tmp_path, monkeypatch):
    server.files["/big.zip"] = CONTENT
    target = tmp_path / "big.zip"
    bar = downloads._bar

    def bar_that_is_interrupted(**options):
        made = bar(**options)
        update = made.update

        def count(n):
            update(n)
            if made.n > len(CONTENT) // 2:
                raise KeyboardInterrupt

        made.update = count
        return made

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(downloads, "_bar", bar_that_is_interrupted)
        downloads.download(f"{server.url}/big.zip", target, len(CONTENT), sha256(CONTENT))
    arrived = (tmp_path / "big.zip.part").stat().st_size
    assert len(CONTENT) // 2 < arrived < len(CONTENT)
    downloads.download(f"{server.url}/big.zip", target, len(CONTENT), sha256(CONTENT))
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, f"bytes={arrived}-"]


def test_a_server_that_ignores_ranges_sends_the_file_again(server, tmp_path):
    server.files["/big.zip"], server.cuts["/big.zip"], server.ignores_range = CONTENT, 1_000_000, True
    downloads.download(f"{server.url}/big.zip", tmp_path / "big.zip", len(CONTENT), sha256(CONTENT))
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert len(server.requests) == 2 and server.requests[1][1] is not None


def test_an_old_part_that_is_too_long_is_replaced(server, tmp_path):
    server.files["/big.zip"] = CONTENT
    (tmp_path / "big.zip.part").write_bytes(CONTENT + b"x")
    downloads.download(f"{server.url}/big.zip", tmp_path / "big.zip", len(CONTENT), sha256(CONTENT))
    assert (tmp_path / "big.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", CONTENT[:1000]], ids=["fresh", "resumed"])
@pytest.mark.parametrize(
    "served", [CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), CONTENT[:-1], b""], ids=["content", "size", "empty"]
)
def test_a_wrong_file_is_named_and_removed(server, tmp_path, served, part):
    server.files["/big.zip"] = served
    if part:
        (tmp_path / "big.zip.part").write_bytes(part)
    url = f"{server.url}/big.zip"
    with pytest.raises(ValueError) as error:
        downloads.download(url, tmp_path / "big.zip", len(CONTENT), sha256(CONTENT))
    expected = sha256(CONTENT) if len(served) == len(CONTENT) else f"{len(CONTENT):,}"
    assert url in str(error.value) and expected in str(error.value)
    assert list(tmp_path.iterdir()) == [] and len(server.requests) == 1


def test_an_address_that_is_gone_is_tried_once(server, tmp_path):
    with pytest.raises(OSError, match=re.escape(f"{server.url}/gone.zip: the server answers 404")):
        downloads.download(f"{server.url}/gone.zip", tmp_path / "gone.zip", 10, sha256(b""))
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == []


def test_no_network_is_given_up_after_some_attempts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.zip"
        with pytest.raises(OSError, match="again goes on from there") as error:
            downloads.download(url, tmp_path / "a.zip", 10, sha256(b""))
    assert url in str(error.value) and "refused" in str(error.value)
    assert capsys.readouterr().err.count("trying again") == downloads.ATTEMPTS - 1


def test_a_file_put_there_by_hand_is_taken_when_it_is_the_right_one(server, tmp_path):
    (tmp_path / "a.zip").write_bytes(CONTENT)
    server.files["/a.zip"] = CONTENT
    downloads.download(f"{server.url}/a.zip", tmp_path / "a.zip", len(CONTENT), sha256(CONTENT))
    assert server.requests == []
    (tmp_path / "a.zip").write_bytes(CONTENT[:-1])
    downloads.download(f"{server.url}/a.zip", tmp_path / "a.zip", len(CONTENT), sha256(CONTENT))
    assert len(server.requests) == 1 and (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("links", [True, False])
def test_an_interrupt_while_the_hash_is_taken_costs_nothing(server, tmp_path, monkeypatch, links):
    import pooch

    server.files["/a.zip"] = CONTENT
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links on this disk")))

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pooch.core, "hash_matches", interrupted)
        downloads.download(f"{server.url}/a.zip", tmp_path / "a.zip", len(CONTENT), sha256(CONTENT))
    assert files_below(tmp_path) == (["a.zip.part"] if links else [])
    downloads.download(f"{server.url}/a.zip", tmp_path / "a.zip", len(CONTENT), sha256(CONTENT))
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and len(server.requests) == (1 if links else 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.zip"]


def test_what_a_killed_process_left_is_removed(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    (tmp_path / ".a.zip.download").mkdir()
    (tmp_path / ".a.zip.download" / "tmp1234").write_bytes(CONTENT)
    downloads.download(f"{server.url}/a.zip", tmp_path / "a.zip", len(CONTENT), sha256(CONTENT))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.zip"]


# --- archives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "C:/evil.txt", "..\\evil.txt"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    archive, inside = tmp_path / "bad.zip", tmp_path / "inside"
    inside.mkdir()
    archive.write_bytes(zip_bytes({"a/1.jpg": b"1", name: b"evil"}))
    with pytest.raises(ValueError, match=r"bad\.zip: refused"):
        downloads.extract(archive, inside, {"a/": "images/"})
    assert files_below(tmp_path) == ["bad.zip"]


def test_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("a/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive, inside = tmp_path / "bad.zip", tmp_path / "inside"
    inside.mkdir()
    archive.write_bytes(zip_bytes({"a/1.jpg": b"1", link: "/etc"}))
    with pytest.raises(ValueError, match="a link"):
        downloads.extract(archive, inside, {"a/": "images/"})
    assert files_below(inside) == []


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content.replace(b"word", b"damp")])
def test_a_damaged_archive_is_named(tmp_path, damage):
    archive = tmp_path / "bad.zip"
    archive.write_bytes(damage(zip_bytes({"a/1.txt": b"word " * 100})))
    with pytest.raises(ValueError, match=r"bad\.zip: not a usable zip archive"):
        downloads.extract(archive, tmp_path, {"a/": "images/"})


def test_an_archive_without_the_photos_is_refused(tmp_path):
    archive = tmp_path / "other.zip"
    archive.write_bytes(zip_bytes({"readme.txt": b""}))
    with pytest.raises(ValueError, match="holds no images/"):
        downloads.extract(archive, tmp_path, {"images/": "images/"})


# --- datasets ---------------------------------------------------------------------------------------------------------


def coco(photos):
    """captions_*.json of COCO for the names of photos."""
    return json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(photos)],
            "annotations": [
                {"id": 10 * i + n, "image_id": i, "caption": f"Caption {n} ."}
                for i in range(len(photos))
                for n in (0, 1)
            ],
        }
    )


def flickr30k_csv(names):
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for i, name in enumerate(names):
        captions = [f'A "dog", {n} .' for n in range(5)]
        table.writerow([json.dumps(captions), "[0]", "train" if i < 4 else ("val", "test")[i % 2], name, i])
    return text.getvalue()


def fake_archives(name):
    """The archives of a dataset as their publishers lay them out, with six photos or so."""
    photos = {f"{i}.jpg": photo_bytes(i) for i in range(6)}
    if name == "flickr8k":
        lines = [f"{photo}#{n}\tCaption {n} ." for photo in [*photos, "2258277193_586949ec62.jpg.1"] for n in range(5)]
        lists = {"train": list(photos)[:3], "dev": ["3.jpg"], "test": ["4.jpg"]}
        text = {f"Flickr_8k.{part}Images.txt": "\n".join(names) for part, names in lists.items()}
        return {
            "Flickr8k_text.zip": zip_bytes({"Flickr8k.token.txt": "\n".join(lines), "readme.txt": "", **text}),
            "Flickr8k_Dataset.zip": zip_bytes(
                {"Flicker8k_Dataset/": b"", "__MACOSX/._0.jpg": b"junk"}
                | {f"Flicker8k_Dataset/{photo}": content for photo, content in photos.items()}
            ),
        }
    if name == "flickr30k":
        return {
            "flickr_annotations_30k.csv": flickr30k_csv(photos).encode(),
            "flickr30k-images.zip": zip_bytes(
                {f"flickr30k-images/{photo}": content for photo, content in photos.items()}
            ),
        }
    train, val = list(photos)[:4], list(photos)[4:]
    return {
        "annotations_trainval2017.zip": zip_bytes(
            {
                "annotations/captions_train2017.json": coco(train),
                "annotations/captions_val2017.json": coco(val),
                "annotations/instances_val2017.json": "{}",
            }
        ),
        "val2017.zip": zip_bytes({f"val2017/{photo}": photos[photo] for photo in val}),
        "train2017.zip": zip_bytes({f"train2017/{photo}": photos[photo] for photo in train}),
    }


@pytest.fixture
def publish(server, monkeypatch):
    """publish(dataset): the server offers small archives of it, and the table of datasets says so."""

    def publish(name):
        served = fake_archives(name)
        server.files |= {f"/{file}": content for file, content in served.items()}
        dataset = downloads.DATASETS[name]
        parts = tuple(
            replace(
                part,
                url=f"{server.url}/{part.name}",
                size=len(served[part.name]),
                hash=sha256(served[part.name]),
                unpacked=1000,
            )
            for part in dataset.downloads
        )
        monkeypatch.setitem(downloads.DATASETS, name, replace(dataset, downloads=parts))

    return publish


LAYOUTS = {
    "flickr8k": (
        [
            "Flickr8k.token.txt",
            "Flickr_8k.devImages.txt",
            "Flickr_8k.testImages.txt",
            "Flickr_8k.trainImages.txt",
            *(f"images/{i}.jpg" for i in range(6)),
            "prepared.json",
        ],
        {"train": 15, "val": 5, "test": 5},  # not 5.jpg, which is in no list, nor the photo that does not exist
    ),
    "flickr30k": (
        ["dataset_flickr30k.json", *(f"flickr30k_images/{i}.jpg" for i in range(6)), "prepared.json"],
        {"train": 20, "val": 5, "test": 5},
    ),
    "coco2017": (
        [
            "annotations/captions_train2017.json",
            "annotations/captions_val2017.json",
            "prepared.json",
            *(f"train2017/{i}.jpg" for i in range(4)),
            "val2017/4.jpg",
            "val2017/5.jpg",
        ],
        {"train": 8, "val": 4},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dataset_lies_as_the_reader_expects_it(server, publish, tmp_path, capsys, name):
    publish(name)
    folder = tmp_path / "new" / name
    prepare_data.main([name, "--to", str(folder)])
    files, splits = LAYOUTS[name]
    assert files_below(folder) == files
    df = sources.load(folder)
    assert df["split"].value_counts().to_dict() == splits
    assert all(image.is_file() for image in df["image"]) and (df["caption"] != "").all()

    asked, stamps = len(server.requests), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    prepare_data.main([name, "--to", str(folder)])
    assert "all is there" in capsys.readouterr().out
    assert len(server.requests) == asked
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps


def test_only_what_is_lost_is_fetched_again(server, publish, tmp_path):
    publish("coco2017")
    downloads.fetch_dataset("coco2017", tmp_path)
    (tmp_path / "val2017" / "4.jpg").write_bytes(b"cut short")
    (tmp_path / "val2017" / "mine.txt").write_text("a note")
    server.requests.clear()
    downloads.fetch_dataset("coco2017", tmp_path)
    assert [path for path, _ in server.requests] == ["/val2017.zip"]
    assert (tmp_path / "val2017" / "4.jpg").read_bytes() == photo_bytes(4)
    assert (tmp_path / "val2017" / "mine.txt").read_text() == "a note"


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_unpacking_is_done_again(server, publish, tmp_path, monkeypatch, killed):
    publish("flickr8k")
    copied, content = [], downloads._content

    def half(opened, member):
        if member.filename.endswith("3.jpg"):
            yield b"half a photo"
            raise KeyboardInterrupt
        copied.append(member)
        yield from content(opened, member)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="again"):
        patched.setattr(downloads, "_content", half)
        if killed:  # a process that is killed cleans nothing up
            patched.setattr(shutil, "rmtree", lambda *args, **options: None)
        prepare_data.main(["flickr8k", "--to", str(tmp_path)])
    assert copied and not (tmp_path / "images").exists()
    assert bool(list(tmp_path.glob(".*.unpacking"))) == killed
    server.requests.clear()
    prepare_data.main(["flickr8k", "--to", str(tmp_path)])
    assert server.requests == []  # the archive was whole
    assert files_below(tmp_path) == LAYOUTS["flickr8k"][0]
    assert (tmp_path / "images" / "3.jpg").read_bytes() == photo_bytes(3)


def test_archives_stay_if_wanted(publish, tmp_path):
    publish("flickr30k")
    prepare_data.main(["flickr30k", "--to", str(tmp_path), "--keep_archives"])
    assert {"flickr30k-images.zip", "flickr_annotations_30k.csv"} <= set(files_below(tmp_path))


def test_a_full_disk_is_found_before_the_download(server, publish, tmp_path, monkeypatch):
    publish("flickr8k")
    disk = namedtuple("usage", "total used free")(10, 9, 1500)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(SystemExit, match=r"error: .*not enough disk space for flickr8k: .* GB needed, 0\.00 GB free"):
        prepare_data.main(["flickr8k", "--to", str(tmp_path / "new")])
    assert server.requests == [] and not (tmp_path / "new").exists()


def test_a_failed_download_ends_with_a_message(server, publish, tmp_path):
    publish("flickr8k")
    server.files["/Flickr8k_Dataset.zip"] = server.files["/Flickr8k_Dataset.zip"][:-1] + b"?"
    with pytest.raises(SystemExit, match=re.escape(f"error: {server.url}/Flickr8k_Dataset.zip: SHA256 hash")):
        prepare_data.main(["flickr8k", "--to", str(tmp_path)])
    assert not list(tmp_path.glob("Flickr8k_Dataset.zip*"))


def test_every_dataset_has_an_exact_size_and_a_hash():
    for dataset in downloads.DATASETS.values():
        for part in dataset.downloads:
            assert re.fullmatch(r"https?://.+/[\w.-]+\.(zip|csv)", part.url)
            assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", part.hash)
            assert part.size > 1_000_000 and part.unpacked > 1_000_000
    with pytest.raises(ValueError, match="unknown dataset 'flickr9k'"):
        downloads.fetch_dataset("flickr9k", "nowhere")


def test_shapes_are_rendered_and_never_replace_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "SHAPES_SCENES", 12)
    prepare_data.main(["shapes", "--to", str(tmp_path / "shapes")])
    assert (tmp_path / "shapes" / shapes.SPLIT_FILE).is_file()
    prepare_data.main(["shapes", "--to", str(tmp_path / "shapes")])
    with pytest.raises(SystemExit, match="other than Shapes"):
        prepare_data.main(["shapes", "--to", str(tmp_path)])
    assert (tmp_path / "shapes" / shapes.SPLIT_FILE).is_file()


@pytest.mark.parametrize("arguments", [[], ["flickr9k"], ["flickr8k", "--check", "data"]])
def test_a_wrong_command_line_is_refused(arguments):
    with pytest.raises(SystemExit) as end:
        prepare_data.main(arguments)
    assert end.value.code.startswith("error: ") and "flickr8k" in end.value.code


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """12 photos in the Flickr30k layout, two captions each; lines 2 and 3 are photo 1000."""
    return make_flickr(tmp_path / "data")


def check(folder, capsys, *options):
    """Run the tool -> exit status, what it printed."""
    try:
        prepare_data.main(["--check", str(folder), *options])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_a_good_dataset_passes(data, tmp_path, capsys):
    status, printed = check(data, capsys)
    assert status == 0 and printed.rstrip().splitlines()[-3] == "none"
    report = (data / "check" / "report.md").read_text(encoding="utf-8")
    for line in (
        "|  | train | val | test | all |",
        "| images | 8 | 2 | 2 | 12 |",
        "| captions | 16 | 4 | 4 | 24 |",
        "- captions an image: 2 to 2, mean 2.00",
        "- words a caption: 8 to 11, median 10, 95% have at most 11",
        "- width x height of the photos: from 50 x 40 to 50 x 40, median 50 x 40",
        "- formats: JPEG 12",
        "   6 to 10         12  #########################",
    ):
        assert line in report.splitlines() and line in printed.splitlines()
    sheet = (data / "check" / "contact_sheet.png").read_bytes()
    assert Image.open(io.BytesIO(sheet)).width > 500
    check(data, capsys, "--report", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "contact_sheet.png").read_bytes() == sheet  # the same photos again


def rewrite(data, old, new):
    path = data / "results.csv"
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def damage(kind, data):
    images = data / "flickr30k_images"
    first, last = images / "1000.jpg", images / "1011.jpg"  # in training, in test
    if kind == "missing":
        first.unlink()
    elif kind == "truncated":
        first.write_bytes(first.read_bytes()[:-300])
    elif kind == "not an image":
        first.write_text("<html>not found</html>")
    elif kind == "same file in two splits":
        shutil.copy(first, last)
    elif kind == "same pixels in two splits":
        Image.open(first).convert("RGBA").save(images / "copy.png")
        (images / "copy.png").replace(last)
    elif kind == "same photo twice":
        shutil.copy(first, images / "1001.jpg")
    elif kind == "tiny":
        first.write_bytes(photo_bytes(99, size=(31, 64)))
    elif kind == "empty":
        rewrite(data, b"a red dog runs across the green grass .", b"")
    elif kind == "two encodings":
        rewrite(data, b"a red dog runs", "a red dög runs".encode("latin-1"))
        rewrite(data, b"two young men", "two yöung men".encode())
    elif kind == "long":
        rewrite(data, b"a red dog runs", b"a red dog runs" + b" on" * 100)
    elif kind == "unnamed":
        (images / "extra.jpg").write_bytes(photo_bytes(98))


@pytest.mark.parametrize(
    "kind, status, title, row",
    [
        ("missing", 1, "error: missing images: 1", "results.csv, line 2: 1000.jpg"),
        ("truncated", 1, "error: images that cannot be decoded: 1", "1000.jpg (image file is truncated"),
        ("not an image", 1, "error: images that cannot be decoded: 1", "line 2: 1000.jpg (not an image of"),
        (
            "same file in two splits",
            1,
            "error: photos that are in more than one split: 1",
            "results.csv, line 2: 1000.jpg (train) = results.csv, line 24: 1011.jpg (test)",
        ),
        (
            "same pixels in two splits",
            1,
            "error: photos that are in more than one split: 1",
            "results.csv, line 2: 1000.jpg (train) = results.csv, line 24: 1011.jpg (test), in pixels",
        ),
        (
            "same photo twice",
            0,
            "warning: photos that are in one split more than once: 1",
            "results.csv, line 2: 1000.jpg (train) = results.csv, line 4: 1001.jpg (train)",
        ),
        ("tiny", 0, "warning: images with a side below 32 pixels: 1", "results.csv, line 2: 1000.jpg (64 x 31)"),
        ("empty", 0, "warning: empty captions: 1", "results.csv, line 2: 1000.jpg"),
        ("two encodings", 0, "warning: captions that are not UTF-8: 1", "results.csv, line 2: 1000.jpg"),
        ("long", 0, "warning: captions of more than 100 words: 1", "results.csv, line 2: 1000.jpg (108 words)"),
        ("unnamed", 0, "warning: photos on disk that no row names: 1", "extra.jpg"),
    ],
)
def test_each_damage_is_found_with_its_row(data, capsys, kind, status, title, row):
    damage(kind, data)
    found, printed = check(data, capsys)
    assert found == status
    assert [line for line in printed.splitlines() if line.startswith("**")] == [f"**{title}**"]
    assert any(line.startswith("- ") and row in line for line in printed.splitlines())


def test_many_rows_are_counted_and_ten_shown(data, capsys):
    shutil.rmtree(data / "flickr30k_images")
    status, printed = check(data, capsys)
    assert status == 1 and "**error: missing images: 12**" in printed and "- and 2 more" in printed
    assert "no photo can be decoded" in printed and not (data / "check" / "contact_sheet.png").exists()


def test_a_dataset_elsewhere_is_checked(data, tmp_path, capsys):
    shutil.move(data / "flickr30k_images", tmp_path / "photos")
    shutil.copy(data / "results.csv", tmp_path / "captions.csv")
    (tmp_path / "captions.csv").write_text("image,caption\n1000.jpg,a dog\n1001.jpg,a cat\n1002.jpg,a cow\n")
    options = ("--captions_file", str(tmp_path / "captions.csv"), "--image_dir", str(tmp_path / "photos"))
    (data / "dataset_flickr30k.json").unlink()
    status, printed = check(data, capsys, *options)
    assert status == 0 and "**warning: photos on disk that no row names: 9**" in printed


def test_a_folder_without_captions_is_an_error(tmp_path, capsys):
    status, _ = check(tmp_path, capsys)
    assert str(status).startswith("error: ") and str(tmp_path) in status
