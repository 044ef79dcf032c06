"""Constants: typed, named, in their range, and checked before anything is loaded or written."""

import copy
import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from captioning.command_line import checks
from captioning.command_line.recipes import read_recipe, write_recipe
from captioning.common.config import complete
from captioning.data.downloads import DATASETS
from captioning.training.trackers import TRACKERS

# What a user types, and the one line it ends with.
REFUSED = [
    ("--lr -1", "lr is -1.0, but must be finite and above 0"),
    ("--lr 0", "lr is 0.0, but must be finite and above 0"),
    ("--lr nan", "lr is nan, but must be finite and above 0"),
    ("--lr inf", "lr is inf, but must be finite and above 0"),
    ("--scst_lr 0", "scst_lr is 0.0, but must be finite and above 0"),
    ("--weight_decay -1", "weight_decay is -1.0, but must be finite and at least 0"),
    ("--clip_norm -1", "clip_norm is -1.0, but must be above 0"),
    ("--clip_norm 0", "clip_norm is 0.0, but must be above 0"),
    ("--label_smoothing 2", "label_smoothing is 2.0, but must be at least 0 and below 1"),
    ("--ema_decay 1.5", "ema_decay is 1.5, but must be at least 0 and below 1"),
    ("--ema_decay 1", "ema_decay is 1.0, but must be at least 0 and below 1"),
    ("--warmup_share 1", "warmup_share is 1.0, but must be at least 0 and below 1"),
    ("--emb_dropout 1", "emb_dropout is 1.0, but must be at least 0 and below 1"),
    ("--attention_dropout -0.1", "attention_dropout is -0.1, but must be at least 0 and below 1"),
    ("--mlp_dropout 1.5", "mlp_dropout is 1.5, but must be at least 0 and below 1"),
    ("--residual_dropout nan", "residual_dropout is nan, but must be at least 0 and below 1"),
    ("--pretrained_lr_scale -1", "pretrained_lr_scale is -1.0, but must be finite and at least 0"),
    ("--crop_scale 3", "crop_scale is 3.0, but must be above 0 and at most 1"),
    ("--crop_scale 0", "crop_scale is 0.0, but must be above 0 and at most 1"),
    ("--max_bad_steps 0", "max_bad_steps is 0, but must be at least 1"),
    ("--max_bad_images -1", "max_bad_images is -1, but must be at least 0"),
    ("--save_minutes -1", "save_minutes is -1.0, but must be at least 0"),
    ("--shapes_scenes 0", "shapes_scenes is 0, but must be at least 1"),
    ("--activation swish", "activation is 'swish', but must be one of 'gelu', 'relu'"),
    ("--positions rotary", "positions is 'rotary', but must be one of 'learned', 'sinusoidal'"),
    ("--coupling loose", "coupling is 'loose', but must be one of 'stepped', 'final'"),
    ("--caption_case upper", "caption_case is 'upper', but must be one of 'lower', 'lower_turkish', 'keep'"),
    ("--tokenizer char", "tokenizer is 'char', but must be one of 'gpt2', 'bpe', 'word', 'character'"),
    ("--score_tokens letters", "score_tokens is 'letters', but must be one of 'words', 'characters'"),
    ("--precision fp8", "precision is 'fp8', but must be one of 'auto', 'float32', 'bf16'"),
    ("--best_by BLEU", "best_by is 'BLEU', but must be one of 'perplexity', 'CIDEr'"),
    ("--scst_bleu -0.5", "scst_bleu is -0.5, but must be at least 0"),
    ("--scst_draws greedy", "scst_draws is 'greedy', but must be one of 'sample', 'beam'"),
    ("--scst_baseline best", "scst_baseline is 'best', but must be one of 'mean', 'greedy'"),
    ("--tracker wandbb", "tracker is 'wandbb', but must be one of 'none', 'tensorboard', 'wandb', 'trackio'"),
    ("--dataset flickr", "dataset is 'flickr', but must be one of 'flickr8k', 'flickr30k', 'coco2017'"),
    ("--batch_size 0", "batch_size is 0, but must be at least 1"),
    ("--batch_size -4", "batch_size is -4, but must be at least 1"),
    ("--batch_size 7 --captions_per_image 5", "batch_size is 7; it counts captions and must be a multiple of "
     "captions_per_image 5, for example 5"),
    ("--accumulate 0", "accumulate is 0, but must be at least 1"),
    ("--captions_per_image 0", "captions_per_image is 0, but must be at least 1"),
    ("--length_window 0", "length_window is 0, but must be at least 1"),
    ("--shuffle_buffer 0", "shuffle_buffer is 0, but must be at least 1"),
    ("--cache_views 0", "cache_views is 0, but must be at least 1"),
    ("--num_workers -1", "num_workers is -1, but must be at least 0"),
    ("--depth 0", "depth is 0, but must be at least 1"),
    ("--embed_dim 0", "embed_dim is 0, but must be at least 1"),
    ("--num_heads 0", "num_heads is 0, but must be at least 1"),
    ("--embed_dim 100", "embed_dim is 100, but must be a multiple of num_heads 12: each head gets an equal part of "
     "the channels"),
    ("--seq_len 2", "seq_len is 2, but must be at least 3"),
    ("--vocab_size 1", "vocab_size is 1, but must be at least 2"),
    ("--eos_token_id -1", "eos_token_id is -1, but must be at least 0"),
    ("--trainable_stages -2", "trainable_stages is -2, but must be at least -1"),
    ("--feature_levels 0", "feature_levels is 0, but must be at least 1"),
    ("--device tpu", "device is 'tpu', but must be cpu, cuda, cuda:N or mps"),
    ("--device meta", "device is 'meta', but must be cpu, cuda, cuda:N or mps"),
    ("--seed -1", "seed is -1, but must be at least 0 and at most 18446744073709551615"),
    ("--epochs -1", "epochs is -1, but must be at least 0"),
    ("--epochs 0", "epochs is 0 and scst_epochs is 0: there is nothing to train"),
    ("--freeze_epochs_gpt -1", "freeze_epochs_gpt is -1, but must be at least 0"),
    ("--freeze_epochs_all -1", "freeze_epochs_all is -1, but must be at least 0"),
    ("--score_every -1", "score_every is -1, but must be at least 0"),
    ("--score_images -1", "score_images is -1, but must be at least 0"),
    ("--demo_images -1", "demo_images is -1, but must be at least 0"),
    ("--log_steps 0", "log_steps is 0, but must be at least 1"),
    ("--scst_epochs -1", "scst_epochs is -1, but must be at least 0"),
    ("--scst_samples 0", "scst_samples is 0, but must be at least 1"),
    ("--scst_epochs 1 --scst_samples 1", "scst_samples is 1, but must be at least 2: a beam, and the mean of a photo's "
     "other draws, need more than one"),
    ("--scst_epochs 1 --score_every 2", "score_every is 2, but must be 1: scst_epochs needs CIDEr every epoch"),
    ("--best_by CIDEr --score_images 0", "score_images is 0, but must be at least 1: best_by CIDEr needs CIDEr"),
    ("--encoder= ", "encoder is '', but must be a name or a path"),
    ("--decoder_weights=", "decoder_weights is '', but must be a name or a path"),
    ("--encoder vit_base_patch16_225", "timm has no model 'vit_base_patch16_225'"),
]  # fmt: skip


