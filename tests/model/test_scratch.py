"""Captioners of other kinds, from scratch: sinusoidal positions, post-norm, ReLU, the convolutional refiner, and an
encoder of which only the last stages train."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.model.encoders import ConvolutionalRefiner, build_encoder, pool_to_grid
from captioning.model.positions import SinusoidalPositions
from conftest import randomize


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def resnet_config(tiny_config):
    """Recipe (d) at tiny size."""
    tiny_config.encoder, tiny_config.encoder_options, tiny_config.coupling = "resnet10t", {"img_size": 64}, "final"
    tiny_config.refiner = dict(width=32, grid=3, layers=2, heads=4)
    tiny_config.positions, tiny_config.activation, tiny_config.post_norm = "sinusoidal", "relu", True
    return tiny_config


# --- decoder ----------------------------------------------------------------------------------------------------------


def test_sinusoidal_positions():
    """sin(position / 10000^(2i / C)) at even places, the cosine at odd ones, scaled to the given std."""
    positions = SinusoidalPositions(50, 16, std=0.1)
    table = positions(torch.arange(50)) / (0.1 * math.sqrt(2))
    for position in (0, 1, 49):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    assert not list(positions.parameters())
    assert not positions.state_dict()  # made again from the sizes
    with pytest.raises(ValueError, match="even embed_dim, not 15"):
        SinusoidalPositions(50, 15, 0.1)


def test_post_norm_block_is_torchs_decoder_layer(script, tiny_config):
    """The same weights in nn.TransformerDecoderLayer (post-norm, ReLU): equal within 1e-5."""
    tiny_config.post_norm, tiny_config.activation = True, "relu"
    block = script.GPT2Block(tiny_config).eval()
    randomize(block)
    theirs = nn.TransformerDecoderLayer(32, 2, 128, 0.0, "relu", batch_first=True, norm_first=False).eval()
    with torch.no_grad():
        pairs = [
            (theirs.self_attn.in_proj_weight, block.self_attn.qkv.weight),
            (theirs.self_attn.in_proj_bias, block.self_attn.qkv.bias),
            (theirs.self_attn.out_proj.weight, block.self_attn.out_proj.weight),
            (theirs.self_attn.out_proj.bias, block.self_attn.out_proj.bias),
            (theirs.multihead_attn.out_proj.weight, block.cross_attn.c_proj.weight),
            (theirs.multihead_attn.out_proj.bias, block.cross_attn.c_proj.bias),
            (theirs.linear1.weight, block.mlp.expand.weight), (theirs.linear1.bias, block.mlp.expand.bias),
            (theirs.linear2.weight, block.mlp.contract.weight), (theirs.linear2.bias, block.mlp.contract.bias),
        ]  # fmt: skip
        for part in ("weight", "bias"):
            cross = [getattr(getattr(block.cross_attn, name), part) for name in "qkv"]
            pairs.append((getattr(theirs.multihead_attn, f"in_proj_{part}"), torch.cat(cross)))
            for number, norm in enumerate((block.ln_1, block.ln_cross, block.ln_2), 1):
                pairs.append(
                    (getattr(getattr(theirs, f"norm{number}"), part), norm.scale if part == "weight" else norm.shift)
                )
        for theirs_parameter, ours in pairs:
            theirs_parameter.copy_(ours)
        text, tokens = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        expected = theirs(text, tokens, tgt_mask=causal, tgt_is_causal=True)
        torch.testing.assert_close(block(text, tokens), expected, atol=1e-5, rtol=1e-5)
        block.post_norm = False
        assert (block(text, tokens) - expected).abs().max() > 0.1


def test_classic_decoder_saves_and_loads(script, resnet_config, bpe, images, tmp_path):
    torch.manual_seed(0)
    model = script.VisionGPT2Model(resnet_config).eval()
    config = {"model_config": vars(model.config), "preprocessing": model.preprocessing}
    script.checkpoint.save_checkpoint(tmp_path, model.state_dict(), config, bpe)
    loaded = script.VisionGPT2Model.from_pretrained(tmp_path)
    ids = torch.randint(0, resnet_config.vocab_size, (3, 7))
    assert torch.equal(loaded(images, ids), model(images, ids))
    assert not any("final_norm" in name or "pos_emb" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("key", "value"), [("positions", "sinusoidal"), ("activation", "relu"), ("post_norm", True)])
def test_gpt2_weights_need_a_gpt2_decoder(script, tiny_config, key, value):
    setattr(tiny_config, key, value)
    with pytest.raises(ValueError, match=f"GPT-2 has no {key} {value}: set --decoder_weights scratch"):
        script.VisionGPT2Model(tiny_config)._load_hf_gpt2_weights({})


# --- encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (7, 11), (8, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("cells", [1, 3, 7])
def test_pooling_is_adaptive_pooling(size, cells):
    """Larger, equal and smaller maps, as values and as gradients."""
    features = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(2, 3, cells, cells, generator=torch.Generator().manual_seed(1))
    ours, theirs = pool_to_grid(features, cells), F.adaptive_avg_pool2d(features, cells)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad((pooled * weights).sum(), features)[0] for pooled in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    half = features.detach().bfloat16()
    assert pool_to_grid(half, cells).dtype == torch.bfloat16
    torch.testing.assert_close(pool_to_grid(half, cells), F.adaptive_avg_pool2d(half, cells), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("options", [dict(refiner=dict(width=16, grid=3, heads=2)), dict(feature_levels=2)])
def test_every_operation_of_a_cnn_has_a_deterministic_form(options):
    """Adaptive pooling has none on a GPU, where `--deterministic true` would be an error in the first backward pass."""
    encoder = build_encoder("resnet10t", 2, "final", {"img_size": 72}, **options)
    with Operations() as seen:
        levels = encoder.refine(encoder.levels(torch.randn(2, 3, 72, 72)))
        sum(level.sum() for level in levels).backward()
    assert any("convolution_backward" in name for name in seen.names)
    assert not [name for name in seen.names if "adaptive" in name]


class Operations(TorchDispatchMode):
    """The names of all operations, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


