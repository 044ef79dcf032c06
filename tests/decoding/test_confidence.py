"""Confidence: what the decoder is asked about finished captions, and the calibration in config.json."""

import itertools
import json

import numpy as np
import pytest
import torch

from captioning.decoding import confidence, search
from captioning.decoding.confidence import Confidence, JudgedCaptions, caption_with_confidence
from captioning.decoding.search import Options, caption_images, generate_ids, log_probabilities, token_log_probabilities
from captioning.images.preprocessing import preprocess
from captioning.model.tokenizer import encode_prompt
from conftest import REPO_ROOT
from helpers.calibrated import calibrated_copy, known_of

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [str(SHAPES / f"scene_{i}.png") for i in range(10)]


@pytest.fixture(scope="module")
def example():
    from MyLLM_Vit_gpt2_captioning import load_captioner

    return load_captioner(SHAPES)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_the_head_in_parts_gives_the_same(tiny_model, images, monkeypatch):
    ids = generate_ids(tiny_model, images, torch.zeros(3, 1, dtype=torch.long), 8, seed=0)
    whole = log_probabilities(tiny_model, images, ids, 1)
    monkeypatch.setattr(search, "MAX_LOGITS", 1)
    assert torch.allclose(log_probabilities(tiny_model, images, ids, 1), whole, atol=1e-5)


@pytest.mark.parametrize("options", [Options(deterministic=True), Options(num_beams=3, num_return_sequences=2)])
def test_captions_are_the_same_with_confidence(example, options):
    """Bit for bit, in batches of any size, and so is the confidence but for rounding."""
    model, tokenizer = example
    plain = caption_images(model, tokenizer, SCENES, **vars(options))
    whole = caption_with_confidence(model, tokenizer, SCENES, known_of(model), options)
    parts = caption_with_confidence(model, tokenizer, SCENES, known_of(model), options, batch_size=3)
    texts = [[caption for caption, _ in of_image] for of_image in whole]
    assert [of_image if options.num_return_sequences > 1 else of_image[0] for of_image in texts] == plain
    for one, other in zip(itertools.chain(*whole), itertools.chain(*parts), strict=True):
        assert one[0] == other[0] == " ".join(one[1].evidence.words)
        assert one[1].caption == pytest.approx(other[1].caption, abs=1e-4)
        assert one[1].words == pytest.approx(other[1].words, abs=1e-4)


def test_evidence_is_the_sum_over_the_tokens_of_a_word(example):
    """The words of the prompt are not in it; words and EOS make up the caption's log-probability."""
    model, tokenizer = example
    pixels = torch.stack([preprocess(scene, **model.preprocessing) for scene in SCENES[:2]])
    prompt = torch.tensor([encode_prompt(tokenizer, "there is")] * 2)
    ids = generate_ids(model, pixels, prompt, deterministic=True)
    for judged, total in zip(
        known_of(model).judge(model, tokenizer, pixels, ids, prompt.size(1)),
        log_probabilities(model, pixels, ids, prompt.size(1)).tolist(),
        strict=True,
    ):
        evidence = judged.evidence
        assert evidence.words[0] == "a" and len(evidence.words) == len(judged.words) == 9
        assert evidence.with_photo.sum() + evidence.end == pytest.approx(total, abs=1e-3)
        assert evidence.log_probability == pytest.approx(total, abs=1e-3)


def test_without_a_photo_the_photo_does_not_matter(example):
    """Nearly all colours are seen; what any scene has is guessed."""
    model, tokenizer = example
    pixels = torch.stack([preprocess(scene, **model.preprocessing) for scene in SCENES[:4]])
    known, prompt = known_of(model), torch.tensor([encode_prompt(tokenizer, "")] * 4)
    known.no_photo = torch.stack([tokens.mean((0, 1)) for tokens in model.encoder_states(pixels)]).detach()
    ids = generate_ids(model, pixels, prompt, deterministic=True)
    other = known.log_probabilities(model, model.encoder_states(pixels.flip(0)), ids, 1)[1]
    assert torch.allclose(known.log_probabilities(model, model.encoder_states(pixels), ids, 1)[1], other, atol=1e-4)
    seen = []  # (word, whether it was seen)
    for judged in known.judge(model, tokenizer, pixels, ids, 1):
        seen += zip(judged.evidence.words, judged.evidence.seen(), strict=True)
    assert not any(was_seen for word, was_seen in seen if word in ("a", "is"))
    colours = [was_seen for word, was_seen in seen if word in ("red", "green", "blue", "yellow", "purple", "white")]
    assert len(colours) == 8 and sum(colours) >= 6
    no_attention = {id(block.cross_attn.c_proj): block.cross_attn.c_proj for block in model.gpt.trf_blocks}.values()
    before = [layer.weight.clone() for layer in no_attention]
    with torch.no_grad():
        for layer in no_attention:
            layer.weight.zero_()
    with_photo, without, _ = known.log_probabilities(model, model.encoder_states(pixels), ids, 1)
    with torch.no_grad():
        for layer, weight in zip(no_attention, before, strict=True):
            layer.weight.copy_(weight)
    assert torch.allclose(with_photo, without, atol=1e-5)


