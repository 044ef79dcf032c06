"""Names and captions of other people are shown, and never act: on a terminal, in Markdown, in HTML, in pictures."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_data
from captioning.common.printable import in_html, in_markdown, printable
from captioning.data import sources
from captioning.decoding import attention_maps
from captioning.images.preprocessing import load_image
from captioning.pages import html_pages, plots
from captioning.sharing.model_card import _read_samples
from captioning.training.trackers import _caption_and_truth, _cell

EVIL = "a \x1b[31mred\x07 dog\n<script>alert(1)</script> ![x](http://evil/x.png) | *b* _c_ `d` &amp; \\ \u202egpj.a"
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]")


def test_control_characters_are_written_out():
    assert printable("a \x1b[31mred\x07\n\x9b\u202edog\ud83d") == "a \\x1b[31mred\\x07\\n\\x9b\\u202edog\\ud83d"
    text = "Käfer \U0001f468\u200d\U0001f469 \u05db\u05dc\u05d1 e\u0301 \\ <b>"
    assert printable(text) == text


def test_markup_is_shown_and_does_nothing():
    shown = in_markdown(EVIL)
    assert shown == (
        r"a \\x1b\[31mred\\x07 dog\\n\<script\>alert(1)\</script\> !\[x\](http\://evil/x.png) \| \*b\* \_c\_ \`d\` "
        r"\&amp; \\ \\u202egpj.a"
    )
    assert in_markdown("my_photo_1.jpg, at 10:30") == "my_photo_1.jpg, at 10:30"
    assert in_html('<b title="x">\x07&') == "&lt;b title=&quot;x&quot;&gt;\\x07&amp;"


def test_samples_and_the_model_card_made_of_them(tmp_path):
    html_pages.write_samples(tmp_path / "samples.md", ["a\x1b[31m<b>.jpg"], [["[true](x)"]], {1: [EVIL]})
    text = (tmp_path / "samples.md").read_text()
    assert not UNSEEN.search(text)
    assert f"| 1 | {in_markdown(EVIL)} |" in text and "## a\\\\x1b\\[31m\\<b\\>.jpg" in text
    [sample] = _read_samples(tmp_path / "samples.md", 1)
    assert (sample.name, sample.caption, sample.references) == ("a\\x1b[31m<b>.jpg", printable(EVIL), ["[true](x)"])


def test_pages_trackers_and_pictures(tmp_path):
    photo = np.zeros((4, 4, 3), np.uint8)
    page = html_pages.photo_grid([(photo, EVIL, [EVIL], EVIL)])
    assert not UNSEEN.search(page) and "<script>" not in page and page.count("\\x1b[31mred\\x07") == 4
    assert _cell(EVIL) == in_markdown(EVIL)
    assert _caption_and_truth(EVIL, [EVIL]) == f"{printable(EVIL)} (true: {printable(EVIL)})"
    figure = plots.plot_captions([Image.new("RGB", (4, 4))], [EVIL], [EVIL], tmp_path / "x.png")
    for text in (figure.axes[0].get_title(loc="left"), figure.axes[0].get_xlabel()):
        assert "\\x1b[31mred\\x07" in text and not UNSEEN.search(text)
    attention_maps.draw_attention(Image.new("RGB", (8, 8)), ["a\x1b"], torch.zeros(1, 2, 2), tmp_path / "y.png")


def test_names_and_captions_on_the_terminal(photos, capsys):
    name = "x\x1b[31m\n<i>.jpg"
    records = [dict(image=image, caption=f"a {i}") for i, image in enumerate(["0.jpg", "1.jpg", "2.jpg", name])]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources.drop_unusable(sources.load(photos), "captions.jsonl")
    with pytest.raises(SystemExit):
        prepare_data.main(["--check", str(photos)])
    said = capsys.readouterr().out
    assert not UNSEEN.search(said) and "captions.jsonl, line 4: x\\x1b[31m\\n<i>.jpg" in said
    report = (photos / "check" / "report.md").read_text()
    assert "- captions.jsonl, line 4: x\\\\x1b\\[31m\\\\n\\<i\\>.jpg" in report and not UNSEEN.search(report)
    for content, error in ((None, FileNotFoundError), (b"damaged", ValueError)):
        if content:
            (photos / name.replace("\n", "")).write_bytes(content)
        with pytest.raises(error) as refused:
            load_image(photos / name.replace("\n", ""))
        assert not UNSEEN.search(str(refused.value)) and "x\\x1b[31m<i>.jpg" in str(refused.value)
    plots.draw_demo(lambda images, prompt: [EVIL], sources.load(photos)[:1], 1, photos / "demo.png")
    assert "generated: a \\x1b[31mred\\x07 dog\\n<script>" in capsys.readouterr().out


def test_what_caption_image_prints(photos, capsys, monkeypatch):
    import caption_image

    outputs = caption_image.Outputs.__new__(caption_image.Outputs)
    outputs.args = type(
        "Args", (), dict(attention=None, json=False, grid=None, out=None, min_confidence=None, words=None)
    )
    outputs.tables, outputs.attention_paths, outputs.sidecars = {}, {}, ()
    photo = caption_image.find_photos([str(photos / "images" / "0.jpg")])[0]
    outputs.write(None, {photo: (None, None)}, [(photo, [EVIL], None, None, [])])
    assert capsys.readouterr().out == f"{photo.name}: {printable(EVIL)}\n"


def test_columns_of_another_file(photos):
    (photos / "captions.csv").write_text("im\x1bage,x\n0.jpg,a\n")
    with pytest.raises(ValueError, match=r"it has im\\x1bage, x"):
        sources.load(photos)
    (photos / "captions.csv").write_text("image,caption\n0.jpg,a\n")
    (photos / "train.txt").write_text("a\x1b.jpg\n")
    (photos / "val.txt").write_text("a\x1b.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt: a\\x1b\.jpg is also in the train list"):
        sources.load(photos)
