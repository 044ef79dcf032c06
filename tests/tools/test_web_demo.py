"""The web demo: its functions, its API under load, and its page in Chromium. Captions are those of the command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image

import caption_image
import web_demo
from captioning.common.files import WEIGHTS_FILE
from conftest import REPO_ROOT
from helpers.calibrated import calibrated_copy
from helpers.image_files import png

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [str(SHAPES / f"scene_{i}.png") for i in range(10)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NOT_AN_IMAGE = "holiday.jpg: not a readable image (cannot identify image file 'holiday.jpg')"
A_BOMB = "bomb.png: not a readable image (Image size (400000000 pixels) exceeds limit of"

# The demo as it is started, on a machine without network: what leads outside is refused and named.
WITHOUT_NETWORK = f"""
import socket, sys
sys.path.insert(0, {str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning")!r})

def refuse_outside(function, place):
    def guarded(*args, **options):
        host = args[place][0] if isinstance(args[place], tuple) else args[place]
        if host not in (None, "", "localhost", "127.0.0.1", "::1"):
            print("outside:", host, file=sys.stderr, flush=True)
            raise socket.gaierror("no network")
        return function(*args, **options)
    return guarded

socket.getaddrinfo = refuse_outside(socket.getaddrinfo, 0)
socket.socket.connect = refuse_outside(socket.socket.connect, 1)
import web_demo
web_demo.main()
"""


def command_line(capsys, *arguments):
    """The captions that caption_image.py prints."""
    capsys.readouterr()
    caption_image.main([*arguments, "--checkpoint", str(SHAPES)])
    return [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def hostile(tmp_path):
    """-> (a text file with the name of a photo, a decompression bomb)."""
    text, bomb = tmp_path / "holiday.jpg", tmp_path / "bomb.png"
    text.write_text("not a photo")
    bomb.write_bytes(png(20_000, 20_000, 8, 2, b"\0"))
    return str(text), str(bomb)


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A repository with two runs, one of them moved aside, and a damaged one."""
    for folder in ("captioner", "captioner_scst/earlier/2026-01-02", "examples/shapes"):
        shutil.copytree(SHAPES, tmp_path / "root" / folder, ignore=shutil.ignore_patterns("*.png"))
    damaged = tmp_path / "root" / "captioner_damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    no_weights = tmp_path / "root" / "examples" / "stopped"
    no_weights.mkdir()
    shutil.copy(SHAPES / "config.json", no_weights)
    return tmp_path / "root"


def test_captioners_are_found(root, capsys):
    found = web_demo.find_captioners(root)
    assert list(found) == ["captioner", "captioner_scst/earlier/2026-01-02", "examples/shapes"]
    assert found["examples/shapes"] == root / "examples" / "shapes"
    assert re.match(r"warning: left out .*captioner_damaged/config.json: not valid JSON", capsys.readouterr().err)


def test_the_chosen_captioner_comes_first(root, tmp_path):
    assert next(iter(web_demo.choose_captioners(root))) == "captioner"
    chosen = web_demo.choose_captioners(root, str(root / "examples" / "shapes"))
    assert list(chosen) == ["examples/shapes", "captioner", "captioner_scst/earlier/2026-01-02"]
    outside = shutil.copytree(SHAPES, tmp_path / "mine")
    chosen = web_demo.choose_captioners(root, str(outside))
    assert next(iter(chosen.items())) == ("mine", outside)  # its name, not its path
    with pytest.raises(FileNotFoundError, match="no captioner in captioner/ or examples/: train one, or give"):
        web_demo.choose_captioners(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        web_demo.choose_captioners(root, str(tmp_path / "nothing_here"))


def test_captioners_are_loaded_once_and_again_when_they_changed(root, script, monkeypatch):
    loaded, load = [], script.load_captioner
    monkeypatch.setattr(script, "load_captioner", lambda folder: loaded.append(folder.name) or load(folder))
    captioners = web_demo.Captioners(web_demo.find_captioners(root))
    assert loaded == []
    model, _ = captioners.load("captioner")
    assert captioners.load("captioner")[0] is model
    captioners.load("examples/shapes")
    assert captioners.load("captioner")[0] is not model
    assert loaded == ["captioner", "shapes", "captioner"]
    weights = root / "captioner" / WEIGHTS_FILE
    os.utime(weights, ns=(0, 0))  # as after another epoch
    captioners.load("captioner")
    assert len(loaded) == 4


@pytest.mark.parametrize(
    ("options", "prompt", "arguments"),
    [
        (dict(deterministic=True), "", []),
        (dict(deterministic=True), "there is", ["--prompt", "there is"]),
        (dict(deterministic=True, max_words=5), "", ["--max_words", "5"]),
        (
            dict(num_beams=4, length_penalty=0.5, deterministic=True, num_return_sequences=3),
            "",
            ["--beam", "4", "--length_penalty", "0.5", "--num", "3"],
        ),
        (
            dict(temperature=1.5, top_k=50, top_p=0.95, seed=7, num_return_sequences=4),
            "",
            ["--temperature", "1.5", "--top_k", "50", "--top_p", "0.95", "--seed", "7", "--num", "4"],
        ),
    ],
)
def test_captions_are_those_of_the_command_line(script, options, prompt, arguments, tmp_path, capsys):
    """Also of a photo that lies on its side, as phones store them."""
    photo = Image.open(SCENES[2]).convert("RGB")
    exif = photo.getexif()
    exif[274] = 6
    turned = tmp_path / "turned.jpg"
    photo.save(turned, exif=exif)
    model, tokenizer = script.load_captioner(SHAPES)
    found = web_demo.caption_photo(model, tokenizer, turned, options, prompt)
    assert [each["caption"] for each in found] == command_line(capsys, str(turned), *arguments)
    for each in found:
        assert " ".join(each["words"]) == each["caption"]
        assert each["log_probability"] < 0
        assert tokenizer.decode(each["ids"][1:]).strip() == each["caption"]


def test_the_log_probability_is_the_loss_of_the_caption(script):
    model, tokenizer = script.load_captioner(SHAPES)
    [found] = web_demo.caption_photo(model, tokenizer, SCENES[0], dict(deterministic=True))
    ids = torch.tensor([found["ids"]])
    image = web_demo.preprocess(SCENES[0], **model.preprocessing)[None]
    with torch.no_grad():
        loss = model(image, ids[:, :-1], ids[:, 1:])  # the mean over the caption's tokens
    assert found["log_probability"] == pytest.approx(-loss.item() * (ids.size(1) - 1), abs=1e-4)


def test_words_are_shaded_by_their_confidence(script, tmp_path):
    """Not those of the prompt; a captioner that is not calibrated says so."""
    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    captioners = web_demo.Captioners({"mine": folder, "example": SHAPES})
    assert captioners.confidence("example") is None
    model, tokenizer = captioners.load("mine")
    options, known = dict(deterministic=True), captioners.confidence("mine")
    [found] = web_demo.caption_photo(model, tokenizer, SCENES[0], options, "a small", known)
    shown = web_demo.shown_with(found)
    assert re.match(r"confidence \d+%, log p = -\d\.\d\d$", shown["shown"])
    assert len(shown["shades"]) == len(shown["titles"]) == len(found["words"])
    assert shown["shades"][:2] == shown["titles"][:2] == ["", ""]
    redness = [float(re.search(r"([\d.]+)\)$", shade)[1]) for shade in shown["shades"][2:]]
    sure = found["word_confidences"][2:]
    assert max(redness) == redness[sure.index(min(sure))] > 0
    [plain] = web_demo.caption_photo(model, tokenizer, SCENES[0], options, "a small")
    assert plain == {key: found[key] for key in ("ids", "words", "caption", "log_probability")}
    assert web_demo.shown_with(plain)["shown"].endswith(", not calibrated")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"error: the web demo needs gradio: pip install -r requirements-extra\.txt"):
        web_demo.main([])


def test_errors_name_no_path_of_the_machine():
    gradio = pytest.importorskip("gradio")
    upload, folder = "/tmp/uploads/0f3a/photo.jpg", REPO_ROOT / "captioner"
    unreadable = ValueError(f"{upload}: not a readable image (why: {upload}); replace the file or remove its rows")
    missing = FileNotFoundError(f"{folder}/config.json: not found; it is no captioner")
    for error, message in (
        (unreadable, "photo.jpg: not a readable image (why: photo.jpg)"),
        (missing, "captioner/config.json: not found; it is no captioner"),
    ):
        with pytest.raises(gradio.Error) as told, web_demo.errors_shown_on_page(upload):
            raise error
        assert told.value.message == message


def test_words_become_entities():
    assert web_demo.as_entities("Käfer 猫 7") == "Käfer 猫 7"
    assert web_demo.as_entities("`\\${<") == "&#96;&#92;&#36;&#123;&#60;"


# --- the API ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a process, on the first free port -> (process, address, where it keeps uploads)."""
    pytest.importorskip("gradio")
    uploads = tmp_path_factory.mktemp("uploads")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")}
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_NETWORK, "--checkpoint", str(SHAPES)],
        env=environment | {"OMP_NUM_THREADS": "1", "TMPDIR": str(uploads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line), line + process.stderr.read()
        yield process, line.split()[0], uploads
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(demo):
    from gradio_client import Client

    return Client(demo[1], verbose=False, analytics_enabled=False)


def ask(client, photo, **options):
    from gradio_client import handle_file

    return client.submit(photo=handle_file(photo), api_name="/caption", **options)


def memory(process):
    """Resident MiB."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(process.pid)])) / 1024


def test_twenty_at_once_are_answered_like_the_command_line(demo, client, capsys):
    """And memory stays where it was after the first twenty."""
    drawn = dict(method="sampling", number=2, top_p=0.9, seed=3)
    expected = command_line(capsys, *SCENES)
    expected_drawn = [command_line(capsys, scene, "--top_p", "0.9", "--seed", "3", "--num", "2") for scene in SCENES]
    assert len({*expected}) == 10
    levels = []
    for _ in range(3):
        greedy = [ask(client, scene) for scene in SCENES]
        sampled = [ask(client, scene, **drawn) for scene in SCENES]
        for job, caption in zip(greedy, expected, strict=True):
            [found] = job.result(60)
            assert found["caption"] == caption
            assert -5 < found["log_probability"] < 0
        for job, captions in zip(sampled, expected_drawn, strict=True):
            assert [found["caption"] for found in job.result(60)] == captions
        levels.append(memory(demo[0]))
    assert levels[-1] < levels[0] + 25, levels


def test_what_is_no_photo_is_named_to_programs_too(client, hostile):
    from gradio_client.exceptions import AppError

    for path, message in zip(hostile, (NOT_AN_IMAGE, A_BOMB), strict=True):
        with pytest.raises(AppError) as told:
            ask(client, path).result(60)
        assert str(told.value).strip("'\"").startswith(message)
        assert "/" not in str(told.value)  # no path of this machine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model="../../secret"), "not in the list of choices"),
        (dict(method="beam search", beams=10_000), "10000 is greater than"),
        (dict(method="sampling", number=10_000), "10000 is greater than"),
        (dict(method="sampling", temperature=0.0), "less than minimum"),
        (dict(method="beam search", beams=2, number=3), "2 beams cannot return 3 captions"),
        (dict(min_tokens=51), "51 is greater than"),
        (dict(prompt="a" * 201), "the prompt has more than 200 characters"),
    ],
)
def test_values_that_the_page_cannot_send(client, options, message):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=message):
        ask(client, SCENES[0], **options).result(60)


def test_files_of_the_machine_are_not_served(demo):
    for path in (REPO_ROOT / "README.md", SHAPES / "config.json"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{demo[1]}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    # As a photo that was uploaded: the same path, and one that the demo may read but did not get from a visitor.
    for path in (SCENES[0], "/etc/passwd"):
        assert call(demo[1], path) == "error"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(photo="/tmp/photo.jpg"), "Photo: expected a file, as handle_file(path or URL) of gradio_client makes it, "
         "not '/tmp/photo.jpg'"),
        (dict(photo="data:image/png;base64," + "A" * 99), "not 'data:image/png;base64,AAAAAAAAAAAAAAAAA"),
        (dict(beams="4"), "Beams: expected a whole number, not '4'"),
        (dict(number=2.5), "Captions: expected a whole number, not 2.5"),
        (dict(temperature=None), "Temperature: expected a number, not None"),
        (dict(seed=True), "Seed: expected a whole number, not True"),
    ],
)  # fmt: skip
def test_a_program_is_told_what_is_wrong_with_what_it_sends(demo, change, reason):
    assert reason in answer_to(demo[1], change.pop("photo", {"path": str(SCENES[0])}), **change)


def call(url, path):
    """Send `path` as an uploaded photo's, without uploading it -> how the answer is called."""
    photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return re.search(r"event: (complete|error)", answer_to(url, photo))[1]


def answer_to(url, photo, **options):
    """Send a photo and options to the API -> the text of the answer."""
    defaults = dict(model="examples/shapes", method="greedy", number=1, prompt="", beams=4, penalty=1.0)
    defaults |= dict(temperature=1.0, top_k=0, top_p=1.0, seed=0, min_tokens=0, max_words=0, max_chars=0)
    values = [photo, *(defaults | options).values()]
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}gradio_api/call/caption", json.dumps({"data": values}).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/caption/{event}") as answer:
        return answer.read().decode()


