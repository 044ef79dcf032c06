"""Which parameters train in which epoch: first new layers, then the GPT-2 blocks, then everything; and how what is
frozen behaves."""


def stage_of(epoch, model, config):
    """What trains in an epoch (counted from 0): "new layers", "GPT-2 blocks" or "everything"; `config`: the
    train_config."""
    stage = "GPT-2 blocks" if epoch >= config.freeze_epochs_gpt else "new layers"
    if model.config.decoder_weights == "scratch":
        stage = "new layers"  # the whole decoder is new: nothing of it waits
    thaws = set(model.pretrained_parameters()) - model.always_frozen()
    if (thaws and epoch >= config.freeze_epochs_all) or not model.pretrained_parameters():
        stage = "everything"
    return stage


def trainable_in(stage, model):
    """The names of the parameters that train in a stage of `stage_of`."""
    names = {name for name, _ in model.named_parameters()}
    if stage == "everything":
        return names - model.always_frozen()
    trainable = names - set(model.pretrained_parameters())
    if stage == "GPT-2 blocks":
        trainable |= {name for name in names if name.startswith("gpt.trf_blocks.")}
    return trainable


def stages_of_run(model, config):
    """The stages that a run goes through, in their order."""
    epochs = range(max(1, config.epochs + config.scst_epochs))
    return list(dict.fromkeys(stage_of(epoch, model, config) for epoch in epochs))


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


def keep_frozen_in_eval(model):
    """Put what is frozen back into eval mode: no dropout, and BatchNorm keeps its buffers."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for part in module.modules():
                part.training = False
    if not model.gpt.tok_emb.weight.requires_grad:
        model.gpt.drop_emb.training = False
