"""Writing captions: greedy, sampled or by beam search.

The image is encoded once, cross-attention's keys and values are projected once per block and shared by all captions
of an image, and each new token costs one token's work.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from captioning.data.batching import to_device
from captioning.decoding.cached_decoder import decoder_for, next_token_logits
from captioning.decoding.packed_weights import packed_linears
from captioning.images.preprocessing import preprocess
from captioning.model.tokenizer import encode_prompt

LEAVE_BELOW = 0.8  # finished images leave the batch when so few go on; to copy the rest at each step would cost more


@dataclass(frozen=True)
class Options:
    """How captions are chosen: greedy (`deterministic`), sampled (the default) or by beam search (`num_beams` above 1).

    The names and the meaning are those of `transformers.GenerationMixin.generate`, and so are the captions.
    Raises ValueError for options that are out of range or contradict each other.
    """

    max_tokens: int = 50  # new tokens, EOS included
    temperature: float = 1.0  # tokens are drawn from softmax(logits / temperature)
    deterministic: bool = False  # the likeliest token every time; temperature is then ignored
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability (Holtzman et al. 2020)
    num_beams: int = 1  # continuations that beam search keeps open
    length_penalty: float = 1.0  # a beam's score is its log-probability / (new tokens, EOS included) ** length_penalty
    early_stopping: bool | str = False  # end when num_beams captions are finished (True), when no open one is likely
    # to beat the worst of them (False), or when none can ("never")
    repetition_penalty: float = 1.0  # above 1: tokens that are there already get less likely (Keskar et al. 2019); BOS
    # counts as there, so that with one id for BOS and EOS captions also end later
    no_repeat_ngram_size: int = 0  # n: no n tokens occur twice; 0: off
    num_return_sequences: int = 1  # captions an image: as many draws, or the best beams
    seed: int | torch.Generator | None = None  # of the draws, or where to take them; None: from torch's own generator

    def __post_init__(self):
        beams = self.num_beams > 1
        samples = not (self.deterministic or beams)
        ranges = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (
                self.temperature > 0 or not samples,
                "positive; the likeliest token every time is greedy decoding (deterministic)",
            ),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "early_stopping": (
                any(self.early_stopping is v for v in (True, False)) or self.early_stopping == "never",
                'True, False or "never"',
            ),
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if (not samples and (self.top_k or self.top_p < 1)) or (beams and self.temperature != 1):
            raise ValueError("temperature, top_k and top_p shape sampling; neither greedy nor beam search draws tokens")
        if self.num_return_sequences > 1 and self.deterministic and not beams:
            raise ValueError("greedy decoding has one caption an image; for more use beams or sampling")
        if beams and self.num_beams < self.num_return_sequences:
            raise ValueError(f"{self.num_beams} beams cannot return {self.num_return_sequences} captions")

    def filters(self):
        """The functions (ids (rows, T), scores (rows, vocab_size)) -> scores that these options ask for, in the order
        in which transformers applies them. Its import is slow, so only what needs it waits for it."""
        filters = []
        if self.repetition_penalty != 1:
            from transformers.generation import RepetitionPenaltyLogitsProcessor

            filters.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            from transformers.generation import NoRepeatNGramLogitsProcessor

            filters.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.temperature != 1 and not self.deterministic:
            filters.append(lambda ids, scores: scores / self.temperature)
        if self.top_k:
            from transformers.generation import TopKLogitsWarper

            filters.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            from transformers.generation import TopPLogitsWarper

            filters.append(TopPLogitsWarper(self.top_p))
        return filters


@torch.inference_mode()
def generate_ids(model, images, sequences, max_tokens=50, temperature=1.0, deterministic=False, **options):
    """Continue each sequence by up to `max_tokens` tokens, for a batch of images; see `Options` for how.

    images (B, 3, H, W) or the model's `levels` of them; sequences (B, T) start with BOS, more tokens are a prompt.
    Returns ids (B * num_return_sequences, T + new) on the model's device, the captions of an image side by side; what
    follows a row's first generated EOS is EOS. A caption is cut where the decoder's seq_len ends. Dropout is off; the
    model's mode is restored afterwards. Raises ValueError for unsuitable options and for a prompt longer than seq_len.
    """
    options = Options(max_tokens, temperature, deterministic, **options)
    room = model.config.seq_len - sequences.size(1)
    if room < 0:
        raise ValueError(f"a prompt of {sequences.size(1)} tokens does not fit into seq_len {model.config.seq_len}")
    max_tokens = min(max_tokens, room)
    if max_tokens == 0:
        return sequences.repeat_interleave(options.num_return_sequences, dim=0)
    eos = model.config.eos_token_id
    rows_per_image = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    with _evaluating(model):
        encoder_states = model.encoder_states(images)
    with (
        _evaluating(model),
        packed_linears(model.gpt) as weights,
        decoder_for(model, encoder_states, rows_per_image, sequences.size(1) + max_tokens, weights) as decoder,
    ):
        decoder.start(encoder_states, sequences, options.filters())
        if options.num_beams > 1:
            ids = _beam_search(decoder, max_tokens, eos, options)  # (B, num_beams, T + new), best first
            return ids[:, : options.num_return_sequences].flatten(0, 1)
        choose = _likeliest
        if not options.deterministic:
            generator = options.seed
            if isinstance(generator, int):
                generator = torch.Generator(sequences.device).manual_seed(generator)
            choose = partial(_draw, generator=generator)
        return _one_by_one(decoder, choose, max_tokens, eos)


def trim(ids, prompt_length, eos):
    """One row of `generate_ids`, cut behind its first generated EOS."""
    ends = (ids[prompt_length:] == eos).nonzero()
    return ids[: prompt_length + int(ends[0]) + 1] if len(ends) else ids


@contextmanager
def _evaluating(model):
    """The model in eval mode, and back in its own afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def log_probabilities(model, images, ids, prompt_length):
    """How likely the model finds captions: the sum of the log-probabilities, in nats, of the tokens behind the prompt,
    the first EOS included, without temperature or any other option -> float tensor (B * K,).

    images as in `generate_ids`, ids (B * K, T) as it returns them, `prompt_length` tokens (BOS included) were given.
    """
    B, eos, sums = len(images[0] if isinstance(images, list) else images), model.config.eos_token_id, []
    with _evaluating(model):
        states = model.encoder_states(images)
        for i, rows in enumerate(ids.view(B, -1, ids.size(1))):  # one image at a time: scores are large
            targets = rows[:, prompt_length:]  # (K, new)
            ends = targets == eos
            real = ends.cumsum(1) - ends.long() == 0  # (K, new): up to the first EOS, which counts
            hidden = model.decode(rows[:, :-1], [tokens[i : i + 1] for tokens in states])[:, prompt_length - 1 :]
            likely = next_token_logits(model, hidden).log_softmax(-1).gather(2, targets[..., None])[..., 0]  # (K, new)
            sums.append((likely * real).sum(1))
    return torch.cat(sums)


