"""caption_image.py: folders that go on, what cannot be read, URLs, attention, JSON. Plain use is in test_script.py."""

import contextlib
import csv
import http.server
import json
import re
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import caption_image
from captioning.command_line import photo_arguments
from captioning.command_line.caption_table import CaptionTable, made_with
from captioning.command_line.sidecars import Sidecars
from captioning.data import sources
from captioning.decoding.confidence import Confidence
from captioning.decoding.familiarity import DIM, UNUSUAL, Familiarity
from captioning.decoding.search import generate_ids, log_probabilities
from conftest import REPO_ROOT
from helpers.calibrated import calibrated_copy
from helpers.other_process import holding

SHAPES = REPO_ROOT / "examples" / "shapes"
CHECKPOINT = ["--checkpoint", str(SHAPES)]
CAPTIONS = {
    "scene_0.png": "a small blue triangle above a small white circle",
    "scene_2.png": "above a large blue cross is a large red square",
}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, example):
    monkeypatch.setattr(caption_image, "load_captioner", lambda source: example)


@pytest.fixture(scope="module")
def example():
    from MyLLM_Vit_gpt2_captioning import load_captioner

    return load_captioner(SHAPES)


@pytest.fixture
def folder(tmp_path):
    """Three scenes, one in a subfolder, and what has to be passed over."""
    folder = tmp_path / "holiday"
    for place in ("scene_0.png", "scene_2.png", "sub/scene_0.PNG", ".thumbnails/scene_1.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHAPES / (place.rpartition("/")[2].lower()), folder / place)
    (folder / "notes.txt").write_text("no photo")
    return folder


def read(path):
    return list(csv.reader(path.read_text(encoding="utf-8").splitlines()))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_gets_a_table_and_goes_on(folder, captioned, capsys):
    """A line that was cut off and a photo that came later are captioned; nothing is captioned twice."""
    caption_image.main([str(folder), *CHECKPOINT])
    shown = capsys.readouterr()
    assert shown.out == f"3 images with captions are in {folder / 'captions.csv'}\n"
    assert "captions: 100%" in shown.err and "3/3" in shown.err
    table = folder / "captions.csv"
    header, *rows = read(table)
    assert header == ["image", "caption", "model", "made_with"]
    made = made_with([SHAPES / "captioner.safetensors"], {})
    assert rows == [
        ["scene_0.png", CAPTIONS["scene_0.png"], str(SHAPES), made],
        ["scene_2.png", CAPTIONS["scene_2.png"], str(SHAPES), made],
        ["sub/scene_0.PNG", CAPTIONS["scene_0.png"], str(SHAPES), made],
    ]
    whole = table.read_text()

    captioned.clear()
    caption_image.main([str(folder), *CHECKPOINT])
    assert "3 of 3 images are captioned already" in capsys.readouterr().out
    assert not captioned
    table.write_text(whole[:-20])
    shutil.copy(SHAPES / "scene_2.png", folder / "later.png")
    caption_image.main([str(folder), *CHECKPOINT])
    assert captioned == ["later.png", "sub/scene_0.PNG"]
    assert sorted(read(table)) == sorted([header, *rows, ["later.png", CAPTIONS["scene_2.png"], str(SHAPES), made]])


def test_captions_are_written_as_they_are_made(folder, monkeypatch):
    """Stopped in the second batch, the first is in the table."""
    caption = caption_image.Captioner.caption

    def stop(self, read):
        if (folder / "captions.csv").read_text().count("\n") > 1:
            raise KeyboardInterrupt
        return caption(self, read)

    monkeypatch.setattr(caption_image.Captioner, "caption", stop)
    with pytest.raises(SystemExit, match=r"interrupted; .* the same command resumes"):
        caption_image.main([str(folder), *CHECKPOINT, "--batch_size", "1"])
    assert [row[0] for row in read(folder / "captions.csv")] == ["image", "scene_0.png"]


def test_two_commands_on_one_folder(folder):
    """Each would caption every photo."""
    with (
        holding(folder / ".captions.csv.lock") as first,
        pytest.raises(SystemExit, match=rf"^error: .*: process {first.pid} on .* is writing there; wait for it"),
    ):
        caption_image.main([str(folder), *CHECKPOINT])
    assert not (folder / "captions.csv").exists()


def test_a_signal_between_two_batches(folder, monkeypatch):
    caption = caption_image.Captioner.caption

    def signalled(self, read):
        signal.raise_signal(signal.SIGTERM)
        return caption(self, read)

    monkeypatch.setattr(caption_image.Captioner, "caption", signalled)
    with pytest.raises(SystemExit, match=r"^stopped by SIGTERM; captions already in a table stay there"):
        caption_image.main([str(folder), *CHECKPOINT, "--batch_size", "1"])
    assert [row[0] for row in read(folder / "captions.csv")] == ["image", "scene_0.png"]


def test_a_bad_image_is_reported_and_the_others_are_captioned(folder, capsys):
    (folder / "bad.jpg").write_text("no photo")
    with pytest.raises(SystemExit, match=r"^error: 2 of 5 images were left out$"):
        caption_image.main([str(folder), str(folder / "gone.png"), *CHECKPOINT, "--beam", "2", "--num", "2"])
    shown = capsys.readouterr()
    assert f"error: {folder / 'bad.jpg'}: not a readable image" in shown.err
    assert f"error: {folder / 'gone.png'}: no such image" in shown.err
    assert "Traceback" not in shown.err
    header, *rows = read(folder / "captions.csv")
    assert header == ["image", "caption", "caption_2", "model", "made_with"]
    assert [row[0] for row in rows] == ["scene_0.png", "scene_2.png", "sub/scene_0.PNG"]
    assert all(len({row[1], row[2]}) == 2 for row in rows)


def test_all_captions_to_one_file(folder, tmp_path, capsys):
    out, photo = tmp_path / "new" / "all.csv", str(SHAPES / "scene_2.png")
    caption_image.main([str(folder / "sub"), photo, *CHECKPOINT, "--out", str(out)])
    assert [row[:2] for row in read(out)[1:]] == [
        [str(folder / "sub" / "scene_0.PNG"), CAPTIONS["scene_0.png"]], [photo, CAPTIONS["scene_2.png"]]
    ]  # fmt: skip
    assert not (folder / "sub" / "captions.csv").exists()
    assert f"{photo}: {CAPTIONS['scene_2.png']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image,caption\nscene_0.png,what a person wrote\n", "its columns are image, caption, not image, caption, mo"),
        ("image;caption;model\n", "its columns are image;caption;model, not"),
    ],
)
def test_a_table_of_another_kind_is_left_alone(folder, content, said):
    (folder / "captions.csv").write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*captions.csv: {said}.*--out"):
        caption_image.main([str(folder), *CHECKPOINT])
    assert (folder / "captions.csv").read_text() == content


