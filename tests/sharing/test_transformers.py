"""A shared folder in transformers: every encoder, coupling and tokenizer gives our captions there, token for token."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, dynamic_module_utils, pipeline

from captioning.decoding.search import caption_images
from captioning.model import checkpoint
from captioning.model.tokenizer import CaptionTokenizer, encode_prompt
from captioning.sharing import hub_folder, model_card
from conftest import CAPTIONS, REDUCED_ENCODERS, REPO_ROOT, randomize
from MyLLM_Vit_gpt2_captioning import load_captioner

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [SHAPES / f"scene_{i}.png" for i in range(4)]
OPTIONS = {
    "greedy": {},
    "beams without a cache": dict(num_beams=3, use_cache=False),
    "two of three beams": dict(num_beams=3, num_return_sequences=2, length_penalty=0.5, early_stopping=True),
    "no repetition": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """transformers puts the code that it loads into pytest's folder, and no file has to survive a loss of power."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        for module in (hub_folder, checkpoint):
            patch.setattr(module, "write_atomically", lambda path, write: write(path))
        yield


@pytest.fixture(scope="module")
def source():
    return hub_folder.source_files()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, source):
    """The Shapes checkpoint as it would be shared."""
    place = tmp_path_factory.mktemp("shapes")
    hub_folder.copy_checkpoint(place, SHAPES)
    hub_folder.write_folder(place, model_card.read_facts(place, "anna/shapes"), source)
    return place


@pytest.fixture(scope="module")
def shapes_pair(shapes):
    return load_captioner(shapes), in_transformers(shapes)


def in_transformers(folder):
    """-> (model, processor) of a shared folder."""
    return [
        auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoProcessor)
    ]


def tokenizer_of(kind, bpe, folder):
    """GPT-2's comes as vocab.json and merges.txt; "word" does not know all words of the captions."""
    if kind == "word":
        return CaptionTokenizer.train(CAPTIONS, vocab_size=20, kind="word")
    bpe.backend.model.save(str(folder))
    return CaptionTokenizer(folder)


def ours(pair, photos, prompts, max_tokens, num_return_sequences=1, use_cache=True, **options):
    """Ids of the captions of each photo by itself, from BOS to EOS: a list of lists."""
    (model, tokenizer), (_, processor) = pair
    rows = []
    for photo, prompt in zip(photos, prompts, strict=True):
        sequence = torch.tensor([encode_prompt(tokenizer, prompt)])
        pixels = processor(images=photo)["pixel_values"]
        options |= dict(deterministic="num_beams" not in options, num_return_sequences=num_return_sequences)
        found = model.generate(pixels, sequence, max_tokens, **options)
        rows += [row.tolist() for row in (found if num_return_sequences > 1 else [found])]
    return rows


def theirs(pair, photos, prompts, max_tokens, **options):
    """The same from transformers, all photos in one batch."""
    (_, tokenizer), (model, processor) = pair
    batch = processor(images=photos, text=prompts)
    rows = model.generate(**batch, max_new_tokens=max_tokens, **options).tolist()
    width, count = batch["input_ids"].size(1), len(rows) // len(photos)
    lengths = batch["attention_mask"].sum(1).repeat_interleave(count).tolist()
    captions = []
    for row, length in zip(rows, lengths, strict=True):
        new = list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, row[width:]))
        ended = [tokenizer.eos_token_id] * (len(new) < len(row) - width)
        captions.append(row[width - length : width] + new + ended)
    return captions


def check(script, config, tokenizer, folder, source, photos, prompts):
    """Share a captioner with random weights as export_to_hub.py does, and compare what both libraries make of it."""
    torch.manual_seed(0)
    model = script.VisionGPT2Model(config).eval()
    randomize(model)
    model.save_pretrained(folder, tokenizer)
    hub_folder.write_folder(folder, model_card.read_facts(folder, "anna/tiny"), source)
    other, processor = in_transformers(folder)
    pair = (model, tokenizer), (other, processor)
    for options in ({}, dict(num_beams=3)):
        expected = ours(pair, photos, prompts, 6, **options)
        assert theirs(pair, photos, prompts, 6, **options) == expected
        assert len({tuple(row) for row in expected}) == len(photos)
    captioner = pipeline("image-text-to-text", model=other, processor=processor)
    caption = captioner(images=photos[0], text="", max_new_tokens=6)[0]["generated_text"]
    assert [caption] == caption_images(model, tokenizer, photos[:1], max_tokens=6)


@pytest.fixture(scope="module")
def photos():
    """Noise, of other sizes than any encoder's."""
    sizes = (40, 60), (70, 50), (33, 90)
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("encoder", REDUCED_ENCODERS)
def test_every_encoder(encoder, script, tiny_config, bpe, photos, source, tmp_path):
    tiny_config.encoder, tiny_config.encoder_options = encoder, REDUCED_ENCODERS[encoder]
    check(script, tiny_config, bpe, tmp_path / "tiny", source, photos[:2], ["", "a red"])