def test_only_its_own_addresses_are_answered(demo):
    """A page elsewhere whose name points at this machine gets nothing."""
    port = demo[1].rpartition(":")[2].strip("/")
    for host, allowed in ((f"127.0.0.1:{port}", True), (f"localhost:{port}", True), ("evil.example", False)):
        request = urllib.request.Request(f"{demo[1]}config", headers={"Host": host, "Origin": f"http://{host}"})
        if allowed:
            assert urllib.request.urlopen(request).status == 200
            continue
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 421
        assert refused.value.read() == b"this address is not served here"


def test_uploads_have_a_limit(demo, tmp_path):
    from gradio_client import Client

    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(20 * 2**20 + 1))
    client = Client(demo[1], verbose=False, analytics_enabled=False)
    with pytest.raises(Exception, match=r"413|exceeds"):
        ask(client, str(large)).result(60)


def test_the_page_names_no_other_server(demo):
    for part in ("", "theme.css"):
        with urllib.request.urlopen(demo[1] + part) as answer:
            text = answer.read().decode()
        assert not re.findall(r"""(?:\bsrc=|<link[^>]*href=|url\()["']?(?:https?:)?//[^"')>]*""", text)
        assert "fonts.g" not in text


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, demo):
    """The demo's page; afterwards it has asked nobody else for anything."""
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(20_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(demo[1])
    page.wait_for_selector("#photo input[type=file]", state="attached")
    yield page
    page.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((demo[1], "data:", "blob:"))] == []


