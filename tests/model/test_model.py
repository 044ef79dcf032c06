"""The captioning model: cross-attention, coupling with the encoder, freezing, generation."""

import re

import pytest
import timm
import torch
from torch import nn

from captioning.model.encoders import build_encoder
from captioning.model.tokenizer import CaptionTokenizer
from conftest import REDUCED_ENCODERS, TINY_ENCODER, randomize
from helpers.mistakes import drop_one_bias, exact_gelu, swap_norms, wrong_epsilon


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def input_ids(tiny_config):
    return torch.randint(0, tiny_config.vocab_size, (6, 7), generator=torch.Generator().manual_seed(4))


# --- decoder ----------------------------------------------------------------------------------------------------------


def test_cross_attention_layers_and_start(script, tiny_config):
    """Normal with std 0.02, also inside a model that is trained from scratch."""
    torch.manual_seed(0)
    cross = script.GPT2CrossAttention(tiny_config)
    for part in (cross, script.VisionGPT2Model(tiny_config).gpt.trf_blocks[0].cross_attn):
        for layer in (part.q, part.k, part.v, part.c_proj):
            assert 0.018 < layer.weight.std() < 0.022
            assert not layer.bias.any()
    assert cross(torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)).shape == (2, 5, 32)


def test_captions_of_an_image_share_it(script, tiny_config):
    """K captions reading one image equal the image repeated K times."""
    cross = script.GPT2CrossAttention(tiny_config)
    randomize(cross)
    text, tokens = torch.randn(6, 5, 32), torch.randn(2, 9, 32)
    repeated = tokens.repeat_interleave(3, dim=0)
    torch.testing.assert_close(cross(text, tokens, tokens), cross(text, repeated, repeated))


def test_block_is_its_formula(script, tiny_config):
    block = script.GPT2Block(tiny_config)
    randomize(block)
    hidden, tokens = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    x = hidden + block.self_attn(block.ln_1(hidden))
    x = x + block.cross_attn(block.ln_cross(x), tokens, tokens)
    x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(block(hidden, tokens), x)


def swap_with_cross_norm(gpt):
    """GPT-2's second norm in front of cross-attention, the new one in front of the MLP: an easy mistake."""
    for block in gpt.trf_blocks:
        block.ln_2, block.ln_cross = block.ln_cross, block.ln_2


def cross_attention_on(gpt):
    for block in gpt.trf_blocks:
        nn.init.normal_(block.cross_attn.c_proj.weight, std=0.2)


MISTAKES = (swap_norms, swap_with_cross_norm, exact_gelu, wrong_epsilon, drop_one_bias)


