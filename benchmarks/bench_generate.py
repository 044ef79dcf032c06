"""How fast are captions written: against Hugging Face's `generate`, against what the processor allows, and against the
naive design that computes image and text again for every token?

    python benchmarks/bench_generate.py                    on the CPU, float32
    python benchmarks/bench_generate.py --device cuda      on a GPU, bf16; --batch_sizes 1 64

ViT-B/16 and GPT-2 small with the same random weights in both; 20 tokens, no end of caption before. "20 tokens" times
leave the image's encoding out, and so does the floor: the decoder's weights once a token over the bandwidth measured
here, plus the products' arithmetic over the rate measured here. All ways take turns in one process.
"""

import argparse
import statistics
from functools import partial

import torch

from captioners import make_batch, make_pair
from captioning.decoding.search import generate_ids
from timing import interleaved, machine, median_and_range, peak_on_a_gpu

NEW = 20


def theirs_generate(model, levels=None, images=None, beams=1):
    """Hugging Face's, from images or from what the encoder made of them -> new ids (B, NEW)."""
    from transformers.modeling_outputs import BaseModelOutput

    given = {"pixel_values": images} if levels is None else {"encoder_outputs": BaseModelOutput(levels[0])}
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=beams, do_sample=False)[:, 1:]


@torch.inference_mode()
def naive_generate(model, images, start):
    """Greedy without any cache: `forward` over everything for each token -> new ids (B, NEW)."""
    ids = start
    for _ in range(NEW):
        ids = torch.cat([ids, model(images, ids).argmax(-1)], dim=1)
    return ids[:, 1:]


def bandwidth_and_rate(device, dtype, rows):
    """-> (bytes a second that are read of a large tensor, floating-point operations a second of a product with so many
    rows and GPT-2's widest layer), the best of a few tries."""
    large = torch.ones(2**28, dtype=dtype, device=device)  # no cache holds it
    x, weight = torch.randn(rows, 768, dtype=dtype, device=device), torch.randn(768, 3072, dtype=dtype, device=device)
    repeats = 100
    times = interleaved(
        {"read": large.sum, "multiply": lambda: [x @ weight for _ in range(repeats)]}, rounds=9, device=device
    )
    size = large.numel() * large.element_size()
    return size / min(times["read"]), 2 * rows * weight.numel() * repeats / min(times["multiply"])


def floor(model, batch, device, dtype):
    """Seconds that NEW tokens take at the least for so many captions."""
    weights = [p.numel() for name, p in model.gpt.named_parameters() if p.ndim == 2 and "pos_emb" not in name]
    # Cross-attention's keys and values are computed once for a caption, not for a token.
    once = 2 * model.config.depth * model.config.embed_dim**2
    numbers, size = sum(weights) - once, torch.tensor([], dtype=dtype).element_size()
    bandwidth, _ = bandwidth_and_rate(device, dtype, 512)
    _, rate = bandwidth_and_rate(device, dtype, 1024)
    seconds = NEW * (numbers * size / bandwidth + 2 * batch * numbers / rate)
    print(
        f"floor, batch {batch}: {numbers / 1e6:.0f}M weights a token, {bandwidth / 1e9:.1f} GB/s, "
        f"{rate / 1e9:,.0f} GFLOP/s: {seconds * 1000:,.0f} ms\n"
    )
    return seconds


def compare(title, candidates, reference, rounds, device):
    """Time candidates {name: function -> ids} and print a row for each, with the ratio to `reference`."""
    ids = {name: function() for name, function in candidates.items()}
    for name, result in ids.items():
        if result.shape != ids[reference].shape:
            raise RuntimeError(f"{title}, {name}: ids {tuple(result.shape)} instead of {tuple(ids[reference].shape)}")
    cuda = device == "cuda"
    peak = {name: peak_on_a_gpu(function) for name, function in candidates.items()} if cuda else {}
    # A new decoder on a GPU runs its steps once and records them the second time: neither counts.
    seconds = interleaved(candidates, rounds, warmup=3 if cuda else 1, device=device)
    for name, times in seconds.items():
        ratio = statistics.median(slow / fast for slow, fast in zip(seconds[reference], times, strict=True))
        same = (ids[name] == ids[reference]).float().mean().item()
        milliseconds = median_and_range([1000 * time for time in times])
        cells = [title, name, milliseconds, f"{ratio:.2f}", f"{same:.1%}"]
        if cuda:
            cells += [f"{len(ids[name]) / statistics.median(times):,.0f}", f"{peak[name]:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    args = parser.parse_args(argv)
    device, cuda = args.device, args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    ours, theirs = make_pair(device, dtype)
    ours.config.eos_token_id, theirs.generation_config.eos_token_id = -1, None  # nothing ends before NEW tokens
    print(f"{machine()}\n\n    python benchmarks/bench_generate.py --device {device}\n")
    bf16 = partial(torch.autocast, device, torch.bfloat16)
    rows = []
    for batch in args.batch_sizes:
        least = floor(ours, batch, device, dtype)
        images, _ = make_batch(batch, 1, 2, device, dtype=dtype)
        start = torch.full((batch, 1), 50256, device=device)
        with torch.inference_mode():
            levels = ours.levels(images)
        greedy = partial(generate_ids, ours, levels, start, NEW, deterministic=True)
        beam = partial(generate_ids, ours, levels, start, NEW, num_beams=4)

        def rough(greedy=greedy):
            with bf16():
                return greedy()

        rows.append((batch, least, greedy, beam, rough, images, levels, start))
    heads = ["work", "way", "ms", "faster", "same tokens"] + (["captions/s", "memory, GiB"] if cuda else [])
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    new = lambda function: lambda: function()[:, 1:]  # noqa: E731
    for batch, least, greedy, beam, rough, _, levels, _ in rows:
        candidates = {"generate": partial(theirs_generate, theirs, levels), "ours": new(greedy)}
        if cuda:
            from captioning.decoding.cached_decoder import cuda_graphs_disabled  # found since `captioners` is imported

            candidates["ours, without CUDA graphs"] = new(cuda_graphs_disabled()(greedy))
        else:
            candidates["ours, bf16 layers"] = new(rough)
        times = compare(f"greedy, batch {batch}, 20 tokens", candidates, "generate", args.rounds, device)
        print(f"| greedy, batch {batch}, 20 tokens | the floor | {1000 * least:,.0f} | "
              f"ours takes {times['ours'] / least:.2f} x | |")  # fmt: skip
        candidates = {"generate": partial(theirs_generate, theirs, levels, beams=4), "ours": new(beam)}
        compare(f"beam 4, batch {batch}, 20 tokens", candidates, "generate", args.rounds, device)
    batch, *_, images, _, start = rows[0]
    whole = partial(generate_ids, ours, images, start, NEW, deterministic=True)

    def whole_rough():
        with bf16():
            return whole()

    candidates = {
        "naive": partial(naive_generate, ours, images, start),
        "generate": partial(theirs_generate, theirs, images=images),
        "ours": new(whole),
    }
    if not cuda:
        candidates["ours, bf16"] = new(whole_rough)
    compare(f"image and greedy, batch {batch}", candidates, "naive", args.rounds, device)


if __name__ == "__main__":
    main()
