"""Mixed precision, and operations that give the same bits every time."""

import os
from functools import partial

import torch


def mixed_precision(device, precision="auto"):
    """-> (autocast, a function that makes the context of a forward pass; GradScaler). `precision` as in
    `autocast_dtype`."""
    dtype = autocast_dtype(device, precision)
    autocast = partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    # bf16 has the range of float32; fp16 has not, so its loss is scaled.
    return autocast, torch.amp.GradScaler(enabled=dtype is torch.float16)


def autocast_dtype(device, precision="auto"):
    """-> the dtype of matrix products and convolutions under mixed precision; None: float32, without it.

    `precision`: "float32", "bf16", or "auto": on CUDA bf16 where the hardware has it, else fp16; elsewhere float32.
    Raises ValueError for another one.
    """
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision {precision!r} is not one of auto, float32, bf16")
    if precision == "auto":
        if device.type != "cuda":
            return None
        # GPUs older than Ampere only emulate bf16, slowly.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if precision == "bf16" else None


def use_deterministic_algorithms():
    """Only operations that give the same bits every time; one that has no such form raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum each time
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