def _likeliest(scores):
    return scores.argmax(-1, keepdim=True)  # (rows, 1)


def _draw(scores, generator):
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)  # (rows, 1)


def _one_by_one(decoder, choose, max_tokens, eos):
    """Greedy search or sampling: `choose` takes scores (rows, vocab_size) to tokens (rows, 1)."""
    start, device = decoder.sequences.size(1), decoder.sequences.device
    captions = torch.full((len(decoder.sequences), start + max_tokens), eos, device=device)
    captions[:, :start] = decoder.sequences
    rows = torch.arange(len(captions), device=device)  # of `captions`, where the decoder's rows are written
    ended = torch.zeros(len(captions), dtype=torch.bool, device=device)  # of the decoder's rows
    for length in range(start + 1, start + max_tokens + 1):
        newest = choose(decoder.filtered(decoder.scores)).masked_fill(ended[:, None], eos)
        captions[rows, length - 1] = newest[:, 0]
        ended |= newest[:, 0] == eos
        goes_on = ~ended.view(-1, decoder.rows_per_image).all(1)  # (images,)
        images = goes_on.nonzero()[:, 0]
        if len(images) == 0 or length == start + max_tokens:
            break
        if decoder.shrinks and len(images) <= LEAVE_BELOW * len(goes_on):
            kept = decoder.keep_images(images)
            rows, ended, newest = rows[kept], ended[kept], newest[kept]
        decoder.append(newest)
    return captions[:, :length]


