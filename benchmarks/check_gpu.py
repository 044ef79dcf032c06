"""Is everything right and fast on this GPU? One command, eight minutes:

    python benchmarks/check_gpu.py                           all steps, to check_gpu/check_gpu.md and .json
    python benchmarks/check_gpu.py --results                 and to the section "One GPU" of benchmarks/RESULTS.md
    python benchmarks/check_gpu.py --only training graphs    some steps; --list names them
    python benchmarks/check_gpu.py --dry-run                 tiny sizes on the CPU: does the command itself work?

Weights are random, and photos and captions are made here: neither a network nor a dataset is needed. Each step is a
process with a time limit. One that fails, runs out of memory or out of time loses no other step and none of its own
finished rows, and steps that no longer fit are not run.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # what reaches for the network fails at once
SCRIPT = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "MyLLM_Vit_gpt2_captioning.py"
PEAK = 989e12  # bf16 operations a second of an H100 SXM, dense, as its data sheet says
LEAST_SECONDS = 10  # a step with less time than that is not run
GRACE = 5  # seconds between asking a process to end and ending it
TINY_ENCODER = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2)
TINY = dict(  # the captioner of a dry run
    encoder="vit_tiny_patch16_224", encoder_options=TINY_ENCODER, embed_dim=24, num_heads=2, depth=2, vocab_size=60,
    eos_token_id=59,
)  # fmt: skip
TINY_OPTIONS = [
    "--encoder", "vit_tiny_patch16_224", "--encoder_options", json.dumps(TINY_ENCODER), "--embed_dim", "24",
    "--num_heads", "2", "--depth", "2", "--num_workers", "0", "--encoder_weights", "scratch",
]  # fmt: skip


@dataclass
class Setting:
    """What a step is given: `device` ("cuda" or "cpu"), whether it is a `dry_run`, when its time is over."""

    device: str
    dry_run: bool
    deadline: float  # of time.monotonic()

    @property
    def cuda(self):
        return self.device == "cuda"

    def left(self):
        """Seconds."""
        return self.deadline - time.monotonic()

    def autocast(self):
        import torch

        return torch.autocast(self.device, torch.bfloat16)


# ======================================================================================================================
# What steps share
# ======================================================================================================================


def table(*columns):
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|", flush=True)


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def fail(reason):
    """A check that is not met: the step goes on, and its result says so."""
    print(f"\nFAILED: {reason}\n", flush=True)


@contextlib.contextmanager
def variant(*cells):
    """Around one variant of a step: whatever goes wrong is a row that begins with `cells`, and the others follow."""
    from timing import free_memory, is_out_of_memory

    failed = False
    try:
        yield
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            row(*cells, "out of memory")
        else:
            failed = True
            message = " ".join(f"{type(error).__name__}: {error}".split())
            row(*cells, "failed")
            fail(f"{', '.join(map(str, cells))}: {message[:300]}")
            traceback.print_exc(limit=-6)
    if failed:
        sys.stderr.flush()
    free_memory()  # behind the handler: the traceback held the variant's tensors


def synchronize(setting):
    import torch

    if setting.cuda:
        torch.cuda.synchronize()


def seconds_of(function, setting, rounds=1, warmup=0):
    """-> seconds of each call, until its kernels have finished."""
    from timing import interleaved

    return interleaved({"": function}, rounds, warmup, setting.device)[""]


def milliseconds(seconds):
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


# ======================================================================================================================
# Steps
# ======================================================================================================================


def versions(setting):
    """Versions, ceilings of the device, and which attention kernels are chosen, with and without cuDNN's."""
    import torch

    import bench_generate
    from bench_train import measured_rate
    from timing import machine

    print(machine())
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}: {properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} SMs")
        table("ceiling", "measured")
        row("bf16 product of 8192 x 8192", f"{measured_rate('cuda') / 1e12:,.0f} TFLOP/s")
        row("reading memory", f"{bench_generate.bandwidth_and_rate('cuda', torch.bfloat16, 512)[0] / 1e9:,.0f} GB/s")
        source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        seconds = min(seconds_of(lambda: target.copy_(source), setting, rounds=9, warmup=2))
        row("copying in memory, read and written", f"{2 * 2 * source.numel() / seconds / 1e9:,.0f} GB/s")
        del source, target
    B, more = (2, (1,)) if setting.dry_run else (128, (1, 2, 3))
    cases = {  # title: (images or captions, queries, keys, causal, dropout, training)
        f"ViT, {B} x 197": (B, 197, 197, False, 0.0, True),
        f"causal, {5 * B} x 14": (5 * B, 14, 14, True, 0.0, True),
        f"causal, {5 * B} x 14, dropout 0.1": (5 * B, 14, 14, True, 0.1, True),
        f"cross, {B} x 70 to 197, dropout 0.1": (B, 70, 197, False, 0.1, True),
        f"one query, {B // 2} x 20": (B // 2, 1, 20, False, 0.0, False),
    }
    table("attention", "cuDNN allowed", "chosen", "ms, with gradients", "first call of a new shape, ms", "kernels")
    for title, case in cases.items():
        for allowed in (True, False):
            with variant(title, allowed):
                torch.backends.cuda.enable_cudnn_sdp(allowed)
                row(title, "yes" if allowed else "no", *attention_row(setting, more, *case))


def attention_row(setting, new_lengths, batch, queries, keys, causal, dropout, training):
    """-> cells: the backend, ms of a call, ms of first calls against new shapes, names of its kernels."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend

    def call(more):
        """The same with `more` tokens: a function that attends, in training also backward."""
        lengths = (queries + more if training else 1), (keys + more)
        q, k, v = (
            torch.randn(batch, length, 12, 64, dtype=torch.bfloat16, device=setting.device).transpose(1, 2)
            for length in (lengths[0], lengths[1], lengths[1])
        )
        inputs = [part.requires_grad_(training) for part in (q, k, v)]

        def attend():
            out = F.scaled_dot_product_attention(*inputs, dropout_p=dropout, is_causal=causal)
            if training:
                torch.autograd.grad(out, inputs, out)

        return attend, SDPBackend(torch._fused_sdp_choice(*inputs, None, dropout, causal)).name

    attend, backend = call(0)
    seconds_of(attend, setting, warmup=1)
    repeats = 2 if setting.dry_run else 20
    steady = seconds_of(lambda: [attend() for _ in range(repeats)], setting, rounds=2 if setting.dry_run else 9)
    first = [seconds_of(call(more)[0], setting)[0] for more in new_lengths]
    kernels = [name for name, _, _ in kernels_of(attend)] if setting.cuda else []
    kernels = "; ".join(re.sub(r"^void |<.*|\(.*", "", name)[:70] for name in kernels[:3])
    new = f"{milliseconds(statistics.median(first))} (most {milliseconds(max(first))})"
    return backend, milliseconds(statistics.median(steady) / repeats), new, kernels


def profiled(function):
    """Run a function under torch.profiler -> the averages of its events."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as found:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return found.key_averages()


def kernels_in(averages):
    """-> [(name, seconds on the GPU, calls)] of kernels and copies, longest first."""
    from torch.autograd import DeviceType

    found = [
        (event.key, event.self_device_time_total / 1e6, event.count)
        for event in averages
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda kernel: -kernel[1])


def kernels_of(function):
    return kernels_in(profiled(function))


# --- the script -------------------------------------------------------------------------------------------------------


def whole_script(setting):
    """The script as a user runs it, stopped by a signal in the middle, and resumed to its end."""
    sys.path.insert(0, str(SCRIPT.parent))
    from captioning.data import shapes

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 24 if setting.dry_run else 2400)
        options = ["--recipe", "shapes", "--data_dir", folder / "shapes", "--model_path", folder / "run"]
        options += ["--device", setting.device, "--demo_images", "2"]
        options += (
            ["--epochs", "3", "--score_images", "2", *TINY_OPTIONS]
            if setting.dry_run
            else ["--epochs", "10", "--batch_size", "128", "--lr", "2e-3", "--score_images", "50"]
        )
        print(f"{SCRIPT.name} " + " ".join(map(str, options)))
        table("run", "exit code", "seconds", "perplexity", "epochs", "captions right: scenes, new combinations")
        for title, more, stop in (("stopped in its second epoch", [], True), ("resumed", ["--resume", "auto"], False)):
            start = time.perf_counter()
            code, said = run_script([*options, *more], folder / "run" / "metrics.csv" if stop else None, setting)
            rows = metrics(folder / "run" / "metrics.csv")
            right = re.findall(r"unseen [a-z ]+? +([\d.]+%)", said)
            perplexity = rows[-1].get("valid_perplexity", "") if rows else ""
            row(title, code, f"{time.perf_counter() - start:.1f}", perplexity, len(rows), ", ".join(right) or "-")
            expected = "--resume auto resumes the run" if stop else "checkpoint and plots are in"
            if code != 0 or expected not in said or (not stop and "resuming" not in said):
                fail(f"the run that was {title}: exit code {code}; it said:\n{said[-2000:]}")
                return


