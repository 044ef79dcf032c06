"""Damage files at random, and see what reads them: one clear line that names the file, or a usable result.

    python tests/fuzz.py --minutes 30               every kind of file in turn
    python tests/fuzz.py --only state --first 4711 --count 1    one input again, by its number

An input is a valid file as this project writes it, damaged in one to three places: a value of another type or of an
absurd size, a key that is missing, double or unknown, deep nesting, bytes that are flipped, cut off or repeated. Its
damage follows from --seed, the kind and the number alone. A finding is an exception that commands do not turn into an
"error:" line, a message that names no file or holds control characters, a process that is started, a connection, more
than SECONDS or MEMORY, a process that dies, or a file that is changed outside of the folder that the kind may write to.
Exit code 1 where there are findings. docs/testing.md says what was found so far.
"""

import argparse
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch

import conftest  # noqa: F401  the import path, and the settings that tests have
import MyLLM_Vit_gpt2_captioning as script
from captioning.command_line.recipes import read_recipe, write_recipe
from captioning.common.stopping import Stopped
from captioning.data import downloads, exclusions, photo_store, sources
from captioning.data.shards import reading, streaming, writing
from captioning.data.token_cache import TokenCache
from captioning.decoding.confidence import Calibration, Confidence
from captioning.decoding.familiarity import DIM, Familiarity
from captioning.model import checkpoint, encoders
from captioning.model.tokenizer import CaptionTokenizer
from captioning.scoring import meteor
from captioning.training.compared_runs import read_runs
from captioning.training.run_state import NEWEST
from conftest import CAPTIONS, REDUCED_ENCODERS, make_flickr, randomize, tiny_model_of, tiny_training_of, trainers_of
from helpers import annotation_files
from helpers.runs import stop_after

SECONDS = 10  # of the processor, for one input
WAIT = 120  # seconds until an input that does nothing hangs, too: on a busy machine a process may wait for its turn
MEMORY = 2**30  # bytes that one process may take on top of what the libraries have
EXPECTED = (OSError, ValueError)  # what the commands print as "error: ..."

# --- damage -----------------------------------------------------------------------------------------------------------

ABSURD = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, -(2**63), 10**6, 10**12, 10**30, 0.0, 0.5, -0.5, 1e-300,
    1e300, float("nan"), float("inf"), float("-inf"), "", " ", "0", "x", "../x", "/etc/passwd", "a\0b", "\x1b[31m",
    "\ud800", "\n", "x" * 10_000, "user/repo", "http://127.0.0.1:9/x", "(a+)+$", [], {}, [[]], [0], [1, 2, 3], [None],
    {"a": 1}, {"": {}}, ["x"] * 1000,
)  # fmt: skip


