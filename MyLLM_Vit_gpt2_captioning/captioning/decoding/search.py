"""Writing captions: greedy search, sampling and beam search.

The image is encoded once, cross-attention's keys and values are projected once per block and shared by all captions
of an image, and with a KV cache each new token costs one token's work.
"""

import os
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from captioning.common.printable import warn_once
from captioning.data.batching import to_device
from captioning.decoding.cached_decoder import decoder_for, next_token_logits
from captioning.decoding.lengths import LengthLimits
from captioning.decoding.packed_weights import packed_linears
from captioning.images.photo_batches import photo_batches
from captioning.model.tokenizer import read_prompt

MAX_LOGITS = 2**24  # that are in memory at a time where finished captions are looked at
MANY_BEAMS = 16  # above which the memory is compared with what they need: asking a GPU costs time
SHRINK_BELOW = 0.8  # finished images leave the batch when this share or less is unfinished: copying the rest has a cost


@dataclass(frozen=True)
class Options:
    """How captions are chosen: greedy (`deterministic`), sampled (the default) or by beam search (`num_beams` above 1).

    The names and their meaning are those of `transformers.GenerationMixin.generate`, and so are the captions. Raises
    ValueError for options that are out of range or contradict each other.
    """

    max_tokens: int = 50  # new tokens, EOS included
    temperature: float = 1.0  # tokens are drawn from softmax(logits / temperature)
    deterministic: bool = False  # greedy: the likeliest token every time; temperature is then ignored
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability (Holtzman et al. 2020)
    num_beams: int = 1  # unfinished captions that beam search keeps in each step
    length_penalty: float = 1.0  # a beam's score is its log-probability / (new tokens, EOS included) ** length_penalty
    # When beam search ends: when num_beams captions are finished (True), when no unfinished one is likely to beat the
    # worst of them (False), or when none can ("never").
    early_stopping: bool | str = False
    # Above 1, tokens that occurred already get less likely (Keskar et al. 2019). BOS counts as one of them, so that
    # captions also get longer where one id is BOS and EOS.
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # n: no n-gram of this length occurs twice; 0: off
    num_return_sequences: int = 1  # captions an image: as many draws, or the best beams
    seed: int | torch.Generator | None = None  # of the draws, or their generator; None: torch's global generator
    min_tokens: int = 0  # new tokens in front of EOS (transformers' min_new_tokens)
    # Limits of the text behind the prompt, 0: off. No caption ends inside a word or behind an article, see lengths.py.
    max_words: int = 0
    max_chars: int = 0

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
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens ({self.max_tokens})"),
            "max_words": (self.max_words >= 0, "0 (off) or more"),
            "max_chars": (self.max_chars >= 0, "0 (off) or more"),
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

    def logits_processors(self, limits=None):
        """The list of functions (ids (rows, T), logits (rows, vocab_size)) -> logits that these options ask for, in
        the order in which transformers applies them; `limits`, a `LengthLimits`, is one of them. transformers is only
        imported for those that need it: its import is slow."""
        processors = []
        if self.repetition_penalty != 1:
            from transformers.generation import RepetitionPenaltyLogitsProcessor

            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            from transformers.generation import NoRepeatNGramLogitsProcessor

            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if limits:
            processors.append(limits)
        if self.temperature != 1 and not self.deterministic:
            processors.append(lambda ids, logits: logits / self.temperature)
        if self.top_k:
            from transformers.generation import TopKLogitsWarper

            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            from transformers.generation import TopPLogitsWarper

            processors.append(TopPLogitsWarper(self.top_p))
        return processors


@torch.inference_mode()
def generate_ids(
    model, images, sequences, max_tokens=50, temperature=1.0, deterministic=False, tokenizer=None, **options
):
    """Continue each sequence by up to `max_tokens` tokens, for a batch of images; see `Options` for how.

    images (B, 3, H, W), the model's `levels` of them or a `FrontOutput`; sequences (B, T) start with BOS, more tokens
    are a prompt.
    `tokenizer`: the captioner's, which max_words and max_chars need.
    Returns ids (B * num_return_sequences, T + new) on the model's device, the captions of an image in adjacent rows;
    after a row's first generated EOS all ids are EOS. A caption ends at the decoder's seq_len at the latest. Dropout is
    off; the model's mode is restored afterwards. Raises ValueError for unsuitable options and for a prompt longer than
    seq_len.
    """
    options = Options(max_tokens, temperature, deterministic, **options)
    room = model.config.seq_len - sequences.size(1)
    if room < 0:
        raise ValueError(f"a prompt of {sequences.size(1)} tokens does not fit into seq_len {model.config.seq_len}")
    max_tokens = min(max_tokens, room)
    if max_tokens == 0:
        return sequences.repeat_interleave(options.num_return_sequences, dim=0)
    check_beams(options.num_beams, model, len(sequences), sequences.size(1) + max_tokens)
    eos, limits = model.config.eos_token_id, None
    if options.min_tokens or options.max_words or options.max_chars:
        limits = LengthLimits(options, tokenizer, sequences.size(1), eos, model.config.vocab_size, sequences.device)
    with _eval_mode(model):
        encoder_states = model.encoder_states(images)
        ids = _search(model, encoder_states, sequences, max_tokens, options, limits)
        return limits.shorten(model, encoder_states, ids, MAX_LOGITS) if limits else ids