def metrics(path):
    """The rows of metrics.csv, with the perplexity of validation."""
    import csv

    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for line in rows:
        line["valid_perplexity"] = f"{math.exp(float(line['valid_loss'])):.3f}"
    return rows


def run_script(options, stop_behind, setting):
    """-> (exit code, what the script said). Where `stop_behind` is a file, SIGTERM is sent soon after that exists."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and stop_behind is not None and not stop_behind.exists():
                time.sleep(0.02)
            if stop_behind is not None and process.poll() is None:
                time.sleep(0.05 if setting.dry_run else 0.5)
                process.send_signal(signal.SIGTERM)
            process.wait(max(1, setting.left()))
        finally:
            process.kill()
        said.seek(0)
        return process.returncode, said.read()


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def cuda_graphs(setting):
    """Captions from CUDA graphs against those without, for batches of different images."""
    import torch

    from captioners import make_batch, make_ours
    from captioning.decoding.cached_decoder import cuda_graphs_disabled
    from captioning.decoding.search import generate_ids

    model = make_ours(setting.device, coupling="stepped", **(TINY if setting.dry_run else {}))
    with torch.no_grad():  # so that captions depend on their images, and words are not repeated for ever
        for name, parameter in model.gpt.trf_blocks.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8 if "cross_attn" in name else 3)
    model.config.eos_token_id = -1
    B, tokens, side = (2, 5, 32) if setting.dry_run else (32, 20, 224)
    pixels, _ = make_batch(3 * B, 1, 2, setting.device, model.config.vocab_size, side)
    batches = [part * scale for part, scale in zip(pixels.split(B), (1.0, 2.0, 0.5), strict=True)]
    start = torch.full((B, 1), model.config.vocab_size - 1, device=setting.device)
    ways = {
        "greedy": dict(deterministic=True),
        "beam 4": dict(num_beams=4),
        "draws, 5 an image": dict(num_return_sequences=5, seed=0),
    }
    table("precision", "captions", "same ids", "different captions", "first, ms", "second", "steady", "without graphs")
    for precision, context in (("float32", contextlib.nullcontext), ("bf16", setting.autocast)):
        for way, options in ways.items():
            with variant(precision, way), context(), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                results = {}

                def generate(images, key, options=options, results=results):
                    results[key] = generate_ids(model, images, start, tokens, **options)

                plain, graphed = [], []
                with cuda_graphs_disabled():
                    for number, images in enumerate([batches[0], *batches]):
                        plain += seconds_of(partial(generate, images, ("plain", number)), setting)
                for number, images in enumerate([batches[0], *batches, *batches]):
                    graphed += seconds_of(partial(generate, images, ("graphs", number)), setting)
                same = torch.cat(
                    [
                        results["plain", 0 if number == 0 else (number - 1) % 3 + 1] == results["graphs", number]
                        for number in range(7)
                    ]
                )
                share = same.float().mean().item()
                different = len(set(map(tuple, torch.cat([results["plain", n] for n in (1, 2, 3)]).tolist())))
                steady = statistics.median(graphed[3:])
                times = [*graphed[:2], steady, statistics.median(plain[1:])]
                row(precision, way, f"{share:.2%}", different, *map(milliseconds, times))
                if share < 1:
                    rows = (~same.all(1)).sum().item()
                    fail(f"{precision}, {way}: {rows} of {len(same)} captions from CUDA graphs differ")
            for message in {str(warning.message) for warning in warned if "without CUDA graphs" in str(warning)}:
                fail(f"{precision}, {way}: {message}")


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(setting):
    """Loss and gradients on the device against those on the CPU in float64, and the chunked loss against PyTorch's."""
    import torch

    from captioners import make_batch, make_ours

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    off = dict(emb_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0, residual_dropout=0.0)
    sizes = (
        TINY
        if setting.dry_run
        else dict(
            encoder_options=dict(img_size=64, patch_size=16, embed_dim=192, depth=4, num_heads=3),
            embed_dim=128,
            num_heads=4,
            depth=4,
            vocab_size=5003,
        )
    )
    table("loss and gradients, float32", "loss, relative error", "worst gradient, relative error", "of")
    for coupling in ("stepped", "final"):
        with variant(coupling):
            model = make_ours(coupling=coupling, normalize_tokens=True, label_smoothing=0.1, **off, **sizes)
            config = model.config
            pixels, ids = make_batch(4, 3, 9, vocab_size=config.vocab_size, img_size=model.preprocessing["img_size"])
            labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
            labels[::2, 5:] = -100
            found = {}
            for device, dtype in (("cpu", torch.float64), (setting.device, torch.float32)):
                model.train().to(device, dtype).zero_grad()
                loss = model(pixels.to(device, dtype), ids.to(device), labels.to(device))
                loss.backward()
                grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
                found[device, dtype] = loss.item(), grads
            (expected, reference), (loss, grads) = found.values()
            whole = math.sqrt(sum(float(grad.norm()) ** 2 for grad in reference.values()))
            errors = {  # a gradient that should be 0, as that of the keys' bias, has no relative error of its own
                name: float((grads[name] - grad).norm() / max(grad.norm(), 1e-3 * whole))
                for name, grad in reference.items()
            }
            worst = max(errors, key=errors.get)
            loss_error = abs(loss - expected) / expected
            row(coupling, f"{loss_error:.1e}", f"{errors[worst]:.1e}", f"{worst} (of {len(errors)})")
            if errors.keys() != grads.keys() or max(loss_error, errors[worst]) > 1e-3:
                fail(f"{coupling}: the gradients are not those of the CPU")
    chunked_loss(setting)


