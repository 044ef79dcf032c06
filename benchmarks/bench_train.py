"""How many captions a second are trained on: by our model, where K captions share one encoding of their image, and by
Hugging Face's VisionEncoderDecoderModel with one image a caption, as is usual, or with shared encoder outputs?

    python benchmarks/bench_train.py                                             on the CPU, float32
    python benchmarks/bench_train.py --device cuda --batch_sizes 32 64 128 256   on a GPU, bf16, images a step

ViT-B/16 and GPT-2 small with the same random weights, dropout 0.1, fused AdamW and clipping in both; captions of 20
tokens. All are timed in turns in one process. "Frozen": only cross-attention and its norms train. Memory is the peak of
one step, on a CPU in a process of its own.
"""

import argparse
import gc
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from captioners import make_batch, make_pair
from timing import (
    check_device,
    free_memory,
    interleaved,
    machine,
    median_and_range,
    peak_on_a_gpu,
    unless_out_of_memory,
)

TOKENS, CAPTIONS = 20, 5
WAYS = ("Hugging Face as used", "Hugging Face, shared encoder outputs", "ours", "ours, from cached tokens")


def freeze(ours, theirs):
    """Freeze everything except cross-attention and its norm, in both models."""
    ours.pretrained_parameters = lambda: [
        name for name, _ in ours.named_parameters() if not any(f".{new}." in name for new in ours.NEW_LAYERS)
    ]
    ours.pretrained_layers_trainable(trainable=False)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad = "crossattention" in name or "ln_cross_attn" in name
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"ours trains {counts[0]:,} parameters, theirs {counts[1]:,}")


def unfreeze(ours, theirs):
    """Undo `freeze`."""
    del ours.pretrained_parameters
    for model in (ours, theirs):
        model.requires_grad_(True).train()


def labels_of(ids):
    """ids (B * K, T) -> (labels of our model, shifted by one and -100 at the end; labels of theirs, which takes the
    tokens to predict)."""
    ours = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return ours, ids[:, 1:]


def loss_of(way, ours, theirs, images, ids, levels):
    """One forward pass -> loss. Both models get the same captions: TOKENS tokens with TOKENS - 1 labels."""
    from transformers.modeling_outputs import BaseModelOutput

    labels, theirs_labels = labels_of(ids)
    if way.startswith("ours"):
        return ours(levels if "cached" in way else images, ids, labels)
    K = len(ids) // len(images)
    if way == "Hugging Face as used":
        inputs = {"pixel_values": images.repeat_interleave(K, dim=0)}
    else:
        encoder_trains = any(p.requires_grad for p in theirs.encoder.parameters())
        with torch.set_grad_enabled(encoder_trains and torch.is_grad_enabled()):
            states = theirs.encoder(images).last_hidden_state  # (B, N, C)
        inputs = {"encoder_outputs": BaseModelOutput(states.repeat_interleave(K, dim=0))}
    return theirs(decoder_input_ids=ids[:, :-1], labels=theirs_labels, **inputs, use_cache=False).loss


class Step:
    """A callable that does a training step in one of WAYS."""

    def __init__(self, way, ours, theirs, inputs, device):
        model = ours if way.startswith("ours") else theirs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.loss = partial(loss_of, way, ours, theirs, *inputs)
        self.device = device

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if not (loss.isfinite() and norm.isfinite()):  # also synchronises with the GPU
            raise RuntimeError("a loss or gradient is not finite")


def make_inputs(ours, images, device):
    """-> (pixels, ids, the encoder's `levels` as a token cache returns them) for a number of images."""
    config, img_size = ours.config, ours.preprocessing["img_size"]
    pixels, ids = make_batch(images, CAPTIONS, TOKENS, device, config.vocab_size, img_size)
    with torch.no_grad():
        levels = ours.levels(pixels)
    return pixels, ids, levels


def flops(images, frozen=False, captions=CAPTIONS, T=TOKENS, labels=None):
    """Floating-point operations of the matrix products of one of our steps: 2 for each weight and row in the forward
    pass, and as many for each of the two gradients that is computed. `captions` of an image have T tokens each, padding
    included, and the step has `labels`, by default T - 1 a caption."""
    C, N, depth = 768, 197, 12
    labels = images * captions * (T - 1) if labels is None else labels
    block = 12 * C * C  # weights of a ViT block, and of a GPT-2 block without cross-attention
    vit = images * depth * (2 * N * block + 4 * N * N * C) + images * 2 * 196 * C * 768
    text = images * captions * T
    decoder = depth * (2 * text * (block + 2 * C * C) + 2 * images * N * 2 * C * C)
    decoder += depth * images * captions * (4 * T * T * C + 4 * T * N * C)
    head = 2 * labels * 50257 * C
    if frozen:  # encoder: forward only; decoder: gradients of all activations, of weights only in cross-attention
        cross = depth * (2 * text * 2 * C * C + 2 * images * N * 2 * C * C)
        return vit + 2 * (decoder + head) + cross
    return 3 * (vit + decoder + head)