@pytest.fixture
def folder(script, flickr, tmp_path, monkeypatch):
    """A run in it would train on a small dataset; the data folder of the repository is not touched."""
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "no_data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script, folder, *argv):
    own = ["--data_dir", str(folder / "data"), "--model_path", str(folder / "captioner"), "--device", "cpu"]
    script.main([*own, "--tokenizer", "bpe", "--encoder_weights", "scratch", "--decoder_weights", "scratch", *argv])


@pytest.mark.parametrize(("argv", "message"), REFUSED)
def test_a_bad_value_is_named_before_anything_is_written(script, folder, capsys, argv, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError) as refused:
        run(script, folder, *argv.split())
    said = str(refused.value)
    assert said == message if "timm" not in message else said.startswith(message)
    assert "\n" not in said
    assert sorted(folder.rglob("*")) == before
    assert "training on" not in capsys.readouterr().out


def test_nothing_is_announced_in_front_of_an_error(script, folder, monkeypatch, capsys):
    """Without a dataset the run would be one on Shapes, which is said when it begins."""
    monkeypatch.setattr(script.train_config, "data_dir", folder / "no_data")
    with pytest.raises(ValueError, match="lr is -1"):
        script.read_configs(["--lr", "-1"])
    assert capsys.readouterr().out == ""
    script.read_configs([])
    assert "training on the built-in Shapes instead" in capsys.readouterr().out