def chunked_loss(setting):
    """The chunked loss under bf16 autocast, against F.cross_entropy of all logits in float32."""
    import torch
    import torch.nn.functional as F

    from captioning.model.loss import chunked_cross_entropy

    N, V, C = (20, 203, 16) if setting.dry_run else (6670, 50257, 768)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(setting.device)
    weight = (torch.randn(V, C, generator=generator) * 0.05).to(setting.device)
    targets = torch.randint(V, (N,), generator=generator).to(setting.device)

    def whole(hidden, weight, targets, smoothing):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, label_smoothing=smoothing)

    def result(function, smoothing, bf16):
        inputs = [part.clone().requires_grad_() for part in (hidden, weight)]
        with setting.autocast() if bf16 else contextlib.nullcontext():
            loss = function(*inputs, targets, smoothing)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    ways = {
        "F.cross_entropy, bf16": (whole, True),
        "chunked, float32": (chunked_cross_entropy, False),
        "chunked, bf16": (chunked_cross_entropy, True),
        "chunked, bf16, head not padded": (partial(chunked_cross_entropy, multiple=1), True),
    }
    table("loss of the head", "smoothing", "loss, relative error", "hidden states' gradient", "weights' gradient", "ms")
    for smoothing in (0.0, 0.1):
        expected = result(whole, smoothing, bf16=False)
        for way, (function, bf16) in ways.items():
            with variant(way, smoothing):
                found = result(function, smoothing, bf16)
                errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
                seconds = seconds_of(lambda f=function, b=bf16: result(f, smoothing, b), setting, 3, 1)  # noqa: B023
                row(way, smoothing, *(f"{error:.1e}" for error in errors), milliseconds(statistics.median(seconds)))
                if max(errors) > (3e-2 if bf16 else 1e-4):
                    fail(f"{way}, smoothing {smoothing}: the loss or a gradient is wrong")


