"""Chapter 3: attention, by which a token gathers information from the tokens before it.

The lesson is one layer, `MultiHeadAttention`, and the KV cache that makes it fast when a model writes one token at a
time. Shapes are written beside the code: B sequences of T tokens each, with `embed_dim` channels split over `num_heads`
heads of `head_dim` channels.
"""

import torch
import torch.nn.functional as F
from torch import nn


def split_heads(x, num_heads):
    """(B, T, embed_dim) -> (B, heads, T, head_dim): each head gets its own slice of the channels."""
    batch, tokens, embed_dim = x.shape
    return x.view(batch, tokens, num_heads, embed_dim // num_heads).transpose(1, 2)  # (B, heads, T, head_dim)


def merge_heads(x):
    """(B, heads, T, head_dim) -> (B, T, embed_dim): the heads' outputs side by side again."""
    return x.transpose(1, 2).flatten(2)  # (B, T, embed_dim)


class KeyValueCache:
    """The KV cache of one attention layer: with the keys and values of earlier tokens stored, a new token costs one
    token's work.

    Memory for `max_length` tokens is allocated once, at the first `append`: growing by concatenation would copy all
    earlier keys and values for every new token.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0  # tokens stored so far
        self.keys = self.values = None

    def append(self, keys, values):
        """Store the keys and values of the T newest tokens, each (B, heads, T, head_dim).

        Returns the keys and values of all tokens so far, each (B, heads, S, head_dim) with S = `self.length`.
        Raises ValueError when they do not fit in `max_length`.
        """
        start, end = self.length, self.length + keys.size(2)
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, not for {end}")
        if self.keys is None:
            batch, heads, _, head_dim = keys.shape
            self.keys = keys.new_empty(batch, heads, self.max_length, head_dim)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows):
        """Keep the sequences `rows` (1-D, may repeat), in this order, as beam search does in every step."""
        if self.keys is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, in GPT-2's form).

    Every token has a query, a key and a value. The output of a token is the weighted mean of its own value and those of
    the tokens before it, with the weights softmax(query . key / sqrt(head_dim)).
    `torch.nn.functional.scaled_dot_product_attention` computes exactly this formula, where the hardware allows it
    without storing the (T, T) weights. Raises ValueError unless `embed_dim` is a multiple of `num_heads`.
    """

    def __init__(self, embed_dim, num_heads, attention_dropout=0.0, residual_dropout=0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        # One matrix for queries, keys and values: one large product is faster than three small ones.
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def forward(self, x, cache=None):
        """x (B, T, embed_dim) -> (B, T, embed_dim).

        With a `KeyValueCache`, x holds only the T newest tokens, which also attend to all tokens in the cache.
        """
        parts = self.qkv(x).chunk(3, dim=-1)  # (B, T, embed_dim) each
        queries, keys, values = (split_heads(part, self.num_heads) for part in parts)  # (B, heads, T, head_dim) each
        # Without a cache the mask is the whole causal one. So that torch.compile makes one graph for all lengths,
        # `is_causal` is then a constant: a comparison of lengths that vary would be a symbol, not a bool.
        mask, is_causal = None, True
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, heads, S, head_dim), S >= T
            new_tokens, all_tokens = queries.size(2), keys.size(2)
            is_causal = bool(new_tokens == all_tokens)  # torch.export compares symbols, and a symbol comes of it
            if 1 < new_tokens < all_tokens:
                # The newest tokens are the last rows of the (S, S) causal mask. A single newest token attends to all
                # tokens and needs no mask.
                mask = torch.ones(new_tokens, all_tokens, dtype=torch.bool, device=x.device)
                mask = mask.tril(all_tokens - new_tokens)  # (T, S), True where attention is allowed
        context = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=is_causal,
        )  # (B, heads, T, head_dim)
        return self.residual_dropout(self.out_proj(merge_heads(context)))
