"""The model summary: every parameter counted once, and the shares that train are those that do."""

import re
from types import SimpleNamespace

import pytest
import torch

from captioning.model import stages, summary


def number(text):
    return int(text.replace(",", ""))


def test_every_parameter_counts_once(script, tiny_model):
    config = script.train_config
    head, rows = summary.summarize(tiny_model, config)
    assert head == ("part", "shape", "parameters", "everything")
    *parts, total = rows
    assert number(total[2]) == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert sum(number(row[2]) for row in parts) == number(total[2])
    counts = {row[0]: number(row[2]) for row in parts}
    assert counts["encoder"] == sum(p.numel() for p in tiny_model.encoder.parameters())
    assert counts["cross-attention"] == 2 * 4 * (32 * 32 + 32)
    assert counts["MLP"] == 2 * (2 * 32 * 128 + 128 + 32)
    assert counts["token embeddings"] == tiny_model.config.vocab_size * 32
    assert counts["bridges"] == 2 * (24 * 32 + 32)


def test_shapes_are_those_of_the_tensors(tiny_model):
    shapes = summary.shapes_of(tiny_model)
    assert shapes["encoder"] == "vit_tiny_patch16_224, 3 x 32 x 32 -> 2 levels of 5 x 24"
    levels = tiny_model.levels(torch.zeros(1, 3, 32, 32))
    assert summary.token_shapes(tiny_model) == [tuple(level.shape[1:]) for level in levels] == [(5, 24)] * 2
    assert shapes["bridges"] == "2 of 24 -> 32"
    assert shapes["MLP"] == "2 blocks, 32 -> 128 -> 32"


@pytest.mark.parametrize("trainable_stages", [-1, 1])
def test_shares_are_what_the_trainer_trains(
    script, tiny_config, tiny_train_config, dls, pretend_pretrained, trainable_stages
):
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"
    tiny_config.trainable_stages = trainable_stages
    tiny_train_config.freeze_epochs_gpt, tiny_train_config.freeze_epochs_all, tiny_train_config.epochs = 1, 2, 3
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    head, rows = summary.summarize(trainer.model, trainer.train_config)
    assert head[3:] == ("new layers", "GPT-2 blocks", "everything")
    for epoch, stage in enumerate(head[3:]):
        trainer.enter_stage(epoch)
        training = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert trainer.stage == stage
        assert stages.trainable_names(stage, trainer.model) == training
        assert number(rows[-1][3 + epoch]) == sum(trainer.model.get_parameter(name).numel() for name in training)
    shares = {row[0]: row[3:] for row in rows}
    assert shares["encoder"][:2] == ("-", "-")
    assert (shares["encoder"][2] == "all") == (trainable_stages == -1)
    assert shares["cross-attention"] == ("all", "all", "all")
    assert shares["self-attention"] == ("-", "all", "all")
    assert shares["token embeddings"] == ("-", "-", "all")
    assert re.fullmatch(r"\d+%", shares["norms"][0])  # ln_cross is new, ln_1 and ln_2 are not


def test_looking_at_the_model_leaves_it_as_it_is(script, tiny_config, dls):
    """BatchNorm's statistics must not see the empty photo, and dropout's random numbers are not drawn."""
    tiny_config.encoder, tiny_config.encoder_options = "resnet10t", {"output_stride": 8}
    model = script.VisionGPT2Model(tiny_config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    summary.summarize(model, script.train_config)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_table_is_aligned():
    text = summary.as_text(("part", "shape", "parameters"), [("encoder", "3 x 32 x 32", "9"), ("MLP", "", "1,234")])
    assert text.splitlines() == [
        "part     shape        parameters",
        "encoder  3 x 32 x 32           9",
        "MLP                        1,234",
    ]


def test_a_run_without_pretrained_weights_has_one_stage(script, tiny_model):
    config = SimpleNamespace(epochs=0, scst_epochs=2, freeze_epochs_gpt=1, freeze_epochs_all=2)
    assert stages.stages_of_run(tiny_model, config) == ["everything"]