# --- training ---------------------------------------------------------------------------------------------------------


def training(setting):
    """Steps of the script's own Trainer with batches of its own loader: times, memory, what keeps the GPU waiting."""
    import torch

    import bench_recipe
    from bench_train import measured_rate
    from captioning.model.loss import chunked_cross_entropy
    from timing import free_memory

    rate = measured_rate(setting.device) if setting.cuda else math.inf
    print(f"product of 8192 x 8192: {rate / 1e12:,.0f} TFLOP/s")
    many = ["--captions_per_image", "5", "--batch_size", "10" if setting.dry_run else "640"]
    few = ["--captions_per_image", "1", "--batch_size", "4" if setting.dry_run else "32"]
    common = ["--device", setting.device, "--length_window", "8"]
    common += TINY_OPTIONS if setting.dry_run else ["--num_workers", "8"]
    steps = 3 if setting.dry_run else 8
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # Half as many photos again: some are set aside for validation.
        bench_recipe.write_dataset(folder, 12 if setting.dry_run else 192 * steps, 2 if setting.dry_run else 32)
        trainer = bench_recipe.make_trainer(folder, [*common, *many])
        batches = {}
        for title, options in (("128 x 5", many), ("32 x 1", few)):
            loader = bench_recipe.make_loaders(folder, [*common, *options])[1][0]
            full = (
                batch for batch in loader if len(batch[1]) == loader.batch_sampler.groups_per_batch * int(options[1])
            )
            batches[title] = list(itertools.islice(full, steps))
            del full, loader  # ends its workers
        columns = ["captions/s", "photos/s", "peak GiB", "MFU of 989", "MFU of measured", "GPU busy"]
        table("photos x captions", "way", "ms a step", *columns, "first pass over the batches, s")
        head_as_it_is = partial(chunked_cross_entropy, multiple=1)
        profiles = {}
        for title in batches:
            with variant(title, "eager, head not padded"):
                trainer.model.loss = head_as_it_is
                training_row(setting, title, "eager, head not padded", trainer, batches[title], rate)
            trainer.model.loss = chunked_cross_entropy
            with variant(title, "eager"):
                profiles[title] = training_row(setting, title, "eager", trainer, batches[title], rate)
        for title, averages in profiles.items():
            print_profile(f"{title}, eager", averages)
        if setting.cuda:
            with variant("lines that wait"):
                print_waits(trainer, batches["128 x 5"])
        del trainer
        free_memory()
        compiled_training(setting, folder, [*common, *many], batches, rate)
        torch.compiler.reset()


def compiled_training(setting, folder, options, batches, rate):
    """Rows of steps with --compile true, and how often something was compiled."""
    import torch
    from torch._dynamo.utils import counters

    import bench_recipe

    compile_model = torch.compile
    if setting.dry_run:
        torch.compile = partial(torch.compile, backend="eager")  # traced, but not compiled
    try:
        columns = ["captions/s", "photos/s", "peak GiB", "MFU of 989", "MFU of measured", "GPU busy"]
        table("photos x captions", "way", "ms a step", *columns, "first pass over the batches, s")
        profiles = {}
        for way in ("compile, block by block", "compile"):
            counters.clear()
            torch.compiler.reset()
            with variant("128 x 5", way):
                trainer = bench_recipe.make_trainer(folder, [*options, "--compile", str(way == "compile").lower()])
                if way != "compile":
                    for block in (*trainer.model.gpt.trf_blocks, *trainer.model.encoder.vit.blocks):
                        block.compile()
                for title in list(batches)[: 1 if setting.dry_run else None]:
                    with variant(title, way):
                        profiles[f"{title}, {way}"] = training_row(setting, title, way, trainer, batches[title], rate)
                        stats = dict(counters["stats"]), dict(counters["frames"])
                        breaks = dict(counters["graph_break"])
                        print(f"<!-- compiled until here: {stats}; graph breaks: {sum(breaks.values())} -->")
                        for reason, count in breaks.items():
                            print(f"<!--    {count} x {' '.join(reason.split())[:200]} -->")
                trainer = None
        for title, averages in profiles.items():
            print_profile(title, averages)
    finally:
        torch.compile = compile_model


