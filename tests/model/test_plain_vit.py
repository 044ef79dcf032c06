"""The plain ViT without timm: the same architectures, the same numbers; and what captioning one photo imports."""

import subprocess
import sys

import pytest
import timm
import torch

from captioning.model import encoders, plain_vit
from conftest import REPO_ROOT, TINY_ENCODER, randomize

NAMES = [name for name in timm.list_models("vit_*") if plain_vit.options_of(name)]


def test_the_common_vits_are_plain():
    assert {"vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch16_384"} <= set(NAMES)
    for name in ("vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "vit_huge_patch14_224", "resnet50"):
        assert plain_vit.options_of(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_plain_vits_are_built_as_timm_builds_them(name):
    options = plain_vit.options_of(name)
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, num_classes=0), plain_vit.VisionTransformer(**options)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.norm.eps == theirs.norm.eps
    for tagged in timm.list_pretrained(f"{name}.*"):
        assert plain_vit.options_of(tagged) == options
        assert timm.get_pretrained_cfg(tagged).input_size[-1] == options["img_size"]


@pytest.mark.parametrize("coupling", encoders.COUPLINGS)
@pytest.mark.parametrize("more", [{}, dict(norm_eps=1e-2, mlp_ratio=3.02, qkv_bias=False, weight_init="jax")])
def test_plain_vits_compute_what_timm_computes(coupling, more):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    theirs, ours = (
        encoders.build_encoder("vit_tiny_patch16_224", 2, coupling, TINY_ENCODER | more, weights)
        for weights in ("scratch", "stored")
    )
    assert isinstance(ours.vit, plain_vit.VisionTransformer)
    assert not isinstance(theirs.vit, plain_vit.VisionTransformer)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.eval().levels(images), theirs.eval().levels(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "option", [dict(drop_path_rate=0.1), dict(img_size=(32, 48)), dict(img_size=33), dict(reg_tokens=4)]
)
def test_what_is_not_plain_is_left_to_timm(option):
    assert plain_vit.options_of("vit_tiny_patch16_224", option) is None


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_a_stored_captioner_is_loaded_without_start_values(script, tiny_config, bpe, tmp_path, positions):
    """Nothing random is drawn, every tensor has its numbers in the model's own type, and the file stays as it is."""
    tiny_config.positions = positions
    model = script.VisionGPT2Model(tiny_config)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    stored = dict(model_config=script.checkpoint.portable(model.config, REPO_ROOT), preprocessing=model.preprocessing)
    script.checkpoint.save_checkpoint(tmp_path, weights, stored, bpe)
    file = tmp_path / script.checkpoint.WEIGHTS_FILE
    before, random_state = file.read_bytes(), torch.get_rng_state()
    loaded = script.VisionGPT2Model.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(loaded.encoder.vit, plain_vit.VisionTransformer)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())
    for (name, ours), theirs in zip(loaded.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    randomize(loaded)
    assert file.read_bytes() == before


def test_captioning_a_photo_imports_only_what_it_needs():
    unneeded = (
        "timm torchvision torch._dynamo sympy transformers huggingface_hub pandas matplotlib sklearn albumentations"
    )
    unneeded += " cv2 scipy datasets requests captioning.data.downloads"
    unneeded += " captioning.scoring.evaluation captioning.scoring.metrics captioning.scoring.ptb_tokenization"
    code = f"""import sys, caption_image
caption_image.main(["../examples/shapes/scene_0.png", "--checkpoint", "../examples/shapes"])
print(sorted(set({unneeded.split()}) & set(sys.modules)))"""
    folder = REPO_ROOT / "MyLLM_Vit_gpt2_captioning"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    caption, imported = done.stdout.splitlines()
    assert caption.endswith("a small blue triangle above a small white circle")
    assert imported == "[]"
