"""Cross-entropy over a large vocabulary without the whole tensor of logits.

1,000 tokens have 50 million logits over GPT-2's vocabulary: 200 MB in float32, and as much again for their gradient.
Here the logits of a few tokens at a time are computed together with their gradient, so that neither tensor ever exists
as a whole and nothing is computed twice. The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et al.
2024).
"""

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100  # the target that `F.cross_entropy` ignores by default
CHUNK = 2**25  # logits at a time: 134 MB in float32


def chunked_cross_entropy(hidden, weight, targets, label_smoothing=0.0, chunk=CHUNK):
    """hidden states (N, C), head weight (V, C), targets (N,) -> mean cross-entropy in nats, a float32 scalar.

    Value and gradients are those of `F.cross_entropy(F.linear(hidden, weight), targets)`. Under autocast matrix
    products run in its dtype, everything else in float32. `chunk`: logits that may exist at a time. With N = 0 the
    loss is 0.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, label_smoothing, max(1, chunk // len(weight)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, smoothing, rows):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        total = torch.zeros((), device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        head = weight.to(dtype)  # cast once for all chunks
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                x = hidden[start : start + rows].to(dtype)  # (rows, C)
                target = targets[start : start + rows, None]  # (rows, 1)
                logits = F.linear(x, head).float()  # (rows, V)
                normalizer = logits.logsumexp(-1, keepdim=True)  # (rows, 1)
                target_loss = normalizer - logits.gather(1, target)  # -log p of the target
                uniform_loss = normalizer - logits.mean(-1, keepdim=True) if smoothing else 0  # mean -log p over V
                total += ((1 - smoothing) * target_loss + smoothing * uniform_loss).sum()
                if needs_hidden or needs_weight:
                    # The gradient of the logits, predicted minus target probabilities, overwrites the logits.
                    error = logits.sub_(normalizer).exp_().sub_(smoothing / len(weight))  # (rows, V)
                    error.scatter_add_(1, target, torch.full_like(target_loss, smoothing - 1))
                    error = error.to(dtype)
                    if needs_hidden:
                        grad_hidden[start : start + rows] = error @ head
                    if needs_weight:
                        grad_weight += error.t() @ x
        # Divided by N only in `backward`: divided here, all of these numbers would be too small for fp16.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = max(1, len(hidden))
        return total / ctx.count

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = (
            saved if saved is None else saved * (grad / ctx.count) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None
