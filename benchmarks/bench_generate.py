"""How fast are captions generated, compared with Hugging Face's `generate`, with the limit of the hardware, and with a
naive design that computes image and text again for every token?

    python benchmarks/bench_generate.py                    on the CPU, float32
    python benchmarks/bench_generate.py --device cuda      on a GPU, bf16; --batch_sizes 1 64

ViT-B/16 and GPT-2 small with the same random weights in both; every caption has 20 tokens. Times for "20 tokens" do not
include the encoding of the image, nor does the floor, a lower bound: reading the decoder's weights once a token at the
measured bandwidth, plus the operations of the matrix products at the measured rate. All are timed in turns in one
process.
"""

import argparse
import statistics
from contextlib import nullcontext
from functools import partial

import torch

from captioners import make_batch, make_pair
from captioning.decoding.cached_decoder import cuda_graphs_disabled
from captioning.decoding.search import generate_ids
from timing import check_device, interleaved, machine, median_and_range, peak_on_a_gpu, unless_out_of_memory

NEW = 20  # tokens of each caption


def hf_generate(model, levels=None, images=None, beams=1):
    """Hugging Face's `generate`, from images or from the encoder's output `levels` -> new ids (B, NEW)."""
    from transformers.modeling_outputs import BaseModelOutput

    inputs = {"pixel_values": images} if levels is None else {"encoder_outputs": BaseModelOutput(levels[0])}
    return model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=beams, do_sample=False)[:, 1:]


def our_generate(model, images, start, context=nullcontext, **options):
    """`generate_ids` in `context()`, from images or the encoder's `levels` -> new ids (B, NEW)."""
    with context():
        return generate_ids(model, images, start, NEW, **options)[:, 1:]


@torch.inference_mode()
def naive_generate(model, images, start):
    """Greedy search without any cache: `forward` over image and text for each token -> new ids (B, NEW)."""
    ids = start
    for _ in range(NEW):
        ids = torch.cat([ids, model(images, ids).argmax(-1)], dim=1)
    return ids[:, 1:]


def bandwidth_and_rate(device, dtype, rows):
    """Measure (bytes a second when reading a large tensor, floating-point operations a second of the product of `rows`
    rows with GPT-2's widest layer), each the best of nine."""
    large = torch.ones(2**28, dtype=dtype, device=device)  # larger than any cache
    x, weight = torch.randn(rows, 768, dtype=dtype, device=device), torch.randn(768, 3072, dtype=dtype, device=device)
    repeats = 100
    times = interleaved(
        {"read": large.sum, "multiply": lambda: [x @ weight for _ in range(repeats)]}, rounds=9, device=device
    )
    size = large.numel() * large.element_size()
    return size / min(times["read"]), 2 * rows * weight.numel() * repeats / min(times["multiply"])


def floor(model, batch, device, dtype):
    """The lower bound, in seconds, for NEW tokens of `batch` captions."""
    sizes = [p.numel() for name, p in model.gpt.named_parameters() if p.ndim == 2 and "pos_emb" not in name]
    # Cross-attention's keys and values are computed once for a caption, not for each token.
    key_value_weights = 2 * model.config.depth * model.config.embed_dim**2
    weights, bytes_per_weight = sum(sizes) - key_value_weights, torch.tensor([], dtype=dtype).element_size()
    bandwidth, _ = bandwidth_and_rate(device, dtype, 512)
    _, rate = bandwidth_and_rate(device, dtype, 1024)
    seconds = NEW * (weights * bytes_per_weight / bandwidth + 2 * batch * weights / rate)
    print(
        f"floor, batch {batch}: {weights / 1e6:.0f}M weights a token, {bandwidth / 1e9:.1f} GB/s, "
        f"{rate / 1e9:,.0f} GFLOP/s: {seconds * 1000:,.0f} ms\n"
    )
    return seconds


def compare(title, candidates, reference, rounds, device):
    """Time candidates {name: function -> ids}, print a row for each with its ratio to `reference` -> {name: seconds}.
    One that runs out of memory has a row that says so, and no seconds."""
    ids = {name: unless_out_of_memory(function) for name, function in candidates.items()}
    for name in [name for name, result in ids.items() if result is None]:
        del ids[name]
        print(f"| {title} | {name} | out of memory |" + " |" * 4, flush=True)
    candidates = {name: function for name, function in candidates.items() if name in ids}
    reference = reference if reference in ids else next(iter(ids), None)
    for name, result in ids.items():
        if result.shape != ids[reference].shape:
            raise RuntimeError(f"{title}, {name}: ids {tuple(result.shape)} instead of {tuple(ids[reference].shape)}")
    cuda = device == "cuda"
    peak = {name: peak_on_a_gpu(function) for name, function in candidates.items()} if cuda else {}
    # On a GPU the first run of a decoding step is eager and the second captures its CUDA graph: neither counts.
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


def measure(ours, theirs, batch_sizes, rounds, device):
    """Time both models of `make_pair` with each batch size and print a table."""
    cuda, dtype = device == "cuda", ours.gpt.tok_emb.weight.dtype
    ours.config.eos_token_id, theirs.generation_config.eos_token_id = -1, None  # all captions have NEW tokens
    bf16 = partial(torch.autocast, device, torch.bfloat16)
    batches = []
    for batch in batch_sizes:
        seconds = floor(ours, batch, device, dtype)
        images, _ = make_batch(batch, 1, 2, device, img_size=ours.preprocessing["img_size"], dtype=dtype)
        start = torch.full((batch, 1), ours.config.vocab_size - 1, device=device)
        with torch.inference_mode():
            levels = ours.levels(images)
        batches.append((batch, seconds, images, levels, start))
    columns = ["work", "way", "ms", "faster", "same tokens"] + (["captions/s", "memory, GiB"] if cuda else [])
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for batch, seconds, _, levels, start in batches:
        greedy = partial(our_generate, ours, levels, start, deterministic=True)
        candidates = {"generate": partial(hf_generate, theirs, levels), "ours": greedy}
        if cuda:
            candidates["ours, without CUDA graphs"] = partial(greedy, context=cuda_graphs_disabled)
        else:
            candidates["ours, bf16 layers"] = partial(greedy, context=bf16)
        work = f"greedy, batch {batch}, 20 tokens"
        times = compare(work, candidates, "generate", rounds, device)
        if "ours" in times:
            print(f"| {work} | the floor | {1000 * seconds:,.0f} | ours takes {times['ours'] / seconds:.2f} x | |")
        candidates = {
            "generate": partial(hf_generate, theirs, levels, beams=4),
            "ours": partial(our_generate, ours, levels, start, num_beams=4),
        }
        compare(f"beam 4, batch {batch}, 20 tokens", candidates, "generate", rounds, device)
    batch, _, images, _, start = batches[0]
    greedy = partial(our_generate, ours, images, start, deterministic=True)
    candidates = {
        "naive": partial(naive_generate, ours, images, start),
        "generate": partial(hf_generate, theirs, images=images),
        "ours": greedy,
    }
    if not cuda:
        candidates["ours, bf16"] = partial(greedy, context=bf16)
    compare(f"image and greedy, batch {batch}", candidates, "naive", rounds, device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    args = parser.parse_args(argv)
    check_device(args.device)
    pair = make_pair(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    print(f"{machine()}\n\n    python benchmarks/bench_generate.py --device {args.device}\n")
    measure(*pair, args.batch_sizes, args.rounds, args.device)


if __name__ == "__main__":
    main()