def _search(model, encoder_states, sequences, max_tokens, options, limits):
    """The search that the `options` ask for -> ids as in `generate_ids`; the model is in eval mode."""
    eos = model.config.eos_token_id
    rows_per_image = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    with (
        packed_linears(model.gpt) as weight_addresses,
        decoder_for(model, encoder_states, rows_per_image, sequences.size(1) + max_tokens, weight_addresses) as decoder,
    ):
        decoder.start(encoder_states, sequences, options.logits_processors(limits))
        if options.num_beams > 1:
            ids = _beam_search(decoder, max_tokens, eos, options)  # (B, num_beams, T + new), best first
            return ids[:, : options.num_return_sequences].flatten(0, 1)
        next_token = _most_likely
        if not options.deterministic:
            generator = options.seed
            if isinstance(generator, int):
                generator = torch.Generator(sequences.device).manual_seed(generator)
            next_token = partial(_sample, generator=generator)
        return _greedy_or_sampling(decoder, next_token, max_tokens, eos)


def check_beams(num_beams, model, images, length):
    """Raise ValueError for more beams than a vocabulary has first tokens, and for more than fit into the memory with
    this many `images` at a time and captions of up to `length` tokens."""
    config, device = model.config, next(model.parameters()).device
    if num_beams == 1:
        return
    if num_beams > config.vocab_size:
        raise ValueError(
            f"num_beams is {num_beams:,}, but must be at most {config.vocab_size:,}, the size of the vocabulary: "
            "beams begin with different tokens"
        )
    if num_beams <= MANY_BEAMS:
        return
    # Of a beam: keys and values of all blocks, twice while beams are chosen; scores of all tokens, a few times.
    of_beam = 4 * images * (4 * config.depth * length * config.embed_dim + 4 * config.vocab_size)
    memory = device_memory(device)
    if num_beams * of_beam > memory:
        raise ValueError(
            f"num_beams {num_beams:,} with {images:,} images at a time needs about {num_beams * of_beam / 1e9:,.0f} GB "
            f"of memory, and there are {memory / 1e9:,.0f} GB: at most {memory // of_beam:,} beams, or fewer images at "
            "a time (batch_size)"
        )


def device_memory(device):
    """Bytes of memory of a device, used or free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def until_first_eos(ids, eos):
    """ids (..., T) -> bool mask (..., T), true for the tokens up to and including the first EOS."""
    is_eos = ids == eos
    return is_eos.cumsum(-1) - is_eos.long() == 0


def trim(ids, prompt_length, eos):
    """One row of `generate_ids`, 1-D, without the ids after its first generated EOS."""
    return ids[: prompt_length + int(until_first_eos(ids[prompt_length:], eos).sum())]


@contextmanager
def _eval_mode(model):
    """Context with the model in eval mode; its own mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def log_probabilities(model, images, ids, prompt_length):
    """The model's log-probabilities of captions, in nats -> float tensor (B * K,).

    Sums over the tokens after the prompt, the first EOS included, at temperature 1 and without any other option.
    images as in `generate_ids`; ids (B * K, T) as it returns them, of which the first `prompt_length` are the prompt,
    BOS included.
    """
    with _eval_mode(model):
        return token_log_probabilities(model, model.encoder_states(images), ids, prompt_length).sum(1)


