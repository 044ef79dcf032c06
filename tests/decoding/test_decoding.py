"""Writing captions: cache and batch change nothing, draws follow their distribution, options mean what they say."""

import re

import numpy as np
import pytest
import torch

from captioning.decoding import cached_decoder, search
from captioning.decoding.search import generate_ids
from conftest import REDUCED_ENCODERS, randomize

BEAMS = dict(num_beams=4)
GREEDY = dict(deterministic=True)
EARLY = dict(early_stopping=True, num_return_sequences=4)


@pytest.fixture
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def ending(tiny_model, tiny_config):
    """The tiny model, changed so that captions end at different lengths."""
    with torch.no_grad():
        tiny_model.gpt.tok_emb.weight[tiny_config.eos_token_id] *= 3
    return tiny_model


def starts(model, images, tokens=1):
    return torch.full((len(images), tokens), model.config.eos_token_id)


def decode_all_again(decoder, newest):
    """In the place of `CachedDecoder._decode`: every token from the start, without caches."""
    hidden = decoder.model.decode(decoder.sequences, decoder.encoder_states)[:, -1]
    decoder.logits = decoder.model.gpt.logits(hidden).float()


def captions_of(ids, eos):
    """Rows as lists, cut behind their first EOS after BOS."""
    return [search.trim(row, 1, eos).tolist() for row in ids]


# --- cache and batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, BEAMS, BEAMS | EARLY, dict(seed=1, num_return_sequences=3)])
def test_finished_images_leave_the_batch(ending, images, options, monkeypatch):
    """The captions are the same as when all stay to the end, at the cost of fewer rows."""
    rows, decode = [], cached_decoder.CachedDecoder._decode
    monkeypatch.setattr(
        cached_decoder.CachedDecoder, "_decode", lambda self, newest: rows.append(len(newest)) or decode(self, newest)
    )
    leaving = generate_ids(ending, images, starts(ending, images), 20, **options)
    cost = rows.copy()
    rows.clear()
    monkeypatch.setattr(search, "SHRINK_BELOW", 0)
    staying = generate_ids(ending, images, starts(ending, images), 20, **options)
    assert len(cost) == len(rows)
    assert sum(cost) < 0.8 * sum(rows)
    assert cost[1:] == sorted(cost[1:], reverse=True)  # rows only leave
    if "seed" not in options:
        assert torch.equal(leaving, staying)
    else:  # the draws of those that stay are others, because fewer are made
        assert leaving.shape[0] == staying.shape[0] == 3 * len(images)
        assert leaving[:, 1].tolist() == staying[:, 1].tolist()


def naive_greedy(model, image, max_tokens, eos):
    """Everything again for every token, by the promised `forward`."""
    sequence = torch.tensor([[eos]])
    for _ in range(max_tokens):
        newest = model(image, sequence).argmax(-1)
        sequence = torch.cat([sequence, newest], dim=1)
        if newest.item() == eos:
            break
    return sequence[0]


def test_cached_batched_generation_equals_the_naive_one(ending, images, tiny_config):
    eos = tiny_config.eos_token_id
    with torch.no_grad():
        naive = [naive_greedy(ending, image[None], 15, eos).tolist() for image in images]
    assert len({len(ids) for ids in naive}) > 2
    assert len({tuple(ids) for ids in naive}) > 6
    batched = generate_ids(ending, images, starts(ending, images), 15, deterministic=True)
    for image, ids, row in zip(images, naive, batched.tolist(), strict=True):
        assert row == ids + [eos] * (len(row) - len(ids))
        single = ending.generate(image[None], torch.tensor([[eos]]), max_tokens=15, deterministic=True)
        assert single.device.type == "cpu"
        assert single.tolist() == ids


@pytest.mark.parametrize("name", REDUCED_ENCODERS)
def test_cache_and_batch_change_nothing_for_any_encoder(script, tiny_config, name, monkeypatch):
    """Greedy and by 4 beams: cached equals uncached, a batch of images equals one at a time, token for token."""
    tiny_config.encoder, tiny_config.encoder_options = name, REDUCED_ENCODERS[name]
    tiny_config.vocab_size = 40  # so few that some captions end
    tiny_config.normalize_tokens = True  # the tokens of a random CNN are otherwise nearly the same for all images
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model.gpt)
    randomize(model.bridges)
    size, eos = model.preprocessing["img_size"], tiny_config.eos_token_id
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(5))
    for options in (GREEDY, BEAMS):
        with monkeypatch.context() as patch:
            patch.setattr(cached_decoder.CachedDecoder, "_decode", decode_all_again)
            uncached = generate_ids(model, images, starts(model, images), 12, **options)
        captions = captions_of(uncached, eos)
        assert len(set(map(tuple, captions))) >= 4
        assert torch.equal(generate_ids(model, images, starts(model, images), 12, **options), uncached)
        singles = [model.generate(image[None], torch.tensor([[eos]]), 12, **options) for image in images]
        assert [single.tolist() for single in singles] == captions


