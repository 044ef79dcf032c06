"""Chapter 4: GPT-2 (Radford et al. 2019), built from the attention of chapter 3.

Read it bottom-up: `LayerNorm` and `FeedForward` are the small parts, `TransformerBlock` joins them with attention, and
`GPTModel` stacks the blocks between token embeddings and logits. The image captioner uses the same code; its blocks
only add cross-attention.

A `config` is any object with the attributes
    vocab_size, seq_len, embed_dim, num_heads, depth      sizes; seq_len is the longest sequence (GPT-2: 1024)
    emb_dropout, attention_dropout, mlp_dropout, residual_dropout
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from MyLLM.ch3 import KeyValueCache, MultiHeadAttention


class LayerNorm(nn.Module):
    """Normalise every token to mean 0 and variance 1 over its channels, then apply a learned scale and shift.

    y = (x - mean) / sqrt(variance + eps) * scale + shift, with the biased variance and eps = 1e-5 of GPT-2.
    """

    def __init__(self, embed_dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(embed_dim))
        self.shift = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x):
        """x (..., embed_dim) -> (..., embed_dim)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class FeedForward(nn.Module):
    """The MLP: two linear layers with a GELU between them, applied to each token separately.

    The GELU is the tanh approximation that GPT-2 was trained with; the exact one would change every logit a little.
    """

    def __init__(self, config):
        super().__init__()
        self.expand = nn.Linear(config.embed_dim, 4 * config.embed_dim)
        self.activation = nn.GELU(approximate="tanh")
        self.contract = nn.Linear(4 * config.embed_dim, config.embed_dim)
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, x):
        """x (B, T, embed_dim) -> (B, T, embed_dim)."""
        return self.dropout(self.contract(self.activation(self.expand(x))))


class TransformerBlock(nn.Module):
    """GPT-2's pre-norm residual block: x + self_attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.embed_dim)
        self.self_attn = MultiHeadAttention(
            config.embed_dim, config.num_heads, config.attention_dropout, config.residual_dropout
        )
        self.ln_2 = LayerNorm(config.embed_dim)
        self.mlp = FeedForward(config)

    def forward(self, x, cache=None):
        """x (B, T, embed_dim) -> (B, T, embed_dim); `cache` as in `MultiHeadAttention`."""
        x = x + self.self_attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def initial_std(embed_dim):
    """Standard deviation of initial weights: GPT-2's 0.02 at its 768 channels, larger in a narrower model, so that the
    size of a layer's output does not depend on the width."""
    return 0.02 * math.sqrt(768 / embed_dim)


class GPTModel(nn.Module):
    """GPT-2: token ids -> logits of the next token.

    The output head is the token embedding itself (weight tying, Press & Wolf 2017). There is no second parameter, so
    the tie survives saving, loading and `copy_`.
    """

    def __init__(self, config, block_class=TransformerBlock):
        """`block_class(config)` builds one block; the captioner passes its block with cross-attention."""
        super().__init__()
        self.seq_len = config.seq_len
        self.tok_emb = nn.Embedding(config.vocab_size, config.embed_dim)
        self.pos_emb = nn.Embedding(config.seq_len, config.embed_dim)
        self.drop_emb = nn.Dropout(config.emb_dropout)
        self.trf_blocks = nn.ModuleList(block_class(config) for _ in range(config.depth))
        self.final_norm = LayerNorm(config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self):
        """GPT-2's initialisation: normal weights, biases 0. The weights of the layers that add to the residual stream
        are smaller by sqrt(2 * depth), so that the stream's variance does not grow with the number of blocks.

        Layers that a `block_class` adds to a block keep their own initialisation.
        """
        std = initial_std(self.tok_emb.embedding_dim)
        residual_std = std / math.sqrt(2 * len(self.trf_blocks))
        for embedding in (self.tok_emb, self.pos_emb):
            nn.init.normal_(embedding.weight, std=std)
        for block in self.trf_blocks:
            attn, mlp = block.self_attn, block.mlp
            for layer, layer_std in (
                (attn.qkv, std),
                (mlp.expand, std),
                (attn.out_proj, residual_std),
                (mlp.contract, residual_std),
            ):
                nn.init.normal_(layer.weight, std=layer_std)
                nn.init.zeros_(layer.bias)

    def embed(self, token_ids, start=0):
        """token_ids (B, T) -> (B, T, embed_dim): token plus position embeddings, for positions from `start` on.

        Raises ValueError when the sequence is longer than `seq_len`.
        """
        end = start + token_ids.size(1)
        if end > self.seq_len:
            raise ValueError(f"{end} tokens do not fit into seq_len {self.seq_len}")
        positions = torch.arange(start, end, device=token_ids.device)  # (T,)
        return self.drop_emb(self.tok_emb(token_ids) + self.pos_emb(positions))

    def logits(self, hidden_states):
        """hidden_states (..., embed_dim) of the last block -> logits of the next token (..., vocab_size)."""
        return F.linear(self.final_norm(hidden_states), self.tok_emb.weight)

    def forward(self, token_ids, caches=None):
        """token_ids (B, T) -> logits (B, T, vocab_size).

        With `caches` from `new_caches`, token_ids hold only the newest tokens of each sequence.
        """
        caches = caches or [None] * len(self.trf_blocks)
        x = self.embed(token_ids, start=caches[0].length if caches[0] else 0)  # (B, T, embed_dim)
        for block, cache in zip(self.trf_blocks, caches, strict=True):
            x = block(x, cache)
        return self.logits(x)

    def new_caches(self, max_length):
        """One empty `KeyValueCache` a block, for sequences of up to `max_length` tokens."""
        return [KeyValueCache(max_length) for _ in self.trf_blocks]
