"""Weights laid out for decoding, where matrix products have few rows, so that reading the weights takes all the time.

On a CPU oneDNN reads weights in its own layout at about twice the speed of PyTorch's (the table in
benchmarks/RESULTS.md has the figures); under autocast the weights are cast once instead of at every step, on any
device.
"""

import weakref
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

MIN_WEIGHTS = 1_000_000  # a decoder with fewer fits into the processor's cache, where the layout does not matter
MIN_ROWS = 4  # oneDNN is a tenth to a fifth faster with four rows than with one or two, for which it has other kernels

_packed = weakref.WeakKeyDictionary()  # {module: {dtype: (fingerprint of its parameters, linear, cast parameters)}}


@contextmanager
def packed_linears(gpt):
    """Context in which the linear layers and the head of `gpt` (a `GPTModel`) use packed weights, without gradients.

    Under autocast the layers multiply in its dtype. On a CPU everything else stays in float32: the norms and attention
    of a single row are no faster in bf16 there. The head always stays in float32: with the 8 bits of a bf16 logit,
    tokens would tie.

    Packed weights are kept for the next call; a weight that has changed since is packed again, see `_fingerprints`.
    Yields the addresses of all cast weights: a CUDA graph is only valid while they stay the same.
    """
    own_dtype, device = gpt.tok_emb.weight.dtype, gpt.tok_emb.weight.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else own_dtype
    onednn = device == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    layers = [layer for layer in gpt.trf_blocks.modules() if isinstance(layer, nn.Linear)]
    if sum(layer.weight.numel() for layer in layers) < MIN_WEIGHTS or not (onednn or autocast):
        yield []
        return
    fingerprints = _fingerprints([gpt.tok_emb, *layers])
    head, _ = _packed_linear(gpt.tok_emb, own_dtype, onednn, fingerprints[0])

    def logits(hidden_states):
        with torch.autocast(device, enabled=False):
            return head(gpt.final_norm(hidden_states.to(own_dtype)))

    addresses = []
    for layer, fingerprint in zip(layers, fingerprints[1:], strict=True):
        layer.forward, cast = _packed_linear(layer, dtype, onednn, fingerprint)
        addresses += [tensor.data_ptr() for tensor in cast]
    gpt.logits = logits
    try:
        with torch.autocast(device, dtype, enabled=autocast and not onednn):
            yield addresses
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class's method is visible again
        vars(gpt).pop("logits", None)


def _packed_linear(module, dtype, onednn, fingerprint):
    """An `nn.Linear` or `nn.Embedding` with its fingerprint -> (linear, cast parameters).

    `linear` maps x (..., in) to x @ weight.T + bias (..., out), multiplied in `dtype`; with oneDNN the result has the
    module's dtype. The second are the copies of the parameters in `dtype`, [] where there are none.
    """
    parameters, packed = _parameters(module), _packed.setdefault(module, {})
    old_fingerprint, _, cast = packed.get(dtype, (None, None, []))
    if old_fingerprint != fingerprint:
        if onednn:
            packed[dtype] = fingerprint, _onednn_linear(parameters, dtype), []
        else:
            cast = [] if module.weight.dtype == dtype else _cast(parameters, dtype, cast)
            weight, bias = (*(cast or [p.detach() for p in parameters]), None)[:2]
            packed[dtype] = fingerprint, lambda x: F.linear(x, weight, bias), cast  # autocast casts x
    return packed[dtype][1:]


def _onednn_linear(parameters, dtype):
    own_dtype = parameters[0].dtype
    weight, bias = (*(p.detach().to(dtype) for p in parameters), None)[:2]
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def linear(x):
        copies = max(1, MIN_ROWS // (x.numel() // x.size(-1)))
        x = x.to(dtype)[..., None, :].expand(*x.shape[:-1], copies, -1)  # (..., copies, in)
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # (..., copies, out)
        return y[..., 0, :].to(own_dtype)  # (..., out)

    return linear


def _cast(parameters, dtype, cast):
    """Parameters in `dtype`, written in place over the earlier `cast` ones where there are any: CUDA graphs hold their
    addresses."""
    with torch.inference_mode(False), torch.no_grad():
        if [(old.shape, old.device) for old in cast] != [(p.shape, p.device) for p in parameters]:
            return [p.detach().to(dtype, copy=True) for p in parameters]
        for old, p in zip(cast, parameters, strict=True):
            old.copy_(p)
    return cast


def _parameters(module):
    return [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]


def _fingerprints(modules):
    """For each module a value that differs after its weights have changed: their addresses, PyTorch's version counters,
    and a sample of their values, because the fused AdamW does not count. Only single values set through `weight.data`
    go unnoticed. All samples are read together: every read waits for the device."""
    groups = [_parameters(module) for module in modules]
    samples = [[p.detach().flatten()[:: p.numel() // 64 + 1] for p in group] for group in groups]
    values = iter(torch.cat([sample for group in samples for sample in group]).tolist())
    return [
        [
            (p.data_ptr(), 0 if p.is_inference() else p._version, list(islice(values, len(sample))))
            for p, sample in zip(*group, strict=True)
        ]
        for group in zip(groups, samples, strict=True)
    ]