@pytest.mark.parametrize("change", [None, cross_attention_on, *MISTAKES])
def test_without_cross_attention_the_decoder_is_hf_gpt2(script, tiny_config, images, tmp_path, change):
    """Within 1e-4 in float32, every parameter random and large; with a mistake, or cross-attention on, it is not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = tiny_config
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_embd=c.embed_dim, n_head=c.num_heads, n_layer=c.depth, n_positions=c.seq_len,
        bos_token_id=0, eos_token_id=0,
    )).eval()  # fmt: skip
    randomize(hf, std=0.5)
    with torch.no_grad():
        for embedding in (hf.transformer.wte, hf.transformer.wpe):
            embedding.weight.mul_(0.2)  # a variance near epsilon in front of the first norm: a wrong epsilon shows
        hf.transformer.ln_f.weight.mul_(10)  # logits are large beside the tolerance
    hf.save_pretrained(tmp_path)
    tiny_config.decoder_weights = str(tmp_path)
    model = script.VisionGPT2Model.from_pretrained(tiny_config).eval()
    for block in model.gpt.trf_blocks:
        randomize(block.ln_cross)
        nn.init.zeros_(block.cross_attn.c_proj.weight)
    if change:
        change(model.gpt)
    input_ids = torch.randint(0, c.vocab_size, (3, 9), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours = model.gpt.logits(model.decode(input_ids, model.encoder_states(images)))
        difference = (ours - hf(input_ids).logits).abs().max()
    assert difference > 1e-3 if change else difference < 1e-4


def test_gpt2_of_another_size_is_refused(script, tiny_config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(
        vocab_size=tiny_config.vocab_size, n_embd=32, n_layer=2, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(GPT2Config(n_head=4, **sizes)).save_pretrained(tmp_path)
    tiny_config.decoder_weights = str(tmp_path)
    with pytest.raises(ValueError, match="has num_heads 4, model_config 2: set --num_heads 4"):
        script.VisionGPT2Model.from_pretrained(tiny_config)


def test_loss_is_the_mean_over_real_tokens(tiny_model, images, input_ids):
    labels = torch.where(torch.arange(7) < torch.tensor([6, 5, 4, 3, 2, 1])[:, None], input_ids.roll(-1, 1), -100)
    loss = tiny_model(images, input_ids, labels)
    logits = tiny_model.gpt.logits(tiny_model.decode(input_ids, tiny_model.encoder_states(images)))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert loss.ndim == 0
    torch.testing.assert_close(loss, expected)


def test_padding_changes_nothing(tiny_model, images, input_ids):
    logits = tiny_model(images, input_ids)
    padded = torch.cat([input_ids, torch.zeros(6, 4, dtype=torch.long)], dim=1)
    hidden = tiny_model.decode(padded, tiny_model.encoder_states(images))
    torch.testing.assert_close(tiny_model.gpt.logits(hidden[:, 6:7]), logits)


def test_without_labels_last_step_logits(tiny_model, tiny_config, images, input_ids):
    assert tiny_model(images, input_ids).shape == (6, 1, tiny_config.vocab_size)
    with pytest.raises(ValueError, match="5 captions cannot be shared equally among 3 images"):
        tiny_model(images, input_ids[:5])


# --- encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, options in REDUCED_ENCODERS.items() if "depth" in options])
def test_stepped_tokens_equal_timm(script, tiny_config, images, name):
    """After step i the tokens are those of timm's own forward after block i, and after the last its features."""
    tiny_config.encoder, tiny_config.encoder_options = name, {**REDUCED_ENCODERS[name], "depth": 3}
    tiny_config.depth = 3
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model.encoder, std=0.1)
    vit = model.encoder.vit
    with torch.no_grad():
        theirs = []  # what each of timm's blocks makes in timm's own forward
        for block in vit.blocks:
            block.register_forward_hook(lambda block, inputs, output: theirs.append(output))
        vit.forward_features(images)
        expected, tokens = list(theirs), model._encode_images(images)
        for i in range(3):
            tokens = model.encoder.step(i, tokens)
            assert torch.equal(tokens, expected[i])


@pytest.mark.parametrize("name", REDUCED_ENCODERS)
def test_final_tokens_equal_timm_features(name):
    """Of every family: timm's own forward before pooling, then its final norm where that comes behind the pooling."""
    options = dict(REDUCED_ENCODERS[name])
    encoder = build_encoder(name, 2, "final", options).eval()
    size = options.pop("img_size") if "resnet" in name or "conv" in name or "efficientnet" in name else 0
    pooling = {"global_pool": ""} if hasattr(encoder, "vit") else {}  # with "", timm's ViTs norm before the pooling
    theirs = timm.create_model(name, num_classes=0, **pooling, **options).eval()
    images = torch.randn(3, 3, size or options["img_size"], size or options["img_size"])
    if hasattr(encoder, "vit"):
        randomize(encoder, std=0.1)
        theirs.load_state_dict(encoder.vit.state_dict())
    else:
        theirs.load_state_dict(encoder.cnn.state_dict(), strict=False)  # without a head
    with torch.no_grad():
        tokens, expected = encoder.embed(images), theirs.forward_features(images)
        if name in ("convnext_atto", "beit_base_patch16_224"):
            randomize(encoder.norm, std=0.1)
            tokens, expected = encoder.embed(images), encoder.norm(expected)
        if expected.ndim == 4 and expected.size(1) == encoder.width:
            expected = expected.permute(0, 2, 3, 1)
        # Channels last adds up in another order: float32 rounding.
        torch.testing.assert_close(tokens, expected.reshape(3, -1, encoder.width), atol=1e-4, rtol=1e-4)
        assert encoder.step(0, tokens) is tokens
    used = torch.autograd.grad(encoder.embed(images).square().sum(), list(encoder.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in used)  # no weights of pooling or classifier are carried along


@pytest.mark.parametrize(("blocks", "steps"), [(6, 3), (5, 3), (2, 4)])
def test_depths_may_differ(images, blocks, steps):
    """Every block runs exactly once, in order, whatever the number of steps."""
    encoder = build_encoder("vit_tiny_patch16_224", steps, "stepped", {**TINY_ENCODER, "depth": blocks}).eval()
    tokens = encoder.embed(images)
    expected = encoder.vit.blocks(tokens)
    for i in range(steps):
        tokens = encoder.step(i, tokens)
    torch.testing.assert_close(tokens, expected)


def test_cnn_grid_becomes_tokens(script, tiny_config, images):
    tiny_config.encoder, tiny_config.encoder_options, tiny_config.coupling = "resnet10t", {}, "final"
    model = script.VisionGPT2Model(tiny_config).eval()
    features = model.encoder.cnn.forward_features(images)  # (3, 512, 1, 1)
    assert torch.equal(model._encode_images(images), features.flatten(2).transpose(1, 2))
    assert [tokens.shape for tokens in model.encoder_states(images)] == [(3, 1, 32)] * 2


@pytest.mark.parametrize(
    ("name", "coupling", "message"),
    [
        ("vit_tiny_patch16_225", "final", "timm has no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_2"),
        ("crossvit_9_240", "final", "CrossVit makes no feature map or tokens of 384 channels"),
        ("vit_tiny_patch16_224", "middle", "coupling 'middle' is not one of stepped, final"),
        ("vit_tiny_patch16_224.bogus", "final", "timm has no weights 'bogus' of vit_tiny_patch16_224; did you mean"),
    ],
)
def test_unsuitable_encoders_are_refused(name, coupling, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, 2, coupling)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("vit_base_patch16_225", "vit_base_patch16_224"),
        ("vit_base_patch16_22", "vit_base_patch16_224"),
        ("ViT_Base_Patch16-224", "vit_base_patch16_224"),
        ("vit_base_patch16_clip_244.openai", "vit_base_patch16_clip_224"),
        ("vit_base_patch16_clip_224.openia", "vit_base_patch16_clip_224.openai"),
        ("clip_vit_base", "vit_base_patch16_clip_224"),
        ("resnet5", "resnet50"),
        ("resnt50", "resnet50"),
        ("convnext-tiny", "convnext_tiny"),
    ],
)
def test_a_mistyped_encoder_is_answered_with_the_nearest_names(typed, meant):
    with pytest.raises(ValueError, match=rf"did you mean {re.escape(meant)}, .*\?$"):
        build_encoder(typed, 2)