def damaged(content, suffix, rng):
    """The bytes of a file, damaged; text of JSON by what it means more often than as bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if suffix in (".json", ".jsonl") and rng.random() < 0.85:
            content = _damaged_json(content, suffix, rng)
        elif suffix in (".pt", ".bin") and rng.random() < 0.85:
            content = _damaged_state(content, rng)
        elif suffix in (".csv", ".txt", ".tsv", ".token", ".toml", ".md") and rng.random() < 0.7:
            content = _damaged_lines(content, rng)
        elif suffix == ".safetensors" and rng.random() < 0.7:
            content = _damaged_header(content, rng)
        else:
            content = _damaged_bytes(content, rng)
    return content


def _damaged_bytes(content, rng):
    place, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 512))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + rng.randbytes(length) + content[place + length :]
    if kind == 2:
        return content[:place] + content[max(0, place - length) :]
    if kind == 3:
        return content[:place] + content[place + length :]
    if kind == 4:
        return content[:place] + bytes(length) + content[place:]
    place = min(place, max(0, len(content) - 1))
    return (
        content[:place] + bytes(b ^ (1 << rng.randrange(8)) for b in content[place : place + 1]) + content[place + 1 :]
    )


def _damaged_lines(content, rng):
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines[i] = lines[j]
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        fields = re.split(rb"([,|\t=])", lines[i])
        fields[rng.randrange(len(fields))] = str(rng.choice(ABSURD)).encode("utf-8", "replace")
        lines[i] = b"".join(fields)
    elif kind == 3:
        lines[i] += rng.choice((b'"', b"|", b",", b"\t", b"\r", b"\0", b"'", b"\xff", b"=", b"[" * 1000))
    elif kind == 4:
        lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
    else:
        lines = [*lines[:i], *lines[i:] * 2]
    return b"\n".join(lines)


def _damaged_json(content, suffix, rng):
    try:
        if suffix == ".jsonl":
            lines = content.split(b"\n")
            i = rng.randrange(len(lines))
            lines[i] = _damaged_json(lines[i], ".json", rng)
            return b"\n".join(lines)
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _damaged_bytes(content, rng)
    value, twice = damaged_value(value, rng)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except RecursionError:  # nested twice: too deep to be written
        return b"[" * 2000
    if twice:  # a key that comes twice
        text = text[:1] + f'"{twice}": {json.dumps(rng.choice(ABSURD))}, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def damaged_value(value, rng):
    """A JSON value, damaged in one place -> (value, a key of it that is to be doubled or None)."""
    places = list(_places(value))
    container, key = rng.choice(places) if places else (None, None)
    kind = rng.randrange(8)
    if container is None or (kind == 0 and rng.random() < 0.2):
        return rng.choice(ABSURD), None
    if kind <= 3:
        container[key] = rng.choice(ABSURD)
    elif kind == 4:
        container[key] = _near(container[key], rng)
    elif kind == 5:
        del container[key]
    elif kind == 6 and isinstance(container, dict):
        container[str(rng.choice(ABSURD))[:50]] = container.pop(key) if rng.random() < 0.5 else rng.choice(ABSURD)
    elif kind == 6:
        container += container[: 1 + rng.randrange(len(container))]
    elif isinstance(value, dict) and rng.random() < 0.5:
        return value, rng.choice(list(value))
    else:
        deep = container[key]
        for _ in range(rng.choice((1, 2, 100, 900))):
            deep = [deep] if rng.random() < 0.5 else {"x": deep}
        container[key] = deep
    return value, None


def _near(value, rng):
    """A value of the same type that is a little, or much, another one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, value * 10**6, value + 10**9))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value * 1e30, value + 1))
    if isinstance(value, str):
        return rng.choice((value + value, value[:-1], value.upper(), f"../{value}", f"{value}\0", value[::-1]))
    return type(value)()


def _places(value):
    """Yields (container, key) of everything in a JSON value, but of long lists and dicts only the ends."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) <= 40 else items[:10] + items[-10:]:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def _damaged_state(content, rng):
    """A file of `torch.save`, with something else in it."""
    draft = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}.pt"
    draft.write_bytes(content)
    try:
        value = torch.load(draft, weights_only=True)
    except Exception:  # damaged before
        return _damaged_bytes(content, rng)
    places = list(_places(value))
    container, key = rng.choice(places) if places else (None, None)
    if container is None:
        value = rng.choice(ABSURD)
    elif isinstance(container[key], torch.Tensor) and container[key].numel() > 10**6:
        return _damaged_bytes(content, rng)  # damaged before
    elif isinstance(container[key], torch.Tensor) and rng.random() < 0.8:
        tensor = container[key]
        container[key] = rng.choice((
            tensor[:0] if tensor.ndim else tensor, tensor.double() * torch.nan, tensor.double() * torch.inf,
            tensor.int(), tensor.bool(), tensor.flatten(), torch.zeros(3, 3), torch.zeros(()),
            torch.cat([tensor.reshape(-1)] * 2), tensor.reshape(-1).to_sparse(),
            tensor.reshape(-1)[:1].expand(min(tensor.numel(), 1) * 10**12),
        ))  # fmt: skip
    else:
        value, _ = damaged_value(value, rng)
    try:
        torch.save(value, draft)
    except RecursionError:  # too deep for a pickle: nobody can have written it
        return _damaged_bytes(content, rng)
    return draft.read_bytes()


def _damaged_header(content, rng):
    """A safetensors file with another JSON in its header."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content):
        return _damaged_bytes(content, rng)
    header = _damaged_json(content[8 : 8 + length], ".json", rng)
    said = len(header) + rng.choice((0, 0, 0, 0, 0, 1, -1, 10**12))
    return said.to_bytes(8, "little", signed=True) + header + content[8 + length :]


# --- what is damaged, and who reads it --------------------------------------------------------------------------------

ALONE = ("annotations", "encoder_options")  # kinds of folders side by side, of which only the damaged one is read
KINDS = {}  # name: (function that makes the valid folder, patterns of the files to damage, reader, may write)