def training_row(setting, title, way, trainer, batches, rate):
    """Time `trainer.train_step` on each of the batches and print a row -> averages of torch.profiler, for a GPU."""
    import torch

    from bench_train import flops

    trainer.model.train()
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()

    def one_pass():
        for batch in batches:
            total, count = trainer.train_step([batch])
            if not math.isfinite(total) or count == 0:
                raise RuntimeError(f"a step gave {total}, {count}")
        synchronize(setting)

    [first] = seconds_of(one_pass, setting)
    passes = seconds_of(one_pass, setting, rounds=1 if setting.dry_run else 4, warmup=0 if setting.dry_run else 1)
    seconds = statistics.median(passes) / len(batches)
    photos = sum(len(batch[0]) for batch in batches) / len(batches)
    captions = sum(len(batch[1]) for batch in batches) / len(batches)
    operations = [
        flops(
            len(batch[0]),
            captions=len(batch[1]) // len(batch[0]),
            T=batch[1].size(1),
            labels=int((batch[2] != -100).sum()),
        )
        for batch in batches
    ]
    achieved = sum(operations) / len(batches) / seconds
    peak, busy, averages = "", "", None
    if setting.cuda:
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        averages = profiled(lambda: [trainer.train_step([batch]) for batch in batches[:5]])
        busy = f"{sum(time for _, time, _ in kernels_in(averages)) / len(batches[:5]) / seconds:.0%}"
    cells = [milliseconds(seconds), f"{captions / seconds:,.0f}", f"{photos / seconds:,.0f}", peak]
    row(title, way, *cells, f"{achieved / PEAK:.1%}", f"{achieved / rate:.1%}", busy, f"{first:.1f}")
    lengths = [batch[1].size(1) for batch in batches]
    print(f"<!-- {title}: T {lengths}, {statistics.mean(operations) / 1e12:.1f} TFLOP a step -->", flush=True)
    return averages


KINDS = {  # of kernels, by what their names contain; the first that fits
    "copies": r"Memcpy|Memset",
    "attention": r"flash|fmha|attention|cudnn.*sdpa|softmax_warp",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas",
    "optimizer and norm of the gradient": r"multi_tensor|adam|lpnorm",
    "layer norm": r"layer_norm|LayerNorm|GammaBeta",
    "dropout": r"dropout",
    "reductions": r"reduce|softmax|logsumexp",
    "embeddings, gather, scatter": r"embedding|gather|scatter|index",
    "Triton": r"^triton",
    "element-wise and casts": r"elementwise|vectorized",
}


def print_profile(title, averages):
    """Kernels by kind, the longest kernels, the operators they belong to, and where the CPU's time goes."""
    from torch.autograd import DeviceType

    if averages is None:
        return
    kernels = kernels_in(averages)
    kinds = Counter()
    for name, seconds, _ in kernels:
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")] += seconds
    whole = sum(kinds.values()) or 1
    table(f"{title}: kind of kernel", "ms in 5 steps", "share")
    for kind, seconds in kinds.most_common():
        row(kind, f"{1000 * seconds:.1f}", f"{seconds / whole:.1%}")
    print(f"\n```\n{title}: kernels, ms in 5 steps, calls")
    for name, seconds, count in kernels[:15]:
        print(f"{1000 * seconds:9.2f} {count:6d}  {name[:150]}")
    operators = [event for event in averages if event.device_type == DeviceType.CPU]
    print("operators by their own time on the GPU")
    for event in sorted(operators, key=lambda event: -event.self_device_time_total)[:15]:
        print(f"{event.self_device_time_total / 1000:9.2f} {event.count:6d}  {event.key[:100]}")
    print("operators by their own time on the CPU")
    for event in sorted(operators, key=lambda event: -event.self_cpu_time_total)[:15]:
        print(f"{event.self_cpu_time_total / 1000:9.2f} {event.count:6d}  {event.key[:100]}")
    print("```", flush=True)


