"""Fixed positions for a decoder that is trained from scratch."""

import math

import torch
from torch import nn


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position at wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017, section 3.5).

    Replaces `GPTModel.pos_emb` and has no parameters. The paper scales token embeddings up to the size of these
    positions; here the positions are scaled down instead, to `std`, so that tied embeddings and logits keep their size.
    """

    def __init__(self, seq_len, embed_dim, std):
        """Raises ValueError for an odd `embed_dim`."""
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"sinusoidal positions need an even embed_dim, not {embed_dim}")
        # On the CPU even where the model is built on the meta device: no checkpoint holds the table.
        even = torch.arange(0, embed_dim, 2, device="cpu")
        frequencies = torch.exp(-math.log(10_000) * even / embed_dim)  # (embed_dim / 2,)
        angles = torch.arange(seq_len, device="cpu")[:, None] * frequencies  # (seq_len, embed_dim / 2)
        pairs = torch.stack([angles.sin(), angles.cos()], dim=-1)  # (seq_len, embed_dim / 2, 2)
        table = pairs.flatten(1)  # (seq_len, embed_dim), sines at the even indices
        self.register_buffer("table", table * std * math.sqrt(2), persistent=False)  # the std of a sine is sqrt(1/2)

    def forward(self, positions):
        """positions (T,) -> (T, embed_dim)."""
        return self.table[positions]