def kind(name, files, make, writes=(), damage=damaged):
    """A kind of files: `make(folder)` writes valid ones, `files` are patterns of those that are damaged, as `damage`
    does it; the function reads them in a folder, in which it may write what `writes` matches."""

    def add(read):
        KINDS[name] = make, files, read, writes, damage
        return read

    return add


BPE = CaptionTokenizer.train(CAPTIONS, 300)


def _model(**changes):
    torch.manual_seed(0)
    config = tiny_model_of(BPE)
    vars(config).update(changes)
    model = script.VisionGPT2Model(config)
    randomize(model)
    return model.eval()


def _confidence(model):
    """A calibration of any numbers."""
    config = model.config
    words, captions = Calibration([0.1] * 4, 0.0), Calibration([0.1] * 5, 0.0)
    vectors = torch.zeros(config.depth, config.embed_dim)
    known = Confidence(vectors, {"": 0.5, "dog": 1.0}, words, captions, {"photos": 10, "right": "words"})
    known.familiarity = Familiarity(torch.zeros(2, DIM), torch.arange(3.0))
    return known


def _write_captioner(folder, **changes):
    model = _model(**changes)
    config = checkpoint.describe(model, folder)
    checkpoint.save_checkpoint(folder, model.state_dict(), config, BPE)
    _confidence(model).save(folder)


def _read_captioner(folder):
    model, tokenizer = script.load_captioner(folder)
    Confidence.load(folder)
    _caption(model, tokenizer)


def _caption(model, tokenizer):
    side = model.preprocessing["img_size"]
    ids = model.generate(
        torch.zeros(1, 3, side, side), torch.tensor([[tokenizer.bos_token_id]]), max_tokens=3, deterministic=True
    )
    tokenizer.decode(ids)


kind("config", ["config.json"], _write_captioner)(_read_captioner)
kind("weights", ["captioner.safetensors"], _write_captioner)(_read_captioner)


def _write_torch_weights(folder):
    _write_captioner(folder)
    (folder / "captioner.safetensors").unlink()


kind("pt_weights", ["captioner.pt"], _write_torch_weights)(_read_captioner)


def _write_cnn(folder):
    _write_captioner(
        folder, encoder="resnet10t", encoder_options={"img_size": 64, "zero_init_last": False}, coupling="final",
        refiner=dict(width=16, grid=2, layers=1, heads=2, kernel=3, dropout=0.0),
    )  # fmt: skip


kind("cnn_config", ["config.json"], _write_cnn)(_read_captioner)


COUNTS = (1, 2, 3, 4, 7, 8, 16, 64, 100, 1000, 2048, 10**5, [1, 2], [2] * 4, [10**5] * 4, [1] * 99)
OPTIONS = {  # the options of an encoder: values that are allowed by themselves
    ("img_size", *encoders.COUNTS): COUNTS,
    encoders.NUMBERS: (0, 0.1, 0.5, 1, 4.0, 1000, 10**5, *COUNTS[-4:]),
    encoders.SWITCHES: (True, False),
    encoders.WORDS: ("", "x", "avg", "token", "map", "layernorm", "gelu", "deep", "rope"),
}
BUILT = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "resnet10t",
         "convnext_atto", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224", "mixer_s32_224")  # fmt: skip


def _write_encoders(folder):
    for name in BUILT:
        refiner = dict(width=16, grid=2, layers=1, heads=2, kernel=3) if name == "resnet10t" else {}
        _write_captioner(folder / name, encoder=name, encoder_options=REDUCED_ENCODERS[name], refiner=refiner)


def _other_options(content, suffix, rng):
    """Known options with any values, together: they do not fit each other, or make a model of another size."""
    config = json.loads(content)
    model = config["model_config"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        names = rng.choice(list(OPTIONS))
        there = sorted(set(names) & model["encoder_options"].keys())
        name = rng.choice(there if there and rng.random() < 0.5 else names)
        model["encoder_options"][name] = rng.choice(OPTIONS[names] if rng.random() < 0.9 else ABSURD)
    if model["refiner"] and rng.random() < 0.5:
        model["refiner"][rng.choice(encoders.REFINER)] = rng.choice(COUNTS if rng.random() < 0.9 else ABSURD)
    if rng.random() < 0.1:
        model["encoder"] = rng.choice(BUILT)
    return json.dumps(config).encode()


@kind("encoder_options", ["*/config.json"], _write_encoders, damage=_other_options)
def _(folder):
    _read_captioner(folder / (folder / "DAMAGED").read_text().split("/")[0])


def _write_hugging_face(folder):
    model = _model(coupling="final", normalize_tokens=False)
    model.export_to_transformers(folder, BPE)


HF_FILES = ["config.json", "generation_config.json", "preprocessor_config.json"]
kind("hf_config", HF_FILES, _write_hugging_face)(lambda folder: _caption(*script.load_captioner(folder)))


def _write_tower(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
    ViTModel(ViTConfig(**sizes, patch_size=16)).save_pretrained(folder / "vit")
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=16)).save_pretrained(folder / "clip")
    for name in ("vit", "clip"):
        preprocessing = dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(preprocessing))


