"""Do words attend to their object? Cross-attention of a Shapes captioner, compared with the boxes of the objects.

    python benchmarks/measure_attention.py                          the model in examples/shapes, 500 new scenes
    python benchmarks/measure_attention.py --checkpoint captioner --scenes 1000

New scenes are rendered, so that the boxes are known, and captioned greedily; those with a wrong caption are left out,
because their words have no object. For each word of an object (size, colour, shape) the table shows the share of the
attention over the patches that is inside the object's box, and what would be there by chance: the box's share of the
area, and the share inside the box of the corresponding object in another scene. A patch partly inside the box counts
proportionally.
"""

import argparse
import random
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning"))

import torch

from captioning.data import shapes
from captioning.decoding.attention_maps import caption_ids, word_maps
from MyLLM_Vit_gpt2_captioning import load_captioner

KINDS = ("size", "colour", "shape")
SEED = 2024  # of the scenes; those of training have seed 0


def coverage(box, grid, side):
    """box (left, top, right, bottom) in pixels of a square image of `side` pixels -> tensor (grid, grid): the fraction
    (0..1) of each cell that is inside the box."""
    edges = torch.arange(grid + 1) * side / grid  # (grid + 1,)
    across, down = (
        (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * grid / side
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )  # (grid,) each
    return down[:, None] * across


def measure(model, tokenizer, scenes, seed=SEED):
    """-> (rows of the table, number of right captions).

    A row: (block or "all", kind of word, share of the attention inside the box of the word's object, inside the box of
    the corresponding object in another scene, inside the box of the other object, the box's share of the area).
    """
    rng, rendered = random.Random(seed), []
    while len(rendered) < scenes:
        scene = shapes.draw_scene(rng, held_out=False)
        if scene[0] != scene[1]:  # with equal objects a word could mean either
            rendered.append((scene, *shapes.render_with_boxes(rng, scene)))
    blocks = [*range(model.config.depth), None]
    shares = {(block, kind): [] for block in blocks for kind in KINDS}
    right = 0
    for (scene, image, boxes), (_, _, other_boxes) in zip(rendered, rendered[1:] + rendered[:1], strict=True):
        ids = caption_ids(model, tokenizer, image, deterministic=True)[0]
        for block in blocks:
            words, maps = word_maps(model, tokenizer, image, ids, block)
            if shapes.parse_caption(" ".join(words)) != scene:
                break
            right += block is None
            for i, thing in enumerate(scene):
                first = next(n for n in range(len(words)) if tuple(words[n : n + 3]) == thing)
                masks = [coverage(box, maps.size(1), image.width) for box in (boxes[i], other_boxes[i], boxes[1 - i])]
                for kind, attention_map in zip(KINDS, maps[first : first + 3], strict=True):
                    attention_map = attention_map / attention_map.sum()  # without the share of the class token
                    inside = [float((attention_map * mask).sum()) for mask in masks]
                    shares[block, kind].append((*inside, float(masks[0].mean())))
    rows = [
        ("all" if block is None else block, kind, *torch.tensor(values).mean(0).tolist())
        for (block, kind), values in shares.items()
    ]
    return rows, right


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=REPO_ROOT / "examples" / "shapes", help="(default: examples/shapes)")
    parser.add_argument("--scenes", type=int, default=500, help="(default: 500)")
    args = parser.parse_args(argv)
    rows, right = measure(*load_captioner(args.checkpoint), args.scenes)
    print(f"{right} of {args.scenes} captions are right. Shares of the attention over the patches, means:\n")
    print(
        "| decoder block | word for | in its object's box | in the other object's | in another scene's | area | times |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for block, kind, own, other_scene, other_object, area in rows:
        cells = " | ".join(f"{share:.1%}" for share in (own, other_object, other_scene, area))
        print(f"| {block} | {kind} | {cells} | {own / area:.1f} |")


if __name__ == "__main__":
    main()
