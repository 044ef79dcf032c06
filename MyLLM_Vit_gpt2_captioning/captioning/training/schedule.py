"""Which parameters learn how fast: AdamW's parameter groups, the learning rate over a run (OneCycle), the moving
average of the weights (EMA), and the state of all of them."""

import math

import torch

from captioning.common.form import check
from captioning.model.checkpoint import check_finite

EMBEDDINGS = ("tok_emb", "pos_emb", "positions", "_token")  # in a parameter's name; a ViT has pos_embed and cls_token

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group, which OneCycle changes or goes by
PLACE = {"last_epoch": int, "_step_count": int, "_last_lr": [float]}  # what OneCycle changes of itself
FORM = {  # of what `load_optimization_state` takes
    "optimizer": {"state": {int: {str: torch.Tensor}}, "param_groups": [dict.fromkeys(RATES, float)]},
    "scheduler": PLACE | {"total_steps": int},
    "scaler": dict,
    "average": (dict, None),
    "lr": float,
}
SCALER = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float)
SCALER |= dict.fromkeys(("growth_interval", "_growth_tracker"), int)


def parameter_groups(model, pretrained, lr, train_config):
    """Groups for AdamW: new layers learn at `lr`, pretrained ones (their names) at `lr * pretrained_lr_scale`; matrices
    have weight decay, norms, biases and embeddings do not."""
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


def build_optimizer(model, lr, train_config):
    """AdamW for a `VisionGPT2Model`; `lr`: peak learning rate of its new layers."""
    groups = parameter_groups(model, model.pretrained_parameters(), lr, train_config)
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, fused=fused)


def one_cycle(optimizer, total_steps, warmup_share, step=0):
    """OneCycle (Smith & Topin 2018): up to each group's peak over `warmup_share` of the steps, down along a cosine.

    `step` > 0 continues in the middle, with the peaks of the first call.
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


def moving_average(model, decay):
    """An exponential moving average of the model's weights (Polyak & Juditsky 1992), started from a copy of them
    -> timm's ModelEmaV3, whose `module` is the averaged model.

    At first it averages about the last tenth of the steps, so that the random start is forgotten at once.
    """
    from timm.utils import ModelEmaV3  # here, so that captioning a photo does not wait for timm

    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1)  # step / (9 + step), at most decay


def optimization_state(optimizer, scheduler, scaler, average, peak_lr):
    """What the next steps depend on beside the model's weights -> dict; `average`: of `moving_average`, or None."""
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "average": average.module.state_dict() if average else None,
        "lr": peak_lr,
    }


def load_optimization_state(saved, optimizer, scheduler, scaler, average, peak_lr, warmup_share):
    """Load a dict of `optimization_state` -> the scheduler to go on with.

    Where the peak learning rate or the number of steps is another one by now, the schedule is that of `scheduler`, at
    the step that the saved one had come to. Of a stranger's file only what changes from step to step is taken. Raises
    ValueError for parts of another form, before anything is changed.
    """
    check(saved, FORM, "['optimization']")
    numbers = [saved["lr"], *(group[rate] for group in saved["optimizer"]["param_groups"] for rate in RATES)]
    if not all(math.isfinite(number) for number in numbers) or saved["lr"] <= 0 or saved["scheduler"]["last_epoch"] < 0:
        raise ValueError("the learning rates or the step of the schedule are impossible")
    own, theirs = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
    groups = [group | {rate: other[rate] for rate in RATES} for group, other in zip(own, theirs, strict=True)]
    _check_moments(saved["optimizer"]["state"], optimizer)
    optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    if saved["scaler"]:  # empty where the run was not in fp16 before
        check(saved["scaler"], SCALER, "['scaler']")
        scaler.load_state_dict(saved["scaler"])
    if average:
        check_finite(saved["average"], "the moving average")
        average.module.load_state_dict(saved["average"])
    if (peak_lr, scheduler.total_steps) == (saved["lr"], saved["scheduler"]["total_steps"]):
        scheduler.load_state_dict(scheduler.state_dict() | {name: saved["scheduler"][name] for name in PLACE})
        return scheduler
    for group in optimizer.param_groups:
        for key in ("initial_lr", "max_lr", "min_lr"):
            group[key] *= peak_lr / saved["lr"]
    return one_cycle(optimizer, scheduler.total_steps, warmup_share, saved["scheduler"]["last_epoch"])


def _check_moments(state, optimizer):
    """Raise ValueError where AdamW's step and moments do not fit its parameters: it would read behind their end."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state.items():
        if moments.keys() != {"step", "exp_avg", "exp_avg_sq"} or number not in range(len(parameters)):
            raise ValueError(f"the optimizer knows no parameter {number} with {', '.join(moments)}"[:200])
        for name, values in moments.items():
            shape = () if name == "step" else parameters[number].shape
            if values.shape != shape or not values.is_floating_point() or (name != "exp_avg" and (values < 0).any()):
                raise ValueError(f"the optimizer's {name} of parameter {number} does not fit it")
        check_finite(moments, "the optimizer")