def test_any_name_and_caption_comes_back(tmp_path):
    names = ['a, "b".jpg', "caf\u00e9.jpg", "two\nlines.jpg", "not \udcff utf-8.jpg"]
    for _ in range(2):
        table = CaptionTable(tmp_path / "t.csv", 1, "m", "weights 1")
        table.start()
        if not table.done:
            table.add([(name, [' "quoted",\n and broken ']) for name in names])
        assert table.done == set(names)
    assert b'"""quoted"", and broken",m,weights 1\n' in table.path.read_bytes()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a", "@sum(a)"])
def test_cells_are_not_changed_for_programs_that_calculate(tmp_path, text):
    table = CaptionTable(tmp_path / "t.csv", 1, "m", "weights 1")
    table.start()
    table.add([(f"{text}.jpg", [text])])
    assert read(table.path)[1][:2] == [f"{text}.jpg", text]


def test_a_table_that_cannot_be_written_is_named(tmp_path):
    table = CaptionTable(tmp_path / "t.csv", 1, "m", "weights 1")
    table.start()
    table.add([("a.jpg", ["a cat"])])
    table.path = tmp_path / "gone" / "t.csv"
    with pytest.raises(OSError, match=r"gone.t\.csv: could not be written \(No such file or directory\); what"):
        table.add([("b.jpg", ["a dog"])])
    assert table.done == {"a.jpg"}
    with pytest.raises(SystemExit, match=r"error: .*photo\.txt.*: could not be written"):
        (tmp_path / "photo.txt").write_text("a file, not a folder")
        caption_image.main([str(SHAPES / "scene_0.png"), *CHECKPOINT, "--out", str(tmp_path / "photo.txt" / "t.csv")])


