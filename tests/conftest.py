"""Shared by all tests: the import path, tiny configurations and a tiny Flickr30k."""

import contextlib
import gc
import getpass
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"), str(REPO_ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks a server for newer versions when it is imported
os.environ["MPLBACKEND"] = "agg"  # no window, also where there is a display
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for each other; child processes', too
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(REPO_ROOT / ".pytest_cache" / "compiled")  # a minute's work the first time

pytest.register_assert_rewrite("helpers")

import MyLLM_Vit_gpt2_captioning as script_module
from captioning.model.tokenizer import CaptionTokenizer
from helpers.annotation_files import NAMES

torch.set_num_threads(1)

CAPTIONS = ("a red dog runs across the green grass .", "two young men stand on the left side of a house .")
TINY_ENCODER = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2)
REDUCED_ENCODERS = {  # every family, its real architecture with fewer and narrower layers or on smaller images
    "vit_tiny_patch16_224": TINY_ENCODER,
    "vit_base_patch16_clip_quickgelu_224": TINY_ENCODER,  # norm_pre
    "vit_small_patch14_reg4_dinov2": TINY_ENCODER,  # register tokens, layer scale
    "deit3_small_patch16_224": TINY_ENCODER,  # no position on the class token
    "vit_base_patch16_siglip_224": TINY_ENCODER,  # no class token, its pooling has weights of its own
    "eva02_tiny_patch14_224": TINY_ENCODER,  # rotary positions, SwiGLU, norm behind the pooling
    "vit_small_patch16_dinov3": TINY_ENCODER,  # rotary positions only
    "resnet10t": dict(img_size=64, zero_init_last=False),
    "convnext_atto": dict(img_size=64),  # its final norm is in the head
    "tf_efficientnet_lite0": dict(img_size=64),
    "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=2, embed_dim=24),  # channels last
    "beit_base_patch16_224": dict(img_size=32, patch_size=16, embed_dim=24, num_heads=2),  # norm behind the pooling
    "mixer_s32_224": dict(img_size=64),  # makes tokens, has no blocks like a ViT's
}


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """Libraries and child processes put their temporary files into pytest's folder, which goes when all tests pass."""
    folder = str(tmp_path_factory.mktemp("tmp", numbered=False))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TMPDIR", "GRADIO_TEMP_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_paraphrases():
    """METEOR's table of paraphrases takes seconds to read; the tests of METEOR read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioning.scoring.meteor.read_paraphrases", lambda references: {})
        yield


@pytest.fixture(scope="module", autouse=True)
def garbage_is_looked_for_in_what_is_new():
    """`Trainer.clean` collects it after every epoch, which in an epoch of four steps would take most of the time: there
    are a million objects of libraries to look at."""
    gc.freeze()
    yield
    gc.unfreeze()


# Their tests start processes, compile or wait. Begun last, one of them would keep a worker while the others are done.
LONG = ("test_distributed.py", "test_resume.py", "test_trackers.py", "test_web_demo.py", "test_onnx.py",
        "test_fast_paths.py", "test_hub.py", "test_check_gpu.py", "test_device_waits.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files of LONG come first, in the order of this list (with --no-loadscope-reorder; else xdist has its own)."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_unconfigure(config):
    """Nor does the folder stay that pytest makes around its own, when all that is left there is a link to nothing."""
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(OSError, KeyError):  # without a name, or with folders of tests that failed
            around = Path(tempfile.gettempdir()) / f"pytest-of-{getpass.getuser()}"
            if not (around / "pytest-current").exists():
                (around / "pytest-current").unlink(missing_ok=True)
            around.rmdir()


@pytest.fixture
def script():
    return script_module


@pytest.fixture(scope="session")
def bpe():
    """A tokenizer trained on the test captions, with one id for BOS, EOS and padding, as GPT-2's."""
    return CaptionTokenizer.train(CAPTIONS, vocab_size=300)


