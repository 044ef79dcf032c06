"""Attention maps: the eager path writes the same captions, its weights are those that were used, and they land where
the image tokens come from."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.decoding import attention_maps, cached_decoder, search
from captioning.decoding.attention_maps import (
    caption_ids,
    cross_attention,
    draw_attention,
    eager_attend,
    eager_decode,
    group_words,
    overlay,
    patch_maps,
    word_maps,
)
from captioning.decoding.search import generate_ids
from captioning.model.tokenizer import CaptionTokenizer
from conftest import CAPTIONS, REDUCED_ENCODERS, REPO_ROOT, randomize
from MyLLM_Vit_gpt2_captioning import load_captioner

FOREIGN = "caf\u00e9 \u6f22\u5b57 zebra !"  # characters of two and three tokens
SHAPES = REPO_ROOT / "examples" / "shapes"
CNN = dict(encoder="resnet10t", encoder_options=REDUCED_ENCODERS["resnet10t"])
CNN_LEVELS = CNN | dict(feature_levels=2)
KINDS = {  # what cross-attention reads, and the side of its grid
    "stepped ViT": (dict(coupling="stepped"), 2),
    "final ViT": (dict(coupling="final"), 2),
    "CLIP": (dict(encoder="vit_base_patch16_clip_quickgelu_224", coupling="final"), 2),
    "registers": (dict(encoder="vit_small_patch14_reg4_dinov2"), 2),
    "rotary": (dict(encoder="vit_small_patch16_dinov3"), 2),
    "no class token": (dict(encoder="vit_base_patch16_siglip_224"), 2),
    "post-norm": (dict(post_norm=True, activation="relu"), 2),
    "CNN": (CNN, 2),
    "channels last": (
        dict(encoder="swin_tiny_patch4_window7_224", encoder_options=REDUCED_ENCODERS["swin_tiny_patch4_window7_224"]),
        2,
    ),
    "BEiT": (dict(encoder="beit_base_patch16_224", encoder_options=REDUCED_ENCODERS["beit_base_patch16_224"]), 2),
    "CNN, levels side by side": (CNN_LEVELS | dict(coupling="final"), 2),
    "CNN, stepped": (CNN_LEVELS | dict(coupling="stepped"), 2),
    "refiner": (CNN | dict(refiner=dict(width=32, grid=3, layers=1, heads=4)), 3),
}


@pytest.fixture(scope="module")
def shapes_model():
    return load_captioner(SHAPES)


@pytest.fixture(params=KINDS)
def kind(request, script, tiny_config):
    options, side = KINDS[request.param]
    vars(tiny_config).update(options, normalize_tokens=True, vocab_size=60)
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model.gpt)
    randomize(model.bridges)
    if getattr(model.encoder, "refiner", None):
        randomize(model.encoder.refiner)
    return model, side


def images_for(model, count):
    size = model.preprocessing["img_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


# --- the weights ------------------------------------------------------------------------------------------------------


def test_the_eager_path_writes_the_same_captions(kind, monkeypatch):
    """Greedy and by beams, token for token, and its weights are over the tokens that the block reads."""
    model, side = kind
    images = images_for(model, 4)
    starts = torch.full((4, 1), model.config.eos_token_id)

    def decode_eagerly(decoder, newest):
        hidden, _ = eager_decode(decoder.model, decoder.sequences, decoder.encoder_states)
        decoder.logits = cached_decoder.next_token_logits(decoder.model, hidden[:, -1])

    for options in (dict(deterministic=True), dict(num_beams=3)):
        fast = generate_ids(model, images, starts, 10, **options)
        with monkeypatch.context() as patch:
            patch.setattr(cached_decoder.CachedDecoder, "_decode", decode_eagerly)
            assert torch.equal(generate_ids(model, images, starts, 10, **options), fast)
    assert len({tuple(row) for row in fast.tolist()}) > 1
    with torch.no_grad():
        states = model.encoder_states(images)
    weights = cross_attention(model, images[0], fast[0])
    depth, heads, N = model.config.depth, model.config.num_heads, states[0].size(1)
    assert weights.shape == (depth, heads, fast.size(1), N)
    assert torch.allclose(weights.sum(-1), torch.ones(depth, heads, fast.size(1)), atol=1e-5)
    assert weights.std() > 0.01
    assert patch_maps(model, weights).shape == (depth, heads, fast.size(1), side, side)


def test_hidden_states_and_outputs_are_the_modules(kind):
    """Also with several captions an image; what the weights make of the values is what `attend` returns."""
    model, _ = kind
    images, ids = images_for(model, 2), torch.randint(60, (6, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = model.encoder_states(images)
        hidden, weights = eager_decode(model, ids, states)  # K = 3
        assert torch.allclose(hidden, model.decode(ids, states), atol=1e-4, rtol=1e-4)
        single, alone = eager_decode(model, ids[4:5], [tokens[1:] for tokens in states])
        assert torch.allclose(hidden[4:5], single, atol=1e-4, rtol=1e-4)
        for many, one in zip(weights, alone, strict=True):
            assert torch.allclose(many[4:5], one, atol=1e-5)
        for block, tokens in zip(model.gpt.trf_blocks, states, strict=True):
            q = torch.randn(6, 7, model.config.embed_dim, generator=torch.Generator().manual_seed(3))
            output, looked = eager_attend(block.cross_attn, q, tokens)
            assert torch.allclose(output, block.cross_attn(q, tokens, tokens), atol=1e-4, rtol=1e-4)
            _, values = block.cross_attn.project(tokens, tokens)  # (B, heads, N, head_dim)
            context = looked @ values.repeat_interleave(3, dim=0)  # (B*K, heads, T, head_dim)
            recomputed = block.cross_attn.c_proj(context.transpose(1, 2).flatten(2))
            assert torch.allclose(output, recomputed, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_shown_is_refused(shapes_model, tiny_model):
    model, tokenizer = shapes_model
    scene, ids = SHAPES / "scene_0.png", [0, *tokenizer.encode("a red circle")]
    with pytest.raises(ValueError, match="block 3: the decoder has blocks 0 to 2"):
        word_maps(model, tokenizer, scene, ids, block=3)
    with pytest.raises(ValueError, match="head -1: the decoder has heads 0 to 3"):
        word_maps(model, tokenizer, scene, ids, head=-1)
    with pytest.raises(ValueError, match="6 image tokens of vit_tiny_patch16_224 are no square grid"):
        patch_maps(tiny_model, torch.ones(7))
    with pytest.raises(ValueError, match="eval mode"):
        cross_attention(tiny_model.train(), torch.zeros(3, 32, 32), [0])


# --- words and maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (CAPTIONS[0], "bpe", CAPTIONS[0].split()),
        (FOREIGN, "bpe", FOREIGN.split()),
        ("a red dog runs .", "word", ["a", "red", "dog", "runs", "."]),
    ],
)
def test_tokens_are_grouped_to_words(text, kind, words):
    tokenizer = CaptionTokenizer.train(CAPTIONS, 270, kind)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    if kind == "bpe":
        assert len(ids) > len(words) + 4  # words have several pieces
    found = group_words(tokenizer, [*ids, tokenizer.eos_token_id, *ids])
    assert [word for word, _ in found] == words
    assert [p for _, positions in found for p in positions] == list(range(1, len(ids) - 1))
    assert group_words(tokenizer, ids[:1]) == group_words(tokenizer, [ids[0], ids[-1]]) == []


def test_the_map_of_a_word_is_the_attention_that_predicts_it(shapes_model):
    model, tokenizer = shapes_model
    text = "a small blue triangle above a purplish circle"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    scene = SHAPES / "scene_0.png"
    words, maps = word_maps(model, tokenizer, scene, torch.tensor(ids))
    assert words == text.split()
    assert maps.shape == (len(words), 6, 6)
    weights = cross_attention(model, attention_maps.preprocess(scene, **model.preprocessing), ids)
    grids = weights[..., 1:].unflatten(-1, (6, 6))  # without the class token, row by row
    assert torch.allclose(maps[2], grids[:, :, 2].mean((0, 1)))  # "blue" is token 3
    pieces = dict(group_words(tokenizer, ids))["purplish"]
    assert len(pieces) > 1
    assert torch.allclose(maps[6], grids[:, :, [p - 1 for p in pieces]].mean((0, 1, 2)), atol=1e-6)
    _, chosen = word_maps(model, tokenizer, scene, ids, block=1, head=3)
    assert torch.allclose(chosen[2], grids[1, 3, 2])
    assert divmod(int(maps[2].argmax()), 6) == (1, 2)  # the cell in which most of the triangle lies


def test_words_look_at_their_object():
    """On new scenes, against boxes that are known: far more than by area, and than at where objects usually are."""
    sys.path.insert(0, str(REPO_ROOT / "benchmarks"))
    import measure_attention

    cells = measure_attention.coverage((12, 8, 24, 16), grid=3, side=48)  # cells of 16 pixels
    assert cells.tolist() == [[0.25 * 0.5, 0.5 * 0.5, 0], [0, 0, 0], [0, 0, 0]]
    rows, right = measure_attention.measure(*load_captioner(SHAPES), scenes=24)
    assert right >= 22
    shares = {(block, kind): values for block, kind, *values in rows}
    assert len(shares) == 12
    for block in (0, 1, 2, "all"):
        own, elsewhere, other, area = shares[block, "colour"]
        assert own > 3.5 * area and own > 1.2 * elsewhere and own > 4 * other
    assert shares["all", "shape"][0] > 2 * shares["all", "shape"][3]


def test_overlay_heats_the_place_of_the_map(shapes_model):
    """The photo as the model sees it, squeezed; the cell [0, 3] of 2 x 4 is at the top right."""
    photo = Image.new("RGB", (400, 100), (100, 100, 100))
    grid = torch.tensor([[0.0, 0.0, 0.0, 0.4], [0.0, 0.1, 0.0, 0.0]])
    heated = overlay(photo, grid, side=80)
    assert heated.size == (80, 80) and heated.mode == "RGB"
    brightness = torch.from_numpy(np.array(heated.convert("L"))).int()  # (80, 80)
    assert brightness[20, 70] > brightness[60, 30] > brightness[60, 70] > 0
    assert brightness[:40].sum() > brightness[40:].sum()
    assert overlay(photo, torch.zeros(3, 3), side=8).getextrema() == overlay(photo, torch.zeros(1, 1), 8).getextrema()


def test_the_picture_has_a_panel_for_each_word(shapes_model, tmp_path):
    model, tokenizer = shapes_model
    scene = SHAPES / "scene_2.png"
    drawn = []
    for options in (dict(deterministic=True), dict(num_beams=3, num_return_sequences=3), dict(max_tokens=0)):
        ids = caption_ids(model, tokenizer, scene, **options)
        drawn.append([word_maps(model, tokenizer, scene, row)[0] for row in ids])
        words, maps = word_maps(model, tokenizer, scene, ids[0])
        draw_attention(scene, words, maps, tmp_path / "attention.png")
        with Image.open(tmp_path / "attention.png") as picture:
            assert picture.height == -(-(1 + len(words)) // 6) * 184
            assert picture.width == min(6, 1 + len(words)) * 160
    (greedy,), beams, nothing = drawn
    assert " ".join(greedy) == search.caption_images(model, tokenizer, [scene])[0]
    assert len(beams) == 3 and greedy in beams
    assert nothing == [[]]
    (prompted,) = caption_ids(model, tokenizer, scene, prompt="below a", deterministic=True)
    assert word_maps(model, tokenizer, scene, prompted)[0][:2] == ["below", "a"]