def test_a_prompt_is_continued(ending, images):
    """The prompt, processed at once, gives what feeding it token by token gives."""
    eos = ending.config.eos_token_id
    greedy = generate_ids(ending, images, starts(ending, images), 8, deterministic=True)
    continued = generate_ids(ending, images, greedy[:, :4], 5, deterministic=True)
    assert captions_of(continued, eos) == captions_of(greedy, eos)
    beams = generate_ids(ending, images, greedy[:, :4], 5, num_beams=3)
    assert torch.equal(beams[:, :4], greedy[:, :4])


def test_generation_stops_at_seq_len_and_restores_the_mode(tiny_model, images, tiny_config):
    tiny_model.train()
    ids = generate_ids(tiny_model, images[:3], torch.zeros(3, 20, dtype=torch.long), max_tokens=50)
    assert ids.size(1) <= tiny_config.seq_len
    assert tiny_model.training
    full = torch.zeros(3, tiny_config.seq_len, dtype=torch.long)
    assert torch.equal(generate_ids(tiny_model, images[:3], full, num_beams=2), full)
    with pytest.raises(ValueError, match="a prompt of 25 tokens does not fit into seq_len 24"):
        generate_ids(tiny_model, images[:3], torch.zeros(3, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="one image and one sequence"):
        tiny_model.generate(images[:3], torch.zeros(3, 20, dtype=torch.long))


# --- sampling ---------------------------------------------------------------------------------------------------------

DRAWS = 20_000


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution to draw from, written down once more: the probabilities, most of them 0."""
    probabilities = (logits / temperature).softmax(-1)  # (V,)
    order = probabilities.argsort(descending=True)
    if top_k:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    kept = 0.0
    for token in order:
        if kept >= top_p:
            probabilities[token] = 0
        kept += float(probabilities[token])
    return probabilities / probabilities.sum()


def p_value(counts, expected):
    """Of the chi-square test; rare tokens are counted together, so that each class expects at least 5."""
    from scipy.stats import chisquare

    rare = expected * DRAWS < 5
    classes = [*counts[~rare].tolist(), counts[rare].sum().item()]
    wanted = [*(expected[~rare] * DRAWS).tolist(), expected[rare].sum().item() * DRAWS]
    if wanted[-1] == 0:
        assert classes.pop() == wanted.pop()
    scale = sum(classes) / sum(wanted)
    return chisquare(classes, [value * scale for value in wanted]).pvalue


@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=0.7), dict(temperature=1.6), dict(top_k=7), dict(top_p=0.8),
     dict(temperature=1.3, top_k=20, top_p=0.9)],
)  # fmt: skip
def test_draws_follow_the_filtered_distribution(tiny_model, images, options):
    """20,000 draws of the next token; no token that is filtered out, and frequencies that pass chi-square at 0.001."""
    with torch.no_grad():
        tiny_model.gpt.final_norm.scale.mul_(0.5)  # a distribution with many likely tokens
        logits = tiny_model(images[:1], starts(tiny_model, images[:1]))[0, 0].double()
    ids = generate_ids(
        tiny_model, images[:1], starts(tiny_model, images[:1]), 1, num_return_sequences=DRAWS, seed=3, **options
    )
    counts = ids[:, 1].bincount(minlength=len(logits)).double()
    expected = filtered(logits, **options)
    assert (expected > 0).sum() >= 5
    assert not counts[expected == 0].any()
    assert p_value(counts, expected) > 0.001
    assert p_value(counts, filtered(logits, **options | dict(temperature=1.3 * options.get("temperature", 1)))) < 1e-6


def test_a_seed_makes_draws_repeatable(tiny_model, images):
    def draw(seed):
        return generate_ids(tiny_model, images, starts(tiny_model, images), 6, seed=seed)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)  # training in between would go on undisturbed


def test_without_a_seed_draws_come_from_torch(tiny_model, images):
    def samples(temperature):
        torch.manual_seed(0)
        start = starts(tiny_model, images[:1])
        return {tuple(tiny_model.generate(images[:1], start, 6, temperature).tolist()) for _ in range(20)}

    assert samples(1.0) == samples(1.0)
    assert len(samples(1.0)) > len(samples(0.001)) == 1


def test_several_captions_of_an_image(ending, images):
    eos = ending.config.eos_token_id
    ids = generate_ids(ending, images, starts(ending, images), 8, num_return_sequences=3, seed=0)
    assert len(ids) == 36
    several = ending.generate(images[:1], starts(ending, images[:1]), 8, num_beams=4, num_return_sequences=3)
    best = ending.generate(images[:1], starts(ending, images[:1]), 8, num_beams=4)
    assert len({tuple(row.tolist()) for row in several}) == 3
    assert torch.equal(several[0], best)
    assert all((row[1:-1] != eos).all() for row in several)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature must be positive; the likeliest token every time is greedy decoding"),
        (dict(top_k=-1), "top_k must be 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1"),
        (dict(num_beams=0), "num_beams must be at least 1"),
        (dict(repetition_penalty=0), "repetition_penalty must be positive"),
        (dict(early_stopping=1), 'early_stopping must be True, False or "never", not 1'),
        (dict(early_stopping="soon"), "early_stopping must be True, False or \"never\", not 'soon'"),
        (dict(num_beams=2, top_k=5), "neither greedy nor beam search draws tokens"),
        (dict(num_beams=2, temperature=0.5), "neither greedy nor beam search draws tokens"),
        (dict(deterministic=True, top_p=0.5), "neither greedy nor beam search draws tokens"),
        (dict(deterministic=True, num_return_sequences=2), "greedy decoding has one caption an image"),
        (dict(num_beams=2, num_return_sequences=3), "2 beams cannot return 3 captions"),
        (dict(min_tokens=51), r"min_tokens must be from 0 to max_tokens \(50\), not 51"),
        (dict(max_words=-1), "max_words must be 0"),
        (dict(max_chars=-1), "max_chars must be 0"),
        (dict(max_words=5), "max_words and max_chars need the captioner's tokenizer"),
    ],
)
def test_options_out_of_range(tiny_model, images, options, message):
    with pytest.raises(ValueError, match=message):
        generate_ids(tiny_model, images, starts(tiny_model, images), **options)


def test_caption_images_takes_all_options(script, tiny_model, bpe):
    import numpy as np

    photos = [np.full((40, 50, 3), value, dtype=np.uint8) for value in (0, 120, 255)]
    lists = script.caption_images(
        tiny_model, bpe, photos, 6, deterministic=False, num_beams=3, num_return_sequences=2, prompt="a red dog"
    )
    assert [len(several) for several in lists] == [2, 2, 2]
    assert all(caption.startswith("a red dog") for several in lists for caption in several)
    draws = script.caption_images(tiny_model, bpe, [photos[0]] * 4, 6, deterministic=False, batch_size=2, seed=1)
    assert draws[:2] != draws[2:]  # the second batch draws new numbers
    assert draws == script.caption_images(tiny_model, bpe, [photos[0]] * 4, 6, 1.0, False, batch_size=2, seed=1)
    in_batches = script.caption_images(tiny_model, bpe, photos, 6, batch_size=2)
    assert in_batches == script.caption_images(tiny_model, bpe, photos, 6)


def test_more_beams_than_fit_are_refused_in_one_line(script, tiny_model, bpe, monkeypatch):
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError) as refused:
        script.caption_images(tiny_model, bpe, [image], num_beams=100_000)
    vocabulary = tiny_model.config.vocab_size
    assert str(refused.value).startswith(f"num_beams is 100,000, but must be at most {vocabulary}, the size of the voc")
    monkeypatch.setattr(search, "device_memory", lambda device: 5_000_000)
    with pytest.raises(ValueError, match=r"num_beams 250 with 2 images .*: at most \d+ beams") as refused:
        script.caption_images(tiny_model, bpe, [image] * 2, num_beams=250)
    fits = int(re.search(r"at most (\d+) beams", str(refused.value))[1])
    assert 1 < fits < 250
    script.caption_images(tiny_model, bpe, [image] * 2, num_beams=min(fits, 20), max_tokens=2)
