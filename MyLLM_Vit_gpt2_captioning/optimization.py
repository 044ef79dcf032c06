"""What the optimizer is told: which parameters learn how fast, and the learning rate over a run."""

import torch

EMBEDDINGS = ("tok_emb", "pos_emb", "positions", "_token")  # in a parameter's name; a ViT has pos_embed and cls_token


def parameter_groups(model, pretrained, train_config):
    """Groups for AdamW: new layers learn at `lr`, pretrained ones (their names) at `lr * pretrained_lr_scale`; matrices
    decay, but norms, biases and embeddings do not."""
    pretrained, groups = set(pretrained), {}
    for name, parameter in model.named_parameters():
        embedding = any(
            part in name for part in ("tok_emb", "pos_emb", "positions", "_token")
        )  # also a ViT's cls_token
        key = (name in pretrained, parameter.ndim > 1 and not embedding)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": train_config.lr * (train_config.pretrained_lr_scale if is_pretrained else 1.0),
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
