"""What the steps of check_gpu.py share: their rows, their clock, and the profile of what a GPU did."""

import contextlib
import json
import re
import time
import traceback
from collections import Counter
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from timing import free_memory, interleaved, is_out_of_memory

PEAK = 989e12  # bf16 operations a second of an H100 SXM, dense, as its data sheet says
TINY_ENCODER = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2)
TINY = dict(  # the captioner of a dry run
    encoder="vit_tiny_patch16_224", encoder_options=TINY_ENCODER, embed_dim=24, num_heads=2, depth=1, vocab_size=60,
    eos_token_id=59,
)  # fmt: skip
TINY_OPTIONS = [  # the same, for the script
    "--encoder", "vit_tiny_patch16_224", "--encoder_options", json.dumps(TINY_ENCODER), "--embed_dim", "24",
    "--num_heads", "2", "--depth", "1", "--num_workers", "0", "--encoder_weights", "scratch",
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
        return torch.autocast(self.device, torch.bfloat16)


# --- rows -------------------------------------------------------------------------------------------------------------


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
    try:
        yield
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            row(*cells, "out of memory")
        else:
            row(*cells, "failed")
            fail(f"{', '.join(map(str, cells))}: {in_one_line(error)}")
            traceback.print_exc(limit=-6)
    free_memory()  # behind the handler: the traceback held the variant's tensors


def in_one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- times ------------------------------------------------------------------------------------------------------------


def seconds_of(function, setting, rounds=1, warmup=0):
    """-> seconds of each call, until its kernels have finished."""
    return interleaved({"": function}, rounds, warmup, setting.device)[""]


def milliseconds(seconds):
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


# --- profiles ---------------------------------------------------------------------------------------------------------


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


def profiled(function):
    """Run a function that works on the GPU under torch.profiler -> the averages of its events."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return found.key_averages()


def kernels_in(averages):
    """-> [(name, seconds on the GPU, calls)] of kernels and copies, longest first."""
    found = [
        (event.key, event.self_device_time_total / 1e6, event.count)
        for event in averages
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel[1])


def print_profile(title, averages):
    """Kernels by kind, the longest kernels, the operators they belong to, and where the CPU's time goes."""
    kernels = kernels_in(averages)
    kinds = Counter()
    for name, seconds, _ in kernels:
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")] += seconds
    whole = sum(kinds.values()) or 1
    table(f"{title}: kind of kernel", "ms", "share")
    for kind, seconds in kinds.most_common():
        row(kind, f"{1000 * seconds:.1f}", f"{seconds / whole:.1%}")
    print(f"\n```\n{title}: kernels, ms, calls")
    for name, seconds, count in kernels[:15]:
        print(f"{1000 * seconds:9.2f} {count:6d}  {name[:150]}")
    operators = [event for event in averages if event.device_type == DeviceType.CPU]
    for where, time_of in (("GPU", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        print(f"operators by their own time on the {where}")
        for event in sorted(operators, key=lambda event: -getattr(event, time_of))[:15]:
            print(f"{getattr(event, time_of) / 1000:9.2f} {event.count:6d}  {event.key[:100]}")
    print("```", flush=True)