@pytest.fixture
def captioned(monkeypatch):
    """The names of the photos that were captioned, in a list that a test may clear."""
    names, caption = [], caption_image.Captioner.caption
    monkeypatch.setattr(
        caption_image.Captioner,
        "caption",
        lambda self, read: names.extend(p.name_in_folder for p in read) or caption(self, read),
    )
    return names


def test_what_others_captioned_is_said_and_redone(folder, captioned, capsys):
    """Other weights and other options; a line is kept until its image has a new one."""
    table, theirs = folder / "captions.csv", "scene_0.png,a cat,m,weights 123\n"
    table.write_text(f"image,caption,model,made_with\n{theirs}")
    caption_image.main([str(folder), *CHECKPOINT])
    assert "1 of 3 images are captioned already" in (said := capsys.readouterr().out)
    assert "1 of them with other weights or options (--redo captions those anew)" in said
    assert theirs in table.read_text() and captioned == ["scene_2.png", "sub/scene_0.PNG"]
    caption_image.main([str(folder), *CHECKPOINT, "--redo"])
    assert captioned[2:] == ["scene_0.png"] and theirs not in table.read_text() and len(read(table)) == 4
    captioned.clear()
    caption_image.main([str(folder), *CHECKPOINT, "--redo"])
    assert not captioned and "other weights" not in capsys.readouterr().out.splitlines()[-1]
    own = table.read_text()
    caption_image.main([str(folder), *CHECKPOINT, "--redo", "--prompt", "a large"])
    assert len(captioned) == 3 and read(table)[1][-1].endswith(", prompt a large")
    assert all(row[1].startswith("a large") for row in read(table)[1:]) and len(read(table)) == 4
    assert own.count(", prompt") == 0


def test_a_table_without_the_record(folder, captioned):
    """Of an earlier version: what its captioner has captioned counts, and the column is added."""
    table = folder / "captions.csv"
    table.write_text(f"image,caption,model\nscene_0.png,a cat,{SHAPES}\nscene_2.png,a dog,other\n")
    caption_image.main([str(folder), *CHECKPOINT, "--redo"])
    assert captioned == ["scene_2.png", "sub/scene_0.PNG"]
    assert read(table)[:2] == [
        ["image", "caption", "model", "made_with"], ["scene_0.png", "a cat", str(SHAPES), ""]
    ]  # fmt: skip


# --- sidecars ---------------------------------------------------------------------------------------------------------


def texts(folder, ending=".txt"):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob(f"s*{ending}")}


def test_sidecars_train_as_they_are(folder, capsys):
    """Through the reader of photos with text beside them, although captions.csv lies there, too."""
    caption_image.main([str(folder), *CHECKPOINT, "--sidecars", "--prepend", "A photo: ", "--append", "."])
    assert "3 .txt files were written beside the photos" in capsys.readouterr().out
    assert texts(folder)["sub/scene_0.txt"] == f"A photo: {CAPTIONS['scene_0.png']}.\n"
    frame = sources.load(folder)
    assert [path.relative_to(folder).as_posix() for path in frame["image"]] == [
        "scene_0.png", "scene_2.png", "sub/scene_0.PNG"
    ]  # fmt: skip
    assert list(frame["caption"])[1] == f"a photo: {CAPTIONS['scene_2.png']}."
    table = sources.load(folder, folder / "captions.csv")
    assert list(table["caption"])[1] == CAPTIONS["scene_2.png"]
    for path in list(folder.rglob("s*.txt"))[1:]:
        path.unlink()
    assert sources.find_captions(folder) == folder / "captions.csv"  # a single text is no dataset