def test_a_name_unlike_all_encoders_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"timm has no model 'qqqqqq'; timm.list_models\(\) lists all names"):
        build_encoder("qqqqqq", 2)


def test_encoder_weights_from_a_local_file(tmp_path):
    from safetensors.torch import save_file

    options = {**TINY_ENCODER, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    randomize(vit)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    encoder = build_encoder("vit_tiny_patch16_224", 2, "final", TINY_ENCODER, weights=tmp_path / "vit.safetensors")
    assert all(torch.equal(value, vit.state_dict()[key]) for key, value in encoder.vit.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_encoder("vit_tiny_patch16_224", 2, weights=tmp_path / "gone.safetensors")


def test_foreign_encoder_weights_are_refused(tmp_path):
    """timm by itself would warn and go on with random weights."""
    from safetensors.torch import save_file

    save_file({"totally.foreign": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors does not fit VisionTransformer.*\n.*Missing key"):
        build_encoder("vit_tiny_patch16_224", 2, "final", TINY_ENCODER, weights=tmp_path / "foreign.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(ValueError, match=r"half\.safetensors does not fit"):
        build_encoder("vit_tiny_patch16_224", 2, "final", TINY_ENCODER, weights=tmp_path / "half.safetensors")


def test_a_classifier_in_the_file_is_left_out(tmp_path):
    from safetensors.torch import save_file

    resnet = timm.create_model("resnet10t")
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    encoder = build_encoder("resnet10t", 2, "final", weights=tmp_path / "resnet.safetensors")
    assert torch.equal(encoder.cnn.conv1[0].weight, resnet.conv1[0].weight)


def test_without_blocks_to_step_the_coupling_is_final(script, tiny_config, capsys):
    """With the default coupling, which a CNN cannot have; the config that is saved says what the model does."""
    tiny_config.encoder, tiny_config.encoder_options, tiny_config.coupling = "resnet10t", {}, "stepped"
    model = script.VisionGPT2Model(tiny_config)
    assert model.config.coupling == "final"
    assert "resnet10t cannot be stepped" in capsys.readouterr().out
    assert len(model.bridges) == 1


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"]
)
def test_levels_of_a_cnn(name):
    """timm's own maps on the grid of the last one: a token of an earlier map holds the cells under it."""
    options = dict(REDUCED_ENCODERS[name])
    encoder = build_encoder(name, 3, "final", options, feature_levels=3).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    last = build_encoder(name, 3, "final", options).eval()
    last.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        levels = encoder.levels(images)
        torch.testing.assert_close(levels[-1], last.levels(images)[0])
        maps = encoder.cnn.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)[-3:-1]
    assert tuple(level.size(-1) for level in levels) == encoder.widths
    assert len({level.size(1) for level in levels}) == 1
    for level, features in zip(levels[:-1], maps, strict=True):
        cells = features.size(-1) // 2  # the last map has 2 x 2 cells
        for token, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            patch = features[:, :, y * cells : (y + 1) * cells, x * cells : (x + 1) * cells]
            assert torch.equal(level[:, token], patch.flatten(1))


def test_levels_whose_sizes_do_not_divide():
    """88 pixels: maps of 6 and 3 cells a side divide, 11 and 3 do not and are averaged to 12."""
    encoder = build_encoder("resnet10t", 3, "final", {"img_size": 88}, feature_levels=3).eval()
    levels = encoder.levels(torch.randn(1, 3, 88, 88))
    assert [tuple(level.shape) for level in levels] == [(1, 9, 128 * 16), (1, 9, 256 * 4), (1, 9, 512)]


@pytest.mark.parametrize(("coupling", "shapes"), [("final", [(3, 12, 32)] * 5), ("stepped", [(3, 4, 32)] * 5)])
def test_blocks_read_a_cnns_levels(script, tiny_config, coupling, shapes):
    """With final coupling each block reads all of them, stepped the first blocks read the first level."""
    tiny_config.encoder, tiny_config.encoder_options = "resnet10t", {"img_size": 64}
    tiny_config.coupling, tiny_config.feature_levels, tiny_config.depth = coupling, 3, 5
    model = script.VisionGPT2Model(tiny_config).eval()
    assert model.config.coupling == coupling
    images = torch.randn(3, 3, 64, 64)
    states = model.encoder_states(images)
    assert [tuple(tokens.shape) for tokens in states] == shapes
    expected = [bridge(level) for bridge, level in zip(model.bridges, model.encoder.levels(images), strict=True)]
    if coupling == "stepped":
        assert all(map(torch.equal, states, [expected[i] for i in (0, 0, 1, 1, 2)]))
    else:
        assert torch.equal(states[4], torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet10t", {}, "feature_levels 9: ResNet gives 5 feature maps"),
        ("resnet10t", {"levels": 0}, "feature_levels must be at least 1, not 0"),
        ("resnet10t", {"levels": 3, "coupling": "stepped"}, "feature_levels 3: more than the 2 decoder blocks"),
        ("mixer_s32_224", {}, "feature_levels 9: MlpMixer makes no feature map"),
        ("vit_tiny_patch16_224", {}, "feature_levels 9: they are a CNN's; vit_tiny_patch16_224 has blocks to step"),
    ],
)
def test_levels_that_are_not_there(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, 2, options.get("coupling", "final"), feature_levels=options.get("levels", 9))


def test_a_refiner_takes_one_level():
    with pytest.raises(ValueError, match="set --feature_levels 1"):
        build_encoder("resnet10t", 2, "final", refiner=dict(width=32), feature_levels=2)


def test_image_size_of_a_cnn(script, tiny_config):
    tiny_config.encoder, tiny_config.encoder_options, tiny_config.coupling = "resnet10t", {"img_size": 64}, "final"
    model = script.VisionGPT2Model(tiny_config)
    assert model.preprocessing["img_size"] == 64
    assert model.encoder_states(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 32)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"resample": "lanczos"}, "resample 'lanczos' is neither bicubic nor bilinear"),
        ({"mean": 0.5}, "mean 0.5 is not one finite number for each of three channels"),
        ({"img_size": 64}, "img_size is the encoder's, 32; change it in encoder_options"),
        ({"crop": 0.9}, "preprocessing has no crop; it has mean, std, resample and grey16"),
    ],
)
def test_bad_preprocessing_is_refused(script, tiny_config, preprocessing, message):
    tiny_config.preprocessing = preprocessing
    with pytest.raises(ValueError, match=message):
        script.VisionGPT2Model(tiny_config)


