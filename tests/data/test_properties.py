"""Properties that hold for any input: captions survive every format, labels and masks follow the lengths."""

import csv
import io
import json
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning.data import sources
from captioning.data.photo_names import is_image_file
from captioning.model.tokenizer import CaptionTokenizer, encode_caption
from conftest import CAPTIONS

# Drawn alike in every run, and as many as a second or two allows; slow machines are no failures.
settings.register_profile(
    "here",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("here")

HARD = st.sampled_from([*"|,\t\"'\\;#{}[]<>\r\0\x1a\x85\u2028\ufeff\u200f\u0301\ud83d", "\r\n", "\U0001f600", "İ", "ß"])
TEXTS = st.lists(st.one_of(st.text(max_size=8), HARD), max_size=8).map("".join)
UTF8 = TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())
CAPTION_LISTS = st.lists(TEXTS, min_size=1, max_size=4)


def as_read(text):
    """What the readers promise to make of a caption: valid UTF-8, without control and invisible characters, one space
    between words, lowercase."""
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    text = "".join(
        c for c in text if c.isspace() or (unicodedata.category(c) != "Cc" and c not in "\xad\u200b\u2060\ufeff")
    )
    return " ".join(text.split()).lower()


# --- formats: captions -> the bytes of a file -------------------------------------------------------------------------


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def comma_separated(captions):
    text = io.StringIO()
    rows = [("image", "caption"), *((f"{i}.jpg", caption) for i, caption in enumerate(captions))]
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    return "captions.csv", encoded(text.getvalue())


def flickr30k(captions):
    lines = [f"{i}.jpg| {i}| {caption}" for i, caption in enumerate(captions)]
    return "results.csv", encoded("\n".join(["image_name| comment_number| comment", *lines, ""]))


def tab_separated(captions):
    return "captions.tsv", encoded(
        "\n".join(["image\tcaption", *(f"{i}.jpg\t{c}" for i, c in enumerate(captions)), ""])
    )


def flickr8k(captions):
    return "Flickr8k.token.txt", encoded("".join(f"{i}.jpg#0\t{c}\n" for i, c in enumerate(captions)))


def mapping(captions):
    return "captions.json", json.dumps({f"{i}.jpg": [c] for i, c in enumerate(captions)}).encode()


def json_lines(captions):
    rows = [json.dumps(dict(image=f"{i}.jpg", caption=c), ensure_ascii=False) for i, c in enumerate(captions)]
    return "captions.jsonl", encoded("\n".join(rows))


def coco(captions):
    images = [dict(id=i, file_name=f"{i}.jpg") for i in range(len(captions))]
    annotations = [dict(id=i, image_id=i, caption=caption) for i, caption in enumerate(captions)]
    return "captions_train2017.json", json.dumps(dict(images=images, annotations=annotations)).encode()


def karpathy(captions):
    images = [dict(filename=f"{i}.jpg", sentences=[dict(raw=caption)]) for i, caption in enumerate(captions)]
    return "dataset_mine.json", json.dumps(dict(images=images)).encode()


@pytest.mark.parametrize("write", [mapping, json_lines, coco, karpathy, comma_separated])
@given(captions=CAPTION_LISTS)
def test_any_caption_survives_a_format_that_quotes(tmp_path, write, captions):
    name, content = write(captions)
    (tmp_path / name).write_bytes(content)
    df = sources.read_captions(tmp_path / name)
    assert df["caption"].map(as_read).tolist() == [as_read(caption) for caption in captions]
    assert df["caption"].map(as_read).tolist() == df["caption"].tolist()
    assert [image.rpartition("/")[2] for image in df["image"]] == [f"{i}.jpg" for i in range(len(captions))]


@pytest.mark.parametrize("write", [flickr30k, tab_separated, flickr8k])
@given(captions=CAPTION_LISTS)
def test_any_line_survives_a_format_without_quotes(tmp_path, write, captions):
    """A caption is one line there, and may hold the separator, for it is the last column."""
    captions = [caption.replace("\n", " ") for caption in captions]
    name, content = write(captions)
    (tmp_path / name).write_bytes(content)
    df = sources.read_captions(tmp_path / name)
    assert df["caption"].tolist() == [as_read(caption) for caption in captions]


HEADERS = [("image", "caption"), ("Image Name", "Comment"), ("FILENAME", "text"), ("image_id", "caption")]


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(UTF8.map(lambda text: text.replace("\r", " ")), st.booleans()), min_size=1, max_size=5),
    separator=st.sampled_from(",;|\t"),
    header=st.sampled_from(HEADERS),
    ends=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_table_gives_the_rows_that_were_written(tmp_path, rows, separator, header, ends, encoding):
    """In every form that spreadsheets write: a caption is quoted, or it is a line that does not begin with a quote."""
    lines = [separator.join(header)]
    for i, (caption, quoted) in enumerate(rows):
        if separator in ",;" and (quoted or caption.lstrip(" ").startswith('"')):
            caption = '"' + caption.replace('"', '""') + '"'
        else:
            caption = caption.replace("\n", " ")
        lines.append(f"{i}.jpg{separator}{caption}")
    (tmp_path / "captions.csv").write_bytes(ends.join([*lines, ""]).encode(encoding))
    df = sources.read_captions(tmp_path / "captions.csv")
    assert df["image"].tolist() == [f"{i}.jpg" for i in range(len(rows))]
    assert df["caption"].tolist() == [as_read(caption) for caption, _ in rows]