def test_refiner_is_its_formula():
    """1x1 convolution, batch norm, ReLU, pooling, positions; then post-norm layers with two convolutions."""
    refiner = ConvolutionalRefiner(24, width=16, grid=3, layers=1, heads=2, kernel=3).eval()
    randomize(refiner)
    features = torch.randn(2, 24, 6, 6)
    convolution, norm, _ = refiner.reduce
    with torch.no_grad():
        x = torch.einsum("bchw,oc->bohw", features, convolution.weight[:, :, 0, 0])
        x = norm(x).clamp(min=0)
        x = x.view(2, 16, 3, 2, 3, 2).mean(dim=(3, 5))  # each cell of the grid is the mean of four
        x = x.flatten(2).transpose(1, 2) + refiner.positions
        layer = refiner.layers[0]
        x = layer.norm_1(x + layer.attention(x, x, x)[0])
        padded = nn.functional.pad(x, (0, 0, 1, 1))  # one token of zeros at either end
        neighbours = torch.stack([padded[:, i : i + 9] for i in range(3)], dim=-1)  # (B, N, C, 3)
        hidden = torch.einsum("bnck,ock->bno", neighbours, layer.expand.weight) + layer.expand.bias
        hidden = hidden.clamp(min=0) @ layer.contract.weight[:, :, 0].T + layer.contract.bias
        expected = layer.norm_2(x + hidden)
        tokens = features.flatten(2).transpose(1, 2)
        torch.testing.assert_close(refiner(tokens), expected, atol=1e-4, rtol=1e-4)