def test_sidecars_go_on_where_they_stopped(folder, captioned, monkeypatch):
    """Stopped behind the line in the table and before the sidecar: it is written from the line."""
    write, count = Sidecars.write, []

    def killed(self, *args):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Sidecars, "write", killed)
    with pytest.raises(SystemExit, match="interrupted"):
        caption_image.main([str(folder), *CHECKPOINT, "--sidecars", "--batch_size", "1"])
    assert list(texts(folder)) == ["scene_0.txt"] and len(read(folder / "captions.csv")) == 3
    caption_image.main([str(folder), *CHECKPOINT, "--sidecars"])
    assert len(texts(folder)) == 3 and captioned == ["scene_0.png", "scene_2.png", "sub/scene_0.PNG"]
    assert not list(folder.rglob("*.part"))


def test_sidecars_that_others_wrote(folder, captioned, capsys):
    """Left alone, and their photos not captioned, until --existing says otherwise; then nothing is added twice."""
    (folder / "scene_0.txt").write_text("by hand\n")
    photos = {path: path.read_bytes() for path in folder.rglob("*.[pP][nN][gG]")}
    caption_image.main([str(folder), *CHECKPOINT, "--sidecars"])
    assert "1 images have captions beside them already and are left alone" in capsys.readouterr().out
    assert captioned == ["scene_2.png", "sub/scene_0.PNG"] and texts(folder)["scene_0.txt"] == "by hand\n"
    ours = CAPTIONS["scene_0.png"]
    for existing, text in (
        ("append", f"by hand\n{ours}\n"),
        ("append", f"by hand\n{ours}\n"),
        ("prepend", f"{ours}\nby hand\n"),
        ("skip", f"{ours}\nby hand\n"),
        ("overwrite", f"{ours}\n"),
    ):
        caption_image.main([str(folder), *CHECKPOINT, "--sidecars", "--existing", existing])
        assert texts(folder)["scene_0.txt"] == text
    assert "1 .txt files hold something else than the table's captions and are left alone" in capsys.readouterr().out
    assert len(captioned) == 3
    assert photos == {path: path.read_bytes() for path in photos}


def test_sidecars_of_an_earlier_captioner_are_redone(folder):
    """What was written here, but not what somebody has corrected since."""
    argv = [str(folder), *CHECKPOINT, "--sidecars", "--caption_extension", "caption"]
    caption_image.main(argv)
    (folder / "scene_2.caption").write_text("corrected\n")
    caption_image.main([*argv, "--redo", "--max_tokens", "3"])
    assert texts(folder, ".caption") == {
        "scene_0.caption": "a small blue\n", "scene_2.caption": "corrected\n", "sub/scene_0.caption": "a small blue\n"
    }  # fmt: skip


def test_xmp_sidecars(folder, capsys):
    """dc:description, in the file of another program among its other content."""
    theirs = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:xmp="http://ns.adobe.com/xap/1.0/" rdf:about="" xmp:Rating="4"/></rdf:RDF></x:xmpmeta>'
    )
    (folder / "scene_0.xmp").write_text(theirs)
    (folder / "scene_2.xmp").write_text("no xmp")
    caption_image.main([str(folder), *CHECKPOINT, "--write_xmp"])
    assert texts(folder, ".xmp")["scene_0.xmp"] == theirs
    assert (
        f'<rdf:li xml:lang="x-default">{CAPTIONS["scene_0.png"]}</rdf:li>' in texts(folder, ".xmp")["sub/scene_0.xmp"]
    )
    assert "2 images have captions beside them already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .*scene_2\.xmp: not an XMP file \(syntax error"):
        caption_image.main([str(folder), *CHECKPOINT, "--write_xmp", "--existing", "append"])
    text = texts(folder, ".xmp")["scene_0.xmp"]
    caption_image.main([str(folder), *CHECKPOINT, "--write_xmp"])
    assert "1 .xmp files hold something else" in capsys.readouterr().out
    assert 'xmp:Rating="4"' in text and f">{CAPTIONS['scene_0.png']}</rdf:li>" in text
    assert not texts(folder)