@pytest.mark.parametrize(("kind", "coupling"), [("gpt2", "final"), ("word", "stepped"), ("word", "final")])
def test_every_tokenizer_and_coupling(kind, coupling, script, tiny_config, bpe, photos, source, tmp_path):
    tokenizer = tokenizer_of(kind, bpe, tmp_path)
    tiny_config.coupling, tiny_config.normalize_tokens, tiny_config.vocab_size = coupling, True, len(tokenizer)
    tiny_config.eos_token_id, tiny_config.unk_token_id = tokenizer.eos_token_id, tokenizer.unk_token_id
    tiny_config.positions, tiny_config.activation, tiny_config.post_norm = "sinusoidal", "relu", coupling == "final"
    prompts = ["", "two young unseen", " <|endoftext|> "]
    check(script, tiny_config, tokenizer, tmp_path / "tiny", source, photos, prompts)


@pytest.mark.parametrize("name", OPTIONS)
def test_captions_that_end_at_different_lengths(name, shapes_pair):
    """Of photos with different prompts, in one batch."""
    prompts = ["", "a small", "above a small white", ""]
    expected = ours(shapes_pair, SCENES, prompts, 20, **OPTIONS[name])
    assert theirs(shapes_pair, SCENES, prompts, 20, **OPTIONS[name]) == expected
    assert len({len(row) for row in expected}) > 1


def test_a_caption_ends_at_seq_len(shapes_pair):
    (model, _), (other, processor) = shapes_pair
    pixels = processor(images=SCENES[0])["pixel_values"]
    sequence = torch.full((1, 30), 5)
    expected = model.generate(pixels, sequence, 9, deterministic=True)
    assert other.generate(sequence, pixel_values=pixels, max_new_tokens=9)[0].tolist() == expected.tolist()
    assert len(expected) <= model.config.seq_len == 32


def test_without_a_prompt_it_starts_from_bos(shapes_pair):
    pair, (_, (model, processor)) = shapes_pair, shapes_pair
    rows = model.generate(pixel_values=processor(images=SCENES)["pixel_values"], max_new_tokens=20)
    assert processor.batch_decode(rows, skip_special_tokens=True) == caption_images(*pair[0], SCENES)


def test_what_was_loaded_can_be_saved_and_loaded(shapes_pair, tmp_path):
    _, (model, processor) = shapes_pair
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = load_captioner(tmp_path / "again"), in_transformers(tmp_path / "again")
    assert again[1][0].config.model_type == hub_folder.MODEL_TYPE
    assert theirs(again, SCENES, [""] * 4, 20) == ours(shapes_pair, SCENES, [""] * 4, 20)
    assert ours(again, SCENES, [""] * 4, 20) == ours(shapes_pair, SCENES, [""] * 4, 20)


def test_half_precision_and_what_is_refused(shapes, shapes_pair):
    _, (model, processor) = shapes_pair
    load = AutoModelForImageTextToText.from_pretrained
    half = load(shapes, trust_remote_code=True, dtype="bfloat16", device_map={"": "cpu"})
    assert half.dtype == torch.bfloat16
    assert half.generate(**processor(images=SCENES), max_new_tokens=3).size(1) == 4
    batch = processor(images=SCENES[:2], text=["", "a small"])
    padded_right = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padding of prompts has to be on the left"):
        model.generate(padded_right[0], attention_mask=padded_right[1], pixel_values=batch["pixel_values"])
    for call, message in (
        (lambda: model.generate(batch["input_ids"]), "a captioner needs a photo"),
        (lambda: processor(text="a dog"), "a captioner needs a photo"),
        (lambda: processor(images=SCENES, text=["a", "b"]), "2 texts for 4 images"),
        (lambda: load(shapes, trust_remote_code=True, device_map={"a": 0, "b": 1}), "on one device as a whole"),
        (lambda: load(shapes, trust_remote_code=True, quantization_config={"load_in_8bit": True}), "quantiz"),
        (lambda: model.save_pretrained(shapes, push_to_hub=True), "export_to_hub.py"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_another_version_of_the_project_is_not_used(shapes, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    file = other / "source" / "MyLLM" / "ch3.py"
    file.write_text(file.read_text() + "# newer\n")
    with pytest.raises(ImportError, match=r"ch3\.py is not the same as .*different versions of the project"):
        AutoModelForImageTextToText.from_pretrained(other, trust_remote_code=True)


def test_the_snippet_in_the_card_runs_where_the_project_is_not(shapes, tmp_path):
    """Word for word, offline, with the folder in the Hub's cache under the name in the card; files are links there."""
    card = (shapes / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text\n" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    cached = tmp_path / "home" / "hub" / "models--anna--shapes"
    revision = "0123456789" * 4
    shutil.copytree(shapes, cached / "snapshots" / revision)
    (cached / "blobs").mkdir()
    for number, path in enumerate(list(cached.rglob("*.*"))):
        if path.is_file():
            path.rename(cached / "blobs" / str(number))
            path.symlink_to(cached / "blobs" / str(number))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    shutil.copyfile(SCENES[1], tmp_path / "photo.jpg")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    code = f"{snippet}\nimport sys\nprint(sys.modules['MyLLM_Vit_gpt2_captioning'].__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *captions, loaded = done.stdout.splitlines()
    assert loaded.startswith(str(cached))
    assert captions == ["above a small white circle is a small yellow circle"]