def print_waits(trainer, batches):
    """A step under CUDA's sync debug mode: the lines of Python that wait for the GPU."""
    import torch

    for batch in batches[:2]:
        trainer.train_step([batch])
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step([batches[2]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter((w.filename, w.lineno) for w in warned if "synchroniz" in str(w.message))
    table("a step waits for the GPU in", "times", "code")
    for (name, number), count in lines.most_common():
        code = Path(name).read_text(encoding="utf-8").splitlines()[number - 1].strip() if Path(name).is_file() else ""
        row(f"{'/'.join(Path(name).parts[-2:])}:{number}", count, f"`{code[:100].replace('|', '/')}`")
    row("all", sum(lines.values()), "")


# --- the recipe, captions, Hugging Face -------------------------------------------------------------------------------


def recipe(setting):
    """The COCO recipe with JPEGs made here, as far as the time goes."""
    import bench_recipe

    if setting.dry_run:
        bench_recipe.WARMUP = 1
        small = [*TINY_OPTIONS, "--captions_per_image", "5", "--batch_size", "10"]
        bench_recipe.measure(setting.device, 0.1, 10, small, distinct=2)
    else:
        bench_recipe.measure(setting.device, min(30, setting.left() - 20), 20_000, [], distinct=48)


def generation(setting):
    """Greedy and beam search against Hugging Face's `generate`."""
    import torch

    import bench_generate
    from captioners import make_pair

    if setting.dry_run:
        bench_generate.bandwidth_and_rate = lambda *args: (1e9, 1e9)
        bench_generate.measure(*make_pair(**TINY), [2], 1, "cpu")
        return
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    bench_generate.measure(*make_pair(setting.device, dtype), [1, 64], 5, setting.device)


def hugging_face(setting):
    """Training steps at the batch that suits each side best: ours, Hugging Face's as used and with shared outputs."""
    import torch

    from bench_train import CAPTIONS, WAYS, Step, check_losses, flops, make_inputs, measured_rate
    from captioners import make_pair
    from timing import free_memory, unless_out_of_memory

    ours, theirs = make_pair(setting.device, **(TINY if setting.dry_run else {}))
    check_losses(ours, theirs, setting.device)
    ours.train(), theirs.train()
    rate = measured_rate(setting.device) if setting.cuda else math.inf
    used, shared, own, _ = WAYS
    sizes = {own: [64, 128, 256, 512], used: [16, 32, 64, 128], shared: [64, 128, 256, 512]}
    best = {}

    def time_step(step):
        if setting.cuda:
            torch.cuda.reset_peak_memory_stats()
        return statistics.median(seconds_of(step, setting, rounds=3, warmup=2))

    table("way", f"photos, {CAPTIONS} captions each", "ms", "captions/s", "over as used", "MFU of 989", "peak GiB")
    for way in (own, used, shared):
        for images in [2, 4] if setting.dry_run else sizes[way]:
            if setting.left() < 8 and not setting.dry_run:
                row(way, images, "not run: no time left")
                break
            inputs = make_inputs(ours, images, setting.device)
            seconds = unless_out_of_memory(time_step, Step(way, ours, theirs, inputs, setting.device))
            ours.zero_grad(), theirs.zero_grad()
            if seconds is None:
                row(way, images, "out of memory")
                break
            captions = images * CAPTIONS / seconds
            over = f"{captions / best[used]:.2f}" if used in best else ""
            mfu = f"{flops(images) / seconds / PEAK:.1%} ({flops(images) / seconds / rate:.1%} of measured)"
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if setting.cuda else ""
            row(way, images, milliseconds(seconds), f"{captions:,.0f}", over, mfu if way == own else "", peak)
            free_memory()
            gain, best[way] = captions / best.get(way, 1e-9), max(captions, best.get(way, 0))
            if gain < 1.02 and not setting.dry_run:
                break
    table("each at its best", "captions/s", "ours is faster")
    for way, captions in best.items():
        row(way, f"{captions:,.0f}", f"{best[own] / captions:.2f}")


# --- several processes ------------------------------------------------------------------------------------------------


RANK_OPTIONS = [
    "--recipe", "shapes", "--captions_per_image", "1", "--epochs", "1", "--accumulate", "2", "--embed_dim", "32",
    "--num_heads", "2", "--encoder_options", json.dumps(TINY_ENCODER), "--emb_dropout", "0", "--attention_dropout",
    "0", "--mlp_dropout", "0", "--residual_dropout", "0", "--precision", "float32", "--num_workers", "0",
]  # fmt: skip


def ranks(setting):
    """Two processes that share the device, and one through the backend for GPUs, against one without torchrun."""
    sys.path.insert(0, str(SCRIPT.parent))
    from captioning.data import shapes

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 60 if setting.dry_run else 120)
        options = [*RANK_OPTIONS, "--data_dir", str(folder / "shapes"), "--device", setting.device]
        alone = train_as_rank(folder / "alone.json", "", [*options, "--batch_size", "10"], folder / "alone")
        backend = "NCCL" if setting.cuda else "gloo"
        table("processes", "backend", "steps", "largest difference of a loss", "seconds")
        cases = [(2, "gloo", "5"), (1, "", "10")] if setting.cuda else [(2, "", "5")]
        for count, wanted, batch_size in cases:
            with variant(count, wanted or backend):
                start = time.perf_counter()
                losses_file = folder / f"{count}.json"
                command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
                worker = ["--worker", str(losses_file), wanted, str(folder / f"run{count}")]
                command = [sys.executable, *command, *worker, *options, "--batch_size", batch_size]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                with tempfile.TemporaryFile("w+") as said:
                    torchrun = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
                    try:
                        torchrun.wait(max(1, setting.left() - 2 * GRACE))
                    finally:
                        torchrun.terminate()  # it ends its processes, which a kill would leave
                        torchrun.wait()
                    said.seek(0)
                    if torchrun.returncode:
                        raise RuntimeError(f"exit code {torchrun.returncode}: {said.read()[-1500:]}")
                losses = json.loads(losses_file.read_text())
                largest = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
                seconds = f"{time.perf_counter() - start:.1f}"
                row(count, wanted or backend, len(losses), f"{largest:.1e}", seconds)
                if not largest < 1e-3:
                    fail(f"{count} processes, {wanted or backend}: the losses are not those of one process")


def train_as_rank(losses_file, backend, argv, folder):
    """Train an epoch of the script's Trainer as this process of the group -> mean loss of each step, also written."""
    from captioners import script

    if backend:
        script.ProcessGroup = partial(script.ProcessGroup, backend=backend)
    model_config, train_config, _ = script.read_configs([*argv, "--model_path", str(folder)])
    script.torch.manual_seed(train_config.seed)
    trainer = script.build_trainer(model_config, train_config, script.load_data(train_config, script.DATA_DIR))
    losses, step = [], trainer.train_step

    def recorded(batches):
        total, count = step(batches)
        losses.append(total / count)
        return total, count

    trainer.train_step = recorded
    trainer.train_one_epoch(0)
    if trainer.processes.is_main:
        Path(losses_file).write_text(json.dumps(losses))
    trainer.processes.destroy()
    return losses


# --- all else ---------------------------------------------------------------------------------------------------------


def options(setting):
    """Small runs of the script's `main`, each with another option: they end, and their numbers are finite."""
    import torch

    from captioners import script
    from captioning.data import shapes

    real_capability = torch.cuda.get_device_capability
    from_pretrained = script.VisionGPT2Model.from_pretrained
    pretend = ["--encoder_weights", "pretrained", "--decoder_weights", "pretrained"]  # frozen at first; still random
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 24 if setting.dry_run else 240)
        common = ["--recipe", "shapes", "--data_dir", str(folder / "shapes"), "--device", setting.device]
        common += ["--score_images", "2", "--demo_images", "1", "--epochs", "1"]
        common += [*TINY_OPTIONS] if setting.dry_run else ["--num_workers", "2"]
        cached = [*pretend, "--trainable_stages", "0", "--cache_tokens", "true", "--cache_dir", str(folder / "cache")]
        stages = [*pretend, "--epochs", "3", "--freeze_epochs_gpt", "1", "--freeze_epochs_all", "2"]
        variants = {
            "--deterministic true": ["--deterministic", "true"],
            "--deterministic true, again": ["--deterministic", "true"],
            "all three stages": stages,
            "self-critical": ["--scst_epochs", "1"],
            "fp16 with a scaler": [],
            "--ema_decay 0.9": ["--ema_decay", "0.9"],
            "--gradient_checkpointing true": ["--gradient_checkpointing", "true"],
            "token cache": cached,
        }
        if setting.dry_run:
            del variants["--deterministic true, again"]
        perplexities = {}
        table("run", "perplexity", "seconds")
        for number, (title, argv) in enumerate(variants.items()):
            with variant(title):
                start = time.perf_counter()
                if "pretrained" in argv:
                    script.VisionGPT2Model.from_pretrained = classmethod(lambda cls, config: cls(config))
                if title.startswith("fp16"):
                    torch.cuda.get_device_capability = lambda *args: (7, 5)
                said = io.StringIO()
                try:
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                        result = script.main([*common, *argv, "--model_path", str(folder / str(number))])
                except BaseException:
                    print(said.getvalue()[-1500:])
                    raise
                finally:
                    script.VisionGPT2Model.from_pretrained = from_pretrained
                    torch.cuda.get_device_capability = real_capability
                    torch.use_deterministic_algorithms(False)
                perplexities[title] = result["best_perplexity"]
                row(title, f"{result['best_perplexity']:.6f}", f"{time.perf_counter() - start:.1f}")
                if not math.isfinite(result["best_perplexity"]):
                    fail(f"{title}: the perplexity is not finite")
        if len(set(list(perplexities.values())[:2])) > 1 and "--deterministic true, again" in perplexities:
            fail("two runs with --deterministic true differ")