def test_refiner_sits_behind_the_cnn(images):
    encoder = build_encoder("resnet10t", 2, "final", refiner=dict(width=32, grid=3, heads=4)).eval()
    levels = encoder.levels(images)
    features = encoder.cnn.forward_features(images)
    assert torch.equal(levels[0], features.flatten(2).transpose(1, 2))
    refined = encoder.refine(levels)
    assert [tokens.shape for tokens in refined] == [(3, 9, 32)]
    assert torch.equal(refined[0], encoder.refiner(levels[0]))


@pytest.mark.parametrize(
    ("name", "options", "refiner", "message"),
    [
        ("vit_tiny_patch16_224", {}, dict(width=32), "needs the feature map of a CNN; vit_tiny_patch16_224 makes none"),
        ("mixer_s32_224", {}, dict(width=32), "needs the feature map of a CNN; MlpMixer makes none"),
        ("resnet10t", {}, dict(width=30), "width 30 must be a multiple of heads 8, and kernel 3 odd"),
    ],
)
def test_unsuitable_refiners(name, options, refiner, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, 2, "final", options, refiner=refiner)


@pytest.mark.parametrize(
    ("name", "options", "last", "trains"),
    [
        ("resnet10t", {}, 2, ("cnn.layer3.", "cnn.layer4.")),
        ("tf_efficientnet_lite0", {}, 1, ("cnn.blocks.6.", "cnn.conv_head", "cnn.bn2")),
        ("convnext_atto", {}, 1, ("cnn.stages.3.", "norm.")),
        ("vit_tiny_patch16_224", dict(depth=3, img_size=32), 1, ("vit.blocks.2.", "vit.norm.")),
    ],
)
def test_the_last_stages_of_an_encoder(name, options, last, trains):
    encoder = build_encoder(name, 2, "final", options)
    before = encoder.weights_before(last)
    after = [key for key in encoder.state_dict() if key not in before]
    assert after
    assert all(key.startswith(trains) for key in after)
    assert not any(key.startswith(trains) for key in before)
    assert encoder.weights_before(0) == list(encoder.state_dict())
    with pytest.raises(ValueError, match=r"trainable_stages 99: the encoder has \d+ stages"):
        encoder.weights_before(99)


@pytest.mark.parametrize("stages", [0, 2])
def test_trainable_stages(script, resnet_config, images, stages):
    """Of a pretrained ResNet only the last stages ever train, and all of it keeps its BatchNorm buffers; the refiner
    trains from the first step."""
    resnet_config.encoder_weights, resnet_config.trainable_stages = "pretrained", stages
    model = script.VisionGPT2Model(resnet_config)
    model.pretrained_layers_trainable(trainable=False)
    assert all(p.requires_grad == ("encoder.cnn" not in name) for name, p in model.named_parameters())
    model.pretrained_layers_trainable(trainable=True)
    last = tuple(f"encoder.cnn.layer{i}." for i in range(5 - stages, 5))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("encoder.cnn") or name.startswith(last)), name
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(images, torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)).backward()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved
    assert all(name.startswith("encoder.refiner") for name in moved)
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    norms = {f"encoder.cnn.layer{i}.0.bn2.{kind}" for i in range(5 - stages, 5) for kind in ("weight", "bias")}
    assert norms <= gradients


def test_a_tower_that_never_trains_has_no_last_stage(script, tiny_config, dls, tmp_path, monkeypatch, capsys):
    """With a decoder from scratch there is only one stage then, and none that changes nothing is announced."""
    from types import SimpleNamespace

    tiny_config.encoder_weights, tiny_config.trainable_stages = "pretrained", 0
    model = script.VisionGPT2Model(tiny_config)
    monkeypatch.setattr(script.VisionGPT2Model, "from_pretrained", classmethod(lambda cls, config: model))
    config = SimpleNamespace(epochs=3, freeze_epochs_all=1, device="cpu", model_path=tmp_path, batch_size=4)
    trainer = script.Trainer(tiny_config, config, dls)
    for epoch in range(3):
        trainer.enter_stage(epoch)
    assert capsys.readouterr().out.count("training") == 1
    assert not any(p.requires_grad for p in model.encoder.parameters())
