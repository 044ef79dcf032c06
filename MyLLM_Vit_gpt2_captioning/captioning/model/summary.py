"""The model summary: parameters and shapes of a captioner's parts, and which share of each trains in which stage."""

import torch

from captioning.model.stages import stages_of_run, trainable_names

BLOCK_PARTS = {  # part of a decoder block: substrings of its parameters' names
    "self-attention": (".self_attn.",),
    "cross-attention": (".cross_attn.",),
    "MLP": (".mlp.",),
    "norms": (".ln_1.", ".ln_2.", ".ln_cross."),
}


def summarize(model, config):
    """A captioner and the train_config -> (header, rows) of the summary table, all cells as text.

    Each part that has parameters is a row: its name, its shape, its number of parameters, and for each stage of the run
    the share of them that trains. The last row is the total. Runs the encoder once on a photo of zeros.
    """
    stages = stages_of_run(model, config)
    trainable = {stage: trainable_names(stage, model) for stage in stages}
    shapes = shapes_of(model)
    counts = {part: dict.fromkeys(["all", *stages], 0) for part in shapes}
    counts["total"] = dict.fromkeys(["all", *stages], 0)
    for name, parameter in model.named_parameters():  # the tied head is the token embedding, and counts once
        for part in (part_of(name), "total"):
            counts.setdefault(part, dict.fromkeys(["all", *stages], 0))
            counts[part]["all"] += parameter.numel()
            for stage in stages:
                counts[part][stage] += parameter.numel() * (name in trainable[stage])
    total = counts.pop("total")
    rows = [
        (part, shapes.get(part, ""), f"{count['all']:,}", *(_share(count[stage], count["all"]) for stage in stages))
        for part, count in counts.items()
        if count["all"]
    ]
    rows.append(("total", "", f"{total['all']:,}", *(f"{total[stage]:,}" for stage in stages)))
    return ("part", "shape", "parameters", *stages), rows


def part_of(name):
    """The name of a parameter -> the name of the part that it belongs to."""
    top, _, rest = name.partition(".")
    if top == "encoder":
        return "refiner" if rest.startswith("refiner.") else "encoder"
    if name.startswith("gpt.trf_blocks."):
        return next((part for part, layers in BLOCK_PARTS.items() if any(layer in name for layer in layers)), "blocks")
    parts = {"gpt.tok_emb": "token embeddings", "gpt.pos_emb": "position embeddings", "gpt.final_norm": "final norm"}
    return parts.get(".".join(name.split(".")[:2]), top)


def shapes_of(model):
    """{part: its shape as text}, in the order in which an image and a caption pass through the model."""
    config, encoder = model.config, model.encoder
    levels = token_shapes(model)
    size, width = model.preprocessing["img_size"], config.embed_dim
    shapes = [" x ".join(map(str, level)) for level in levels]
    equal = len(shapes) > 1 and len(set(shapes)) == 1
    tokens = f"{len(shapes)} levels of {shapes[0]}" if equal else ", ".join(shapes)
    widths = sorted(set(encoder.widths))
    inner = model.gpt.trf_blocks[0].mlp.expand.out_features
    return {
        "encoder": f"{config.encoder}, 3 x {size} x {size} -> {tokens}",
        "refiner": f"{encoder.width} channels" if config.refiner else "",
        "bridges": f"{len(model.bridges)} of {' or '.join(map(str, widths))} -> {width}",
        "token embeddings": f"{config.vocab_size} x {width}, tied to the head",
        "position embeddings": f"{config.seq_len} x {width}",
        "self-attention": f"{config.depth} blocks of {config.num_heads} heads, {width} -> {width}",
        "cross-attention": f"{config.depth} blocks of {config.num_heads} heads, to tokens of {width}",
        "MLP": f"{config.depth} blocks, {width} -> {inner} -> {width}",
        "norms": f"{config.depth} blocks, {width}",
        "final norm": f"{width}",
    }


@torch.inference_mode()
def token_shapes(model):
    """The encoder's tokens of one photo: (N, C) of each level, as cross-attention's bridges get them."""
    was_training, size = model.training, model.preprocessing["img_size"]
    device = next(model.parameters()).device
    model.eval()  # BatchNorm must not take up the statistics of a photo of zeros
    try:
        levels = model.encoder.refine(model.levels(torch.zeros(1, 3, size, size, device=device)))
    finally:
        model.train(was_training)
    return [tuple(level.shape[1:]) for level in levels]


def _share(part, whole):
    percent = 100 * part / whole
    return "-" if not part else "all" if part == whole else f"{percent:.0f}%" if percent >= 1 else "<1%"


def as_text(header, rows):
    """The table of `summarize` -> one text with aligned columns: part and shape to the left, numbers to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[:2] = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        lines.append("  ".join(padded))
    return "\n".join(lines)