def test_an_unknown_encoder_is_an_error_before_data_is_rendered(script, folder):
    with pytest.raises(
        ValueError, match=r"timm has no model 'vit_base_patch16_225'; did you mean vit_base_patch16_224,"
    ):
        script.main(["--recipe", "shapes", "--encoder", "vit_base_patch16_225", "--model_path", str(folder / "out")])
    assert not (folder / "no_data").exists() and not (folder / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(script, folder):
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device is '{device}', but no CUDA GPU is here; give --device cpu"):
            run(script, folder, "--device", device)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (1, "cuda:1", "device is 'cuda:1', but 1 CUDA GPU is here; give --device cpu, or cuda:0"),
        (2, "cuda:2", "device is 'cuda:2', but 2 CUDA GPUs are here; give --device cpu, or cuda:0"),
    ],
)
def test_more_gpus_than_there_are(monkeypatch, count, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    checks.check_device(f"cuda:{count - 1}")
    checks.check_device("cuda")
    with pytest.raises(ValueError) as refused:
        checks.check_device(device)
    assert str(refused.value) == message


@pytest.mark.parametrize("argv", ["--lr fast", "--epochs 2.5", "--compile yes", "--encoder_options [1]", "--depth"])
def test_a_value_of_another_type_is_named(script, folder, capsys, argv):
    with pytest.raises(SystemExit) as ended:
        run(script, folder, *argv.split())
    assert ended.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_every_constant_is_checked_or_free(script):
    """A new constant has to be put into a table, or into this list."""
    free = {
        "post_norm", "normalize_tokens", "encoder_options", "refiner", "preprocessing", "start_from", "cache_tokens",
        "gradient_checkpointing", "compile", "device", "image_dir",
        "captions_file", "exclude", "unescape_captions", "keep_epoch_checkpoints", "push_every_epoch", "resume",
        "deterministic",
    }  # fmt: skip
    for config, table in ((script.model_config, checks.MODEL), (script.train_config, checks.TRAIN)):
        names = {field.name for field in dataclasses.fields(config)}
        assert table.keys() <= names
        assert names - table.keys() <= free, "neither checked nor free"
    assert set(checks.TRAIN["dataset"]) == set(DATASETS)
    assert set(checks.TRAIN["tracker"]) == set(TRACKERS)


# --- from Python ------------------------------------------------------------------------------------------------------


def test_an_unknown_constant_is_refused_with_the_nearest_name(script):
    with pytest.raises(ValueError, match=r"^ModelConfig has no dept; did you mean depth\?$"):
        script.VisionGPT2Model(SimpleNamespace(dept=2))
    with pytest.raises(ValueError, match=r"^TrainConfig has no epoch; did you mean epochs\?$"):
        script.complete_configs(train=SimpleNamespace(epoch=2))
    with pytest.raises(AttributeError, match=r"ModelConfig has no embed_dims; did you mean embed_dim\?"):
        script.ModelConfig().embed_dims = 3
    with pytest.raises(TypeError, match=r"TrainConfig has no batchsize; did you mean batch_size\?"):
        script.TrainConfig(batchsize=3)
    with pytest.raises(AttributeError, match=r"TrainConfig has no xyz$"):
        script.train_config.xyz = 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(depth="2"), "depth is '2', but must be of type int"),
        (dict(depth=2.5), "depth is 2.5, but must be of type int"),
        (dict(depth=True), "depth is True, but must be of type int"),
        (dict(depth=float("nan")), "depth is nan, but must be of type int"),
        (dict(emb_dropout="none"), "emb_dropout is 'none', but must be of type float"),
        (dict(post_norm=1), "post_norm is 1, but must be of type bool"),
        (dict(encoder=None), "encoder is '', but must be a name or a path"),
        (dict(encoder=["vit"]), "encoder is ['vit'], but must be of type str"),
        (dict(encoder_options=[("img_size", 48)]), "encoder_options is [('img_size', 48)], but must be of type dict"),
        (dict(depth=0), "depth is 0, but must be at least 1"),
    ],
)
def test_a_wrong_type_is_refused(script, given, message):
    with pytest.raises(ValueError) as refused:
        script.complete_configs(model=SimpleNamespace(**given))
    assert str(refused.value) == message


