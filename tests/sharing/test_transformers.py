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

import export_to_hub
from captioning.common.files import write_atomically
from captioning.decoding.search import caption_images
from captioning.model.tokenizer import CaptionTokenizer, encode_prompt
from captioning.sharing import hub_folder, model_card
from conftest import CAPTIONS, REDUCED_ENCODERS, REPO_ROOT, randomize

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [SHAPES / f"scene_{i}.png" for i in range(4)]
PROMPTS = ["", "a red", "two young men", ""]
OPTIONS = {
    "greedy": {},
    "recomputed": dict(use_cache=False),
    "beams": dict(num_beams=3),
    "recomputed beams": dict(num_beams=3, use_cache=False),
    "two of three beams": dict(num_beams=3, num_return_sequences=2, length_penalty=0.5, early_stopping=True),
    "no repetition": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers puts the code that it loads."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def source():
    return hub_folder.source_files()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The Shapes checkpoint as it would be shared."""
    place = tmp_path_factory.mktemp("exported") / "shared"
    export_to_hub.main(["anna/shapes", "--dry-run", str(place), "--checkpoint", str(SHAPES)])
    return place


@pytest.fixture(scope="module")
def shapes_pair(script_module, shapes):
    return both(script_module, shapes)


@pytest.fixture(scope="module")
def script_module():
    import MyLLM_Vit_gpt2_captioning

    return MyLLM_Vit_gpt2_captioning


def both(script, folder):
    """-> ((our model, our tokenizer), (their model, their processor)) of a shared folder."""
    theirs = [
        auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoProcessor)
    ]
    return script.load_captioner(folder), theirs


def share(model, tokenizer, folder, source):
    """Write the folder of a tiny captioner as export_to_hub.py does."""
    model.save_pretrained(folder, tokenizer)
    hub_folder.write_folder(folder, model_card.read_facts(folder, "anna/tiny"), source)
    return folder


def tokenizers(bpe, folder):
    """{name: tokenizer} of every kind; GPT-2's comes as vocab.json and merges.txt."""
    bpe.backend.model.save(str(folder))
    word = CaptionTokenizer.train(CAPTIONS, vocab_size=20, kind="word")  # not all words: one is <unk>
    return {"bpe": bpe, "gpt2": CaptionTokenizer(folder), "word": word}


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


def check(pair, folder, photos, prompts):
    for options in (OPTIONS["greedy"], OPTIONS["beams"]):
        expected = ours(pair, photos, prompts, 8, **options)
        assert theirs(pair, photos, prompts, 8, **options) == expected
        assert len({tuple(row) for row in expected}) > 1
    (model, tokenizer), _ = pair
    captioner = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    captions = [captioner(images=photo, text="", max_new_tokens=8)[0]["generated_text"] for photo in photos[:2]]
    assert captions == caption_images(model, tokenizer, photos[:2], max_tokens=8)


@pytest.fixture(scope="module")
def photos():
    """Noise, of other sizes than any encoder's."""
    sizes = (40, 60), (70, 50), (64, 64), (33, 90)
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("encoder", REDUCED_ENCODERS)
def test_every_encoder(encoder, script, tiny_config, bpe, photos, source, tmp_path):
    tiny_config.encoder, tiny_config.encoder_options = encoder, REDUCED_ENCODERS[encoder]
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model)
    folder = share(model, bpe, tmp_path / "tiny", source)
    check(both(script, folder), folder, photos, PROMPTS)


@pytest.mark.parametrize("coupling", ["stepped", "final"])
@pytest.mark.parametrize("kind", ["gpt2", "word"])
def test_every_tokenizer_and_coupling(kind, coupling, script, tiny_config, bpe, photos, source, tmp_path):
    tokenizer = tokenizers(bpe, tmp_path)[kind]
    tiny_config.coupling, tiny_config.normalize_tokens, tiny_config.vocab_size = coupling, True, len(tokenizer)
    tiny_config.eos_token_id, tiny_config.unk_token_id = tokenizer.eos_token_id, tokenizer.unk_token_id
    tiny_config.positions, tiny_config.activation, tiny_config.post_norm = "sinusoidal", "relu", coupling == "final"
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model)
    folder = share(model, tokenizer, tmp_path / "tiny", source)
    check(both(script, folder), folder, photos, ["", "a red dog", "two young unseen", " <|endoftext|> "])


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


def test_what_was_loaded_can_be_saved_and_loaded(script, shapes_pair, tmp_path):
    _, (model, processor) = shapes_pair
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = both(script, tmp_path / "again")
    assert type(again[1][0]) is not type(model)  # the code is that of the new folder
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
    write_atomically(file, lambda path: path.write_text(file.read_text() + "# newer\n"))
    with pytest.raises(ImportError, match=r"ch3\.py is not the same as .*different versions of the project"):
        AutoModelForImageTextToText.from_pretrained(other, trust_remote_code=True)


def test_the_snippet_in_the_card_runs_where_the_project_is_not(shapes, tmp_path):
    """Word for word, offline, with the folder in the Hub's cache under the name in the card."""
    card = (shapes / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text\n" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    cached = tmp_path / "home" / "hub" / "models--anna--shapes"
    revision = "0123456789" * 4
    shutil.copytree(shapes, cached / "snapshots" / revision)
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