@kind("tower_config", ["*/config.json", "*/preprocessor_config.json"], _write_tower)
def _(folder):
    for name in ("vit", "clip"):
        config = tiny_model_of(BPE)
        config.encoder, config.encoder_options, config.encoder_weights = str(folder / name), {}, "pretrained"
        script.VisionGPT2Model.from_pretrained(config)


def _write_tokenizers(folder):
    for name in ("bpe", "word"):
        (folder / name).mkdir()
        tokenizer = CaptionTokenizer.train(CAPTIONS, 300, name)
        (folder / name / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "files").mkdir()
    content = json.loads(BPE.to_json())["model"]
    (folder / "files" / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "files" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["merges"]))


@kind("tokenizer", ["*/tokenizer.json", "files/*"], _write_tokenizers)
def _(folder):
    for name in ("bpe", "word", "files"):
        tokenizer = CaptionTokenizer(folder / name)
        ids = tokenizer.encode(f"{CAPTIONS[0]} {'a' * 40}! \U0001f600")
        tokenizer.decode([*ids, *range(len(tokenizer)), 10**6])
        tokenizer.to_json()


def _write_state(folder):
    data = make_flickr(folder / "data")
    trainer = trainers_of(script, tiny_model_of(BPE), tiny_training_of(data, folder / "run"), BPE)(folder / "run")
    stop_after(trainer, 2, signal.SIGTERM)
    with suppress(Stopped):
        trainer.run_training()
    shutil.copy(folder / "run" / "last" / NEWEST, folder / NEWEST)
    shutil.rmtree(folder / "run")


@kind("state", [NEWEST], _write_state, ["run", "run/*"])
def _(folder):
    """Resumed, and trained to its end: what is taken has to be usable."""
    make = trainers_of(script, tiny_model_of(BPE), tiny_training_of(folder / "data", folder / "run"), BPE)
    make(folder / "run", resume=str(folder / NEWEST), save_minutes=1000).run_training()


def _write_token_cache(folder):
    photos = sorted((make_flickr(folder / "data") / "flickr30k_images").iterdir())[:3]
    TokenCache(folder / "cache", _model()).fill(_model(), photos)


@kind("token_cache", ["cache/*/*"], _write_token_cache, ["cache/*"])
def _(folder):
    photos = sorted((folder / "data" / "flickr30k_images").iterdir())[:3]
    for path in photos:  # the copy is newer than what the index says
        os.utime(path, ns=(0, 10**18))
    model = _model()
    cache = TokenCache(folder / "cache", model)
    if cache.folder.is_dir() and cache.rows:
        cache.batch([path for path in cache.index if path in cache])
    assert [level.shape[0] for level in cache.fill(model, photos).batch(photos)] == [3, 3]


def _write_photo_store(folder):
    photo_store.write_store(make_flickr(folder / "data", 5), folder / "store")


@kind("photo_store", ["store/*.json", "store/*.jsonl"], _write_photo_store, ["store/*"])
def _(folder):
    sources.load_usable(folder / "store", None, None, "flickr30k")
    photo_store.write_store(folder / "data", folder / "store")


def _write_shards(folder):
    writing.write_shards(make_flickr(folder / "data", 8), folder / "shards", 2)
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    shutil.copytree(folder / "shards", folder / "others")
    (folder / "others" / "manifest.json").unlink()
    reading.training_shards(folder / "others")  # counts.json
    lines = [["source", manifest["source"]], *manifest["shards"].items()]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))


