"""What the optimizer is told: which parameters learn how fast, the learning rate over a run, in which precision; and
the moving average of the weights."""

from functools import partial

import torch

EMBEDDINGS = ("tok_emb", "pos_emb", "positions", "_token")  # in a parameter's name; a ViT has pos_embed and cls_token


def parameter_groups(model, pretrained, lr, train_config):
    """Groups for AdamW: new layers learn at `lr`, pretrained ones (their names) at `lr * pretrained_lr_scale`; matrices
    decay, but norms, biases and embeddings do not."""
    pretrained, groups = set(pretrained), {}
    for name, parameter in model.named_parameters():
        embedding = any(part in name for part in EMBEDDINGS)
        key = (name in pretrained, parameter.ndim > 1 and not embedding)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (train_config.pretrained_lr_scale if is_pretrained else 1.0),
            "weight_decay": train_config.weight_decay if decays else 0.0,
        }
        for (is_pretrained, decays), parameters in groups.items()
    ]


def one_cycle(optimizer, total_steps, warmup_share, step=0):
    """OneCycle (Smith & Topin 2018): up to each group's peak over `warmup_share` of the steps, down along a cosine.

    `step` > 0 goes on in the middle, with the peaks of the first call.
    """
    peaks = [group.get("max_lr", group["lr"]) for group in optimizer.param_groups]
    total = max(total_steps, step, 3)  # OneCycleLR divides by zero in shorter runs
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        peaks,
        total_steps=total,
        pct_start=max(warmup_share, 2 / total),
        div_factor=25,
        cycle_momentum=False,
        last_epoch=step - 1,
    )


def mixed_precision(device, precision="auto"):
    """-> (autocast, a function that makes the context of a forward pass; GradScaler).

    `precision`: "float32", "bf16", or "auto": on CUDA bf16 where the hardware has it, else fp16; elsewhere float32.
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


def average_of(model, decay):
    """An exponential moving average of the model's weights (Polyak & Juditsky 1992), started from a copy of them.

    At first it is about the last tenth of the steps, so that the random start is forgotten at once.
    """
    from timm.utils import ModelEmaV3  # here, so that captioning a photo does not wait for timm

    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1)  # step / (9 + step), at most decay