def upload(page, path):
    page.set_input_files("#photo input[type=file]", path)


def captions_on(page, count):
    """Wait until the page shows `count` captions, and return them."""
    from playwright.sync_api import expect

    expect(page.locator("#captions li")).to_have_count(count, timeout=20_000)
    return [" ".join(row.locator("button").all_inner_texts()) for row in page.locator("#captions li").all()]


def test_upload_change_to_sampling_and_click_a_word(page, capsys):
    upload(page, SCENES[0])
    assert captions_on(page, 1) == command_line(capsys, SCENES[0])
    assert re.search(r"log p = -\d\.\d\d", page.inner_text("#captions"))
    assert not page.get_by_label("Top-p").first.is_visible()
    page.get_by_label("sampling").check()
    page.get_by_label("Top-p").first.wait_for()
    assert not page.get_by_label("Beams").first.is_visible()
    page.get_by_role("button", name="Caption", exact=True).click()
    drawn = captions_on(page, 3)
    assert drawn == command_line(capsys, SCENES[0], "--sample", "--num", "3")

    maps = {}
    for word in (drawn[0].split().index("triangle"), drawn[0].split().index("circle")):
        page.locator("#captions li").first.locator("button").nth(word).click()
        page.get_by_text(f'Where it looked for "{drawn[0].split()[word]}"').wait_for()
        picture = page.locator("#map img")
        picture.wait_for()
        maps[word] = picture.get_attribute("src")
        assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth }") == 480
        assert page.locator("#captions button.chosen").all_inner_texts() == [drawn[0].split()[word]]
    assert len({*maps.values()}) == 2
    page.get_by_label("The caption begins with").fill("there is")
    page.get_by_role("button", name="Caption", exact=True).click()
    page.locator("#map").wait_for(state="hidden")  # it belonged to the captions before
    assert captions_on(page, 3) == command_line(capsys, SCENES[0], "--sample", "--num", "3", "--prompt", "there is")


