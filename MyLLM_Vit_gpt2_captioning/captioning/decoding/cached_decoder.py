"""Scores of the next token for captions that grow: each new token costs one token's work, the image's none.

`decoder_for` gives a `CachedDecoder`, or on a GPU a `GraphedDecoder`, which gives the same scores with less waiting.
"""

import threading
import weakref
from contextlib import contextmanager
from functools import partial

import torch

from captioning.decoding.cuda_graphs import CudaGraphs

CUDA_GRAPHS = True  # repeat decoding steps on a GPU as CUDA graphs
GRAPH_DEVICES = ("cuda",)  # types of devices that have them
DECODERS_KEPT = 2  # with their graphs, of each model: greedy captions and draws, or full batches and the last one
ROOM = 16  # tokens: a kept decoder's room is a multiple, so that prompts of other lengths fit in too

_lock = threading.Lock()  # of what follows
_kept = weakref.WeakKeyDictionary()  # {model: [(what its graphs depend on, GraphedDecoder), ...]}, the newest last


class BlockCache:
    """What one block keeps while a caption grows: self-attention keys and values of the tokens so far, and the image's
    keys and values for cross-attention, which never change."""

    def __init__(self, self_attn):
        self.self_attn = self_attn  # a `KeyValueCache`
        self.cross_attn = None  # (keys, values), each (B, heads, N, head_dim), from the first forward

    def select(self, rows):
        """Keep the captions `rows` (1-D, may repeat), equally many an image; what the image says is shared by them."""
        self.self_attn.select(rows)

    def lay_out_for_one_row(self):
        """Let a head's keys and values lie together: the single query of an image reads them a third faster on a CPU,
        while those of several beams do not."""
        if self.cross_attn is not None:
            self.cross_attn = tuple(part.contiguous() for part in self.cross_attn)

    def select_images(self, images):
        """Keep what these images (1-D) say."""
        if self.cross_attn is not None:
            self.cross_attn = tuple(part[images] for part in self.cross_attn)


def next_token_logits(model, hidden):
    """hidden states (..., embed_dim) -> float32 scores (..., vocab_size) of the next token; one that stands for unknown
    words is ruled out, because it would leave a hole in the caption."""
    scores = model.gpt.logits(hidden).float()
    if model.config.unk_token_id >= 0:
        scores[..., model.config.unk_token_id] = -torch.inf
    return scores


class CachedDecoder:
    """Scores of the next token for `rows_per_image` growing sequences an image, which share the image's tokens.

    From `start` on, `sequences` are the ids so far (rows, T), `scores` the logits (rows, vocab_size) of what follows.
    """

    shrinks = True  # images may leave the batch

    def __init__(self, model, rows_per_image, room):
        """`room`: tokens of the longest sequence."""
        self.model, self.rows_per_image, self.room = model, rows_per_image, room

    def start(self, encoder_states, prompts, filters):
        """Begin with images and a prompt for each: `encoder_states` of the model, prompts (B, T); `filters`, functions
        (ids (rows, T), scores (rows, vocab_size)) -> scores, are for `filtered`."""
        self.encoder_states, self.filters = encoder_states, filters
        self.caches = self.model.new_caches(self.room)
        self.sequences = prompts
        self._decode(prompts)  # once for each image, then copied to its rows
        if self.rows_per_image == 1:
            for cache in self.caches:
                cache.lay_out_for_one_row()
        else:
            self.select(torch.arange(len(prompts), device=prompts.device).repeat_interleave(self.rows_per_image))
            self.scores = self.scores.repeat_interleave(self.rows_per_image, dim=0)

    def _decode(self, newest):
        hidden = self.model.decode(newest, self.encoder_states, self.caches)[:, -1]  # (rows, embed_dim), last token
        self.scores = next_token_logits(self.model, hidden)  # (rows, vocab_size)

    def filtered(self, scores):
        """scores (rows, vocab_size) after all filters."""
        for apply in self.filters:
            scores = apply(self.sequences, scores)
        return scores

    def select(self, rows):
        """Go on with these rows, which may repeat."""
        self.sequences = self.sequences[rows]
        for cache in self.caches:
            cache.select(rows)

    def keep_images(self, images):
        """Go on with these images (1-D places) and their rows only -> the places of those rows."""
        rows = (
            images[:, None] * self.rows_per_image + torch.arange(self.rows_per_image, device=images.device)
        ).flatten()
        self.select(rows)
        kept = {id(states): states[images] for states in self.encoder_states}  # blocks may share one
        self.encoder_states = [kept[id(states)] for states in self.encoder_states]
        for cache in self.caches:
            cache.select_images(images)
        return rows

    def append(self, newest):
        """Add a token (rows, 1) to each sequence."""
        self.sequences = torch.cat([self.sequences, newest], dim=1)
        self._decode(newest)


