"""Staged unfreezing: which parameters train in which epoch, and how frozen ones behave.

A run goes through the stages "new layers", "GPT-2 blocks" and "everything", as far as its weights are pretrained:
parameters that start from random weights are never frozen.
"""

import itertools

import torch
from torch import nn


def stage_of(epoch, model, config):
    """The stage of an epoch, which counts from 0; `config`: the train_config."""
    pretrained = set(model.pretrained_parameters())
    unfreezes = pretrained - always_frozen(model)
    if (unfreezes and epoch >= config.freeze_epochs_all) or not pretrained:
        return "everything"
    if model.config.decoder_weights == "scratch":
        return "new layers"  # the whole decoder is new: none of its blocks is frozen at first
    return "GPT-2 blocks" if epoch >= config.freeze_epochs_gpt else "new layers"


def stages_of_run(model, config):
    """The stages that a run goes through, in their order."""
    epochs = range(max(1, config.epochs + config.scst_epochs))
    return list(dict.fromkeys(stage_of(epoch, model, config) for epoch in epochs))


def trainable_names(stage, model):
    """The names of the parameters that train in a stage."""
    names = {name for name, _ in model.named_parameters()}
    if stage == "everything":
        return names - always_frozen(model)
    trainable = names - set(model.pretrained_parameters())
    if stage == "GPT-2 blocks":
        trainable |= {name for name in names if name.startswith("gpt.trf_blocks.")}
    return trainable


def pretrained_names(model, new_layers):
    """Names of the parameters whose weights the model's config does not call "scratch", but for those of its
    `new_layers`."""
    scratch = {
        "encoder": model.config.encoder_weights == "scratch",
        "gpt": model.config.decoder_weights == "scratch",
        "bridges": True,
    }
    return [
        name
        for name, _ in model.named_parameters()
        if not scratch[name.partition(".")[0]] and not any(f".{new}." in name for new in new_layers)
    ]


def always_frozen(model):
    """Names of pretrained parameters that no stage trains: those of the encoder before its `trainable_stages`."""
    if model.config.trainable_stages < 0:
        return set()
    before = {f"encoder.{name}" for name in model.encoder.weights_before(model.config.trainable_stages)}
    return before & set(model.pretrained_parameters())


def train_only(model, names):
    """Train the parameters `names`, freeze all others, and print how many parameters are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in names
    model.train(model.training)  # frozen modules go to eval mode
    print(f"frozen parameters: {sum(p.numel() for p in model.parameters() if not p.requires_grad):,}")


def _front(model):
    """The modules that run before the stages that alone train, those without weights (dropout) included."""
    if not always_frozen(model) or model.config.trainable_stages == 0:
        return []
    first = model.encoder.stages()[-model.config.trainable_stages]
    return itertools.takewhile(lambda module: module is not first, model.encoder.modules())


def batch_norms(model, pretrained):
    """{BatchNorm of the encoder: its name}, those whose weights are `pretrained`, or those that start at random."""
    names = set(model.pretrained_parameters())
    return {
        module: name
        for name, module in model.encoder.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (f"encoder.{name}.weight" in names) == pretrained
    }


@torch.no_grad()
def norm_of_one_value(model):
    """The name of the first BatchNorm that normalises with the statistics of the batch, and has one value a channel of
    one photo, or None."""
    norms = batch_norms(model, pretrained=False)
    if not norms:
        return None
    found = []

    def look(norm, inputs):
        if inputs[0].numel() == norm.num_features:
            found.append(norms[norm])

    hooks, was_training = [norm.register_forward_pre_hook(look) for norm in norms], model.training
    side, device = model.preprocessing["img_size"], next(model.parameters()).device
    try:
        model.eval().levels(torch.zeros(1, 3, side, side, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def keep_frozen_in_eval(model):
    """Put frozen modules back into eval mode: no dropout, and BatchNorm keeps its buffers.

    A pretrained BatchNorm does so also while its weights train, as is usual in fine-tuning: a batch's statistics are
    noisier than those that the weights were trained with. recipes/RESULTS.md says what that is worth.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for part in module.modules():
                part.training = False
    if model.training:
        for part in [*batch_norms(model, pretrained=True), *_front(model)]:
            part.training = False
    if not model.gpt.tok_emb.weight.requires_grad:
        model.gpt.drop_emb.training = False