def test_defaults_that_a_user_edited_are_checked_where_they_are_used(script, tiny_config, monkeypatch):
    """Those of training only where there is training: a tool that captions does not stumble over them."""
    monkeypatch.setattr(script.train_config, "lr", "1e-4")
    with pytest.raises(ValueError, match="lr is '1e-4', but must be of type float"):
        script.complete_configs(train=SimpleNamespace(epochs=1))
    script.VisionGPT2Model(tiny_config)
    monkeypatch.setattr(script.train_config, "lr", 1e-4)
    monkeypatch.setattr(script.train_config, "model_path", "runs/x")
    assert script.complete_configs(train=SimpleNamespace(epochs=1))[1].model_path == Path("runs/x")
    with pytest.raises(ValueError, match="model_path is None, but must be a path"):
        script.complete_configs(train=SimpleNamespace(model_path=None))


def test_what_a_run_reads_it_writes(script, tmp_path):
    """recipe.toml of a run without clipping is TOML, too, and a completed config shares no dict with the defaults."""
    model, train = script.complete_configs({}, {"clip_norm": float("inf"), "save_minutes": float("inf")})
    write_recipe(tmp_path, model, train)
    sections = dict(model_config=script.model_config, train_config=script.train_config)
    stored = read_recipe(tmp_path / "recipe.toml", None, **sections)
    assert stored["train_config"]["clip_norm"] == stored["train_config"]["save_minutes"] == float("inf")
    model.encoder_options["img_size"] = 48
    assert script.model_config.encoder_options == {}


def test_configs_are_completed_and_left_as_they_are(script):
    given = SimpleNamespace(lr=1, data_dir="data", captions_file=Path("captions.json"), device=torch.device("cpu"))
    before = copy.copy(given)
    _, config = script.complete_configs(train=given)
    assert vars(given) == vars(before)
    assert (config.lr, type(config.lr)) == (1.0, float)
    assert config.data_dir == Path("data") and config.captions_file == "captions.json" and config.device == "cpu"
    assert config.epochs == script.train_config.epochs
    assert complete(config, script.train_config) == config
    assert complete({"depth": 3}, script.model_config).depth == 3
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def test_a_model_leaves_the_given_config_as_it_is(script, tiny_config):
    config = script.complete(tiny_config, script.model_config)
    before = copy.deepcopy(config)
    model = script.VisionGPT2Model(config)
    assert config == before
    assert model.config is not config and model.config.depth == config.depth