PARTS = st.sampled_from(
    ["..", ".", "a", "A", "a.jpg", "A.JPG", "sub", "SUB", "b", "b.png", "1", "C:", "", "~", "images"]
)
PATHS = st.lists(PARTS | st.text(max_size=3), max_size=5)


@settings(max_examples=80)
@given(
    names=st.lists(
        st.tuples(PATHS, st.sampled_from(["/", "\\"]), st.sampled_from(["", "/", "\\\\", "C:\\"])), max_size=4
    )
)
def test_no_name_leads_out_of_the_folder(photo_tree, names):
    """Whatever the names, a photo is in the folder of photos, or the name is refused, or nothing is there."""
    names = [start + separator.join(parts) for parts, separator, start in names]
    lines = [json.dumps(dict(image=name, caption="a")) for name in [*names, "1.jpg"]]
    (photo_tree / "captions.jsonl").write_bytes(encoded("\n".join(lines)))
    try:
        df = sources.load(photo_tree, say=lambda line: None)
    except ValueError as error:
        assert "lies outside of" in str(error) or "may be" in str(error) or "no image name" in str(error)
        return
    for path in df["image"]:
        if is_image_file(path):
            assert path.resolve().is_relative_to(photo_tree / "images")


@pytest.fixture(scope="module")
def photo_tree(tmp_path_factory):
    """Photos in images/ and below it, with others beside it that are none of the data set."""
    folder = tmp_path_factory.mktemp("photos") / "data"
    for name in ("images/a.jpg", "images/1.jpg", "images/sub/b.png", "images/sub/a/a.jpg", "../a.jpg", "../sub/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a photo")
    return folder


FILE_NAMES = ["captions.csv", "captions.tsv", "results.csv", "captions.json", "captions.jsonl", "Flickr8k.token.txt"]


@given(content=st.one_of(st.binary(max_size=200), TEXTS.map(encoded)), name=st.sampled_from(FILE_NAMES))
def test_any_file_is_read_or_refused_by_its_name(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try:
        sources.read_captions(tmp_path / name)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / name}")


KEYS = ["image", "images", "annotations", "caption", "id", "image_id", "file_name", "filename", "sentences", "raw"]
KEYS += ["split", "prompt"]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(value=JSON_VALUES, name=st.sampled_from(["captions.json", "captions_train.json", "captions.jsonl"]))
def test_any_json_is_read_or_refused_by_its_name(tmp_path, value, name):
    (tmp_path / name).write_text(json.dumps(value))
    try:
        sources.read_captions(tmp_path / name)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / name}")


# --- tokens, labels, masks --------------------------------------------------------------------------------------------

BPE = CaptionTokenizer.train(CAPTIONS, 300)
WORDS = CaptionTokenizer.train(CAPTIONS, 60, "word")
TOKENIZERS = st.sampled_from([BPE, WORDS])


@given(text=UTF8)
def test_bytes_lose_nothing(text):
    assert BPE.decode(BPE.encode(text)) == text


@given(tokenizer=TOKENIZERS, caption=UTF8, prompt=UTF8, length=st.integers(2, 30))
def test_a_sequence_begins_with_bos_ends_with_eos_and_is_never_too_long(tokenizer, caption, prompt, length):
    ids = encode_caption(tokenizer, caption, length, prompt)
    assert 2 <= len(ids) <= length
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    whole = encode_caption(tokenizer, caption, 1000, prompt)
    assert len(ids) == min(length, len(whole)) or prompt.strip()
    if not prompt.strip():
        assert ids[:-1] == whole[: len(ids) - 1]


@given(ids=st.lists(st.integers(0, 299), max_size=20))
def test_labels_are_the_next_tokens(script, ids):
    labels = script._shift_labels(ids)
    assert len(labels) == len(ids)
    assert labels[:-1] == ids[1:] and labels[-1:] == ids[-1:]


@given(
    rows=st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), min_size=1, max_size=6),
    pad=st.integers(0, 299),
)
def test_padding_adds_to_the_right_and_changes_nothing(script, rows, pad):
    padded = script._pad_token_batch(SimpleNamespace(pad_token_id=pad), rows)
    assert padded.shape == (len(rows), max(map(len, rows))) and padded.dtype == torch.long
    for row, ids in zip(padded.tolist(), rows, strict=True):
        assert row[: len(ids)] == ids and set(row[len(ids) :]) <= {pad}


@given(data=st.data(), tokenizer=TOKENIZERS, K=st.integers(1, 3), photos=st.integers(1, 3))
def test_masks_go_by_length_whatever_the_ids(script, data, tokenizer, K, photos):
    """The ids may hold BOS, EOS and pad anywhere: only what is at and behind the last real token is masked."""
    ids = st.lists(st.integers(0, len(tokenizer) - 1) | st.just(tokenizer.eos_token_id), min_size=2, max_size=12)
    rows = data.draw(st.lists(ids, min_size=K * photos, max_size=K * photos))
    items = [(torch.full((3, 2, 2), i // K), row, script._shift_labels(row)) for i, row in enumerate(rows)]
    images, input_ids, labels = script.collate_fn(items, tokenizer, captions_per_image=K)
    assert images[:, 0, 0, 0].tolist() == list(range(photos))
    assert input_ids.shape == labels.shape == (K * photos, max(map(len, rows)))
    for row, input_row, label_row in zip(rows, input_ids.tolist(), labels.tolist(), strict=True):
        assert input_row[: len(row)] == row
        assert label_row[: len(row) - 1] == row[1:]
        assert set(label_row[len(row) - 1 :]) == {-100}