def _stream(folder):
    """One epoch over the training shards in `folder`."""
    train = script.complete(tiny_training_of(folder, folder), script.train_config)
    train.batch_size, train.captions_per_image = 2, 1
    rows = sources.load_usable(folder, None, None, "flickr30k")
    dataset = script.Dataset(rows[:0], script.build_transforms(16)[0], BPE)
    loader = streaming.build_stream_loader(
        folder, dataset, lambda items: script.collate_fn(items, tokenizer=BPE), train
    )
    for number, _ in enumerate(loader):
        assert number < 1000


@kind("shard_records", ["shards/manifest.json", "others/counts.json", "progress.jsonl"], _write_shards,
      ["shards/*", "others/*", "progress.jsonl"])  # fmt: skip
def _(folder):
    for name in ("others", "shards"):
        _stream(folder / name)
    reading.find_damage(folder / "shards")
    writing.write_shards(folder / "data", folder / "shards", 2)
    (folder / "progress.jsonl").rename(folder / "shards" / "progress.jsonl")
    (folder / "shards" / "manifest.json").unlink()
    writing.write_shards(folder / "data", folder / "shards", 2)


@kind("tar", ["others/*.tar"], _write_shards, ["others/*"])
def _(folder):
    (folder / "others" / "counts.json").unlink()
    _stream(folder / "others")
    reading.find_damage(folder / "others")
    sources.load(folder / "others")


def _write_annotations(folder):
    for write in annotation_files.FORMATS:
        inner = folder / write.__name__
        inner.mkdir()
        make_flickr(folder / "photos", len(annotation_files.NAMES))
        (folder / "photos" / "flickr30k_images").rename(inner / "images")
        for path, name in zip(sorted((inner / "images").iterdir()), annotation_files.NAMES, strict=True):
            path.rename(inner / "images" / name)
        shutil.rmtree(folder / "photos")
        write(inner)
    shutil.copytree(folder / "flickr30k", folder / "split")
    parts = ("train", "train", "train", "train", "val", "test")
    records = [dict(filename=name, split=part) for name, part in zip(annotation_files.NAMES, parts, strict=True)]
    (folder / "split" / "dataset_flickr30k.json").write_text(json.dumps({"images": records}))
    (folder / "exclude.csv").write_text('image,caption\nimages/1.jpg,"caption 0 of 1.jpg"\n')


ANNOTATIONS = ["results.csv", "captions.txt", "captions.json", "*.token.txt", "annotations/*", "dataset_*.json"]
ANNOTATIONS += ["metadata.jsonl", "captions.jsonl", "captions.csv", "images/*.txt"]


@kind("annotations", [f"*/{name}" for name in ANNOTATIONS], _write_annotations)
def _(folder):
    """The one that is damaged is read by itself, so that an error in another one hides nothing."""
    damaged = (folder / "DAMAGED").read_text().split("/")[0]
    sources.load_usable(folder / damaged, None, None, "flickr30k")


def _write_lists(folder):
    data = make_flickr(folder / "data")
    names = [f"{1000 + i}.jpg" for i in range(12)]
    entries = [dict(image_id=name, caption="a dog") for name in names]
    (folder / "predictions.json").write_text(json.dumps(entries))
    exclusions.write_list(folder / "exclude.csv", [(data / "flickr30k_images" / n, CAPTIONS[0]) for n in names], data)
    (folder / "downloads").mkdir()
    (folder / "downloads" / downloads.MANIFEST_FILE).write_text(json.dumps({"finished": {"a.zip": {"a/1.jpg": 7}}}))
    shutil.copy(script.RECIPES_DIR / "flickr8k_frozen.toml", folder / "recipe.toml")


@kind("results", ["predictions.json", "exclude.csv", "recipe.toml", "downloads/*"], _write_lists)
def _(folder):
    from evaluate_captions import read_predictions

    damaged = (folder / "DAMAGED").read_text()
    data = folder / "data"
    if damaged == "predictions.json":
        photos = sorted((data / "flickr30k_images").iterdir())
        read_predictions(folder / damaged, {photo: photo.name for photo in photos})
    elif damaged == "exclude.csv":
        sources.load_usable(data, None, None, "flickr30k", exclude=str(folder / damaged))
    elif damaged == "recipe.toml":
        read_recipe(str(folder / damaged), folder, model_config=script.model_config, train_config=script.train_config)
    else:
        for files in downloads._read_manifest(folder / "downloads").values():
            downloads._is_complete(folder, files)