def test_what_is_no_photo_is_named_and_cleared(page, hostile, capsys):
    page.locator("#examples button").nth(3).click()
    assert captions_on(page, 1) == command_line(capsys, SCENES[3])
    for path, message in zip(hostile, (NOT_AN_IMAGE, A_BOMB), strict=True):
        upload(page, path)
        page.get_by_text(message).wait_for()
        page.get_by_text("Drop Image Here").wait_for()
        page.get_by_text("Captions appear here.").wait_for()
    upload(page, SCENES[5])  # and it goes on
    assert captions_on(page, 1) == command_line(capsys, SCENES[5])


def test_it_fits_on_a_phone(page):
    page.set_viewport_size(dict(width=390, height=844))
    page.get_by_label("sampling").check()
    page.get_by_label("Top-p").first.wait_for()
    upload(page, SCENES[1])
    captions_on(page, 3)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.locator("footer").count() == 0 or not page.locator("footer").is_visible()


def test_a_caption_is_no_program(browser, tmp_path):
    """A stranger's tokenizer, with tokens that are HTML, a template of Handlebars and JavaScript: they are shown."""
    tokens = {
        "a": "${alert(1)}",  # Handlebars leaves this as it is
        "above": "{{this}}&#36;{alert(2)}",
        "triangle": "<img/src=x/onerror=alert(3)>",
    }
    evil = shutil.copytree(SHAPES, tmp_path / "evil")
    stored = json.loads((evil / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    for word, token in tokens.items():
        vocabulary[f"\u0120{token}"] = vocabulary.pop(f"\u0120{word}")
    stored["model"]["merges"] = []
    (evil / "tokenizer.json").write_text(json.dumps(stored))
    built = web_demo.build({"evil": evil})
    _, url, _ = web_demo.launch(built, quiet=True, prevent_thread_lock=True)
    page, dialogs = browser.new_page(), []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
    try:
        page.goto(url)
        page.wait_for_selector("#photo input[type=file]", state="attached")
        upload(page, SCENES[0])
        [caption] = captions_on(page, 1)
        assert all(token in caption for token in tokens.values())
        assert not dialogs
        page.locator("#captions li button").filter(has_text="alert").first.click()
        page.get_by_text("Where it looked for").wait_for()
        assert not dialogs
    finally:
        page.close()
        built.close(verbose=False)


# --- its end ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_it_and_nothing_went_outside(demo):
    process, _, uploads = demo
    assert list(uploads.glob("web_demo_*"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "KeyboardInterrupt" not in errors
    assert "outside:" not in errors
    assert list(uploads.iterdir()) == []
