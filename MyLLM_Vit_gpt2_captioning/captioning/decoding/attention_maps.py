"""Attention maps: cross-attention's weights for each word of a caption, over the photo (Xu et al. 2015).

    ids = caption_ids(model, tokenizer, "photo.jpg", deterministic=True)[0]
    words, maps = word_maps(model, tokenizer, "photo.jpg", ids)
    draw_attention("photo.jpg", words, maps, "attention.png")

Captions are written with `scaled_dot_product_attention`, which does not return its weights. Here the blocks run once
more over the finished caption with an explicit softmax in cross-attention. The model is not modified for that, not even
temporarily: a web page may caption with it at the same time.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from captioning.common.files import write_atomically
from captioning.common.printable import printable
from captioning.images.preprocessing import preprocess, resize
from captioning.model.tokenizer import read_prompt


def caption_ids(model, tokenizer, image, prompt="", **options):
    """Caption one image -> list of the ids of its `num_return_sequences` captions, each 1-D on the CPU: BOS, prompt,
    caption, EOS if it was reached.

    `image`: anything that `preprocessing.load_image` takes. `options` as in `search.Options`.
    """
    device = next(model.parameters()).device
    pixels = preprocess(image, **model.preprocessing)[None].to(device)  # (1, 3, H, W)
    start = torch.tensor([read_prompt(tokenizer, prompt, model.config).ids], device=device)  # (1, T)
    ids = model.generate(pixels, start, **options)
    return ids if isinstance(ids, list) else [ids]


def eager_attend(cross_attn, q, image_tokens):
    """`GPT2CrossAttention` with an explicit softmax, without dropout.

    q (B*K, T, embed_dim), image_tokens (B, N, embed_dim) -> (output (B*K, T, embed_dim), attention weights
    (B*K, heads, T, N), which sum to 1 over N).
    """
    keys, values = cross_attn.project(image_tokens, image_tokens)  # (B, heads, N, head_dim) each
    queries = cross_attn.q(q).view(len(keys), -1, keys.size(1), keys.size(3))  # (B, K*T, heads, head_dim)
    queries = queries.transpose(1, 2)  # (B, heads, K*T, head_dim)
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(keys.size(-1))  # (B, heads, K*T, N)
    weights = scores.softmax(-1)
    context = (weights @ values).transpose(1, 2)  # (B, K*T, heads, head_dim)
    output = cross_attn.c_proj(context.reshape(q.shape))
    weights = weights.unflatten(2, (-1, q.size(1))).transpose(1, 2).flatten(0, 1)  # (B*K, heads, T, N)
    return output, weights


def eager_decode(model, input_ids, encoder_states):
    """`model.decode` with `eager_attend` in every block.

    input_ids (B*K, T), encoder_states of `model.encoder_states` -> (hidden states (B*K, T, embed_dim), list of the
    attention weights (B*K, heads, T, N) of each block).
    """
    x, weights = model._build_text_embeddings(input_ids), []
    for block, image_tokens in zip(model.gpt.trf_blocks, encoder_states, strict=True):

        def cross_attn(q, block=block, image_tokens=image_tokens):
            output, block_weights = eager_attend(block.cross_attn, q, image_tokens)
            weights.append(block_weights)
            return output

        x = block.residual(x, block.ln_1, block.self_attn)
        x = block.residual(x, block.ln_cross, cross_attn)
        x = block.residual(x, block.ln_2, block.mlp)
    return x, weights


@torch.inference_mode()
def cross_attention(model, image, token_ids):
    """Cross-attention's weights for one image and one caption -> float32 tensor (depth, heads, T, N) on the CPU.

    `image` (3, H, W) or (1, 3, H, W): normalised, or uint8 pixels; `token_ids` (T,) begin with BOS. Entry [i, h, t] is
    the distribution of head h in block i over the N image tokens of that block, at the position t, which predicts the
    token t + 1; it sums to 1. Raises ValueError unless the model is in eval mode.
    """
    if model.training:
        raise ValueError("attention maps need a model in eval mode: call model.eval() first")
    device = next(model.parameters()).device
    token_ids = torch.as_tensor(token_ids, device=device).view(1, -1)  # (1, T)
    states = model.encoder_states(image.view(1, *image.shape[-3:]).to(device))
    _, weights = eager_decode(model, token_ids, states)
    return torch.cat(weights).float().cpu()  # (depth, heads, T, N)


def patch_maps(model, weights):
    """Weights (..., N) over image tokens -> maps (..., grid_h, grid_w) over the photo.

    Class and register tokens are left out, so a map sums to less than 1 where they got some attention. With coupling
    "final" a CNN's levels (`feature_levels`) are all among the N tokens; their maps are summed. Raises ValueError when
    the image tokens do not form a square grid.
    """
    encoder = model.encoder
    timm_model = encoder.vit if hasattr(encoder, "vit") else encoder.cnn
    weights = weights[..., getattr(timm_model, "num_prefix_tokens", 0) :]  # class and register tokens come first
    levels = getattr(encoder, "feature_levels", 1) if model.config.coupling == "final" else 1
    maps = []
    for level in weights.chunk(levels, dim=-1):  # (..., cells); all levels have the grid of the last one
        side = math.isqrt(level.size(-1))
        if side * side != level.size(-1):
            raise ValueError(f"the {level.size(-1)} image tokens of {model.config.encoder} are no square grid")
        maps.append(level.unflatten(-1, (side, side)))
    return torch.stack(maps).sum(0)


def group_words(tokenizer, token_ids):
    """token_ids, a list that begins with BOS -> list of (word, positions of its tokens in `token_ids`).

    The pieces of a BPE are joined to words, characters that are tokens stay alone; special tokens and everything after
    EOS are left out.
    """
    words = []  # the positions of each word
    for position in range(1, len(token_ids)):
        if token_ids[position] == tokenizer.eos_token_id:
            break
        previous = tokenizer.decode(token_ids[position - 1 : position])
        added = tokenizer.decode(token_ids[position - 1 : position + 1])[len(previous) :]
        if not words or added[:1].isspace() or getattr(tokenizer, "has_characters", False):
            words.append([])
        words[-1].append(position)
    return [(tokenizer.decode([token_ids[p] for p in positions]).strip(), positions) for positions in words]


def check_choice(model, block=None, head=None):
    """Raise ValueError for a decoder block or attention head that does not exist; None stands for all of them."""
    for name, index, count in (("block", block, model.config.depth), ("head", head, model.config.num_heads)):
        if index is not None and not 0 <= index < count:
            raise ValueError(f"{name} {index}: the decoder has {name}s 0 to {count - 1}")


def word_maps(model, tokenizer, image, token_ids, block=None, head=None):
    """Attention maps of the words of a caption -> (words, list of str; maps, float tensor (words, grid_h, grid_w)).

    `image`: anything that `preprocessing.load_image` takes, or a tensor as in `cross_attention`; `token_ids`: a
    caption's ids from BOS on, as `caption_ids` and `model.generate` return them. The map of a word is the attention of
    the position that predicts it, the one before it; a word of two or more tokens has their mean. It is the mean over
    all decoder blocks and heads unless `block` (0 .. depth-1) or `head` (0 .. num_heads-1) selects one. See
    `patch_maps` for the cells of a map.
    Raises ValueError for a block or head that does not exist.
    """
    check_choice(model, block, head)
    token_ids = [int(token) for token in token_ids]
    image = image if isinstance(image, torch.Tensor) else preprocess(image, **model.preprocessing)
    weights = cross_attention(model, image, token_ids)  # (depth, heads, T, N)
    weights = weights if block is None else weights[block : block + 1]
    weights = weights if head is None else weights[:, head : head + 1]
    maps = patch_maps(model, weights.mean((0, 1)))  # (T, grid_h, grid_w)
    words = group_words(tokenizer, token_ids)
    of_words = [maps[[position - 1 for position in positions]].mean(0) for _, positions in words]
    return [word for word, _ in words], torch.stack(of_words) if of_words else maps[:0]


def overlay(photo, attention_map, side=256):
    """Draw an attention map over its photo as a heat map -> RGB `PIL.Image.Image` of side x side pixels.

    The photo (anything that `preprocessing.load_image` takes) is upright and resized to a square, as the model sees it.
    `attention_map` (grid_h, grid_w) is enlarged bilinearly; its largest value is the brightest, 0 darkens the photo.
    """
    import matplotlib

    heat = F.interpolate(attention_map[None, None].float(), size=(side, side), mode="bilinear")[0, 0]  # (side, side)
    heat = (heat / attention_map.max().clamp(min=1e-12)).clamp(0, 1).cpu().numpy()
    colours = Image.fromarray(matplotlib.colormaps["inferno"](heat, bytes=True)[..., :3].copy())
    opacity = Image.fromarray(((0.4 + 0.35 * heat) * 255).astype("uint8"))  # the photo is visible everywhere
    return Image.composite(colours, resize(photo, side), opacity)


def draw_attention(photo, words, maps, path, columns=6, side=152):
    """Write a PNG to `path`: the photo, then a panel of `side` pixels for each word with its attention map.

    `photo` as in `overlay`; `words` and `maps` of `word_maps`. Raises OSError that names `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [resize(photo, side), *(overlay(photo, attention_map, side) for attention_map in maps)]
    columns, title, gap = min(columns, len(panels)), 24, 8  # pixels
    width, height = side + gap, side + title + gap
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    figure = Figure(figsize=(sheet.width / 100, sheet.height / 100), dpi=100)
    FigureCanvasAgg(figure)  # pyplot would keep every figure in memory and may need a display
    for i, (panel, word) in enumerate(zip(panels, ["", *words], strict=True)):
        left, top = i % columns * width + gap // 2, i // columns * height + title
        sheet.paste(panel, (left, top))
        x, y = (left + side / 2) / sheet.width, 1 - (top - 5) / sheet.height
        size = min(12, 150 / max(1, len(word)))  # a long word stays over its own panel
        figure.text(x, y, printable(word), ha="center", va="baseline", fontsize=size, parse_math=False)
    figure.figimage(np.asarray(sheet))
    write_atomically(path, lambda draft: figure.savefig(draft, format="png", dpi=100, pil_kwargs={"optimize": True}))
