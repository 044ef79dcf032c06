"""Cross-entropy over a large vocabulary without the table of all scores.

1,000 tokens have 50 million scores of GPT-2's tokens: 200 MB in float32, and as much again for their gradient. Here
they are made for a few tokens at a time, and their gradient with them, so that neither is ever there as a whole and
nothing is computed twice. The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024).
"""

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100  # the target that `F.cross_entropy` ignores by default
CHUNK = 2**25  # scores at a time: 134 MB in float32


def chunked_cross_entropy(hidden, weight, targets, label_smoothing=0.0, chunk=CHUNK):
    """hidden (N, C), head weight (V, C), targets (N,) -> mean cross-entropy, a float32 scalar.

    The value and gradients of `F.cross_entropy(F.linear(hidden, weight), targets)`; under autocast products are made in
    its dtype, everything else in float32. `chunk`: scores that may exist at a time. Without any token the loss is 0.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, label_smoothing, max(1, chunk // len(weight)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, smoothing, rows):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        total = torch.zeros((), device=hidden.device)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight) if of_weight else None
        head = weight.to(dtype)  # once for all chunks
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                x, target = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
                scores = F.linear(x, head).float()  # (rows, V)
                normalizer = scores.logsumexp(-1, keepdim=True)  # (rows, 1)
                hit = normalizer - scores.gather(1, target)  # -log p of the target
                spread = normalizer - scores.mean(-1, keepdim=True) if smoothing else 0  # of all tokens
                total += ((1 - smoothing) * hit + smoothing * spread).sum()
                if of_hidden or of_weight:  # p - what p should be, in the place of the scores
                    error = scores.sub_(normalizer).exp_().sub_(smoothing / len(weight))
                    error.scatter_add_(1, target, torch.full_like(hit, smoothing - 1))
                    error = error.to(dtype)
                    if of_hidden:
                        grad_hidden[start : start + rows] = error @ head
                    if of_weight:
                        grad_weight += error.t() @ x
        # Divided by N in `backward` only: in fp16 the smallest of these numbers would be lost, divided they all would.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = max(1, len(hidden))
        return total / ctx.count

    @staticmethod
    def backward(ctx, grad):
        of_hidden, of_weight = (part if part is None else part * (grad / ctx.count) for part in ctx.saved_tensors)
        return of_hidden, of_weight, None, None, None