@dataclass
class Step:
    limit: float  # seconds
    function: object


STEPS = {  # in order of value
    "versions": Step(40, versions),
    "script": Step(75, whole_script),
    "graphs": Step(60, cuda_graphs),
    "gradients": Step(40, gradients),
    "training": Step(140, training),
    "recipe": Step(75, recipe),
    "generation": Step(75, generation),
    "hugging_face": Step(80, hugging_face),
    "ranks": Step(45, ranks),
    "options": Step(60, options),
}


# ======================================================================================================================
# Running the steps
# ======================================================================================================================


def run_step(name, device, dry_run, deadline):
    """Run a step in this process. Raises SystemExit(1) where it fails."""
    warnings.simplefilter("default")
    setting = Setting(device, dry_run, deadline)
    if device == "cpu":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        STEPS[name].function(setting)
    except BaseException as error:
        from timing import is_out_of_memory

        traceback.print_exc()
        reason = "out of memory" if is_out_of_memory(error) else " ".join(f"{type(error).__name__}: {error}".split())
        fail(reason[:300])
        sys.exit(1)


def forked_step(name, args, deadline, log):
    """Run a step in a forked process of a dry run, which has imported torch already."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    run_step(name, args.device, args.dry_run, deadline)


class Process:
    """A step in a process group of its own, which writes to the file `log`."""

    def __init__(self, name, args, deadline, log):
        self.forked = None
        if args.dry_run:  # imports once for all steps: a test has to be quick
            self.forked = multiprocessing.get_context("fork").Process(
                target=forked_step, args=(name, args, deadline, log)
            )
            self.forked.start()
            self.pid = self.forked.pid
            return
        command = [sys.executable, "-u", __file__, "--step", name, "--device", args.device, "--deadline", str(deadline)]
        self.popen = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.pid = self.popen.pid

    def code(self):
        """The exit code; None while it runs."""
        return self.forked.exitcode if self.forked else self.popen.poll()

    def end(self):
        """End it and the processes it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            until = time.monotonic() + GRACE
            while self.code() is None and time.monotonic() < until:
                time.sleep(0.05)