def test_encoder_weights_without_network():
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .* --encoder_weights FILE"):
        build_encoder("vit_tiny_patch16_224", 2, weights="pretrained")


def test_random_vit_starts_with_2d_positions(tiny_config):
    """Rows and columns are told apart from the start: patches of one row share half of their position."""
    vit = build_encoder("vit_tiny_patch16_224", 2, "stepped", {**TINY_ENCODER, "patch_size": 8}).vit
    positions = vit.pos_embed[0, 1:].view(4, 4, 24)
    assert positions.requires_grad and not positions[0, 0].equal(positions[3, 3])
    same_in_row = (positions == positions[:, :1]).all(dim=(0, 1))
    same_in_column = (positions == positions[:1]).all(dim=(0, 1))
    assert same_in_row.sum() >= 12
    assert same_in_column.sum() >= 12


def test_vit_parts_are_reachable(tiny_model, images):
    patches = tiny_model.patch_embed(images)
    tokens = tiny_model._pos_embed(patches)
    assert tokens.shape == (3, 1 + patches.size(1), 24)
    assert torch.equal(tokens[:, 1:], patches + tiny_model.pos_embed[:, 1:])
    assert tiny_model.cls_token.shape == (1, 1, 24)
    assert len(tiny_model.blocks) == 2


