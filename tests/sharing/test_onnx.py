"""The export to ONNX: the graphs caption as the model does, the example needs no torch, the page works in Chromium."""

import functools
import http.server
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models

import export_onnx
from captioning.data.shapes import draw_scene, render_scene
from captioning.decoding.search import caption_images
from captioning.images.preprocessing import resize
from captioning.model.tokenizer import CaptionTokenizer
from captioning.sharing import onnx_export, onnx_page
from conftest import CAPTIONS, REPO_ROOT, randomize

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [str(SHAPES / f"scene_{i}.png") for i in range(10)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Runs example_onnx.py where nothing but onnxruntime, NumPy and Pillow can be imported.
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "transformers", "tokenizers", "timm", "captioning", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """examples/shapes -> (exported folder, folder of the page with two small files as onnxruntime-web, what the tool
    printed)."""
    folder = tmp_path_factory.mktemp("onnx")
    package = folder / "package"
    (package / "dist").mkdir(parents=True)
    for name in onnx_page.RUNTIME:
        (package / name).write_text(f"stands for {name}")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words: printed.append(" ".join(map(str, words))))
        targets = [str(folder / "graphs"), "--web", str(folder / "page"), "--onnxruntime_web", str(package)]
        export_onnx.main([*targets, "--checkpoint", str(SHAPES), "--count", "10"])
    return folder / "graphs", folder / "page", printed


@pytest.fixture
def captioner(exported):
    from captioning.sharing.example_onnx import Captioner

    return Captioner(exported[0], threads=1)


@pytest.fixture
def shapes(script):
    return script.load_captioner(SHAPES)


# --- the graphs -------------------------------------------------------------------------------------------------------


def test_the_tool_writes_and_compares(exported):
    graphs, page, printed = exported
    names = {"encoder.onnx", "decoder.onnx", "captioner.json", "example_onnx.py"}
    assert {path.name for path in graphs.iterdir()} == names
    onnxruntime_web = {"onnxruntime.js", "onnxruntime.wasm"}
    assert {path.name for path in page.iterdir()} == names | {"index.html", "page.js", "captioner.js"} | onnxruntime_web
    assert re.fullmatch(r"encoder.onnx 2\.\d MB, decoder.onnx 3\.\d MB \(float32\)", printed[0])
    assert printed[1] == "photos with the same pixels: 10 of 10"
    assert printed[2] == "greedy captions that are the same: 10 of 10, by 4 beams: 10 of 10"
    assert re.fullmatch(r"logits: largest 1\d\.\d+, difference at most \d\.\de-0[567]", printed[3])
    assert re.fullmatch(r"a greedy caption, .*: \d+\.\d ms, by torch \d+\.\d ms \(medians, 1 thread\)", printed[4])
    for name in ("encoder.onnx", "decoder.onnx"):
        content = (graphs / name).read_bytes()
        assert str(REPO_ROOT).encode() not in content and b".py" not in content, "lines of source, with their paths"


def test_a_difference_is_found(exported, shapes, tmp_path, monkeypatch):
    """And then nothing is written."""
    model, tokenizer = shapes
    with torch.no_grad():
        model.gpt.trf_blocks[1].cross_attn.v.bias += 1  # behind the tool's back
    found = onnx_export.compare(model, tokenizer, exported[0], SCENES[:2])
    assert found.logits > 0.1
    monkeypatch.setattr(export_onnx, "load_captioner", lambda folder: (model, tokenizer))
    monkeypatch.setattr(
        onnx_export, "export", lambda m, t, folder, int8: shutil.copytree(exported[0], folder, dirs_exist_ok=True)
    )
    with pytest.raises(SystemExit, match="error: the graphs compute something else than the model; nothing was writ"):
        export_onnx.main([str(tmp_path / "new"), "--checkpoint", str(SHAPES), "--photos", SCENES[0]])
    assert not (tmp_path / "new").exists()