def _beam_search(decoder, max_tokens, eos, options):
    """-> ids (B, num_beams, T + new), best first.

    The search of `transformers.GenerationMixin._beam_search`: in every step the 2 * num_beams best continuations of
    an image are looked at, so that num_beams open ones remain even if as many end. Those that end are kept if they
    rank among the first num_beams continuations and among the num_beams best finished captions so far.
    """
    num_beams, length_penalty, early_stopping = options.num_beams, options.length_penalty, options.early_stopping
    B, device, start = len(decoder.sequences) // num_beams, decoder.sequences.device, decoder.sequences.size(1)
    impossible = -torch.inf
    open_scores = torch.full((B, num_beams), impossible, device=device)  # sums of log-probabilities
    open_scores[:, 0] = 0  # all beams start alike: only the first may have continuations in the first step
    finished = torch.full((B, num_beams, start + max_tokens), eos, device=device)
    finished[:, :, :start] = decoder.sequences.view(B, num_beams, start)
    finished_scores = torch.full((B, num_beams), impossible, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    ranks_first = torch.arange(2 * num_beams, device=device) < num_beams  # (2 * beams,)
    captions = finished.clone()  # of all images; the variables above lose those that leave the batch
    images = torch.arange(B, device=device)  # those that are left

    for new in range(1, max_tokens + 1):
        log_probs = decoder.filtered(decoder.scores.log_softmax(-1))  # (B * beams, V)
        V = log_probs.size(-1)
        totals = (open_scores.view(-1, 1) + log_probs).view(-1, num_beams * V)  # (B, beams * V)
        scores, places = totals.topk(min(2 * num_beams, num_beams * V))  # (B, 2 * beams), best first
        first_rows = torch.arange(len(places), device=device)[:, None] * num_beams  # (B, 1)
        rows, tokens = first_rows + places // V, places % V  # (B, 2 * beams) each
        ends = tokens == eos
        if new == max_tokens:
            ends = torch.ones_like(ends)  # no room to go on: the caption counts as it stands

        # Captions that end here compete with those that ended before.
        candidates = torch.full((*rows.shape, finished.size(-1)), eos, device=device)
        candidates[:, :, : start + new - 1] = decoder.sequences[rows]
        candidates[:, :, start + new - 1] = tokens
        admitted = ends & ranks_first[: ends.size(1)] & ~done[:, None]
        candidate_scores = (scores / new**length_penalty).masked_fill(~admitted, impossible)
        finished_scores, best = torch.cat([finished_scores, candidate_scores], dim=1).topk(num_beams)  # (B, beams)
        finished = torch.cat([finished, candidates], dim=1).take_along_dim(best[:, :, None], dim=1)

        # The best that do not end go on.
        open_scores, best = scores.masked_fill(ends, impossible).topk(num_beams)  # (B, beams)
        length = max_tokens if early_stopping == "never" and length_penalty > 0 else new
        hopeless = open_scores[:, 0] / length**length_penalty <= finished_scores[:, -1]
        full = finished_scores.isfinite().all(1)
        done |= hopeless | (full if early_stopping is True else False)
        rows, tokens = (of.take_along_dim(best, dim=1) for of in (rows, tokens))  # (B, beams) each
        goes_on = ~done
        if new == max_tokens or done.all():
            captions[images] = finished
            break
        decoder.select(rows.flatten())
        if decoder.shrinks and goes_on.sum() <= LEAVE_BELOW * len(goes_on):
            captions[images] = finished
            decoder.keep_images(goes_on.nonzero()[:, 0])
            images, tokens, done = images[goes_on], tokens[goes_on], done[goes_on]
            open_scores, finished, finished_scores = (of[goes_on] for of in (open_scores, finished, finished_scores))
        decoder.append(tokens.view(-1, 1))
    return captions[:, :, : start + new]


def caption_images(
    model,
    tokenizer,
    images,
    max_tokens=50,
    temperature=1.0,
    deterministic=True,
    batch_size=64,
    prompt="",
    load_batch=None,
    **options,
):
    """Paths, PIL images or arrays -> a list of captions; with `num_return_sequences` above 1 a list of lists.

    Each caption begins with `prompt`; when it is a list, one prompt for each image, the captions are what follows the
    prompts: answers to questions. `load_batch` as in `caption_batches`. `options`: see `Options`; with `num_beams` it is beam
    search.
    """
    options = Options(max_tokens, temperature, deterministic, **options)
    captions = [None] * len(images)
    for place, texts, _ in caption_batches(model, tokenizer, images, options, batch_size, prompt, load_batch):
        captions[place] = texts[0] if options.num_return_sequences == 1 else texts
    return captions


def caption_batches(model, tokenizer, images, options, batch_size=64, prompt="", load_batch=None):
    """Yields (place in `images`, its captions, for each whether it came to its end), a batch at a time in any order.

    `options`: an `Options`. `load_batch` makes of a list of images what the model takes, for example `TokenCache.batch`; by
    default it preprocesses them. The rest as in `caption_images`. Raises ValueError when there are not as many prompts
    as images.
    """
    device, asked = next(model.parameters()).device, not isinstance(prompt, str)
    load_batch = load_batch or (
        lambda images: torch.stack([preprocess(image, **model.preprocessing) for image in images])
    )
    longest = model.config.seq_len - 2  # as training cuts them
    prompts = [encode_prompt(tokenizer, text)[:longest] for text in (prompt if asked else [prompt] * len(images))]
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
    if isinstance(options.seed, int):  # one stream for all batches
        options = replace(options, seed=torch.Generator(device).manual_seed(options.seed))
    count, by_length = options.num_return_sequences, {}  # prompts of one length make a batch without padding
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    for length, places in by_length.items():
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            photos = to_device(load_batch([images[i] for i in batch]), device)
            sequences = torch.tensor([prompts[i] for i in batch], device=device)  # (B, T)
            rows = generate_ids(model, photos, sequences, **vars(options)).tolist()
            texts = [tokenizer.decode(row[length if asked else 1 :]).strip() for row in rows]
            ended = [model.config.eos_token_id in row[length:] for row in rows]
            for n, i in enumerate(batch):
                yield i, texts[n * count : (n + 1) * count], ended[n * count : (n + 1) * count]