@torch.inference_mode()
def token_log_probabilities(model, states, ids, prompt_length):
    """The model's log-probability of each token of finished captions, in nats -> float tensor (B * K, new).

    `states`: those of `model.encoder_states` for B images; `ids` (B * K, T) and `prompt_length` as in
    `log_probabilities`. It is 0 behind the first EOS. The model is in eval mode.
    """
    targets, log_probs = ids[:, prompt_length:], []  # (B * K, new)
    hidden = model.decode(ids[:, :-1], states)[:, prompt_length - 1 :]  # (B * K, new, embed_dim)
    rows = max(1, MAX_LOGITS // (max(1, targets.size(1)) * model.config.vocab_size))
    for part, part_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = next_token_logits(model, part)  # (rows, new, vocab_size)
        log_probs.append(logits.log_softmax(-1).gather(2, part_targets[..., None])[..., 0])
    return torch.cat(log_probs) * until_first_eos(targets, model.config.eos_token_id)


def _most_likely(logits):
    return logits.argmax(-1, keepdim=True)  # (rows, 1)


def _sample(logits, generator):
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (rows, 1)


def _greedy_or_sampling(decoder, next_token, max_tokens, eos):
    """Greedy search or sampling -> ids (rows, T + new). `next_token`: logits (rows, vocab_size) -> tokens (rows, 1).

    A finished row is filled with EOS until all rows of its image are finished.
    """
    start, device = decoder.sequences.size(1), decoder.sequences.device
    captions = torch.full((len(decoder.sequences), start + max_tokens), eos, device=device)
    captions[:, :start] = decoder.sequences
    rows = torch.arange(len(captions), device=device)  # for each row of the decoder, its row in `captions`
    finished = torch.zeros(len(captions), dtype=torch.bool, device=device)  # (rows of the decoder,)
    for length in range(start + 1, start + max_tokens + 1):
        tokens = next_token(decoder.process(decoder.logits)).masked_fill(finished[:, None], eos)
        captions[rows, length - 1] = tokens[:, 0]
        finished |= tokens[:, 0] == eos
        unfinished = ~finished.view(-1, decoder.rows_per_image).all(1)  # (images,)
        images = unfinished.nonzero()[:, 0]
        if len(images) == 0 or length == start + max_tokens:
            break
        if decoder.can_drop_images and len(images) <= SHRINK_BELOW * len(unfinished):
            kept = decoder.keep_images(images)
            rows, finished, tokens = rows[kept], finished[kept], tokens[kept]
        decoder.append(tokens)
    return captions[:, :length]


def _beam_search(decoder, max_tokens, eos, options):
    """Beam search -> ids (B, num_beams, T + new), best first.

    The algorithm of `transformers.GenerationMixin._beam_search`: in every step the 2 * num_beams best continuations of
    an image are candidates, so that num_beams unfinished ones remain even if as many end. A candidate that ends is kept
    if it ranks among the first num_beams candidates and among the num_beams best finished captions so far.
    """
    num_beams, length_penalty, early_stopping = options.num_beams, options.length_penalty, options.early_stopping
    B, device, start = len(decoder.sequences) // num_beams, decoder.sequences.device, decoder.sequences.size(1)
    beam_scores = torch.full((B, num_beams), -torch.inf, device=device)  # sums of log-probabilities
    beam_scores[:, 0] = 0  # all beams start alike: in the first step only the first may have continuations
    finished = torch.full((B, num_beams, start + max_tokens), eos, device=device)
    finished[:, :, :start] = decoder.sequences.view(B, num_beams, start)
    finished_scores = torch.full((B, num_beams), -torch.inf, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    ranks_first = torch.arange(2 * num_beams, device=device) < num_beams  # (2 * beams,)
    captions = finished.clone()  # of all images; the variables above shrink with the decoder's batch
    images = torch.arange(B, device=device)  # for each image of the decoder's batch, its index in `captions`

    for new in range(1, max_tokens + 1):
        log_probs = decoder.process(decoder.logits.log_softmax(-1))  # (B * beams, V)
        V = log_probs.size(-1)
        totals = (beam_scores.view(-1, 1) + log_probs).view(-1, num_beams * V)  # (B, beams * V)
        scores, indices = totals.topk(min(2 * num_beams, num_beams * V))  # (B, 2 * beams), best first
        first_rows = torch.arange(len(indices), device=device)[:, None] * num_beams  # (B, 1)
        rows, tokens = first_rows + indices // V, indices % V  # (B, 2 * beams) each
        ends = tokens == eos
        if new == max_tokens:
            ends = torch.ones_like(ends)  # the length limit finishes every caption

        # Candidates that end compete with the captions that are finished already.
        candidates = torch.full((*rows.shape, finished.size(-1)), eos, device=device)
        candidates[:, :, : start + new - 1] = decoder.sequences[rows]
        candidates[:, :, start + new - 1] = tokens
        eligible = ends & ranks_first[: ends.size(1)] & ~done[:, None]
        candidate_scores = (scores / new**length_penalty).masked_fill(~eligible, -torch.inf)
        finished_scores, best = torch.cat([finished_scores, candidate_scores], dim=1).topk(num_beams)  # (B, beams)
        finished = torch.cat([finished, candidates], dim=1).take_along_dim(best[:, :, None], dim=1)

        # The best of the others are the beams of the next step.
        beam_scores, best = scores.masked_fill(ends, -torch.inf).topk(num_beams)  # (B, beams)
        length = max_tokens if early_stopping == "never" and length_penalty > 0 else new
        cannot_improve = beam_scores[:, 0] / length**length_penalty <= finished_scores[:, -1]  # (B,)
        all_finished = finished_scores.isfinite().all(1)  # (B,)
        done |= cannot_improve | (all_finished if early_stopping is True else False)
        rows, tokens = rows.take_along_dim(best, dim=1), tokens.take_along_dim(best, dim=1)  # (B, beams) each
        unfinished = ~done
        if new == max_tokens or done.all():
            captions[images] = finished
            break
        decoder.select(rows.flatten())
        if decoder.can_drop_images and unfinished.sum() <= SHRINK_BELOW * len(unfinished):
            captions[images] = finished
            decoder.keep_images(unfinished.nonzero()[:, 0])
            images, tokens, done, beam_scores, finished, finished_scores = (
                tensor[unfinished] for tensor in (images, tokens, done, beam_scores, finished, finished_scores)
            )
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

    With one `prompt` for all images every caption begins with it, cleaned as captions are. A list of prompts, one an
    image, are questions: the captions are then only what follows them, the answers. `load_batch` as in
    `caption_batches`, `options` as in `Options`.
    """
    options = Options(max_tokens, temperature, deterministic, **options)
    captions = [None] * len(images)
    for i, texts, _ in caption_batches(model, tokenizer, images, options, batch_size, prompt, load_batch):
        captions[i] = texts[0] if options.num_return_sequences == 1 else texts
    return captions


def caption_batches(model, tokenizer, images, options, batch_size=64, prompt="", load_batch=None, observe=None):
    """Caption images batch by batch; yields (index of an image, its captions, for each whether it ended with EOS).

    The order is any: images whose prompts have equally many tokens share a batch. `options`: an `Options`.
    `load_batch(images)` turns a list of images into input of the model, for example `TokenCache.batch`; by default they
    are preprocessed, on an accelerator those of the next batch while it works. `observe(indices of the images, their
    image tokens of `model.levels`, ids of `generate_ids`, length of the prompt, their pixels or None where `load_batch`
    gave tokens)` is called for each batch. Other arguments as in `caption_images`. Raises ValueError when there are not
    as many prompts as images.
    """
    device, are_questions = next(model.parameters()).device, not isinstance(prompt, str)
    texts = prompt if are_questions else [prompt] * len(images)
    prompt_of = {text: read_prompt(tokenizer, text, model.config) for text in dict.fromkeys(texts)}
    for unreadable in [of_text for of_text in prompt_of.values() if of_text.unknown][:1]:
        warn_once(unreadable.warning())
    prompts = [prompt_of[text] for text in texts]
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
    if isinstance(options.seed, int):  # one generator for all batches
        options = replace(options, seed=torch.Generator(device).manual_seed(options.seed))
    count, by_length = options.num_return_sequences, {}  # prompts of one length make a batch without padding
    for i, of_image in enumerate(prompts):
        by_length.setdefault(len(of_image.ids), []).append(i)
    batches = [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]
    image_batches = ([images[i] for i in batch] for batch in batches)
    if load_batch:
        inputs = (load_batch(batch) for batch in image_batches)
    else:
        photo = model.preprocessing  # the model normalises, on its device
        inputs = photo_batches(image_batches, photo["img_size"], photo["resample"], device, photo.get("grey16", "full"))
    with closing(inputs):
        for batch, pixels_or_tokens in zip(batches, inputs, strict=True):
            sequences = torch.tensor([prompts[i].ids for i in batch], device=device)  # (B, T)
            length = sequences.size(1)
            inputs_of_model, pixels = to_device(pixels_or_tokens, device), None
            if observe is not None and not isinstance(inputs_of_model, list):
                pixels = inputs_of_model if torch.is_tensor(inputs_of_model) else None
                with torch.inference_mode():  # encoded once, for the captions and for what is observed
                    inputs_of_model = model.levels(inputs_of_model)
            rows = generate_ids(model, inputs_of_model, sequences, tokenizer=tokenizer, **vars(options))
            if observe is not None:
                observe(batch, inputs_of_model, rows, length, pixels)
            rows = rows.tolist()
            if are_questions:
                texts = [tokenizer.decode(row[length:]).strip() for row in rows]
            else:
                texts = [prompts[0].caption(tokenizer, row) for row in rows]
            finished = [model.config.eos_token_id in row[length:] for row in rows]
            for n, i in enumerate(batch):
                yield i, texts[n * count : (n + 1) * count], finished[n * count : (n + 1) * count]