def measured_rate(device):
    """Floating-point operations a second of a large matrix product in the dtype of training, the best of nine."""
    dtype, side = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)

    def multiply():
        c = a @ b
        return c[0, 0].item()

    return 2 * side**3 / min(interleaved({"matmul": multiply}, rounds=9, warmup=2, device=device)["matmul"])


def check_losses(ours, theirs, device):
    """Raise RuntimeError unless both models, in eval mode, have the same loss in all WAYS."""
    inputs = make_inputs(ours, 2, device)
    with torch.no_grad():
        losses = {way: loss_of(way, ours, theirs, *inputs).item() for way in WAYS}
    if max(losses.values()) - min(losses.values()) > 1e-3:
        raise RuntimeError(f"the losses differ: {losses}")


def compare(ours, theirs, frozen, images, rounds, device):
    """Time the steps of all WAYS with `images` images and print a row for each, also where it runs out of memory."""
    inputs = make_inputs(ours, images, device)
    ours.train(), theirs.train()
    if frozen:
        freeze(ours, theirs)
    steps = {way: Step(way, ours, theirs, inputs, device) for way in (WAYS if frozen else WAYS[:3])}
    cuda, weights = device == "cuda", "frozen" if frozen else "all train"
    peak = {way: unless_out_of_memory(peak_on_a_gpu, step) for way, step in steps.items()} if cuda else {}
    for way in [way for way, memory in peak.items() if memory is None]:
        del steps[way]
        print(f"| {weights} | {images} | {way} | out of memory |" + " |" * 6, flush=True)
    seconds = interleaved(steps, rounds, warmup=3 if cuda else 1, device=device)
    rate = measured_rate(device)
    for way, times in seconds.items():
        captions = median_and_range([images * CAPTIONS / time for time in times])
        over = [
            f"{statistics.median(a / b for a, b in zip(seconds[other], times, strict=True)):.2f}"
            if other in seconds
            else ""
            for other in WAYS[:2]
        ]
        achieved = flops(images, frozen) / statistics.median(times)
        cells = [weights, images, way, captions, *over]
        cells += [f"{achieved / rate:.0%}" if way == "ours" else "", f"{peak[way]:.1f} GiB" if cuda else ""]
        if cuda:
            cells += [f"{images / statistics.median(times):,.0f}", f"{achieved / 1e12:.0f}" if way == "ours" else ""]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"<!-- matmul {rate / 1e9:,.0f} GFLOP/s -->", flush=True)
    if frozen:
        unfreeze(ours, theirs)


def peak_memory(way, images):
    """Run a CPU step in its own process -> [peak memory of the process, peak on top of the memory before], in GiB."""
    command = [sys.executable, __file__, "--peak_of", way, "--images", str(images)]
    return [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]]


def print_peak(way, images):
    """Print the peak of the resident memory during a step, and its increase over the memory before (GiB; Linux)."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**20

    ours, theirs = make_pair()
    inputs = make_inputs(ours, images, "cpu")
    model, other = (ours, theirs) if way.startswith("ours") else (theirs, ours)
    other.to("meta")  # frees its memory
    model.train()
    step = Step(way, ours, theirs, inputs, "cpu")
    step()  # allocates the optimizer's moments
    step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    step()
    print(status("VmHWM"), status("VmHWM") - before)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4], help="images a step (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--peak_of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=8, help="images of the step whose memory is measured on a CPU")
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.peak_of:
        print_peak(args.peak_of, args.images)
        return
    print(f"{machine()}\n\n    python benchmarks/bench_train.py --device {args.device}\n")
    if args.device == "cpu":
        print("| memory | process, GiB | on top of weights and moments | ratio | |\n| --- | --- | --- | --- | --- |")
        memory = {way: peak_memory(way, args.images) for way in WAYS[:3]}
        for way, (whole, top) in memory.items():
            as_used = memory[WAYS[0]]
            print(
                f"| {args.images} images, {way} | "
                f"{whole:.2f} | {top:.2f} | {whole / as_used[0]:.2f} | {top / as_used[1]:.2f} |",
                flush=True,
            )
        print()
    columns = ["weights", "images", "way", "captions/s", "over as used", "over shared", "MFU", "memory of a step"]
    columns += ["images/s", "TFLOP/s"] if args.device == "cuda" else []
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    ours, theirs = make_pair(args.device)
    check_losses(ours, theirs, args.device)
    for images in args.batch_sizes:
        for frozen in (False, True):
            compare(ours, theirs, frozen, images, args.rounds, args.device)
            free_memory()


if __name__ == "__main__":
    main()
