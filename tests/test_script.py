"""The script as a user runs it: command line, whole runs on tiny data, messages."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from conftest import REPO_ROOT, TINY_ENCODER, make_flickr, script_module
from helpers.runs import TINY

SCRIPT = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "MyLLM_Vit_gpt2_captioning.py"


@pytest.fixture(autouse=True)
def nothing_in_the_repository(script, monkeypatch, tmp_path):
    """Default folders under tmp_path, so that a developer's own data/ and captioner/ are neither read nor written."""
    monkeypatch.setattr(script, "DATA_DIR", tmp_path / "no_data")
    monkeypatch.setattr(script.train_config, "data_dir", tmp_path / "no_data")
    monkeypatch.setattr(script.train_config, "model_path", tmp_path / "captioner")
    (tmp_path / "no_data").mkdir()


# --- command line -----------------------------------------------------------------------------------------------------


def configs(script, flickr, *argv):
    return script.read_configs(["--data_dir", str(flickr), *argv])[:2]


def test_overrides_are_typed(script, flickr):
    model_cfg, train_cfg = configs(
        script, flickr, "--depth", "6", "--lr=2e-4", "--batch-size", "8", "--normalize_tokens", "true",
        "--encoder_options", '{"img_size": 48}', "--model-path", "somewhere",
    )  # fmt: skip
    assert (model_cfg.depth, train_cfg.lr, train_cfg.batch_size) == (6, 2e-4, 8)
    assert model_cfg.normalize_tokens is True
    assert model_cfg.encoder_options == {"img_size": 48}
    assert train_cfg.model_path == Path("somewhere")
    assert train_cfg.image_dir is None  # looked for beside the captions
    assert script.model_config.depth == 12  # the constants themselves are untouched


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--freeze_epoch_gpt", "2"], "unknown option --freeze_epoch_gpt; did you mean --freeze_epochs_gpt?"),
        (["--zzz", "2"], "unknown option --zzz; see --help"),
        (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--normalize_tokens", "maybe"], "argument --normalize_tokens: invalid true or false value: 'maybe'"),
        (["--encoder_options", "[1]"], "argument --encoder_options: invalid JSON object value: '[1]'"),
    ],
)
def test_bad_overrides_are_refused(script, flickr, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        configs(script, flickr, *argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_another_encoder_than_the_recipes_brings_its_own_options(script):
    """Without a dataset the recipe is Shapes', with a tiny ViT from scratch; an encoder asked for is not that one."""
    model_cfg, _, _ = script.read_configs(["--encoder", "resnet50"])
    assert (model_cfg.encoder, model_cfg.encoder_weights, model_cfg.encoder_options) == ("resnet50", "pretrained", {})
    assert model_cfg.decoder_weights == "scratch"


def test_help_shows_every_constant_with_comment_and_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section in (script.model_config, script.train_config):
        for key in vars(section):
            # the key, its type, a comment of at least a word, its default
            assert re.search(rf"--{key} \w+ [^-(]\S+ .*?\(default: ", shown), key
    assert "--freeze_epochs_gpt int epochs before the pretrained GPT-2 blocks train too (default: 1)" in shown


def test_importing_the_script_uses_no_network():
    """A tokenizer would be downloaded."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): sys.exit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import MyLLM_Vit_gpt2_captioning\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The script on twelve photos -> (its folder, what `main` gives back, what it printed)."""
    folder = tmp_path_factory.mktemp("whole_run")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = script_module.main(
            ["--data_dir", str(make_flickr(folder / "data")), "--model_path", str(folder / "captioner"), *TINY]
        )
    return folder / "captioner", result, said.getvalue()


def test_training_needs_neither_albumentations_nor_opencv(flickr, tmp_path):
    """Both are only for pipelines that a user makes; a broken installation of them stops nothing."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('albumentations', 'albucore', 'cv2'))  # None: importing it is an error\n"
        "import MyLLM_Vit_gpt2_captioning as script\n"
        "script.main(sys.argv[1:])\n"
    )
    options = ["--data_dir", str(flickr), "--model_path", str(tmp_path / "captioner"), *TINY, "--epochs", "1"]
    options += ["--score_every", "0", "--demo_images", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "captioner" / "captioner.safetensors").is_file()


def test_whole_script_on_twelve_photos(whole_run):
    output, result, said = whole_run
    assert set(result) == {"best_perplexity", "best_epoch"}
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock", "captioner.pt", "captioner.safetensors", "cider.png", "config.json", "demo.png", "last",
        "loss.png", "metrics.csv", "perplexity.png", "recipe.toml", "report.html", "samples.md", "timings.csv",
        "tokenizer.json",
    ]  # fmt: skip
    table = pd.read_csv(output / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2]
    assert table["valid_perplexity"].min() == pytest.approx(result["best_perplexity"])
    for name in ("loss.png", "perplexity.png", "demo.png"):
        with Image.open(output / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
    assert "train: 8 photos" in said
    assert said.count("generated:") == 2


def test_an_earlier_run_is_moved_aside(script, flickr, tmp_path, capsys):
    argv = ["--data_dir", str(flickr), *TINY, "--epochs", "1"]
    script.main(argv)
    first = (tmp_path / "captioner" / "captioner.safetensors").read_bytes()
    script.main([*argv, "--seed", "1"])
    assert "an earlier run was moved to" in capsys.readouterr().out
    (earlier,) = (tmp_path / "captioner" / "earlier").iterdir()
    assert (earlier / "captioner.safetensors").read_bytes() == first != (
        tmp_path / "captioner" / "captioner.safetensors"
    ).read_bytes()  # fmt: skip


def test_same_seed_same_run(script, flickr, tmp_path, whole_run):
    script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path / "again"), *TINY])
    for file in ("metrics.csv", "captioner.safetensors"):
        assert (whole_run[0] / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_without_a_dataset_it_says_so_and_trains_on_shapes(script, tmp_path, capsys):
    # TINY without its tokenizer and encoder: those of the Shapes preset are used
    result = script.main([*TINY[:10], "--epochs", "1", "--shapes_scenes", "24", "--demo_images", "2"])
    said = capsys.readouterr().out
    assert said.startswith(f"no dataset in {tmp_path / 'no_data'}: training on the built-in Shapes")
    assert (tmp_path / "no_data" / "shapes" / "results.csv").is_file()
    assert set(result["scores"]) == {
        "unseen scenes", "unseen combinations of attributes", "images shuffled among scenes", "chance level"
    }  # fmt: skip
    assert all(f"{name} " in said for name in result["scores"])
    config = json.loads((tmp_path / "captioner" / "config.json").read_text())
    assert config["preprocessing"]["img_size"] == 48


def test_flickr8k_in_the_default_folder(script, flickr, monkeypatch):
    """captions.txt with images/ in data/, as data/README.md says, needs no option."""
    (flickr / "flickr30k_images").rename(flickr / "images")
    monkeypatch.setattr(script.train_config, "data_dir", flickr)
    monkeypatch.setattr(script.train_config, "image_dir", flickr / "flickr30k_images")
    _, train_cfg, _ = script.read_configs([])
    df = script.load_data(train_cfg, script.DATA_DIR)
    assert len(df) == 24
    assert df["image"].map(lambda path: path.parent == flickr / "images").all()


def test_a_split_without_photos_is_refused_before_training(script, flickr):
    for name in ("1008.jpg", "1009.jpg"):
        (flickr / "flickr30k_images" / name).unlink()
    with pytest.raises(ValueError, match="no usable caption is in the val split"):
        script.main(["--data_dir", str(flickr), *TINY])


def test_a_named_folder_without_captions_is_an_error(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no captions there(.|\n)*prepare_data\.py flickr30k --to"):
        script.main(["--data_dir", str(tmp_path)])


def test_without_network_it_says_what_to_give(flickr, tmp_path):
    """A process of its own, as a user sees it: status 1, one message, no traceback, nothing trained at random."""
    argv = ["--data_dir", flickr, "--model_path", tmp_path / "captioner"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("HF_GPT2_REPO=FOLDER", "--encoder_weights FILE", "vit_base_patch16_224", "openai-community/gpt2"):
        assert part in done.stderr
    assert not (tmp_path / "captioner").exists()


def test_local_gpt2_and_encoder_weights(script, flickr, bpe, tmp_path, monkeypatch, capsys):
    """The default recipe at tiny size: pretrained encoder and GPT-2 from local files, three stages."""
    import timm
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=32, n_head=2, n_layer=2, n_positions=24, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe), **sizes)).save_pretrained(tmp_path / "gpt2")
    bpe.backend.model.save(str(tmp_path / "gpt2"))
    monkeypatch.setattr(script, "HF_GPT2_REPO", str(tmp_path / "gpt2"))
    monkeypatch.setattr(script, "tokenizer", script.CaptionTokenizer(tmp_path / "gpt2"))
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_ENCODER)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")

    argv = [*TINY, "--tokenizer", "gpt2", "--decoder_weights", "pretrained", "--epochs", "3", "--lr", "1e-3"]
    script.main(["--data_dir", str(flickr), *argv, "--encoder_weights", str(tmp_path / "vit.safetensors")])
    said = capsys.readouterr().out
    assert [line.split(";")[0] for line in said.splitlines() if "frozen parameters" in line] == [
        "epoch 1: training new layers", "epoch 2: training GPT-2 blocks", "epoch 3: training everything"
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "captioner" / "metrics.csv")
    assert table["stage"].tolist() == ["new layers", "GPT-2 blocks", "everything"]
    assert table["train_loss"].iloc[-1] < table["train_loss"].iloc[0]


# --- captioning with the tracked checkpoint ---------------------------------------------------------------------------


def test_example_checkpoint_captions_its_scenes(tmp_path, capsys):
    """Right after an install: examples/shapes holds a model that this code trained, and scenes it never saw."""
    import caption_image
    from captioning.data import shapes

    examples = REPO_ROOT / "examples" / "shapes"
    truth = json.loads((examples / "scenes.json").read_text())
    images = [str(examples / name) for name in truth]
    caption_image.main([*images, "--checkpoint", str(examples), "--grid", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().out.splitlines()
    captions = [line.partition(": ")[2] for line in lines[: len(images)]]
    scenes = [tuple(tuple(thing) for thing in scene) for scene in truth.values()]
    assert len(captions) == len(images) >= 8
    assert shapes.exact_rate(captions, scenes) >= 0.8
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 300


def test_caption_image_errors_name_the_file(tmp_path):
    import caption_image

    with pytest.raises(SystemExit, match=r"gone\.png: no such image"):
        caption_image.main([str(tmp_path / "gone.png"), "--checkpoint", str(REPO_ROOT / "examples" / "shapes")])
    with pytest.raises(SystemExit, match=r"config\.json: not found; .* is no captioner checkpoint"):
        caption_image.main(["x.png", "--checkpoint", str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="a gpt2 model, not a captioner"):
        caption_image.main(["x.png", "--checkpoint", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"config\.json: not the config of a captioner"):
        caption_image.main(["x.png", "--checkpoint", str(tmp_path)])


def test_caption_image_searches_and_samples(capsys):
    import caption_image

    scene = ["examples/shapes/scene_0.png", "--checkpoint", str(REPO_ROOT / "examples" / "shapes")]
    scene[0] = str(REPO_ROOT / scene[0])

    def lines(*options):
        caption_image.main([*scene, *options])
        return capsys.readouterr().out.splitlines()

    beams = lines("--beam", "4", "--num", "3")
    assert len(set(beams)) == 3
    assert beams[0] == lines("--beam", "4")[0]
    draws = lines("--temperature", "3", "--top_k", "50", "--num", "5", "--seed", "1")
    assert draws == lines("--temperature", "3", "--top_k", "50", "--num", "5", "--seed", "1")
    assert draws != lines("--temperature", "3", "--top_k", "50", "--num", "5", "--seed", "2")
    assert lines("--prompt", "below a")[0].startswith(f"{scene[0]}: below a")
    assert lines("--beam", "1") == lines()
    assert len(lines("--beam", "4", "--length_penalty", "9")[0]) >= len(beams[0])
    with pytest.raises(SystemExit, match="--length_penalty is for beam search"):
        lines("--length_penalty", "2")
    assert lines("--precision", "bf16") == lines()
    with pytest.raises(SystemExit, match="choose beam search"):
        caption_image.main([*scene, "--beam", "4", "--sample"])
    with pytest.raises(SystemExit, match="--beam must be an integer of at least 1, not 0"):
        caption_image.main([*scene, "--beam", "0"])
    with pytest.raises(SystemExit, match="--num 2: greedy search has one caption an image"):
        caption_image.main([*scene, "--num", "2"])
