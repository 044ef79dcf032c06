"""From a loss to new weights: which parameters learn how fast, the learning rate over a run, in which precision,
accumulated and clipped gradients, the moving average of the weights."""

import math
import os
from functools import partial

import torch
from torch import nn

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


def be_deterministic():
    """Only operations that give the same bits every time; one that has no such form raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum each time
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def average_of(model, decay):
    """An exponential moving average of the model's weights (Polyak & Juditsky 1992), started from a copy of them.

    At first it is about the last tenth of the steps, so that the random start is forgotten at once.
    """
    from timm.utils import ModelEmaV3  # here, so that captioning a photo does not wait for timm

    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1)  # step / (9 + step), at most decay


class Optimization:
    """AdamW on a OneCycle schedule of its own, and the moving average of the weights if the config wants one.

    Its parts are there to be looked at: `optimizer`, `scheduler`, `scaler`, `average` (a timm ModelEmaV3 or None).
    """

    def __init__(self, model, lr, steps, scaler, config):
        """`lr`: peak of new layers; `steps`: of the whole schedule; `scaler`: of `mixed_precision`; `config`: the
        train_config."""
        self.model, self.scaler, self.config, self.peak = model, scaler, config, lr
        groups = parameter_groups(model, model.pretrained_parameters(), lr, config)
        fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(groups, fused=fused)
        self.scheduler = one_cycle(self.optimizer, steps, config.warmup_share)
        self.average = average_of(model, config.ema_decay) if config.ema_decay else None
        self.bad_steps = 0  # consecutive

    lr = property(lambda self: max(self.scheduler.get_last_lr()))

    def reschedule(self, steps):
        """OneCycle over so many steps, continued at the current one."""
        done = self.scheduler.last_epoch
        self.scheduler = one_cycle(self.optimizer, steps, self.config.warmup_share, done)

    def step(self, losses):
        """One step down the gradient of the sum of `losses`, scalars that are asked for one by one so that only one
        graph exists at a time -> True; False where a loss or the gradient is not finite, or where there is no loss (no
        photo of the batches could be read): nothing has changed.

        Raises FloatingPointError after `max_bad_steps` of those in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = None
        for loss in losses:
            # Where a loss is not finite its gradient must not be: other processes wait for it and see only that.
            self.scaler.scale(loss if math.isfinite(loss.item()) else loss * math.nan).backward()
        if loss is None:
            return False
        self.scaler.unscale_(self.optimizer)
        if self._is_bad(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)):
            if self.scaler.is_enabled():  # it skips the step too, and takes a smaller scale
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return False
        self.bad_steps = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler.last_epoch < self.scheduler.total_steps:  # in more epochs than planned the rate stays low
            self.scheduler.step()
        if self.average:
            self.average.update(self.model, step=self.scheduler.last_epoch)
        return True

    def state_dict(self):
        """All that the next steps depend on, next to the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "lr": self.peak,
        }

    def load_state_dict(self, state):
        """Go on from what `state_dict` gave. Where the config has another peak rate or length by now, the schedule is
        the new one, at the step it had come to."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        done, steps = state["scheduler"]["last_epoch"], self.scheduler.total_steps
        if (self.peak, steps) == (state["lr"], state["scheduler"]["total_steps"]):
            self.scheduler.load_state_dict(state["scheduler"])
            return
        for group in self.optimizer.param_groups:
            for key in ("initial_lr", "max_lr", "min_lr"):
                group[key] *= self.peak / state["lr"]
        self.scheduler.last_epoch = done
        self.reschedule(steps)

    def _is_bad(self, value):
        """True when a loss or gradient norm is not finite; too many of them in a row end the run."""
        if math.isfinite(value.item()):
            return False
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            raise FloatingPointError(f"{self.bad_steps} steps in a row were not finite: try a lower --lr")
        return True