# --- staged unfreezing ------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(script, tiny_config):
    """A model whose config says that encoder and GPT-2 are pretrained."""
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"
    return script.VisionGPT2Model(tiny_config)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def named(model, *parts):
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


NEW = ("cross_attn", "ln_cross", "bridges")


def test_stages_change_exactly_the_named_parameters(pretrained, capsys):
    everything = {name for name, _ in pretrained.named_parameters()}
    pretrained.pretrained_layers_trainable(trainable=False)
    assert trainable(pretrained) == named(pretrained, *NEW)
    frozen = sum(p.numel() for name, p in pretrained.named_parameters() if name not in named(pretrained, *NEW))
    assert f"{frozen:,}" in capsys.readouterr().out

    pretrained.unfreeze_gpt_layers()
    assert trainable(pretrained) == named(pretrained, *NEW, "gpt.trf_blocks")
    assert everything - trainable(pretrained) == named(
        pretrained, "encoder.", "tok_emb", "pos_emb.weight", "final_norm"
    )

    pretrained.pretrained_layers_trainable(trainable=True)
    assert trainable(pretrained) == everything


@pytest.mark.parametrize(("part", "prefix"), [("encoder_weights", "encoder."), ("decoder_weights", "gpt.")])
def test_random_weights_are_never_frozen(script, tiny_config, part, prefix):
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"
    setattr(tiny_config, part, "scratch")
    model = script.VisionGPT2Model(tiny_config)
    model.pretrained_layers_trainable(trainable=False)
    own = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    assert own <= trainable(model)
    assert trainable(model) != {name for name, _ in model.named_parameters()}


def test_a_model_that_is_frozen_as_a_whole(tiny_model, images):
    tiny_model.requires_grad_(False)
    assert not any(module.training for module in tiny_model.train().modules())
    assert len(tiny_model.generate(images[:1], torch.zeros(1, 1, dtype=torch.long), 3)) > 1


def test_frozen_parts_stay_in_eval_mode(pretrained):
    pretrained.pretrained_layers_trainable(trainable=False)
    pretrained.train()
    block = pretrained.gpt.trf_blocks[0]
    assert not any(module.training for module in pretrained.encoder.modules())
    assert not block.self_attn.training
    assert not block.mlp.dropout.training
    assert not pretrained.gpt.drop_emb.training
    assert block.cross_attn.training
    pretrained.pretrained_layers_trainable(trainable=True)
    assert all(module.training for module in pretrained.modules())


# --- files ------------------------------------------------------------------------------------------------------------


def test_from_pretrained_folder_gives_the_same_captioner(script, tiny_model, bpe, images, input_ids, tmp_path):
    tiny_model.preprocessing["mean"] = (0.1, 0.2, 0.3)
    config = {"model_config": vars(tiny_model.config), "preprocessing": tiny_model.preprocessing}
    script.checkpoint.save_checkpoint(tmp_path, tiny_model.state_dict(), config, bpe)
    loaded = script.VisionGPT2Model.from_pretrained(tmp_path)
    assert torch.equal(loaded(images, input_ids), tiny_model(images, input_ids))
    assert list(loaded.preprocessing["mean"]) == [0.1, 0.2, 0.3]
    assert CaptionTokenizer(tmp_path).encode("a red dog") == bpe.encode("a red dog")


def test_from_pretrained_unknown_source(script):
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder, and not available"):
        script.VisionGPT2Model.from_pretrained("nobody/nothing")