@pytest.fixture
def tiny_config(bpe):
    """A captioner of a few thousand parameters; nothing is random but the weights."""
    return tiny_model_of(bpe)


def tiny_model_of(bpe):
    return SimpleNamespace(
        embed_dim=32, num_heads=2, depth=2, seq_len=24, vocab_size=len(bpe), emb_dropout=0.0, attention_dropout=0.0,
        mlp_dropout=0.0, residual_dropout=0.0, eos_token_id=bpe.eos_token_id, encoder="vit_tiny_patch16_224",
        encoder_options=TINY_ENCODER, encoder_weights="scratch", decoder_weights="scratch",
    )  # fmt: skip


@pytest.fixture
def tiny_model(script, tiny_config):
    """Weights drawn large, so that different images give different captions."""
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config)
    randomize(model)
    return model.eval()


def randomize(module, std=0.3):
    """Large random values for every parameter. With a default start, where norms are 1 and biases 0, a norm in the
    wrong place or a forgotten bias would change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if parameter.ndim == 1 and (parameter == 1).all() else noise)


@pytest.fixture
def flickr(tmp_path):
    """A folder in the Flickr30k layout: 12 photos, 2 captions each, split by a Karpathy file into 8, 2 and 2."""
    return make_flickr(tmp_path / "data")


def make_flickr(folder, photos=12):
    images = folder / "flickr30k_images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines, records = ["image_name| comment_number| comment"], []
    for i in range(photos):
        name = f"{1000 + i}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(images / name)
        lines += [f"{name}| {n}| {caption}" for n, caption in enumerate(CAPTIONS)]
        records.append({"filename": name, "split": "train" if i < photos - 4 else "val" if i < photos - 2 else "test"})
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": records}))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Six photos in tmp_path/images."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def photo():
    """The pixels of one photo: noise."""
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def tiny_train_config(flickr, tmp_path):
    return tiny_training_of(flickr, tmp_path / "captioner")


def tiny_training_of(flickr, folder):
    return SimpleNamespace(
        epochs=1, freeze_epochs_gpt=0, freeze_epochs_all=0, lr=1e-3, device="cpu", batch_size=4, num_workers=0,
        captions_per_image=2, data_dir=flickr, image_dir=flickr / "flickr30k_images", model_path=folder,
        crop_scale=0.9, seed=0,
    )  # fmt: skip


@pytest.fixture
def dls(script, tiny_config, tiny_train_config, bpe):
    df = script._load_flickr_dataframe(tiny_train_config.data_dir, tiny_train_config.image_dir)
    config = script.complete(tiny_config, script.model_config)
    return script.build_dataloaders(df, bpe, config, tiny_train_config)


@pytest.fixture
def pretend_pretrained(script, monkeypatch):
    """`from_pretrained` without downloads: the config says pretrained, the weights are random."""
    monkeypatch.setattr(script.VisionGPT2Model, "from_pretrained", classmethod(lambda cls, config: cls(config)))


@pytest.fixture
def make_trainer(script, tiny_config, tiny_train_config, bpe):
    """make_trainer(folder, **changes of the configs): dropout and averaged weights are on."""
    return trainers_of(script, tiny_config, tiny_train_config, bpe)


def trainers_of(script, tiny_config, tiny_train_config, bpe):
    def make(folder, **changes):
        config = script.complete(tiny_config, script.model_config)
        config.mlp_dropout = config.attention_dropout = 0.2
        train = script.complete(tiny_train_config, script.train_config)
        train.model_path, train.epochs, train.ema_decay, train.score_images = folder, 3, 0.9, 2
        for key, value in changes.items():
            setattr(train if hasattr(train, key) else config, key, value)
        df = script._load_flickr_dataframe(train.data_dir, train.image_dir)
        torch.manual_seed(train.seed)
        return script.Trainer(config, train, script.build_dataloaders(df, bpe, config, train))

    return make