def test_a_captioner_of_other_parts(script, tiny_config, tmp_path):
    """A CNN with two levels, a decoder that is not GPT-2's, a list of words, a prompt."""
    words = CaptionTokenizer.train([" ".join(f"word{i}" for i in range(60))], vocab_size=64, kind="word")
    changes = dict(
        encoder="resnet10t", encoder_options=dict(img_size=64), feature_levels=2, coupling="final", depth=1,
        normalize_tokens=True, activation="relu", positions="sinusoidal", tokenizer="word", vocab_size=64,
        eos_token_id=words.eos_token_id, unk_token_id=words.unk_token_id, preprocessing=dict(resample="bilinear"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = script.VisionGPT2Model(script.SimpleNamespace(**vars(tiny_config) | changes)).eval()
    randomize(model.gpt)
    randomize(model.bridges, std=1.0)
    onnx_export.export(model, words, tmp_path)
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((90, 60), 0) for _ in range(6)]
    captions = caption_images(model, words, photos)
    assert len(set(captions)) >= 3
    found = onnx_export.compare(model, words, tmp_path, photos, beams=3)
    assert (found.greedy, found.beam, found.pixels) == (6, 6, 6)
    assert found.logits <= 1e-4 * found.largest

    from captioning.sharing.example_onnx import Captioner

    prompt = "word3 word41"
    expected = caption_images(model, words, photos, prompt=prompt)
    prompted = [Captioner(tmp_path, threads=1).caption(photo, prompt=words.encode(prompt)) for photo in photos]
    assert prompted == expected
    assert all(caption.startswith(prompt) for caption in prompted)


def test_eight_bits(exported, shapes, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "int8")
    onnx_export.quantize(folder / "decoder.onnx")
    assert (folder / "decoder.onnx").stat().st_size < 0.4 * (exported[0] / "decoder.onnx").stat().st_size
    found = onnx_export.compare(*shapes, folder, SCENES)
    assert found.greedy >= 8
    assert 1e-3 < found.logits < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write: give a FOLDER, or --web FOLDER for a page"),
        ([str(SHAPES)], "shapes exists already: give another folder"),
        (["--web", "{new}", "--onnxruntime_web", str(SHAPES)], "shapes: not the npm package onnxruntime-web .*`npm pa"),
        (["--web", "{new}", "--onnxruntime_web", str(REPO_ROOT / "README.md")], "README.md: not the npm package onnxr"),
        (["{new}", "--count", "0"], "--count must be an integer of at least 1, not 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    arguments = [argument.replace("{new}", str(tmp_path / "new")) for argument in arguments]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        export_onnx.main([*arguments, "--checkpoint", str(SHAPES)])
    assert not (tmp_path / "new").exists()


def test_without_the_libraries_or_a_network(tmp_path, monkeypatch):
    new = str(tmp_path / "new")

    def no_network(url, path, size, known_hash):
        raise OSError(f"{url}: given up")

    monkeypatch.setattr(onnx_page, "download", no_network)
    monkeypatch.setattr(onnx_page, "cached_package", lambda: tmp_path / "cache" / "a.tgz")
    monkeypatch.delenv("ONNXRUNTIME_WEB", raising=False)
    with pytest.raises(SystemExit, match=r"tgz: given up\. Where there is a network, `npm pack onnxruntime-web@"):
        export_onnx.main(["--web", new, "--checkpoint", str(SHAPES)])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r"exporting needs onnxscript: pip install -r requirements-extra\.txt"):
        export_onnx.main([new, "--checkpoint", str(SHAPES)])


def test_what_cannot_be_exported(shapes, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("this operator is unknown\nand much more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    message = "^the encoder cannot be exported to ONNX with encoder vit_tiny_patch16_224: RuntimeError: this"
    with pytest.raises(ValueError, match=message + " operator is unknown$"):
        onnx_export.export(*shapes, tmp_path)
    monkeypatch.setattr(onnx_export, "LARGEST_GRAPH", 1_000_000)
    with pytest.raises(ValueError, match=r"the encoder has 0\.0 GB of weights, and an ONNX file holds 2 GB"):
        onnx_export.export(*shapes, tmp_path)
    assert not list(tmp_path.iterdir())


# --- tokens and photos ------------------------------------------------------------------------------------------------


def test_texts_of_tokens():
    """A character of several tokens, special tokens, an id that the tokenizer does not have."""
    from captioning.sharing.example_onnx import Captioner

    captions = ["two Käfer and a 猫 🙂 — “why”?", "a man's t-shirt , \n 100% red"]
    reader = Captioner.__new__(Captioner)
    for kind in ("bpe", "word"):
        tokenizer = CaptionTokenizer.train([*CAPTIONS, *captions], 290, kind)
        reader.tokens = onnx_export.token_texts(tokenizer, 300)
        assert len(reader.tokens) == 300
        for caption in captions:
            ids = [*tokenizer.encode(caption), tokenizer.eos_token_id, 299]
            assert reader.text(ids) == tokenizer.decode(ids).strip() != ""
            assert reader.text(ids[3:5]) == tokenizer.decode(ids[3:5]).strip()  # may begin within a character


def test_a_tokenizer_of_another_kind_is_refused():
    vocabulary = {token: i for i, token in enumerate(("<start>", "<end>", "<pad>", "dog", "##s"))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<pad>"))
    backend.add_special_tokens(["<start>", "<end>", "<pad>"])
    backend.decoder = decoders.WordPiece(prefix="##")
    with pytest.raises(ValueError, match="mine: its tokens become text by WordPiece; only a byte-level BPE and a"):
        onnx_export.token_texts(CaptionTokenizer("mine", backend), 5)


def test_photos_have_the_same_pixels(captioner, tmp_path):
    """Of every mode; turned, transparent, with 16 bits, larger and smaller than the model's, as JPEG."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (70, 130, 4), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 65536, (31, 40)).astype(np.uint16))
    photos = {"rgba.png": colours, "16 bits.png": grey, "palette.gif": colours.convert("P")}
    photos |= {f"{mode}.png": colours.convert(mode) for mode in ("RGB", "L", "LA", "1")}
    photos |= {"cmyk.jpg": colours.convert("CMYK"), "turned.jpg": colours.convert("RGB")}
    for name, photo in photos.items():
        exif = Image.Exif()
        exif[274] = 6 if "turned" in name else 1
        photo.save(tmp_path / name, exif=exif)
        expected = np.array(resize(tmp_path / name, 48, "bicubic"))
        assert np.array_equal(captioner.pixels(tmp_path / name), expected), name
    assert not np.array_equal(captioner.pixels(tmp_path / "turned.jpg"), captioner.pixels(tmp_path / "RGB.png"))


def test_the_example_runs_without_torch(exported, shapes, tmp_path):
    """Greedy and by beams; a file that is no photo is named, and the others are captioned."""
    folder = shutil.copytree(exported[0], tmp_path / "elsewhere")
    bad = tmp_path / "holiday.jpg"
    bad.write_text("not a photo")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder / "example_onnx.py"), *SCENES, str(bad), "--beams", "4"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    expected = caption_images(*shapes, SCENES, num_beams=4)
    assert ran.stdout.splitlines() == [f"{path}: {words}" for path, words in zip(SCENES, expected, strict=True)]
    assert re.fullmatch(r"error: .*holiday.jpg: not a readable photo \(cannot identify .*\)\n", ran.stderr)
    assert ran.returncode == 1


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory):
    """The page in Chromium, served like any static folder; afterwards it has asked nobody else for anything."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    package = Path(os.environ.get("ONNXRUNTIME_WEB") or onnx_page.cached_package())
    if not package.exists():
        version = f"onnxruntime-web@{onnx_page.VERSION}"
        pytest.skip(f"needs onnxruntime-web: run `npm pack {version}`, and set ONNXRUNTIME_WEB to the file it writes")
    folder = shutil.copytree(exported[1], tmp_path_factory.mktemp("web") / "page")
    onnx_page.write_page(folder, onnx_page.read_runtime(package))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40e6
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as started:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked, problems = browser.new_page(), [], []
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(error))
        page.goto(address)
        page.get_by_text("Ready.").wait_for()
        page.context.set_offline(True)
        yield page
        browser.close()
        server.shutdown()
    assert len(asked) >= 8 and not problems
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def caption_on(page, path):
    """Choose a file on the page, and wait for the answer -> (caption, remark)."""
    page.set_input_files("#input", path)
    page.get_by_text(re.compile(r"Written in|not a photo")).wait_for()
    return page.inner_text("#caption"), page.inner_text("#note")


def test_fifty_scenes_have_the_captions_of_python(page, shapes, tmp_path):
    rng, paths = random.Random(7), []
    for i in range(50):
        paths.append(str(tmp_path / f"{i}.png"))
        render_scene(rng, draw_scene(rng, held_out=bool(i % 2))).save(paths[-1])
    shown = [caption_on(page, path) for path in paths]
    assert [caption for caption, _ in shown] == caption_images(*shapes, paths)
    assert all(re.fullmatch(r"Written in \d+ ms\.", remark) for _, remark in shown)


def test_photos_of_other_sizes_and_what_is_no_photo(page, shapes, tmp_path):
    large, bad = tmp_path / "large.png", tmp_path / "holiday.jpg"
    Image.open(SCENES[2]).resize((640, 411), Image.Resampling.BICUBIC).save(large)
    bad.write_text("not a photo")
    assert [caption_on(page, str(large))[0]] == caption_images(*shapes, [str(large)])
    assert caption_on(page, str(bad)) == ("", "holiday.jpg: not a photo that this browser can read")
    assert not page.locator("#photo").is_visible()
    assert [caption_on(page, SCENES[4])[0]] == caption_images(*shapes, [SCENES[4]])


def test_a_photo_is_dropped(page, shapes):
    page.evaluate(
        """bytes => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }""",
        list(Path(SCENES[5]).read_bytes()),
    )
    page.get_by_text("Written in").wait_for()
    assert [page.inner_text("#caption")] == caption_images(*shapes, [SCENES[5]])


def test_resizing_is_pillows(page):
    """To the byte: both filters; larger, smaller, one side only, one pixel."""
    rng = np.random.default_rng(1)
    for (width, height), size, resample in (
        ((97, 64), 48, "bicubic"), ((97, 64), 48, "bilinear"), ((20, 31), 48, "bicubic"), ((48, 200), 48, "bilinear"),
        ((201, 48), 48, "bicubic"), ((48, 48), 48, "bicubic"), ((5, 7), 1, "bicubic"), ((1, 1), 9, "bilinear"),
    ):  # fmt: skip
        photo = Image.fromarray(rng.choice([0, 3, 250, 255], (height, width, 3)).astype(np.uint8))
        expected = np.array(photo.resize((size, size), Image.Resampling[resample.upper()])).ravel().tolist()
        answer = page.evaluate(
            """async ([pixels, ...rest]) => {
                const { resize } = await import("./captioner.js");
                return [...resize(Uint8Array.from(pixels), ...rest)];
            }""",
            [np.array(photo).ravel().tolist(), width, height, size, resample],
        )
        assert answer == expected, (width, height, size, resample)


def test_a_caption_is_no_program(page):
    """A stranger's tokens that are HTML are shown as they are."""
    words = page.evaluate(
        """async () => {
            const { Captioner } = await import("./captioner.js");
            const evil = new Captioner();
            evil.about = { tokens: [" <img/src=x/onerror=alert(1)>", " \\u00c3", "\\u00a4"] };
            const element = document.getElementById("caption");
            element.textContent = evil.text([0, 1, 2]);
            return [element.textContent, element.children.length];
        }"""
    )
    assert words == ["<img/src=x/onerror=alert(1)> ä", 0]
    for source in onnx_page.PAGE.iterdir():
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|https?://", source.read_text())