class GraphedDecoder(CachedDecoder):
    """A `CachedDecoder` whose steps are replayed from CUDA graphs: one for each length of prompts reads them; for each
    length of the sequences one appends a token, another selects rows.

    Graphs read and write fixed addresses, so that what they share lies in tensors that are made once and then written
    to. It serves as many batches of the same size as come, and finished images stay: other rows need other graphs.
    """

    shrinks = False

    def __init__(self, model, rows_per_image, room, images, device):
        """For batches of so many images."""
        super().__init__(model, rows_per_image, room)
        rows = images * rows_per_image
        self.prompts = torch.zeros(images, room, dtype=torch.long, device=device)
        self.newest = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.rows = torch.zeros(rows, dtype=torch.long, device=device)
        self.caches = model.new_caches(room)
        self.scores = None  # it and what is in the caches are made by the first batch, which shows their dtypes
        self.graphs = CudaGraphs(device)

    def start(self, encoder_states, prompts, filters):
        self.filters = filters
        for block, states, cache in zip(self.model.gpt.trf_blocks, encoder_states, self.caches, strict=True):
            projected = block.cross_attn.project(states, states)
            if cache.cross_attn is None:
                cache.cross_attn = tuple(part.new_empty(part.shape) for part in projected)
            for part, new in zip(cache.cross_attn, projected, strict=True):
                part.copy_(new)
        length = prompts.size(1)
        self.prompts[:, :length] = prompts
        self.sequences = prompts.repeat_interleave(self.rows_per_image, dim=0)
        self.graphs.run(("prompts", length), partial(self._read_prompts, length))

    def _decode(self, newest, caches):
        """What the image says is in the caches already. -> scores (rows, vocab_size)"""
        hidden = self.model.decode(newest, [None] * len(caches), caches)[:, -1]  # (rows, embed_dim), last token
        return next_token_logits(self.model, hidden)

    def _read_prompts(self, length):
        fresh = self.model.new_caches(length)
        for new, cache in zip(fresh, self.caches, strict=True):
            new.cross_attn = cache.cross_attn
        scores = self._decode(self.prompts[:, :length], fresh)  # (B, vocab_size)
        if self.scores is None:
            self.scores = scores.new_empty(len(self.rows), scores.size(1))
        self._to_rows(self.scores, scores)
        for own, new in ((cache.self_attn, new.self_attn) for cache, new in zip(self.caches, fresh, strict=True)):
            if own.keys is None:
                _, heads, _, head_dim = new.keys.shape
                own.keys, own.values = (
                    new.keys.new_empty(len(self.rows), heads, self.room, head_dim) for _ in range(2)
                )
            self._to_rows(own.keys[:, :, :length], new.keys)
            self._to_rows(own.values[:, :, :length], new.values)

    def _to_rows(self, rows, images):
        """Write what there is of each image (B, ...) to its rows (B * rows_per_image, ...)."""
        rows.unflatten(0, (len(images), self.rows_per_image)).copy_(images[:, None])

    def append(self, newest):
        self.sequences = torch.cat([self.sequences, newest], dim=1)
        self.newest.copy_(newest)
        length = self.sequences.size(1)
        self.graphs.run(("append", length), partial(self._append, length))

    def _append(self, length):
        for cache in self.caches:
            cache.self_attn.length = length - 1
        self.scores.copy_(self._decode(self.newest, self.caches))

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
        raise NotImplementedError("images do not leave a batch that is decoded by CUDA graphs")


@contextmanager
def decoder_for(model, encoder_states, rows_per_image, room, weights):
    """A decoder for a batch of images with these `encoder_states`, not started yet.

    A `GraphedDecoder` is kept for the next batch of its kind, and a new one made where the weights have moved: graphs
    know the addresses of the model's own parameters and of `weights`, those that `packed_linears` put in their place.
    """
    device = encoder_states[0].device
    if not (CUDA_GRAPHS and device.type in GRAPH_DEVICES):
        yield CachedDecoder(model, rows_per_image, room)
        return
    room = -(-room // ROOM) * ROOM
    tensors = [*model.gpt.parameters(), *model.gpt.buffers()]
    kind = (
        rows_per_image,
        room,
        [(states.shape, states.dtype) for states in encoder_states],
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        model.config.unk_token_id,
        [(tensor.data_ptr(), tensor.dtype) for tensor in tensors],
        weights,
    )
    kept = _kept.setdefault(model, [])
    with _lock:  # taken out while it is used: another thread then makes its own
        places = [i for i, (its_kind, _) in enumerate(kept) if its_kind == kind]
        decoder = kept.pop(places[-1])[1] if places else None
    decoder = decoder or GraphedDecoder(model, rows_per_image, room, len(encoder_states[0]), device)
    decoder.model = model
    yield decoder
    decoder.model = None  # or the model would never be forgotten
    with _lock:
        kept.append((kind, decoder))
        del kept[:-DECODERS_KEPT]


@contextmanager
def cuda_graphs_disabled():
    """Inside, decoding does without CUDA graphs: for few batches, and where memory is short."""
    global CUDA_GRAPHS
    before, CUDA_GRAPHS = CUDA_GRAPHS, False
    try:
        yield
    finally:
        CUDA_GRAPHS = before