def _write_run(folder):
    data = make_flickr(folder / "data")
    model, train = tiny_model_of(BPE), tiny_training_of(data, folder / "run")
    trainer = trainers_of(script, model, train, BPE)(folder / "run")
    trainer.run_training()
    write_recipe(folder / "run", trainer.model.config, trainer.train_config)


@kind("run", ["run/metrics.csv", "run/timings.csv", "run/samples.md", "run/recipe.toml", "run/config.json"], _write_run,
      ["page/*"])  # fmt: skip
def _(folder):
    import compare_runs

    runs, left_out = read_runs([folder / "run"])
    for line in left_out:
        check_message(line, folder)
    if runs:
        compare_runs.main([str(folder / "run"), "--output", str(folder / "page" / "page.html")])


def _write_zip(folder):
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"a/{i}.jpg", bytes([i]) * 3000)


@kind("zip", ["photos.zip"], _write_zip, ["inside/*", "inside"])
def _(folder):
    (folder / "inside").mkdir()
    downloads.extract(folder / "photos.zip", folder / "inside", {"a/": "images/"})


# --- one input --------------------------------------------------------------------------------------------------------


def prepare(name, valid, work):
    """Write the valid files of a kind, and see that they are read as they are."""
    make, patterns, read, *_ = KINDS[name]
    valid.mkdir(parents=True)
    make(valid)
    for path in sorted(path for pattern in patterns for path in valid.glob(pattern) if path.is_file()):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(valid, work)
        (work / "DAMAGED").write_text(path.relative_to(valid).as_posix())
        read(work)


def try_input(name, number, seed, valid, work):
    """Damage a copy of the `valid` folder and read it -> (outcome, words, the file). The outcome is "read", "refused",
    or what is wrong with it."""
    _, patterns, read, writes, damage = KINDS[name]
    rng = random.Random(f"{seed} {name} {number}")
    files = sorted(path for pattern in patterns for path in valid.glob(pattern) if path.is_file())
    path = work / rng.choice(files).relative_to(valid)
    shutil.rmtree(work, ignore_errors=True)
    inner = path.relative_to(work).parts[0] if name in ALONE else "."
    shutil.copytree(valid / inner, work / inner)
    path.write_bytes(damage(path.read_bytes(), path.suffix, rng))
    (work / "DAMAGED").write_text(path.relative_to(work).as_posix())
    before, where = _listing(work, writes), path.relative_to(work).as_posix()
    _watch.clear()
    _allowed[:] = [str(work), tempfile.gettempdir(), os.devnull]
    outcome = "read", ""
    torch.manual_seed(0)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            read(work)
    except EXPECTED as error:
        outcome = "refused", str(error)
        if problem := check_message(str(error), work, path):
            outcome = problem, "".join(traceback.format_exception(error))[-3000:]
    except SystemExit as end:
        if not isinstance(end.code, (str, int, type(None))):
            raise
        outcome = "refused", str(end.code)
    except BaseException as error:
        outcome = f"{type(error).__name__}", "".join(traceback.format_exception(error))[-3000:]
    finally:
        _allowed.clear()
    if _watch:
        outcome = "touches what is none of its own", "; ".join(_watch[:5])
    after = _listing(work, writes)
    if changed := {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}:
        outcome = "changes files", ", ".join(sorted(changed)[:5])
    return *outcome, where


def check_message(message, work, path=None):
    """What is wrong with the words of an error, or None: it is short, is printable, names the folder or the file."""
    if re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", message):
        return "control characters"
    if len(message) > 3000:
        return "an endless message"
    if re.search("Traceback|MemoryError|allocate|out of memory", message):
        return "memory"
    if str(work) not in message and (path is None or path.name not in message):
        return "names no file"
    return None


def _listing(folder, writes):
    """{name: (size, hash)} of the files in a folder that are none of those that may be written."""
    return {
        name: (path.stat().st_size, hash(path.read_bytes()))
        for path in folder.rglob("*")
        if path.is_file() and not any(path.relative_to(folder).match(pattern) for pattern in _deep(writes))
        for name in [path.relative_to(folder).as_posix()]
    }


def _deep(writes):
    """Patterns for what lies below folders, too."""
    return [*writes, *(f"{pattern}/*" for pattern in writes), *(f"{pattern}/*/*" for pattern in writes)]


_watch, _allowed = [], []  # what a reader did that it must not; folders in which it may do more


