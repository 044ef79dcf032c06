"""The plain ViT (Dosovitskiy et al. 2021), for captioning without timm: importing timm takes as long as captioning.

Parameters have timm's names, and its outputs equal timm's to the bit (a test compares them), so the weights of a
captioner that was trained with timm's `VisionTransformer` load into this one. It is only built where trained weights
are loaded afterwards: it has PyTorch's default initialisation, not timm's for a ViT.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

NAME = re.compile(r"vit_(tiny|small|base|large)_patch(\d+)_(\d+)(\.\w+)?")  # the tag after the dot only names weights
SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}
DEFAULTS = dict(mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6)


def options_of(name, options=None):
    """Arguments of `VisionTransformer` for the timm model `name` with `options`; None where timm has to build it."""
    match = NAME.fullmatch(name)
    if not match:
        return None
    chosen = SIZES[match[1]] | dict(patch_size=int(match[2]), img_size=int(match[3])) | DEFAULTS | (options or {})
    chosen.pop("weight_init", None)  # only matters for random weights
    known = chosen.keys() == SIZES["tiny"].keys() | DEFAULTS.keys() | {"patch_size", "img_size"}
    square = isinstance(chosen["img_size"], int) and isinstance(chosen["patch_size"], int)
    return chosen if known and square and chosen["img_size"] % chosen["patch_size"] == 0 else None


class PatchEmbed(nn.Module):
    """One linear layer applied to each patch of pixels, written as a convolution whose stride is its kernel size."""

    def __init__(self, img_size, patch_size, embed_dim):
        super().__init__()
        self.img_size, self.patch_size = (img_size,) * 2, (patch_size,) * 2
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        """images (B, 3, H, W) -> patch tokens (B, N_patches, C), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, N_patches, C)


class Attention(nn.Module):
    """Multi-head self-attention without a mask: every token attends to all tokens."""

    def __init__(self, embed_dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        """x (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim) each
        context = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, N, head_dim)
        return self.proj(context.transpose(1, 2).flatten(2))  # (B, N, C)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, embed_dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim)

    def forward(self, x):
        """x (B, N, C) -> (B, N, C)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, embed_dim, num_heads, mlp_ratio, qkv_bias, norm_eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, norm_eps)
        self.attn = Attention(embed_dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, x):
        """x (B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The layers that a captioner uses of timm's class of this name, under the same attribute names."""

    num_prefix_tokens = 1  # the class token

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_eps):
        super().__init__()
        self.embed_dim = self.num_features = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.patch_drop = self.norm_pre = nn.Identity()  # other ViTs have these layers
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_eps) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, norm_eps)

    def _pos_embed(self, patch_tokens):
        """Patch tokens (B, N_patches, C) -> (B, 1 + N_patches, C): class token in front, positions added."""
        cls_token = self.cls_token.expand(len(patch_tokens), -1, -1)  # (B, 1, C)
        return torch.cat([cls_token, patch_tokens], dim=1) + self.pos_embed