def test_shifted_copies_of_the_photo(example, tmp_path):
    """A word's probability is then the mean over the photo and four copies; the caption's stays the photo's."""
    model, tokenizer = example
    pixels = torch.stack([preprocess(scene, **model.preprocessing) for scene in SCENES[:2]])
    prompt = torch.tensor([encode_prompt(tokenizer, "")] * 2)
    ids = generate_ids(model, pixels, prompt, deterministic=True)
    plain, known = known_of(model), known_of(model)
    known.shifted = True
    step = round(pixels.size(-1) * confidence.SHIFT)
    left = torch.cat([pixels[..., step:], pixels[..., -1:].expand(-1, -1, -1, step)], dim=-1)
    *_, copies = known.log_probabilities(model, model.encoder_states(pixels), ids, 1, pixels)
    at_left = token_log_probabilities(model, model.encoder_states(left), ids, 1)
    assert len(copies) == 4 and any(torch.allclose(copy, at_left, atol=1e-5) for copy in copies)
    asked = [known_one.judge(model, tokenizer, model.levels(pixels), ids, 1, pixels) for known_one in (plain, known)]
    for before, after, *rows in zip(*asked, *copies, strict=True):
        assert after.evidence.log_probability == before.evidence.log_probability
        assert np.array_equal(after.evidence.with_photo, before.evidence.with_photo)
        assert np.array_equal(before.evidence.agreed, before.evidence.with_photo)
        first = [before.evidence.with_photo[0], *(row[0].item() for row in rows)]  # each word of Shapes is a token
        assert after.evidence.agreed[0] == pytest.approx(np.log(np.exp(first).mean()), abs=1e-5)
    with pytest.raises(ValueError, match="looks at shifted photos, not at cached tokens: no --cache_dir"):
        known.judge(model, tokenizer, model.levels(pixels), ids, 1)
    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    assert not Confidence.load(folder).shifted
    known.save(folder)
    assert Confidence.load(folder).shifted


def test_log_odds():
    values = confidence.log_odds(np.log([0.5, 0.9, 1e-9, 1.0]))
    assert values == pytest.approx([0, np.log(9), -confidence.MAX_LOG_ODDS, confidence.MAX_LOG_ODDS], abs=1e-3)
    assert np.isfinite(confidence.log_odds(np.array([0.0, -1e30]))).all()


def test_alternatives_are_the_likeliest_tokens(example):
    model, tokenizer = example
    states = model.encoder_states(preprocess(SCENES[0], **model.preprocessing)[None])
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode("a small blue triangle")])
    found = confidence.alternatives(model, tokenizer, states, ids, [3], count=4)
    log_prob = token_log_probabilities(model, states, ids[None], 1)[0, 2]
    assert found[0][0] == ("blue", pytest.approx(log_prob.exp().item(), abs=1e-4))
    assert [p for _, p in found[0]] == sorted((p for _, p in found[0]), reverse=True) and len(found[0]) == 4


def test_the_calibration_is_kept_in_the_config(example, tmp_path, script):
    """Beside what was there; a captioner without one has none, and one that is damaged is named."""
    assert Confidence.load(SHAPES) is None
    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    known, given = Confidence.load(folder), known_of(example[0])
    assert torch.equal(known.no_photo, given.no_photo)
    assert (known.usual, known.word, known.caption, known.about) == (
        given.usual,
        given.word,
        given.caption,
        given.about,
    )
    config, before = (json.loads((place / "config.json").read_text()) for place in (folder, SHAPES))
    stored = config.pop("confidence")
    assert config == before
    script.load_captioner(folder)  # the rest of the code does not mind
    (folder / "config.json").write_text(json.dumps(config | {"confidence": stored | {"no_photo": "AAAA"}}))
    with pytest.raises(ValueError, match=r"config\.json: its confidence cannot be read .*--calibrate"):
        Confidence.load(folder)


def test_judged_captions_of_several_captions_an_image(example):
    model, tokenizer = example
    judged = JudgedCaptions(known_of(model), model, tokenizer)
    options = Options(num_beams=3, num_return_sequences=3)
    batches = list(search.caption_batches(model, tokenizer, SCENES[:3], options, 2, observe=judged))
    assert {i: len(of_image) for i, of_image in judged.items()} == {0: 3, 1: 3, 2: 3}
    for i, captions, _ in batches:
        assert [" ".join(one.evidence.words) for one in judged[i]] == captions
