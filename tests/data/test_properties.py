"""Properties that hold for any input: captions survive every format, labels and masks follow the lengths."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning.data import sources
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
CAPTION_LISTS = st.lists(TEXTS, min_size=1, max_size=4)


def as_read(text):
    """What the readers promise to make of a caption: valid UTF-8, one space between words, lowercase."""
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
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


@pytest.mark.parametrize(("write", "separator"), [(flickr30k, "|"), (tab_separated, "\t"), (flickr8k, None)])
@given(captions=CAPTION_LISTS)
def test_any_line_survives_a_format_without_quotes_or_is_refused(tmp_path, write, separator, captions):
    """A caption is one line there; where it holds the separator, the file is refused by its name."""
    captions = [caption.replace("\n", " ") for caption in captions]
    name, content = write(captions)
    (tmp_path / name).write_bytes(content)
    if separator and any(separator in caption for caption in captions):
        with pytest.raises(ValueError) as error:
            sources.read_captions(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}")
    else:
        df = sources.read_captions(tmp_path / name)
        assert df["caption"].tolist() == [as_read(caption) for caption in captions]


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
UTF8 = TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())


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
