"""Timing for all benchmarks: candidates measured in turns, medians with ranges, a description of the machine."""

import gc
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "timm", "transformers", "pillow", "opencv-python-headless", "albumentations", "numpy")


def interleaved(candidates, rounds=5, warmup=1, device="cpu"):
    """Time functions without arguments against each other -> {name: [seconds of a call in each round]}.

    Every round calls each of `candidates` {name: function} once and begins with another one than the round before, so
    that a temporary slowdown of the machine affects all alike. The `warmup` rounds before do not count. On "cuda" the
    time is taken with CUDA events, so that a call ends when its kernels have finished.
    """
    clock = _seconds_on_a_gpu if device == "cuda" else _seconds
    names = list(candidates)
    seconds = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = clock(candidates[name])
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _seconds_on_a_gpu(function):
    import torch

    torch.cuda.synchronize()  # kernels launched before do not count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_on_a_gpu(function):
    """Peak GPU memory of a second call in GiB, without the memory that was allocated before it."""
    import torch

    function()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def is_out_of_memory(error):
    """Whether an exception, or one that it was raised from or after, says that the GPU has not enough memory."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def unless_out_of_memory(function, *args):
    """-> the function's result, or None where the GPU has not enough memory for it; all that it held is freed."""
    try:
        return function(*args)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # only here: the traceback held the function's tensors
    return None


def free_memory():
    """Give memory that nothing uses any more back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_device(device):
    """End the benchmark with one line when `device` is "cuda" and there is no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no CUDA GPU; use --device cpu")


def median_and_range(values):
    """Numbers -> "median (smallest to largest)", with three significant digits."""
    middle, low, high = (_three_digits(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def machine():
    """One line: the processor, the cores this process may use, the GPU if there is one, and versions of packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{_processor()}, {cores} of {os.cpu_count()} cores"]
    torch = sys.modules.get("torch")  # not imported for benchmarks that do without it
    if torch is not None:
        parts[0] += f", {torch.get_num_threads()} torch threads"
        if torch.cuda.is_available():
            parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _three_digits(value):
    """1234.5 -> "1,234", 12.345 -> "12.3", 0.0012345 -> "0.00123"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
