"""Recipes: each trains through the real `main` at reduced size, saves, reloads and captions; bad ones are named."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from captioning.command_line.recipes import read_recipe
from captioning.data import built_in
from conftest import REPO_ROOT, TINY_ENCODER, make_flickr

RECIPES = {path.stem: path for path in (REPO_ROOT / "recipes").glob("*.toml")}
SMALL = dict(
    embed_dim=32, num_heads=2, depth=2, seq_len=24, epochs=2, batch_size=10, captions_per_image=1, num_workers=0,
    device="cpu", demo_images=2, shapes_scenes=24,
)  # fmt: skip
SMALL_ENCODER = {
    "shapes": dict(encoder_options={**TINY_ENCODER, "weight_init": "jax"}),
    "vqa_shapes": dict(encoder_options={**TINY_ENCODER, "weight_init": "jax"}),
    "vit_gpt2_flickr30k": dict(encoder="vit_tiny_patch16_224", encoder_options=TINY_ENCODER),
    "vit_gpt2_coco": dict(encoder="vit_tiny_patch16_224", encoder_options=TINY_ENCODER),
    "resnet_transformer": dict(
        encoder="resnet10t", encoder_options=dict(img_size=64), refiner=dict(width=32, grid=2, heads=2)
    ),
    "flickr8k_frozen": dict(encoder_options=dict(img_size=64)),
    "flickr8k_tuned": dict(encoder_options=dict(img_size=64), freeze_epochs_all=1),
}


def words(changes):
    """{constant: value} as command line."""
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in changes.items()]


@pytest.fixture
def local_weights(script, bpe, tmp_path, monkeypatch):
    """What the recipes would download, at tiny size: GPT-2, a CLIP tower, weights of timm models."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "weights"
    sizes = dict(n_embd=32, n_head=2, n_layer=2, n_positions=24, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe), **sizes)).save_pretrained(folder / "gpt2")
    bpe.backend.model.save(str(folder / "gpt2"))
    monkeypatch.setattr(script, "HF_GPT2_REPO", str(folder / "gpt2"))
    monkeypatch.setattr(script, "tokenizer", script.CaptionTokenizer(folder / "gpt2"))
    clip = dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=16
    )
    CLIPVisionModel(CLIPVisionConfig(**clip)).save_pretrained(folder / "clip")

    def weights_of(name, options):
        options = {key: value for key, value in options.items() if key != "img_size" or "vit" in name}
        save_file(timm.create_model(name, **options).state_dict(), folder / f"{name}.safetensors")
        return str(folder / f"{name}.safetensors")

    return folder, weights_of


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_saves_reloads_and_captions(script, name, local_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "data")
    data = make_flickr(tmp_path / "flickr")
    recipe = read_recipe(
        name, REPO_ROOT / "recipes", model_config=script.model_config, train_config=script.train_config
    )
    changes = SMALL | dict(model_path=tmp_path / "out", cache_dir=tmp_path / "cache") | SMALL_ENCODER.get(name, {})
    if name not in built_in.BUILT_IN:
        changes["data_dir"] = data
    folder, weights_of = local_weights
    if name == "flickr8k_frozen_scst":  # goes on from what the other recipe trains
        sizes = changes | SMALL_ENCODER["flickr8k_frozen"]
        sizes |= dict(model_path=tmp_path / "first", epochs=1, encoder_weights=weights_of("tf_efficientnet_lite0", {}))
        script.main(["--recipe", "flickr8k_frozen", *words(sizes)])
        changes = {key: value for key, value in changes.items() if key in vars(script.train_config)}
        changes |= dict(start_from=tmp_path / "first", epochs=0, scst_epochs=2)
    elif name == "clip_scratch_decoder":
        changes["encoder"] = folder / "clip"
    elif recipe["model_config"].get("encoder_weights") != "scratch":
        encoder = changes.get("encoder", recipe["model_config"].get("encoder"))
        changes["encoder_weights"] = weights_of(encoder, changes["encoder_options"])
    if recipe["model_config"].get("decoder_weights", "scratch" if "start_from" in changes else "") != "scratch":
        changes["vocab_size"] = 300
    result = script.main(["--recipe", name, *words(changes)])
    assert result["best_perplexity"] > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in {**recipe["model_config"], **recipe["train_config"]}.items():
        if key not in changes and key not in ("vocab_size", "encoder"):
            assert (config["model_config"] | config["train_config"])[key] == value
    if recipe["train_config"].get("keep_epoch_checkpoints"):
        kept = sorted((tmp_path / "out" / "epochs").iterdir())
        assert [path.name[:14] for path in kept] == ["epoch_01_loss_", "epoch_02_loss_"]
        assert load_file(kept[0]).keys() == load_file(tmp_path / "out" / "captioner.safetensors").keys()
    model, tokenizer = script.load_captioner(tmp_path / "out")
    photos = tmp_path / "data" / name / "images" if name in built_in.BUILT_IN else data / "flickr30k_images"
    photo = next(photos.iterdir())
    assert isinstance(script.caption_images(model, tokenizer, [photo])[0], str)
    # What was printed and saved as recipe.toml gives the same run again.
    saved = read_recipe(
        tmp_path / "out" / "recipe.toml", None, model_config=script.model_config, train_config=script.train_config
    )
    again = SimpleNamespace(**{**vars(script.model_config), **saved["model_config"]})
    assert vars(again) == vars(script.complete_configs(model=model.config)[0]) | dict(
        preprocessing=again.preprocessing, encoder_weights=again.encoder_weights, start_from=again.start_from
    )
    assert "model_config" in capsys.readouterr().out


