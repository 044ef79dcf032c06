"""Weights laid out for decoding, where each product has few rows and its time is that of reading the weights.

On a CPU oneDNN's own layout is read at about twice the speed of PyTorch's (the table in benchmarks/RESULTS.md has the
figures); under autocast the weights are cast once instead of at every step, on any device.
"""

import weakref
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

WORTHWHILE = 1_000_000  # weights of a decoder; a smaller one is in the processor's cache however it is laid out

_packed = weakref.WeakKeyDictionary()  # {module: {dtype: (state of its weight, the product with it)}}


@contextmanager
def packed_linears(gpt):
    """Inside, the linear layers of `gpt` (a `GPTModel`) and its head multiply with packed weights, without gradients.

    Under autocast the layers multiply in its dtype, on a CPU nothing else does: one row's norms and attention are no
    faster in bf16 there. The head stays in float32: the 8 bits of a bf16 score leave ties between tokens.

    What was packed is kept for the next time; a weight that has changed since is packed anew, see `_state`.
    """
    own, device = gpt.tok_emb.weight.dtype, gpt.tok_emb.weight.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else own
    onednn = device == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    layers = [layer for layer in gpt.trf_blocks.modules() if isinstance(layer, nn.Linear)]
    if sum(layer.weight.numel() for layer in layers) < WORTHWHILE or not (onednn or autocast):
        yield
        return
    head = _product(gpt.tok_emb, own, onednn)

    def logits(hidden_states):
        with torch.autocast(device, enabled=False):
            return head(gpt.final_norm(hidden_states.to(own)))

    for layer in layers:
        layer.forward = _product(layer, dtype, onednn)
    gpt.logits = logits
    try:
        with torch.autocast(device, dtype, enabled=autocast and not onednn):
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # back to its class's method
        vars(gpt).pop("logits", None)


def _product(module, dtype, onednn):
    """-> the function x (..., in) -> x @ weight.T + bias (..., out) for an `nn.Linear` or `nn.Embedding`. It multiplies
    in `dtype`; with oneDNN its result has that of the module."""
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    state, packed = _state(parameters), _packed.setdefault(module, {})
    if packed.get(dtype, (None,))[0] != state:
        weight, bias = (*(p.detach().to(dtype) for p in parameters), None)[:2]
        if onednn:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            multiply, module_dtype = torch.ops.mkldnn._linear_pointwise, module.weight.dtype
            packed[dtype] = state, lambda x: multiply(x.to(dtype), weight, bias, "none", [], "").to(module_dtype)
        else:
            packed[dtype] = state, lambda x: F.linear(x, weight, bias)  # autocast takes care of x
    return packed[dtype][1]


def _state(parameters):
    """What tells that weights have changed: where they lie, PyTorch's count of changes in place, and a sample of their
    values, because the fused AdamW does not count. Only single values that are set through `weight.data` escape it."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.detach().flatten()[:: p.numel() // 64 + 1].tolist())
        for p in parameters
    ]