def follow(name, args, limit, record):
    """Run a step in a process, show what it prints and keep it in `record` -> its result in a few words."""
    with tempfile.TemporaryFile("w+b") as log:
        reader = os.fdopen(os.dup(log.fileno()), "rb")
        place = 0

        def read():
            nonlocal place
            text = os.pread(reader.fileno(), 2**24, place)
            place += len(text)
            text = text.decode(errors="replace")
            sys.stdout.write(text)
            sys.stdout.flush()
            record["output"] += text
            return bool(text)

        start, saved = time.monotonic(), time.monotonic()
        process = Process(name, args, start + limit, log)
        try:
            while process.code() is None and time.monotonic() - start < limit:
                if read() and time.monotonic() - saved > 2:
                    record["seconds"], saved = round(time.monotonic() - start, 1), time.monotonic()
                    args.write()
                time.sleep(0.05)
            code = process.code()
        finally:
            process.end()
            read()
            reader.close()
    if code is None:
        return f"stopped: over its limit of {limit:.0f} s"
    failures = re.findall(r"^FAILED: (.*)", record["output"], flags=re.M)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return f"failed: {failures[0][:160]}{more}"
    return "ok" if code == 0 else f"failed: exit code {code}"


def tables_in(text):
    """The Markdown tables in a text -> [[{column: cell}, ...], ...]; a row with fewer cells lacks the last columns."""
    found, lines = [], text.splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    columns = None
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            columns = None
        elif number + 1 < len(lines) and re.fullmatch(r"(\| *--- *)+\|", lines[number + 1]):
            columns = cells[number]
            found.append([])
        elif columns and not re.fullmatch(r"(\| *--- *)+\|", line):
            found[-1].append(dict(zip(columns, cells[number], strict=False)))
    return found


def summary(records):
    """The table of all steps, as Markdown."""
    rows = "".join(f"| {r['step']} | {r['seconds']:.0f} | {r['result'].replace('|', '/')} |\n" for r in records)
    return f"| step | seconds | result |\n| --- | --- | --- |\n{rows}"


def write_report(folder, head, records):
    """Write check_gpu.md and check_gpu.json into `folder`."""
    text = f"# The check of a GPU\n\n{head}\n\n{summary(records)}"
    for record in records:
        text += (
            f"\n## {record['step']}\n\n{record['seconds']:.0f} s: {record['result']}\n\n{record['output'].strip()}\n"
        )
    rows = [record | {"tables": tables_in(record["output"])} for record in records]
    for name, content in (("check_gpu.md", text), ("check_gpu.json", json.dumps({"head": head, "steps": rows}))):
        draft = folder / f".{name}"
        draft.write_text(content, encoding="utf-8")
        draft.replace(folder / name)


def results_section(records):
    """Summary and tables of all steps for RESULTS.md, without what else the steps printed."""
    text = f"{datetime.date.today()}. `python benchmarks/check_gpu.py --results`\n\n{summary(records)}"
    for record in records:
        lines = [line for line in record["output"].splitlines() if line.startswith("|") or not line.strip()]
        tables = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() or "not measured"
        first = record["output"].strip().splitlines()[0] + "\n\n" if record["step"] == "versions" else ""
        text += f"\n### {record['step']}\n\n{first}{tables}\n"
    return text


def check(args):
    """Run the steps of `args` one after the other -> their records."""
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    names = args.only or list(STEPS)
    head = f"{datetime.datetime.now():%Y-%m-%d %H:%M}, device {args.device}{', dry run' if args.dry_run else ''}"
    records, deadline = [], time.monotonic() + 60 * args.minutes
    args.write = partial(write_report, folder, head, records)
    for name in names:
        record = dict(step=name, seconds=0.0, result="not run: no time left", output="")
        records.append(record)
        left = deadline - time.monotonic()
        if left > LEAST_SECONDS:
            print(f"\n=== {name} ({left:.0f} s left) ===\n", flush=True)
            start, record["result"] = time.monotonic(), "running"
            args.write()
            record["result"] = follow(name, args, min(left, STEPS[name].limit), record)
            record["seconds"] = round(time.monotonic() - start, 1)
        args.write()
    print("\n" + summary(records), flush=True)
    return records


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda; in a dry run cpu)")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("check_gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=list(STEPS), help="only these steps")
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--results", action="store_true", help="also write the section of benchmarks/RESULTS.md")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=math.inf, help=argparse.SUPPRESS)  # of time.monotonic()
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    if args.results and (args.dry_run or args.device == "cpu"):
        parser.error("--results is for what a GPU has measured")
    return args


def main(argv=None):
    """-> exit code: 0 where all steps are ok."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        losses_file, backend, folder, *constants = argv[1:]
        train_as_rank(losses_file, backend, constants, folder)
        return 0
    args = parse(argv)
    if args.list:
        for name, step in STEPS.items():
            print(f"{name:14s} at most {step.limit:3.0f} s  {step.function.__doc__.splitlines()[0]}")
        return 0
    if args.step:
        run_step(args.step, args.device, args.dry_run, args.deadline)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if args.dry_run:
        import timm  # noqa: F401 (here, for all steps)
        from transformers import VisionEncoderDecoderModel  # noqa: F401

        import captioners  # noqa: F401
    records = check(args)
    if args.results:
        import run_all

        run_all.write_section(run_all.ONE_GPU, results_section(records))
    return 0 if all(record["result"] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
