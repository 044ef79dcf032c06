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
FEW_ROWS = 4  # oneDNN is a tenth to a fifth faster with so many rows than with one or two, which it computes otherwise

_packed = weakref.WeakKeyDictionary()  # {module: {dtype: (state of its weight, the product with it, casts)}}


@contextmanager
def packed_linears(gpt):
    """Inside, the linear layers of `gpt` (a `GPTModel`) and its head multiply with packed weights, without gradients.

    Under autocast the layers multiply in its dtype, on a CPU nothing else does: one row's norms and attention are no
    faster in bf16 there. The head stays in float32: the 8 bits of a bf16 score leave ties between tokens.

    What was packed is kept for the next time; a weight that has changed since is packed anew, see `_state`. Yields what
    tells where the weights lie that were cast, for who remembers their addresses (cuda_graphs.py).
    """
    own, device = gpt.tok_emb.weight.dtype, gpt.tok_emb.weight.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else own
    onednn = device == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    layers = [layer for layer in gpt.trf_blocks.modules() if isinstance(layer, nn.Linear)]
    if sum(layer.weight.numel() for layer in layers) < WORTHWHILE or not (onednn or autocast):
        yield []
        return
    head, _ = _product(gpt.tok_emb, own, onednn)

    def logits(hidden_states):
        with torch.autocast(device, enabled=False):
            return head(gpt.final_norm(hidden_states.to(own)))

    addresses = []
    for layer in layers:
        layer.forward, casts = _product(layer, dtype, onednn)
        addresses += [tensor.data_ptr() for tensor in casts]
    gpt.logits = logits
    try:
        with torch.autocast(device, dtype, enabled=autocast and not onednn):
            yield addresses
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # back to its class's method
        vars(gpt).pop("logits", None)


def _product(module, dtype, onednn):
    """-> (the function x (..., in) -> x @ weight.T + bias (..., out) for an `nn.Linear` or `nn.Embedding`, the tensors
    that were cast for it). It multiplies in `dtype`; with oneDNN its result has that of the module."""
    parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    state, packed = _state(parameters), _packed.setdefault(module, {})
    old_state, _, casts = packed.get(dtype, (None, None, []))
    if old_state != state:
        if onednn:
            packed[dtype] = state, _onednn_product(parameters, dtype), []
        else:
            casts = [] if module.weight.dtype == dtype else _cast(parameters, dtype, casts)
            weight, bias = (*(casts or [p.detach() for p in parameters]), None)[:2]
            packed[dtype] = state, lambda x: F.linear(x, weight, bias), casts  # autocast takes care of x
    return packed[dtype][1:]


def _onednn_product(parameters, dtype):
    own = parameters[0].dtype
    weight, bias = (*(p.detach().to(dtype) for p in parameters), None)[:2]
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def multiply(x):
        copies = max(1, FEW_ROWS // (x.numel() // x.size(-1)))
        x = x.to(dtype)[..., None, :].expand(*x.shape[:-1], copies, -1)  # (..., copies, in)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[..., 0, :].to(own)  # (..., out)

    return multiply


def _cast(parameters, dtype, casts):
    """Parameters in `dtype`, written over their earlier `casts` where there are any: a CUDA graph knows the place."""
    with torch.inference_mode(False), torch.no_grad():
        if [(own.shape, own.device) for own in casts] != [(p.shape, p.device) for p in parameters]:
            return [p.detach().to(dtype, copy=True) for p in parameters]
        for own, p in zip(casts, parameters, strict=True):
            own.copy_(p)
    return casts


def _state(parameters):
    """What tells that weights have changed: where they lie, PyTorch's count of changes in place, and a sample of their
    values, because the fused AdamW does not count. Only single values that are set through `weight.data` escape it."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.detach().flatten()[:: p.numel() // 64 + 1].tolist())
        for p in parameters
    ]
