"""Next-token logits for growing captions, with a KV cache: each new token costs one token's work, the image's none.

`decoder_for` gives a `CachedDecoder`, or on a GPU a `GraphedDecoder`, which computes the same logits from CUDA graphs.
"""

import threading
import weakref
from contextlib import contextmanager
from functools import partial

import torch

from captioning.decoding.cuda_graphs import CudaGraphs

CUDA_GRAPHS = True  # replay decoding steps on a GPU as CUDA graphs
CUDA_GRAPH_DEVICES = ("cuda",)  # device types that have them
MAX_KEPT_DECODERS = 2  # of each model, with their graphs: for greedy captions and draws, or full batches and the last
LENGTH_MULTIPLE = 16  # a kept decoder's max_length is rounded up to it, so that it also serves prompts of other lengths

_lock = threading.Lock()  # guards _kept_decoders
_kept_decoders = weakref.WeakKeyDictionary()  # {model: [(key of `decoder_for`, GraphedDecoder), ...]}, the newest last


class BlockCache:
    """The KV cache of one block: self-attention keys and values of the tokens so far, and cross-attention keys and
    values of the image tokens, which never change."""

    def __init__(self, self_attn):
        self.self_attn = self_attn  # a `KeyValueCache`
        self.cross_attn = None  # (keys, values), each (B, heads, N, head_dim), set by the first forward

    def select(self, rows):
        """Keep the captions `rows` (1-D, may repeat), equally many of each image; they share the image's keys and
        values."""
        self.self_attn.select(rows)

    def make_cross_attn_contiguous(self):
        """Lay each head's keys and values of the image out contiguously: a single query an image then reads them a
        third faster on a CPU, while the queries of two or more beams do not."""
        if self.cross_attn is not None:
            self.cross_attn = tuple(part.contiguous() for part in self.cross_attn)

    def select_images(self, images):
        """Keep the cross-attention keys and values of these images (1-D indices)."""
        if self.cross_attn is not None:
            self.cross_attn = tuple(part[images] for part in self.cross_attn)


def next_token_logits(model, hidden):
    """hidden states (..., embed_dim) -> float32 logits (..., vocab_size) of the next token.

    The logit of `unk_token_id` is -inf where the vocabulary has one: written, it would leave a gap in the caption.
    """
    logits = model.gpt.logits(hidden).float()
    if model.config.unk_token_id >= 0:
        logits[..., model.config.unk_token_id] = -torch.inf
    return logits


class CachedDecoder:
    """Next-token logits for `rows_per_image` growing sequences an image, which share the image's tokens.

    After `start`, `sequences` (rows, T) are the ids so far and `logits` (rows, vocab_size) those of the next token.
    """

    can_drop_images = True

    def __init__(self, model, rows_per_image, max_length):
        """`max_length`: tokens of the longest sequence."""
        self.model, self.rows_per_image, self.max_length = model, rows_per_image, max_length

    def start(self, encoder_states, prompts, logits_processors):
        """Process the prompts (B, T) of a batch of images.

        `encoder_states`: those of the model. `logits_processors`: functions (ids (rows, T), logits (rows, vocab_size))
        -> logits, used by `process`.
        """
        self.encoder_states, self.logits_processors = encoder_states, logits_processors
        self.caches = self.model.new_caches(self.max_length)
        self.sequences = prompts
        self._decode(prompts)  # once an image, then copied to its rows
        if self.rows_per_image == 1:
            for cache in self.caches:
                cache.make_cross_attn_contiguous()
        else:
            self.select(torch.arange(len(prompts), device=prompts.device).repeat_interleave(self.rows_per_image))
            self.logits = self.logits.repeat_interleave(self.rows_per_image, dim=0)

    def _decode(self, tokens):
        hidden = self.model.decode(tokens, self.encoder_states, self.caches)[:, -1]  # (rows, embed_dim), last token
        self.logits = next_token_logits(self.model, hidden)  # (rows, vocab_size)

    def process(self, logits):
        """logits (rows, vocab_size) -> the same after all logits processors."""
        for processor in self.logits_processors:
            logits = processor(self.sequences, logits)
        return logits

    def select(self, rows):
        """Keep the sequences `rows` (1-D, may repeat), in this order."""
        self.sequences = self.sequences[rows]
        for cache in self.caches:
            cache.select(rows)

    def keep_images(self, images):
        """Keep only these images (1-D indices) and their rows -> the old indices of those rows."""
        offsets = torch.arange(self.rows_per_image, device=images.device)
        rows = (images[:, None] * self.rows_per_image + offsets).flatten()  # (images * rows_per_image,)
        self.select(rows)
        kept = {id(states): states[images] for states in self.encoder_states}  # blocks may share the same tensor
        self.encoder_states = [kept[id(states)] for states in self.encoder_states]
        for cache in self.caches:
            cache.select_images(images)
        return rows

    def append(self, tokens):
        """Append a token to each sequence: tokens (rows, 1)."""
        self.sequences = torch.cat([self.sequences, tokens], dim=1)
        self._decode(tokens)


