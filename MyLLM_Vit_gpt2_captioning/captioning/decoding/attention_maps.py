"""Where the decoder looked for each word: cross-attention's weights, as maps over the photo (Xu et al. 2015).

    ids = caption_ids(model, tokenizer, "photo.jpg", deterministic=True)[0]
    words, maps = word_maps(model, tokenizer, "photo.jpg", ids)
    draw_attention("photo.jpg", words, maps, "attention.png")

Captions are written by `scaled_dot_product_attention`, which never shows its weights. Here the blocks run once more
over the finished caption with an explicit softmax in cross-attention. The model is not changed by that, not even for a
moment: a web page may be captioning with it at the same time.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from captioning.common.files import write_atomically
from captioning.images.preprocessing import preprocess, resize
from captioning.model.tokenizer import encode_prompt


def caption_ids(model, tokenizer, image, prompt="", **options):
    """Caption one image -> list of its captions' ids, 1-D on the CPU: BOS, prompt, caption, EOS if it was reached.

    `image`: whatever `preprocessing.load_image` takes. `options` as in `decoding.Options`; the list has
    `num_return_sequences` captions.
    """
    device = next(model.parameters()).device
    photo = preprocess(image, **model.preprocessing)[None].to(device)  # (1, 3, H, W)
    ids = model.generate(photo, torch.tensor([encode_prompt(tokenizer, prompt)], device=device), **options)
    return ids if isinstance(ids, list) else [ids]


def eager_attend(cross_attn, q, image_tokens):
    """`GPT2CrossAttention` with an explicit softmax, without dropout.

    q (B*K, T, embed_dim), image_tokens (B, N, embed_dim) -> its output (B*K, T, embed_dim), and the weights
    (B*K, heads, T, N) with which each query takes the image tokens' values; they sum to 1 over N.
    """
    keys, values = cross_attn.project(image_tokens, image_tokens)  # (B, heads, N, head_dim) each
    queries = cross_attn.q(q).view(len(keys), -1, keys.size(1), keys.size(3)).transpose(1, 2)
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(keys.size(-1))  # (B, heads, K*T, N)
    weights = scores.softmax(-1)
    context = (weights @ values).transpose(1, 2)  # (B, K*T, heads, head_dim)
    output = cross_attn.c_proj(context.reshape(q.shape))
    weights = weights.unflatten(2, (-1, q.size(1))).transpose(1, 2).flatten(0, 1)  # (B*K, heads, T, N)
    return output, weights


def eager_decode(model, input_ids, encoder_states):
    """`model.decode` with `eager_attend` in every block.

    input_ids (B*K, T), encoder_states as `model.encoder_states` makes them -> hidden states (B*K, T, embed_dim), and
    the weights of each block, a list of (B*K, heads, T, N).
    """
    x, weights = model._build_text_embeddings(input_ids), []
    for block, image_tokens in zip(model.gpt.trf_blocks, encoder_states, strict=True):

        def look(q, block=block, image_tokens=image_tokens):
            output, looked = eager_attend(block.cross_attn, q, image_tokens)
            weights.append(looked)
            return output

        x = block.residual(x, block.ln_1, block.self_attn)
        x = block.residual(x, block.ln_cross, look)
        x = block.residual(x, block.ln_2, block.mlp)
    return x, weights


@torch.inference_mode()
def cross_attention(model, image, token_ids):
    """The weights of cross-attention for one image and one caption -> float32 tensor (depth, heads, T, N) on the CPU.

    `image` (3, H, W) or (1, 3, H, W): normalised, or uint8 pixels; `token_ids` (T,), ids that begin with BOS. Entry
    [i, h, t] says how the head h of block i shares its attention among the N image tokens that the block sees, while
    position t decides which token follows it; it sums to 1. The model has to be in eval mode.
    """
    if model.training:
        raise ValueError("attention is shown of a model in eval mode: call model.eval() first")
    device = next(model.parameters()).device
    token_ids = torch.as_tensor(token_ids, device=device).view(1, -1)  # (1, T)
    states = model.encoder_states(image.view(1, *image.shape[-3:]).to(device))
    _, weights = eager_decode(model, token_ids, states)
    return torch.cat(weights).float().cpu()  # (depth, heads, T, N)


def patch_maps(model, weights):
    """Weights (..., N) over image tokens -> maps (..., grid_h, grid_w) over the photo.

    Class and register tokens are left out, so that a map sums to less than 1 where something went to them. The levels
    of a CNN (`feature_levels`), whose tokens stand side by side with coupling "final", are resampled to the largest
    grid and summed. Raises ValueError for image tokens that are no square grid.
    """
    encoder = model.encoder
    timm_model = encoder.vit if hasattr(encoder, "vit") else encoder.cnn
    weights = weights[..., getattr(timm_model, "num_prefix_tokens", 0) :]  # class and register tokens are in front
    levels = getattr(encoder, "feature_levels", 1) if model.config.coupling == "final" else 1
    maps = []
    for level in weights.chunk(levels, dim=-1):  # (..., cells), all levels have the grid of the last one
        side = math.isqrt(level.size(-1))
        if side * side != level.size(-1):
            raise ValueError(f"the {level.size(-1)} image tokens of {model.config.encoder} are no square grid")
        maps.append(level.unflatten(-1, (side, side)))
    return torch.stack(maps).sum(0)


def group_words(tokenizer, token_ids):
    """token_ids, a list that begins with BOS -> list of (word, positions of its tokens in `token_ids`).

    The pieces of a BPE are joined to words; what stands behind the EOS, and special tokens, are left out.
    """
    words = []
    for position in range(1, len(token_ids)):
        if token_ids[position] == tokenizer.eos_token_id:
            break
        before = tokenizer.decode(token_ids[position - 1 : position])
        added = tokenizer.decode(token_ids[position - 1 : position + 1])[len(before) :]
        if not words or added[:1].isspace():
            words.append([])
        words[-1].append(position)
    return [(tokenizer.decode([token_ids[p] for p in positions]).strip(), positions) for positions in words]


def check_choice(model, block=None, head=None):
    """Raise ValueError for a decoder block or head that is not there; None is always fine."""
    for name, chosen, count in (("block", block, model.config.depth), ("head", head, model.config.num_heads)):
        if chosen is not None and not 0 <= chosen < count:
            raise ValueError(f"{name} {chosen}: the decoder has {name}s 0 to {count - 1}")


def word_maps(model, tokenizer, image, token_ids, block=None, head=None):
    """Where cross-attention looked for each word -> (words, a list of str; maps, float tensor (words, grid_h, grid_w)).

    `image`: whatever `preprocessing.load_image` takes, or a tensor as `cross_attention` takes it; `token_ids`: a
    caption's ids that begin with BOS, as `caption_ids` or `model.generate` gives them. The map of a word is the
    attention of the position that predicts it, the one before it; a word of several tokens has their mean. Mean over
    all decoder blocks and heads unless `block` (0 .. depth-1) or `head` (0 .. num_heads-1) chooses one. See
    `patch_maps` for what a map's cells are.
    Raises ValueError for a block or head that is not there.
    """
    check_choice(model, block, head)
    token_ids = [int(token) for token in token_ids]
    image = image if isinstance(image, torch.Tensor) else preprocess(image, **model.preprocessing)
    weights = cross_attention(model, image, token_ids)  # (depth, heads, T, N)
    weights = weights if block is None else weights[block : block + 1]
    weights = weights if head is None else weights[:, head : head + 1]
    maps = patch_maps(model, weights.mean((0, 1)))  # (T, grid_h, grid_w)
    words = group_words(tokenizer, token_ids)
    looked = [maps[[position - 1 for position in positions]].mean(0) for _, positions in words]
    return [word for word, _ in words], torch.stack(looked) if looked else maps[:0]


def overlay(photo, attention_map, side=256):
    """Heat over the photo -> RGB `PIL.Image.Image` of side x side pixels.

    The photo (whatever `preprocessing.load_image` takes) is upright and squeezed into a square, as the model sees it.
    `attention_map` (grid_h, grid_w), enlarged bilinearly; its largest value is the hottest, 0 leaves the photo dim.
    """
    import matplotlib

    heat = F.interpolate(attention_map[None, None].float(), size=(side, side), mode="bilinear")[0, 0]  # (side, side)
    heat = (heat / attention_map.max().clamp(min=1e-12)).clamp(0, 1).cpu().numpy()
    colours = Image.fromarray(matplotlib.colormaps["inferno"](heat, bytes=True)[..., :3].copy())
    opacity = Image.fromarray(((0.4 + 0.35 * heat) * 255).astype("uint8"))  # even the hottest place shows the photo
    return Image.composite(colours, resize(photo, side), opacity)


def draw_attention(photo, words, maps, path, columns=6, side=152):
    """The photo, then a panel of `side` pixels for each word with its map -> PNG at `path`.

    `photo`, `words` and `maps` as `word_maps` takes and gives them. Raises OSError that names `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [resize(photo, side), *(overlay(photo, attention_map, side) for attention_map in maps)]
    columns, title, gap = min(columns, len(panels)), 24, 8  # pixels
    width, height = side + gap, side + title + gap
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    figure = Figure(figsize=(sheet.width / 100, sheet.height / 100), dpi=100)
    FigureCanvasAgg(figure)  # pyplot would keep every figure and may want a display
    for i, (panel, word) in enumerate(zip(panels, ["", *words], strict=True)):
        left, top = i % columns * width + gap // 2, i // columns * height + title
        sheet.paste(panel, (left, top))
        x, y = (left + side / 2) / sheet.width, 1 - (top - 5) / sheet.height
        size = min(12, 150 / max(1, len(word)))  # a long word stays over its own panel
        figure.text(x, y, word, ha="center", va="baseline", fontsize=size, parse_math=False)
    figure.figimage(np.asarray(sheet))
    write_atomically(path, lambda draft: figure.savefig(draft, format="png", dpi=100, pil_kwargs={"optimize": True}))
