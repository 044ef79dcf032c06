"""Mixed precision, and operations that give the same bits every time."""

import os
from functools import partial

import torch


def mixed_precision(device, precision="auto"):
    """-> (autocast, a function that makes the context of a forward pass; GradScaler).

    `precision`: "float32", "bf16", or "auto": on CUDA bf16 where the hardware has it, else fp16; elsewhere float32.
    Raises ValueError for another one.
    """
    cuda = device.type == "cuda"
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision {precision!r} is not one of auto, float32, bf16")
    if precision == "auto":
        precision = "float32"
        if cuda:  # GPUs older than Ampere only emulate bf16, slowly
            precision = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "float32")
    # bf16 has the range of float32; fp16 has not, so its loss is scaled.
    return autocast, torch.amp.GradScaler(enabled=precision == "fp16")


def use_deterministic_algorithms():
    """Only operations that give the same bits every time; one that has no such form raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum each time
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