class GraphedDecoder(CachedDecoder):
    """A `CachedDecoder` that replays CUDA graphs: one for each length of the prompts processes them (prefill); for each
    length of the sequences one appends a token and one selects rows.

    Graphs read and write fixed addresses, so all tensors they share are allocated once and written in place. The
    decoder serves any number of batches of the same size. Finished images stay in their batch: fewer rows would need
    other graphs.
    """

    can_drop_images = False

    def __init__(self, model, rows_per_image, max_length, batch_size, device):
        """`batch_size`: images of each batch."""
        super().__init__(model, rows_per_image, max_length)
        rows = batch_size * rows_per_image
        self.prompts = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.rows = torch.zeros(rows, dtype=torch.long, device=device)
        self.caches = model.new_caches(max_length)
        self.logits = None  # allocated with the first batch, as are the tensors in the caches: it shows their dtypes
        self.graphs = CudaGraphs(device)

    def start(self, encoder_states, prompts, logits_processors):
        self.logits_processors = logits_processors
        for block, states, cache in zip(self.model.gpt.trf_blocks, encoder_states, self.caches, strict=True):
            keys_and_values = block.cross_attn.project(states, states)  # (B, heads, N, head_dim) each
            if cache.cross_attn is None:
                cache.cross_attn = tuple(part.new_empty(part.shape) for part in keys_and_values)
            for part, new in zip(cache.cross_attn, keys_and_values, strict=True):
                part.copy_(new)
        length = prompts.size(1)
        self.prompts[:, :length] = prompts
        self.sequences = prompts.repeat_interleave(self.rows_per_image, dim=0)
        self.graphs.run(("prefill", length), partial(self._prefill, length))

    def _decode(self, tokens, caches):
        """tokens (rows, T) -> logits (rows, vocab_size); cross-attention reads its keys and values from `caches`."""
        hidden = self.model.decode(tokens, [None] * len(caches), caches)[:, -1]  # (rows, embed_dim), last token
        return next_token_logits(self.model, hidden)

    def _prefill(self, length):
        caches = self.model.new_caches(length)  # a row an image; copied to all rows below
        for new, cache in zip(caches, self.caches, strict=True):
            new.cross_attn = cache.cross_attn
        logits = self._decode(self.prompts[:, :length], caches)  # (B, vocab_size)
        if self.logits is None:
            self.logits = logits.new_empty(len(self.rows), logits.size(1))
        self._copy_to_rows(self.logits, logits)
        for target, source in (
            (cache.self_attn, new.self_attn) for cache, new in zip(self.caches, caches, strict=True)
        ):
            if target.keys is None:
                _, heads, _, head_dim = source.keys.shape
                shape = len(self.rows), heads, self.max_length, head_dim
                target.keys, target.values = source.keys.new_empty(shape), source.keys.new_empty(shape)
            self._copy_to_rows(target.keys[:, :, :length], source.keys)
            self._copy_to_rows(target.values[:, :, :length], source.values)

    def _copy_to_rows(self, rows, images):
        """Write the values of each image (B, ...) to all its rows (B * rows_per_image, ...)."""
        rows.unflatten(0, (len(images), self.rows_per_image)).copy_(images[:, None])

    def append(self, tokens):
        self.sequences = torch.cat([self.sequences, tokens], dim=1)
        self.tokens.copy_(tokens)
        length = self.sequences.size(1)
        self.graphs.run(("append", length), partial(self._append, length))

    def _append(self, length):
        for cache in self.caches:
            cache.self_attn.length = length - 1
        self.logits.copy_(self._decode(self.tokens, self.caches))

    def select(self, rows):
        self.sequences = self.sequences[rows]
        self.rows.copy_(rows)
        length = self.sequences.size(1)
        self.graphs.run(("select", length), partial(self._select, length))

    def _select(self, length):
        for cache in self.caches:
            for part in (cache.self_attn.keys[:, :, :length], cache.self_attn.values[:, :, :length]):
                part.copy_(part[self.rows])

    def keep_images(self, images):
        raise NotImplementedError("a batch that is decoded by CUDA graphs keeps all its images")


@contextmanager
def decoder_for(model, encoder_states, rows_per_image, max_length, weight_addresses):
    """Context with a decoder, not started yet, for a batch of images with these `encoder_states`.

    A `GraphedDecoder` is kept for the next batch that it fits. Where weights have moved a new one is made, because
    graphs hold the addresses of the model's own parameters and of those that `packed_linears` puts in their place
    (`weight_addresses`).
    """
    device = encoder_states[0].device
    if not (CUDA_GRAPHS and device.type in CUDA_GRAPH_DEVICES):
        yield CachedDecoder(model, rows_per_image, max_length)
        return
    max_length = -(-max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tensors = [*model.gpt.parameters(), *model.gpt.buffers()]
    key = (  # everything that the graphs depend on
        rows_per_image,
        max_length,
        [(states.shape, states.dtype) for states in encoder_states],
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        model.config.unk_token_id,
        [(tensor.data_ptr(), tensor.dtype) for tensor in tensors],
        weight_addresses,
    )
    kept = _kept_decoders.setdefault(model, [])
    with _lock:  # removed while it is used: another thread then makes its own
        matches = [i for i, (other, _) in enumerate(kept) if other == key]
        decoder = kept.pop(matches[-1])[1] if matches else None
    decoder = decoder or GraphedDecoder(model, rows_per_image, max_length, len(encoder_states[0]), device)
    decoder.model = model
    yield decoder
    decoder.model = None  # else the kept decoder would keep the model alive
    with _lock:
        kept.append((key, decoder))
        del kept[:-MAX_KEPT_DECODERS]


@contextmanager
def cuda_graphs_disabled():
    """Context in which decoding does not use CUDA graphs: for few batches, or where memory is short."""
    global CUDA_GRAPHS
    before, CUDA_GRAPHS = CUDA_GRAPHS, False
    try:
        yield
    finally:
        CUDA_GRAPHS = before
