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
CHUNK_ON_GPU = 2**27  # each chunk adds to the whole weight gradient, which takes a GPU as long as half such a chunk
HEAD_MULTIPLE_ON_GPU = 64  # tensor cores want rows of the head in multiples of 64; GPT-2 has 50,257


def label_places(labels):
    """labels (B, T) -> LongTensor (real labels,): the places of those that are not -100 in `labels.flatten()`."""
    return (labels.flatten() != IGNORED_LABEL).nonzero()[:, 0]


def chunked_cross_entropy(hidden, weight, targets, label_smoothing=0.0, chunk=None, multiple=None):
    """hidden states (N, C), head weight (V, C), targets (N,) -> mean cross-entropy in nats, a float32 scalar.

    Value and gradients are those of `F.cross_entropy(F.linear(hidden, weight), targets)`. Under autocast matrix
    products run in its dtype, everything else in float32. `chunk`: logits that may exist at a time. `multiple`: the
    head is padded to a multiple of so many rows, whose logits are -inf. With N = 0 the loss is 0.
    """
    on_gpu = hidden.device.type == "cuda"
    chunk = chunk or (CHUNK_ON_GPU if on_gpu else CHUNK)
    multiple = multiple or (HEAD_MULTIPLE_ON_GPU if on_gpu else 1)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, label_smoothing, max(1, chunk // len(weight)), multiple)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, smoothing, rows, multiple):
        device, V = hidden.device.type, len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        total = torch.zeros((), device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = _padded(weight.to(dtype), -(-V // multiple) * multiple)  # (V padded, C); cast once for all chunks
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=weight.dtype) if needs_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                x = hidden[start : start + rows].to(dtype)  # (rows, C)
                target = targets[start : start + rows, None]  # (rows, 1)
                logits = F.linear(x, head)  # (rows, V padded)
                logits[:, V:] = -torch.inf
                if logits.dtype == torch.float32:  # in place: no second tensor of this size
                    log_probs = logits.sub_(logits.logsumexp(-1, keepdim=True))  # (rows, V padded)
                else:
                    log_probs = logits.log_softmax(-1, dtype=torch.float32)  # (rows, V padded)
                total -= (1 - smoothing) * log_probs.gather(1, target).sum()
                if smoothing:
                    total -= smoothing * log_probs[:, :V].mean(-1).sum()
                if needs_hidden or needs_weight:
                    # The gradient of the logits, predicted minus target probabilities, overwrites the probabilities.
                    error = log_probs.exp_()  # (rows, V padded)
                    if smoothing:
                        error[:, :V] -= smoothing / V
                    error.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=error.dtype))
                    error = error.to(dtype)
                    if needs_hidden:
                        grad_hidden[start : start + rows] = error @ head
                    if needs_weight:
                        grad_head += error.t() @ x
        # Divided by N only in `backward`: divided here, all of these numbers would be too small for fp16.
        ctx.save_for_backward(grad_hidden, grad_head[:V] if needs_weight else None)
        ctx.count = max(1, len(hidden))
        return total / ctx.count

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = (
            saved if saved is None else saved * (grad / ctx.count) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None, None


def _padded(head, rows):
    """head (V, C) -> (rows, C), with rows of zeros at its end."""
    return F.pad(head, (0, 0, 0, rows - len(head))) if rows > len(head) else head