def test_what_has_no_sidecars(folder):
    shutil.copy(folder / "scene_0.png", folder / "scene_0.jpg")
    for argv, said in (
        ([str(folder), "--sidecars"], r"scene_0\.jpg and .*scene_0\.png would have the same sidecar, scene_0\.txt"),
        ([str(folder / "scene_2.png"), "--sidecars"], "--sidecars and --write_xmp are for folders, and for files with"),
        ([str(folder), "--append", "x"], "--caption_extension, --prepend, --append and --existing are for --sidecars"),
        ([str(folder), "--sidecars", "--caption_extension", "jpg"], "--caption_extension jpg: captions need an ending"),
        ([str(folder), "--sidecars", "--append", "a\nb"], "--prepend and --append are for one line"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            caption_image.main([*argv, *CHECKPOINT])
    assert not (folder / "captions.csv").exists()


def test_what_cannot_be_captioned(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, said in (
        ([str(tmp_path / "empty")], "empty: no image is in this folder"),
        ([str(folder), "--batch_size", "0"], "--batch_size must be an integer of at least 1, not 0"),
        (
            [str(folder), "--attention", str(folder / "maps")],
            "lies in .*holiday, where it would be captioned next time",
        ),
        ([str(SHAPES / "scene_0.png"), "--block", "1"], "--block and --head choose what --attention draws"),
        ([str(SHAPES / "scene_0.png"), "--attention", "a.png", "--head", "4"], "head 4: the decoder has heads 0 to 3"),
        ([str(SHAPES / "scene_0.png"), "--attention", "a.jpg"], "a.jpg: drawn as PNG"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            caption_image.main([*argv, *CHECKPOINT])
    assert not (folder / "captions.csv").exists()


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A web server on this machine: a photo, a page that is none, more bytes than are wanted, bytes that never end, and
    where it leads on to."""
    answers = {
        "/photo.png": (SHAPES / "scene_2.png").read_bytes(),
        "/page.png": b"<html>sorry</html>",
        "/large.png": bytes(200_000),
        "/slow.png": b"",
        "/moved.png": "/photo.png",
        "/local": "http://localhost:1/photo.png",
        "/private": "http://10.0.0.1/photo.png",
        "/metadata": "http://169.254.169.254/latest",
        "/file": "file:///etc/passwd",
        "/circle": "/circle",
    }
    asked, closing = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            redirect = isinstance(answers.get(self.path), str)
            self.send_response(302 if redirect else 200 if self.path in answers else 404)
            if redirect:
                self.send_header("Location", answers[self.path])
            self.end_headers()
            if self.path == "/slow.png":
                with contextlib.suppress(OSError):  # the other side has given up
                    while not closing.wait(0.05):
                        self.wfile.write(b"x")
            elif not redirect:
                self.wfile.write(answers.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = asked
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        closing.set()
        server.shutdown()
        thread.join()


def test_urls_are_fetched_only_where_that_is_allowed(server, capsys, monkeypatch):
    monkeypatch.setattr(photo_arguments, "MAX_BYTES", 100_000)
    monkeypatch.setattr(photo_arguments.fetch_image, "__defaults__", (100_000, 5, 30, "full"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(SystemExit, match=r"^error: http://127.*photo\.png: a URL; .*--allow_urls$"):
        caption_image.main([str(SHAPES / "scene_0.png"), f"{root}/photo.png", *CHECKPOINT])
    assert capsys.readouterr().out == ""
    assert not server.asked
    caption_image.main([f"{root}/photo.png", *CHECKPOINT, "--allow-urls"])
    assert capsys.readouterr().out == f"{root}/photo.png: {CAPTIONS['scene_2.png']}\n"
    assert server.asked == ["/photo.png"]
    for name, said in (
        ("page.png", "not a readable image"),
        ("large.png", "more than 100,000 bytes"),
        ("gone.png", "could not be fetched .404 Client Error"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: {root}/{name}: {said}"):
            caption_image.main([f"{root}/{name}", *CHECKPOINT, "--allow_urls"])
    with pytest.raises(SystemExit, match=r"x\.png: could not be fetched \(ConnectionError\)"):
        caption_image.main(["http://127.0.0.1:1/x.png", *CHECKPOINT, "--allow_urls"])
    with pytest.raises(SystemExit, match="only http:// and https:// can be fetched"):
        caption_image.main(["file:///etc/hosts.png", *CHECKPOINT, "--allow_urls"])


def test_a_server_that_never_ends(server, monkeypatch):
    """A byte now and then: no single read waits long."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ValueError, match=r"slow\.png: could not be fetched within 0\.5 s"):
        photo_arguments.fetch_image(f"http://127.0.0.1:{server.server_port}/slow.png", deadline=0.5)


def test_redirects(server, monkeypatch):
    """Within the server, and to a public address, but not into this machine's network."""
    monkeypatch.setenv("NO_PROXY", "*")
    root = f"http://127.0.0.1:{server.server_port}"
    assert photo_arguments.fetch_image(f"{root}/moved.png").size == (48, 48)
    for name, said in (
        ("local", "leads on to localhost, which is no public address"),
        ("private", "leads on to 10.0.0.1, which is no public address"),
        ("metadata", "leads on to 169.254.169.254, which is no public"),
        ("file", "leads on to 'file:///etc/passwd'"),
        ("circle", "more than 5 redirects"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            photo_arguments.fetch_image(f"{root}/{name}")
    photo_arguments._check_redirect(root, "https://8.8.8.8/photo.jpg")


# --- JSON and log-probabilities ---------------------------------------------------------------------------------------


def test_json_is_one_object_a_line(folder, capsys):
    photo = str(SHAPES / "scene_0.png")
    caption_image.main([photo, str(folder), *CHECKPOINT, "--json", "--beam", "3", "--num", "2"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["image"] for entry in found[:2]] == [photo, str(folder / "scene_0.png")]
    assert len(found) == 4
    for entry in found:
        assert set(entry) == {"image", "captions", "log_probabilities", "confidences", "words", "familiarity"}
        assert entry["confidences"] is entry["words"] is entry["familiarity"] is None  # the example is not calibrated
        assert len(entry["captions"]) == len(entry["log_probabilities"]) == 2
        assert all(-5 < value < 0 for value in entry["log_probabilities"])


@pytest.mark.parametrize("options", [dict(deterministic=True), dict(num_beams=3, num_return_sequences=3), dict(seed=1)])
def test_log_probabilities_are_the_sums_over_a_caption(tiny_model, options):
    """Token by token with `forward`, up to the first EOS."""
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    eos = tiny_model.config.eos_token_id
    with torch.no_grad():
        tiny_model.gpt.tok_emb.weight[eos] *= 3
    starts = torch.full((5, 2), eos)  # a prompt of one token, the EOS in it does not count
    ids = generate_ids(tiny_model, images, starts, 8, **options)
    found = log_probabilities(tiny_model, images, ids, 2)
    K, lengths = len(ids) // 5, set()
    assert found.shape == (5 * K,)
    assert torch.allclose(found, log_probabilities(tiny_model, tiny_model.levels(images), ids, 2), atol=1e-4)
    for row, ids_of_row in enumerate(ids):
        total, length = 0.0, 2
        while length < len(ids_of_row):
            with torch.no_grad():
                scores = tiny_model(images[row // K][None], ids_of_row[None, :length])[0, 0]
            total += float(scores.log_softmax(-1)[ids_of_row[length]])
            length += 1
            if ids_of_row[length - 1] == eos:
                break
        lengths.add(length)
        assert float(found[row]) == pytest.approx(total, abs=1e-3)
    assert len(lengths) > 1 or options == dict(num_beams=3, num_return_sequences=3)


def test_draws_go_on_from_batch_to_batch(folder, capsys):
    """They do not begin again: the same photo twice, one a batch, has other captions."""
    draws = []
    photos = [str(folder / "scene_0.png"), str(folder / "sub" / "scene_0.PNG")]
    for batch_size in ("2", "2", "1"):
        argv = ["--temperature", "2", "--num", "4", "--json", "--seed", "1", "--batch-size", batch_size]
        caption_image.main([*photos, *CHECKPOINT, *argv])
        draws.append([json.loads(line)["captions"] for line in capsys.readouterr().out.splitlines()])
    assert draws[0] == draws[1]
    assert draws[2][0] != draws[2][1]


# --- confidence -------------------------------------------------------------------------------------------------------


def test_confidence_of_captions_and_words(folder, tmp_path, capsys):
    """In JSON, in the table, and as a list of what people must look at, also when nothing is left to caption."""
    own = ["--checkpoint", str(calibrated_copy(SHAPES, tmp_path / "calibrated"))]
    caption_image.main([str(folder / "scene_0.png"), *own, "--json"])
    entry = json.loads(capsys.readouterr().out)
    assert entry["captions"] == [CAPTIONS["scene_0.png"]]
    assert [word for word, _ in entry["words"][0]] == CAPTIONS["scene_0.png"].split()
    assert all(0 < sure < 1 for sure in [*entry["confidences"], *(sure for _, sure in entry["words"][0])])
    caption_image.main([str(folder), *own])
    header, *rows = read(folder / "captions.csv")
    assert header == ["image", "caption", "confidence", "model", "made_with"]
    sure = {row[0]: float(row[2]) for row in rows}
    assert sure["scene_0.png"] == entry["confidences"][0]
    between = sum(sorted(set(sure.values()))) / len(set(sure.values()))
    capsys.readouterr()
    caption_image.main([str(folder), *own, "--min_confidence", f"{between}"])
    low = [name for name in sorted(sure, key=sure.get) if sure[name] < between]
    assert f"{len(low)} of them, with a confidence below" in capsys.readouterr().out
    header, *rows = read(folder / "captions_to_check.csv")
    assert header[2] == "confidence" and [row[0] for row in rows] == low and 0 < len(low) < 3
    caption_image.main([str(folder / "scene_0.png"), *own, "--min_confidence", "1"])
    assert capsys.readouterr().out.endswith(
        f"{CAPTIONS['scene_0.png']}  (to check: confidence {sure['scene_0.png']:.2f})\n"
    )


def test_a_photo_unlike_those_of_training(tmp_path, capsys):
    own, photo = str(calibrated_copy(SHAPES, tmp_path / "calibrated")), str(SHAPES / "scene_0.png")
    sure = []
    for nearer in (0, 99):  # so many of 99 held-out photos
        known = Confidence.load(own)
        known.familiarity = Familiarity(
            torch.zeros(1, DIM), torch.full((99,), 1e6).index_fill(0, torch.arange(nearer), 0)
        )
        known.save(own)
        caption_image.main([photo, "--checkpoint", own, "--json"])
        sure.append(json.loads(capsys.readouterr().out))
    assert [entry["familiarity"] for entry in sure] == [1, 0.01]
    assert sure[1]["confidences"] == pytest.approx([0.01 / UNUSUAL * sure[0]["confidences"][0]], abs=1e-4)
    caption_image.main([photo, "--checkpoint", own, "--min_confidence", "0.9"])
    said = f"(to check: confidence {sure[1]['confidences'][0]:.2f}, as the photo is unlike those of training)\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_captioner_without_confidence_says_so(folder, tmp_path, capsys):
    caption_image.main([str(folder), *CHECKPOINT])
    assert "is not calibrated: its captions come without confidence" in capsys.readouterr().err
    assert read(folder / "captions.csv")[0] == ["image", "caption", "model", "made_with"]
    for option in (["--min_confidence", "0.5"], ["--words", str(tmp_path / "words.html")]):
        with pytest.raises(SystemExit, match=r"^error: .*shapes: the captioner is not calibrated .*--calibrate"):
            caption_image.main([str(folder / "scene_0.png"), *CHECKPOINT, *option])


def test_the_page_of_words(tmp_path, capsys):
    """A card a word: seen or guessed, its map, five alternatives with the photo and five without; no prompt."""
    own = ["--checkpoint", str(calibrated_copy(SHAPES, tmp_path / "calibrated"))]
    caption_image.main(
        [str(SHAPES / "scene_0.png"), *own, "--prompt", "a small", "--words", str(tmp_path / "words.html")]
    )
    page = (tmp_path / "words.html").read_text()
    words = CAPTIONS["scene_0.png"].split()[2:]
    assert re.findall(r"<h3>(\w+)</h3>", page) == words
    kinds = re.findall(r"<span class=(\w+)>\1</span>", page)
    assert len(kinds) == len(words) and kinds[words.index("a")] == "guessed" and "seen" in kinds
    assert page.count("<tr><td>") == 5 * len(words)
    assert page.count("data:image/jpeg") == 1 + len(words)


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_is_drawn_for_one_and_several(folder, tmp_path, capsys):
    photo = str(SHAPES / "scene_2.png")

    def pixels(name):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            return np.asarray(picture.convert("RGB"))

    caption_image.main([photo, *CHECKPOINT, "--attention", str(tmp_path / "mean.png")])
    said = capsys.readouterr().out
    assert said.endswith(f"attention maps are drawn to {tmp_path / 'mean.png'}\n")
    assert said.startswith(f"{photo}: {CAPTIONS['scene_2.png']}\n")
    caption_image.main([photo, *CHECKPOINT, "--attention", str(tmp_path / "one.png"), "--block", "1", "--head", "2"])
    assert pixels("mean.png").shape == pixels("one.png").shape
    assert (pixels("mean.png") != pixels("one.png")).any()
    caption_image.main([photo, str(SHAPES / "scene_0.png"), *CHECKPOINT, "--attention", str(tmp_path / "many.png")])
    assert (pixels("many_1.png") == pixels("mean.png")).all()
    assert pixels("many_2.png").shape == pixels("many_1.png").shape  # both on two rows
    caption_image.main([str(folder), photo, *CHECKPOINT, "--attention", str(tmp_path / "maps")])
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "scene_0.png", "scene_2.png", "scene_2_2.png", "sub_scene_0.png"
    ]  # fmt: skip
    assert (pixels("maps/scene_2.png") == pixels("mean.png")).all()


# --- from Python ------------------------------------------------------------------------------------------------------


def test_caption_image_of_the_script(script):
    photo = SHAPES / "scene_2.png"
    assert script.caption_image(photo, SHAPES, do_sample=False) == CAPTIONS["scene_2.png"]
    torch.manual_seed(0)
    drawn = {script.caption_image(str(photo), str(SHAPES), "cpu", temperature=3.0, top_k=20) for _ in range(3)}
    assert len(drawn) > 1 and all(isinstance(text, str) for text in drawn)
    assert len(script.caption_image(photo, SHAPES, max_length=3, do_sample=False).split()) <= 3
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such image"):
        script.caption_image("gone.png", SHAPES)
