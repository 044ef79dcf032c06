"""Checkpoints as other training loops write them, and configurations that do not fit their weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import caption_image
import web_demo
from captioning.common.files import CONFIG_FILE, TORCH_FILE, WEIGHTS_FILE
from captioning.model import checkpoint, loading


@pytest.fixture
def folder(tiny_model, bpe, tmp_path):
    tiny_model.save_pretrained(tmp_path / "captioner", bpe)
    return tmp_path / "captioner"


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def wrapped(weights, *prefixes):
    for prefix in prefixes:
        weights = {prefix + name: tensor.clone() for name, tensor in weights.items()}
    return weights


@pytest.mark.parametrize("name", [WEIGHTS_FILE, TORCH_FILE])
@pytest.mark.parametrize(
    "prefixes", [(), ("module.",), ("_orig_mod.",), ("_orig_mod.", "module."), ("module.", "_orig_mod.")]
)
def test_prefixes_are_left_out(script, tiny_model, folder, name, prefixes):
    (folder / WEIGHTS_FILE).unlink()
    weights = wrapped(tiny_model.state_dict(), *prefixes)
    save_file(weights, folder / name) if name == WEIGHTS_FILE else torch.save(weights, folder / name)
    assert equal(script.load_captioner(folder)[0], tiny_model)
    assert checkpoint.read_shapes(folder / name) == {k: tuple(v.shape) for k, v in tiny_model.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3},
        lambda weights: {"state_dict": wrapped(weights, "module.")},
        lambda weights: {"model_state_dict": weights},
        lambda weights: {
            "epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": wrapped(weights, "model."), "loops": {},
            "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "hyper_parameters": {"lr": 0.1},
        },
    ],
)  # fmt: skip
def test_a_state_dict_beside_other_things(script, make_trainer, tiny_model, folder, tmp_path, wrap, capsys):
    """By `load_captioner`, `load_best_model`, caption_image.py and --start_from."""
    (folder / WEIGHTS_FILE).unlink()
    torch.save(wrap(tiny_model.state_dict()), folder / TORCH_FILE)
    assert equal(script.load_captioner(folder)[0], tiny_model)
    trainer = make_trainer(tmp_path / "run")
    for path in (folder, folder / TORCH_FILE):
        trainer.load_best_model(path)
        assert equal(trainer.model, tiny_model) and equal(trainer.eval_model, tiny_model)
    shutil.copy(script.REPO_ROOT / "examples" / "shapes" / "scene_1.png", tmp_path / "photo.png")
    caption_image.main([str(tmp_path / "photo.png"), "--checkpoint", str(folder)])
    assert f"{tmp_path / 'photo.png'}: " in capsys.readouterr().out
    config, _ = script.complete_configs(model={"start_from": str(folder)})
    assert equal(script.VisionGPT2Model.from_pretrained(config), tiny_model)
    assert web_demo.find_captioners(tmp_path) == {"captioner": folder}


def test_what_is_left_is_strict(script, tiny_model, folder):
    weights = wrapped(tiny_model.state_dict(), "module.")
    weights["stranger"] = torch.zeros(1)
    save_file(weights, folder / WEIGHTS_FILE)  # a prefix that not all names have is none
    with pytest.raises(ValueError, match=r"does not fit the model:\n.*: missing\n(.*\n)*.*: unknown\n  and \d+ more"):
        script.load_captioner(folder)
    (folder / WEIGHTS_FILE).unlink()
    for content in ({"state_dict": [1, 2]}, [torch.zeros(1)], {"a": {"b": torch.zeros(1)}}):
        torch.save(content, folder / TORCH_FILE)
        with pytest.raises(ValueError, match=r"captioner\.pt: .*holds no state_dict"):
            script.load_captioner(folder)
    (folder / TORCH_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"captioner\.safetensors: not found"):
        script.load_captioner(folder)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "depth", 3, "depth is 3, but the weights beside it have 2;"),
        (None, "depth", 10**6, "depth is 1000000, but the weights beside it have 2;"),
        (None, "vocab_size", 10**12, "vocab_size is 1000000000000, but the weights beside it have 300;"),
        (None, "embed_dim", 64, "embed_dim is 64, but the weights beside it have 32;"),
        (None, "seq_len", 10**9, "seq_len is 1000000000, but the weights beside it have 24;"),
        ("encoder_options", "depth", 10**5, "encoder_options: depth is 100000, but the weights beside it have 2;"),
        ("encoder_options", "norm_eps", [1, 2], "encoder_options: norm_eps is [1, 2], but must be a number from 0"),
        (None, "unk_token_id", 10**9, "unk_token_id is 1000000000, but there are 300 tokens;"),
        ("encoder_options", "embed_dim", 48, "encoder_options: embed_dim is 48, but the weights beside it have 24;"),
        ("encoder_options", "img_size", 10**5, "encoder_options: img_size is 100000, but the weights beside it are "),
        ("refiner", "layers", 10**6, "refiner: layers is 1000000, but the weights beside it are "),
        (None, "feature_levels", 10**7, "feature_levels is 10000000, but the weights beside it are "),
    ],
)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(
    script, folder, monkeypatch, section, key, value, message
):
    config = json.loads((folder / CONFIG_FILE).read_text())
    values = config["model_config"].setdefault(section, {}) if section else config["model_config"]
    values[key] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    monkeypatch.setattr(script.VisionGPT2Model, "__init__", lambda *args, **options: pytest.fail("it was built"))
    monkeypatch.setattr(checkpoint, "load_file", lambda path: pytest.fail("its weights were read"))
    for load in (
        lambda: script.load_captioner(folder),
        lambda: script.complete_configs(model={"start_from": str(folder)}),
    ):
        with pytest.raises(ValueError) as refused:
            load()
        assert str(refused.value).startswith(f"{folder / CONFIG_FILE}: {message}")


def test_sizes_of_a_hugging_face_captioner(script, tiny_config, bpe, tmp_path):
    tiny_config.coupling = "final"
    script.VisionGPT2Model(tiny_config).export_to_transformers(tmp_path, bpe)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for part, key, message in (
        ("decoder", "n_layer", "depth is"),
        ("encoder", "num_hidden_layers", "encoder_options: depth is"),
    ):
        changed = config | {part: config[part] | {key: 10**5}}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{message} 100000, but the weights beside it have 2;"):
            script.load_captioner(tmp_path)


def test_a_captioner_that_fits_is_not_refused(script, folder):
    for fits in (folder, script.REPO_ROOT / "examples" / "shapes"):
        loading.check_stored_sizes(script.stored_config(fits)[1], fits)