def test_every_recipe_says_how_long_it_takes():
    """Its header: the command, and time, memory and score, measured or said not to be."""
    assert RECIPES.keys() >= {
        "shapes", "flickr8k_frozen", "flickr8k_frozen_scst", "vqa_shapes", "vit_gpt2_flickr30k", "vit_gpt2_coco",
        "clip_scratch_decoder", "resnet_transformer", "flickr8k_tuned",
    }  # fmt: skip
    for name, path in RECIPES.items():
        header = path.read_text().split("\n\n")[0]
        comment = "\n".join(line for line in header.splitlines() if line.startswith("#"))
        assert f"--recipe {name}" in comment
        for word in ("time", "memory", "score"):
            assert word in comment, f"{name}: {word}"


def test_the_command_line_wins_over_the_recipe(script, tmp_path):
    (tmp_path / "mine.toml").write_text('epochs = 3\nlr = 1\ndepth = 4\ndata_dir = "data/elsewhere"\n')
    model_cfg, train_cfg, _ = script.read_configs(["--recipe", str(tmp_path / "mine.toml"), "--epochs", "7"])
    assert (train_cfg.epochs, train_cfg.lr, model_cfg.depth) == (7, 1.0, 4)
    assert isinstance(train_cfg.lr, float)
    assert train_cfg.data_dir == REPO_ROOT / "data" / "elsewhere"  # seen from the repository's root