def _audit(event, args):
    """Notes what is opened for writing, removed, renamed or started outside of the folder of an input."""
    if not _allowed:
        return
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "socket.connect", "socket.getaddrinfo"):
        _watch.append(f"{event} {args!r}"[:200])
    elif event == "open":
        path, _, flags = args
        if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _note(event, path)
    elif event.removeprefix("os.") in ("remove", "rename", "mkdir", "rmdir", "link", "symlink", "chmod", "truncate"):
        for path in args[:2] if args[-1] == -1 or os.path.isabs(args[0]) else ():  # else relative to an opened folder
            _note(event, path)


def _note(event, path):
    if isinstance(path, (str, bytes)):
        path = os.path.realpath(os.fsdecode(path))
        if not any(path.startswith(os.path.realpath(folder)) for folder in _allowed):
            _watch.append(f"{event} {path}"[:200])


# --- many of them, in processes that may die --------------------------------------------------------------------------


def limit_memory():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


@contextmanager
def worker(name, numbers, seed, valid, work):
    """A forked process that tries the numbers -> (its id, a pipe from which a line of JSON comes for each)."""
    ours, theirs = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(ours)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            limit_memory()
            for number in numbers:
                result = try_input(name, number, seed, valid, work)
                os.write(theirs, json.dumps([number, *result]).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        os.close(ours)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def lines_of(process, pipe):
    """Yields the lines of a pipe; None where none comes for too long; ends with the process."""
    buffer, since, used = b"", time.monotonic(), _processor_seconds(process)
    while True:
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield json.loads(line)
            since, used = time.monotonic(), _processor_seconds(process)
        if not select.select([pipe], [], [], 1)[0]:
            if time.monotonic() - since > WAIT or _processor_seconds(process) - used > SECONDS:
                yield None
                return
            continue
        if not (content := os.read(pipe, 2**20)):
            return
        buffer += content


def _processor_seconds(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def run_batch(name, first, count, seed, valid, work):
    """Try the inputs first .. first + count - 1 of a kind -> [(number, outcome, words, file)]."""
    results, end = [], first + count
    while first < end:
        with worker(name, range(first, end), seed, valid, work) as started:
            for line in lines_of(*started):
                if line is None:
                    results.append((first, "hangs", "no answer", _damaged_file(work)))
                    first += 1
                    break
                results.append(tuple(line))
                first = line[0] + 1
            else:
                if first < end:
                    results.append((first, "dies", "the process has ended", _damaged_file(work)))
                    first += 1
    return results


def _damaged_file(work):
    return (work / "DAMAGED").read_text() if (work / "DAMAGED").is_file() else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long (default: until --count)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input of each kind")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="inputs of a kind, one after the other")
    args = parser.parse_args(argv)
    sys.addaudithook(_audit)
    meteor.read_paraphrases = lambda references: {}  # which takes seconds, and is no stranger's
    sys.stdout.reconfigure(errors="backslashreplace")
    tried, findings, start = Counter(), {}, time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        tempfile.tempdir = str(root / "tmp")
        (root / "tmp").mkdir()
        valid = {name: root / "valid" / name for name in args.only}
        for name in args.only:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                prepare(name, valid[name], root / "work")
        first = args.first
        while True:
            for name in args.only:
                for number, outcome, words, where in run_batch(
                    name, first, args.count, args.seed, valid[name], root / "work"
                ):
                    tried[name, outcome if outcome in ("read", "refused") else "findings"] += 1
                    if outcome not in ("read", "refused"):
                        last = [line for line in words.strip().splitlines() if line.strip()][-1:]
                        place = re.findall(r'captioning/(\S+\.py)", line (\d+)', words)[-1:]
                        key = name, outcome, str(place)
                        if key not in findings:
                            print(f"{name} {number} ({where}): {outcome}: {last} {place}\n{words}\n", flush=True)
                        findings[key] = findings.get(key, 0) + 1
            first += args.count
            if args.minutes is None or time.monotonic() - start > 60 * args.minutes:
                break
    for name in args.only:
        print(f"{name:>14}: " + ", ".join(f"{tried[name, o]:,} {o}" for o in ("read", "refused", "findings")))
    print(f"{sum(tried.values()):,} inputs in {(time.monotonic() - start) / 60:.1f} minutes, seed {args.seed}, numbers "
          f"{args.first} to {first - 1}: {len(findings)} kinds of findings")  # fmt: skip
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
