"""The steps of check_gpu.py that ask: is it fast? What the device can do, training steps, torch.compile, the COCO
recipe, captions, and the same against Hugging Face."""

import contextlib
import itertools
import math
import re
import statistics
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

import bench_generate
import bench_recipe
import bench_train
from bench_train import CAPTIONS, WAYS, flops, measured_rate
from captioners import make_pair
from captioning.model.loss import chunked_cross_entropy
from gpu_step import (
    PEAK,
    TINY,
    TINY_OPTIONS,
    fail,
    kernels_in,
    milliseconds,
    print_profile,
    profiled,
    row,
    seconds_of,
    table,
    variant,
)


def versions(setting):
    """Versions, ceilings of the device, and which attention kernels are chosen, with and without cuDNN's."""
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
    B, more = (1, (1,)) if setting.dry_run else (128, (1, 2, 3))
    cases = {  # title: (images or captions, queries, keys, causal, dropout, training)
        f"ViT, {B} x 197": (B, 197, 197, False, 0.0, True),
        f"causal, {5 * B} x 14": (5 * B, 14, 14, True, 0.0, True),
        f"causal, {5 * B} x 14, dropout 0.1": (5 * B, 14, 14, True, 0.1, True),
        f"cross, {B} x 70 to 197, dropout 0.1": (B, 70, 197, False, 0.1, True),
        f"one query, {max(1, B // 2)} x 20": (max(1, B // 2), 1, 20, False, 0.0, False),
    }
    table("attention", "cuDNN allowed", "chosen", "ms, with gradients", "first call of a new shape, ms", "kernels")
    for title, case in cases.items():
        for allowed in (True, False):
            answer = "yes" if allowed else "no"
            with variant(title, answer):
                torch.backends.cuda.enable_cudnn_sdp(allowed)
                row(title, answer, *attention_row(setting, more, *case))


def attention_row(setting, new_lengths, batch, queries, keys, causal, dropout, training):
    """-> cells: the backend, ms of a call, ms of first calls against new shapes, names of its kernels."""

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
    repeats, rounds = (1, 1) if setting.dry_run else (20, 9)
    steady = seconds_of(lambda: [attend() for _ in range(repeats)], setting, rounds)
    first = [seconds_of(call(more)[0], setting)[0] for more in new_lengths]
    kernels = [name for name, _, _ in kernels_in(profiled(attend))] if setting.cuda else []
    kernels = "; ".join(re.sub(r"^void |<.*|\(.*", "", name)[:70] for name in kernels[:3])
    new = f"{milliseconds(statistics.median(first))} (most {milliseconds(max(first))})"
    return backend, milliseconds(statistics.median(steady) / repeats), new, kernels


# --- training ---------------------------------------------------------------------------------------------------------


MANY, FEW = "128 x 5", "32 x 1"  # photos x captions of each; a dry run has 2 x 5 and 4 x 1
EAGER, UNPADDED, BLOCKS, WHOLE = "eager", "eager, head not padded", "compile, block by block", "compile"


def training(setting):
    """Steps of the script's own Trainer with batches of its own loader: times, memory, what keeps the GPU waiting."""
    with training_batches(setting) as (folder, options, batches):
        trainer = bench_recipe.make_trainer(folder, options)
        measure = Measurement(setting)
        for title in batches:
            for way in (UNPADDED, EAGER):
                trainer.model.loss = partial(chunked_cross_entropy, multiple=1 if way == UNPADDED else None)
                measure(title, way, trainer, batches[title])
        measure.print_details()
        if setting.cuda:
            with variant("lines that wait"):
                print_waits(trainer, batches[MANY])


def compiled(setting):
    """The same steps with torch.compile, of each block or of the whole model: times, and how often it compiled."""
    if setting.dry_run:
        torch.compile = partial(torch.compile, backend="eager")  # traced, but not compiled
    with training_batches(setting) as (folder, options, batches):
        measure = Measurement(setting)
        for way in (BLOCKS, WHOLE):
            counters.clear()
            torch.compiler.reset()
            with variant("a trainer", way):
                trainer = bench_recipe.make_trainer(folder, [*options, "--compile", str(way == WHOLE).lower()])
                if way == BLOCKS:
                    for block in (*trainer.model.gpt.trf_blocks, *trainer.model.encoder.vit.blocks):
                        block.compile()
                for title in [FEW] if setting.dry_run else batches:
                    measure(title, way, trainer, batches[title])
                    graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
                    measure.notes.append(f"{title}, {way}: {graphs} graphs until here, {breaks.total()} graph breaks")
                    measure.notes += [f"  {count} x {' '.join(why.split())[:200]}" for why, count in breaks.items()]
            trainer = None
        measure.print_details()


@contextlib.contextmanager
def training_batches(setting):
    """-> (folder of a dataset, options of the COCO recipe for it, {title: full batches as its loader makes them})."""
    dry_run, steps = setting.dry_run, 3 if setting.dry_run else 8
    many = ["--captions_per_image", "5", "--batch_size", "10" if dry_run else "640"]
    few = ["--captions_per_image", "1", "--batch_size", "4" if dry_run else "32"]
    common = ["--device", setting.device, "--length_window", "8"]
    common += [*TINY_OPTIONS, "--vocab_size", "100"] if dry_run else ["--num_workers", "8"]
    with tempfile.TemporaryDirectory() as folder:
        folder, batches = Path(folder), {}
        # Half as many photos again: some are set aside for validation.
        bench_recipe.write_dataset(folder, 12 if dry_run else 192 * steps, distinct=1 if dry_run else 32)
        for title, options in ((MANY, many), (FEW, few)):
            loader = bench_recipe.make_loaders(folder, [*common, *options])[1][0]
            full = loader.batch_sampler.groups_per_batch * int(options[1])  # captions
            batches[title] = list(itertools.islice((batch for batch in loader if len(batch[1]) == full), steps))
            del loader  # ends its workers
        yield folder, [*common, *many], batches


class Measurement:
    """A table of training steps. Called with a variant, it times that and prints a row; `print_details` prints below
    the table what was noted and, of a GPU, the profiles."""

    def __init__(self, setting):
        self.setting, self.profiles, self.notes = setting, {}, []
        self.rate = measured_rate("cuda") if setting.cuda else math.inf
        columns = ["ms a step", "captions/s", "photos/s", "peak GiB", "MFU of 989", "MFU of measured", "GPU busy"]
        table("photos x captions", "way", *columns, "first pass over the batches, s")

    def __call__(self, title, way, trainer, batches):
        with variant(title, way):
            row(title, way, *self.cells(title, way, trainer, batches))

    def cells(self, title, way, trainer, batches):
        """Time `trainer.train_step` on each of the batches -> cells of the row."""
        cuda, dry_run = self.setting.cuda, self.setting.dry_run
        trainer.model.train()
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def train(batches):
            for batch in batches:
                total, count = trainer.train_step([batch])
                if not math.isfinite(total) or count == 0:
                    raise RuntimeError(f"a step gave {total}, {count}")

        [first] = seconds_of(partial(train, batches), self.setting)
        rounds, warmup = (1, 0) if dry_run else (4, 1)
        seconds = statistics.median(seconds_of(partial(train, batches), self.setting, rounds, warmup)) / len(batches)
        photos = sum(len(batch[0]) for batch in batches) / len(batches)
        captions = sum(len(batch[1]) for batch in batches) / len(batches)
        operations = statistics.mean(map(flops_of, batches))
        peak, busy = "", ""
        if cuda:
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            some = partial(train, batches[:3])  # reading a profile takes a second a step
            whole = statistics.median(seconds_of(some, self.setting, rounds=3))
            averages = profiled(some)
            busy = f"{sum(time for _, time, _ in kernels_in(averages)) / whole:.0%}"
            if way != UNPADDED:
                self.profiles[f"{title}, {way}, 3 steps"] = averages
        self.notes.append(f"{title}, {way}: T {[batch[1].size(1) for batch in batches]}, {operations:.2e} FLOP a step")
        return (
            milliseconds(seconds), f"{captions / seconds:,.0f}", f"{photos / seconds:,.0f}", peak,
            f"{operations / seconds / PEAK:.1%}", f"{operations / seconds / self.rate:.1%}", busy, f"{first:.1f}",
        )  # fmt: skip

    def print_details(self):
        print("\n" + "\n".join(self.notes))
        if self.setting.cuda:
            print(f"product of 8192 x 8192: {self.rate / 1e12:,.0f} TFLOP/s")
        for title, averages in self.profiles.items():
            print_profile(title, averages)


def flops_of(batch):
    """Floating-point operations of a training step with a batch of a loader (ViT-B and GPT-2)."""
    images, ids, labels = batch[:3]
    return flops(len(images), captions=len(ids) // len(images), T=ids.size(1), labels=int((labels != -100).sum()))


def print_waits(trainer, batches):
    """A step under CUDA's sync debug mode: the lines of Python that wait for the GPU."""
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
    row("all", lines.total(), "")
    if lines.total() > 1:
        fail(f"a training step waits for the GPU {lines.total()} times instead of once")


# --- the recipe, captions, Hugging Face -------------------------------------------------------------------------------


def recipe(setting):
    """The COCO recipe with JPEGs made here, as far as the time goes."""
    if setting.dry_run:
        bench_recipe.WARMUP = 1
        small = [*TINY_OPTIONS, "--vocab_size", "100", "--captions_per_image", "5", "--batch_size", "10"]
        bench_recipe.measure(setting.device, 0.1, 10, small, distinct=1)
    else:
        bench_recipe.measure(setting.device, min(30, setting.left() - 20), 20_000, [], distinct=48)


def generation(setting):
    """Greedy and beam search against Hugging Face's `generate`."""
    if setting.dry_run:
        bench_generate.bandwidth_and_rate = lambda *args: (1e9, 1e9)
        bench_generate.measure(*make_pair(**TINY), [2], 1, "cpu")
    else:
        dtype = torch.bfloat16 if setting.cuda else torch.float32
        bench_generate.measure(*make_pair(setting.device, dtype), [1, 64], 5, setting.device)


def hugging_face(setting):
    """Training steps at the batch that suits each side best: ours, Hugging Face's as used and with shared outputs."""
    ours, theirs = make_pair(setting.device, **(TINY if setting.dry_run else {}))
    with variant("equal losses"):
        bench_train.check_losses(ours, theirs, setting.device)
    ours.train(), theirs.train()
    rate = measured_rate("cuda") if setting.cuda else math.inf
    used, shared, own, _ = WAYS
    sizes = {used: [16, 32, 64, 128], own: [64, 128, 256, 512], shared: [64, 128, 256, 512]}
    best = {}

    def time_step(way, images):
        step = bench_train.Step(
            way, ours, theirs, bench_train.make_inputs(ours, images, setting.device), setting.device
        )
        if setting.cuda:
            torch.cuda.reset_peak_memory_stats()
        rounds, warmup = (1, 0) if setting.dry_run else (3, 2)
        try:
            return statistics.median(seconds_of(step, setting, rounds, warmup))
        finally:
            ours.zero_grad(), theirs.zero_grad()

    table("way", f"photos, {CAPTIONS} captions each", "ms", "captions/s", "over as used", "MFU of 989", "peak GiB")
    for way in sizes:
        for images in [2] if setting.dry_run else sizes[way]:
            if setting.left() < 8:
                row(way, images, "not run: no time left")
                break
            rate_before, seconds = best.get(way, 0), None
            with variant(way, images):
                seconds = time_step(way, images)
                captions = images * CAPTIONS / seconds
                best[way] = max(captions, rate_before)
                over = f"{captions / best[used]:.2f}" if used in best else ""
                mfu = f"{flops(images) / seconds / PEAK:.1%} ({flops(images) / seconds / rate:.1%} of measured)"
                peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if setting.cuda else ""
                row(way, images, milliseconds(seconds), f"{captions:,.0f}", over, mfu if way == own else "", peak)
            if seconds is None or best[way] < 1.02 * rate_before:
                break  # out of memory, or larger batches gain nothing
    table("each at its best", "captions/s", "ours is faster")
    for way, captions in best.items():
        row(way, f"{captions:,.0f}", f"{best[own] / captions:.2f}" if own in best else "")