def test_a_recipe_that_starts_from_a_captioner(script, tmp_path):
    """Its constants count on top of the captioner's, those of the command line on top of both."""
    start = REPO_ROOT / "examples" / "shapes"
    (tmp_path / "mine.toml").write_text(f'start_from = "{start}"\nemb_dropout = 0.5\nmlp_dropout = 0.5\n')
    model_cfg, _, _ = script.read_configs(["--recipe", str(tmp_path / "mine.toml"), "--mlp_dropout", "0.2"])
    assert (model_cfg.emb_dropout, model_cfg.mlp_dropout, model_cfg.embed_dim) == (0.5, 0.2, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"mine\.toml: unknown constant epoch; did you mean epochs\?"),
        ("epochs = 3.5", r"mine\.toml: epochs is 3\.5, but must be of type int"),
        ("epochs = true", r"mine\.toml: epochs is True, but must be of type int"),
        ("lr = 'fast'", r"mine\.toml: lr is 'fast', but must be of type float"),
        ("epochs = = 3", r"mine\.toml: not a TOML file"),
    ],
)
def test_bad_recipes_are_named(script, tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        script.read_configs(["--recipe", str(tmp_path / "mine.toml")])


def test_unknown_recipe(script):
    with pytest.raises(
        FileNotFoundError, match=r"flickr\.toml: no such recipe; there are clip_scratch_decoder, flickr8k_frozen,"
    ):
        script.read_configs(["--recipe", "flickr"])


def test_a_recipe_without_its_data_prints_the_command(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py flickr8k --to .*nowhere"):
        script.main(["--recipe", "flickr8k_frozen", "--data_dir", str(tmp_path / "nowhere")])


def test_download_fetches_what_the_recipe_names(script, tmp_path, monkeypatch):
    from captioning.data import downloads

    fetched = []
    monkeypatch.setattr(downloads, "fetch_dataset", lambda name, folder: fetched.append((name, folder)))
    with pytest.raises(FileNotFoundError):
        script.main(["--recipe", "flickr8k_frozen", "--download", "--data_dir", str(tmp_path / "new")])
    assert fetched == [("flickr8k", tmp_path / "new")]


def test_answers_about_shapes_are_checked(script, tmp_path, capsys):
    """A perfect answerer gets 100%, one that always says yes only those questions; the questions have one answer."""
    import random

    from captioning.data import shapes

    scene = (("large", "red", "circle"), ("large", "red", "square"))
    asked = dict(shapes.questions(random.Random(0), scene))
    assert asked["what is above the large red square ?"] == "large red circle"
    assert asked["what colour is the large circle ?"] == "red"
    assert "what shape is the large red thing ?" not in asked  # there are two of them
    assert sorted(answer for question, answer in asked.items() if question.startswith("is there")) == ["no", "yes"]

    shapes.write_questions(tmp_path / "vqa", 24)
    truth = {}
    for held_out in (False, True):
        for path, scene in zip(*shapes.read_scenes(tmp_path / "vqa", held_out), strict=True):
            truth[path] = scene

    def perfect(paths, prompt):
        answers = []
        for path, question in zip(paths, prompt, strict=True):
            known = {}
            for seed in range(60):  # yes/no questions are drawn
                known |= dict(shapes.questions(random.Random(seed), truth[path]))
            answers.append(known.get(question, "?"))
        return answers

    scores = shapes.score_answers(perfect, tmp_path / "vqa")
    assert scores["unseen scenes"] > 0.95
    assert scores["images shuffled among questions"] < 0.6
    assert shapes.score_answers(lambda paths, prompt: ["yes"] * len(paths), tmp_path / "vqa")["unseen scenes"] < 0.2
    assert "is there" in capsys.readouterr().out


def test_a_run_is_repeated_by_its_recipe(script, flickr, tmp_path, capsys):
    """recipe.toml of a run trains the same model again, bit for bit, and from the beginning."""
    small = [f"--{key}={value}" for key, value in (SMALL | dict(epochs=1)).items()]
    small += ["--tokenizer=word", "--decoder_weights=scratch", "--encoder_weights=scratch"]
    small += ["--encoder=vit_tiny_patch16_224", f"--encoder_options={json.dumps(TINY_ENCODER)}"]
    script.main([*small, "--data_dir", str(flickr), "--model_path", str(tmp_path / "a"), "--resume", "auto"])
    said = capsys.readouterr().out  # there was nothing to resume, which is said where the training starts, too
    assert said.rindex("training starts from the beginning") > said.rindex("# train_config")
    script.main(["--recipe", str(tmp_path / "a" / "recipe.toml"), "--model_path", str(tmp_path / "b")])
    assert "resume" not in capsys.readouterr().out.replace('resume = ""', "")
    first, second = (load_file(tmp_path / name / "captioner.safetensors") for name in "ab")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
