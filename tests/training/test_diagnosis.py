"""The run says why it fails: measurements on small models, findings from measurements, and what a run prints."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from captioning.training import measurements
from captioning.training.diagnosis import Diagnosis, find

HEALTHY = {  # of a run on Shapes after an epoch
    "tokens of a caption": 12, "captions cut off": 0.0, "unknown words": 0.0,
    "photos with the commonest caption": 0.002, "commonest caption": "a red square", "photos": 3200,
    "validation photos also in training": 0.0,
    "captions that begin with BOS": 1.0, "captions whose end is a target": 1.0, "mean of the model's input": -0.13,
    "its standard deviation": 0.36, "variance at the start": 0.5, "loss with the own photo": 0.62,
    "loss with another photo": 1.25, "loss of the first word": 1.49,
    "captions that another photo suits clearly better": 0.0, "captions that their own photo suits clearly better": 0.94,
    "image tokens' variance between photos": 0.96, "cross-attention's share of the text": 0.41,
    "evenness of cross-attention": 0.54, "steps": 200, "epochs": 1.0, "steps left out": 0, "share of steps left out": 0,
    "share of steps clipped": 0.35, "peak learning rate over weights": 0.05, "training loss": 0.59,
    "training loss over the first": 0.11, "loss has risen by": 0.01, "loss above guessing": -5.0,
    "pretrained encoder has moved": 0.05, "captions written": 100, "different ones among them": 0.9,
    "captions that repeat three words": 0.0, "captions over three times the usual length": 0.0, "empty captions": 0.0,
    "epochs in which validation loss rose": 0,
}  # fmt: skip


def names(script, changes, **model):
    train = script.TrainConfig()
    found = find(HEALTHY | changes, script.ModelConfig(**model), train)
    for finding in found:
        assert "nan" not in str(finding), str(finding)
        assert finding.remedy and finding.cause
    return [finding.name for finding in found]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"captions that begin with BOS": 0.0}, "captions do not begin with [BOS]"),
        ({"captions whose end is a target": 0.0}, "the end of captions is not learned"),
        ({"unknown words": 0.4}, "most captions are full of <unk>"),
        ({"captions cut off": 0.9}, "captions are cut off"),
        ({"photos with the commonest caption": 0.3}, "many photos have the same caption"),
        ({"validation photos also in training": 1.0}, "validation photos are in training too"),
        ({"mean of the model's input": 128.0}, "the encoder gets pixels of the wrong size"),
        ({"its standard deviation": 0.001}, "the encoder gets pixels of the wrong size"),
        (
            {"mean and std, difference from the encoder's own": 0.1},
            "the encoder gets other pixels than it was trained with",
        ),
        ({"share of steps left out": 0.3, "steps left out": 60}, "steps are left out"),
        ({"peak learning rate over weights": 2.0}, "the learning rate is too high"),
        ({"loss has risen by": 3.0}, "the learning rate is too high"),
        ({"loss has risen by": 3.0, "peak learning rate over weights": 0.001}, "the loss rises"),
        ({"pretrained encoder has moved": 0.8}, "the pretrained encoder is overwritten"),
        (
            {"peak learning rate over weights": 2e-5, "training loss over the first": 0.99},
            "the learning rate is too low",
        ),
        ({"image tokens' variance between photos": 1e-9}, "the encoder sees no difference between photos"),
        ({"image tokens' variance between photos": 0.005}, "the encoder sees no difference between photos"),
        ({"cross-attention's share of the text": 0.0}, "cross-attention adds nothing"),
        ({"loss with another photo": 0.62}, "the photo makes no difference"),
        (
            {
                "captions that another photo suits clearly better": 0.2,
                "captions that their own photo suits clearly better": 0.6,
            },
            "many captions belong to other photos",
        ),
        ({"different ones among them": 0.01}, "one caption for all photos"),
        ({"captions over three times the usual length": 0.5}, "captions do not stop"),
        ({"captions that repeat three words": 0.5}, "captions repeat themselves"),
        ({"epochs in which validation loss rose": 3}, "overfitting"),
    ],
)
def test_findings(script, changes, name):
    """Each fault alone is named first, and nothing is found in a healthy run."""
    assert names(script, {}) == []
    assert names(script, changes)[0] == name


@pytest.mark.parametrize(
    ("constants", "name"),
    [(dict(label_smoothing=0.9), "label smoothing is too strong"), (dict(mlp_dropout=0.9), "dropout is too strong")],
)
def test_constants_that_hinder(script, constants, name):
    assert names(script, {}, **constants) == [name]


def test_what_follows_from_a_cause_is_not_reported(script):
    """An encoder that sees nothing also makes one caption for all photos, and the photo worth nothing."""
    changes = {
        "image tokens' variance between photos": 0.0,
        "loss with another photo": 0.62,
        "different ones among them": 0.01,
    }
    assert names(script, changes) == ["the encoder sees no difference between photos"]


def test_nothing_is_concluded_early(script):
    """Nor from what was not measured."""
    changes = {"steps": 50, "epochs": 0.2, "loss with another photo": 0.62, "cross-attention's share of the text": 0.0}
    assert names(script, changes) == []
    assert find({}, script.ModelConfig(), script.TrainConfig()) == []


# --- measurements -----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (8, 7))
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = -100
    labels[::2, 4:] = -100
    return torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), ids, labels


def test_what_the_photo_is_worth(script, tiny_model, batch):
    """Losses of the first caption of each photo, with its own photo and with the next one."""
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    state = torch.get_rng_state()
    tiny_model.train()
    found = measurements.of_model(tiny_model, batch)
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    tiny_model.eval()
    images, ids, labels = batch[0], batch[1][::2], batch[2][::2]
    assert found["loss with the own photo"] == pytest.approx(tiny_model(images, ids, labels).item(), rel=1e-5)
    assert found["loss with another photo"] == pytest.approx(
        tiny_model(images.roll(1, 0), ids, labels).item(), rel=1e-5
    )
    worth = found["loss with another photo"] - found["loss with the own photo"]
    assert found["worth of the photo"] == pytest.approx(worth, abs=1e-5)
    first = labels.clone()
    first[:, 1:] = -100
    assert found["loss of the first word"] == pytest.approx(tiny_model(images, ids, first).item(), rel=1e-5)
    assert 0 < found["image tokens' variance between photos"] < 1.5
    tiny_model.config.unk_token_id = int(labels[0, 0])  # is never written, but may be a label
    assert measurements.of_model(tiny_model, batch) == found
    assert found["cross-attention's share of the text"] > 1e-2
    assert 0 < found["evenness of cross-attention"] <= 1
    assert measurements.of_model(tiny_model, (images[:1], ids[:1], labels[:1])) == {}  # there is no other photo


def test_a_constant_encoder_and_silent_cross_attention(tiny_model, batch):
    images = batch[0][:1].expand(4, -1, -1, -1)
    assert measurements.of_model(tiny_model, (images, *batch[1:]))["image tokens' variance between photos"] < 1e-9
    for block in tiny_model.gpt.trf_blocks:
        torch.nn.init.zeros_(block.cross_attn.c_proj.weight)
        torch.nn.init.zeros_(block.cross_attn.c_proj.bias)
    found = measurements.of_model(tiny_model, batch)
    assert found["cross-attention's share of the text"] == 0
    assert found["loss with another photo"] == pytest.approx(found["loss with the own photo"])


def test_captions_and_photos_of_a_dataset(script, bpe, dls, flickr):
    training, validation = (loader.dataset for loader in dls)
    found = measurements.of_captions(training)
    assert found["captions cut off"] == 0 and found["unknown words"] == 0
    assert found["photos with the commonest caption"] == 1  # the test photos share their two captions
    training.max_length = 5
    assert measurements.of_captions(training)["captions cut off"] == 1
    assert measurements.of_photos(training.images, validation.images) == {"validation photos also in training": 0}
    copied = flickr / "copy.jpg"
    shutil.copy(validation.images[0], copied)
    share = measurements.of_photos([*training.images, str(copied)], list(validation.captions_of))
    assert share == {"validation photos also in training": 1 / len(validation.captions_of)}


def test_tokens_and_pixels_of_a_batch(script, bpe, dls, tiny_model):
    images, ids, labels = next(iter(dls[0]))
    found = measurements.of_batch((images, ids, labels), tiny_model, bpe)
    assert found["captions that begin with BOS"] == found["captions whose end is a target"] == 1
    assert abs(found["mean of the model's input"]) < 1 and 0.1 < found["its standard deviation"] < 2
    no_end = labels.masked_fill(labels == bpe.eos_token_id, -100)
    found = measurements.of_batch((images.float(), ids[:, 1:], no_end[:, 1:]), tiny_model, bpe)
    assert found["captions that begin with BOS"] == found["captions whose end is a target"] == 0
    assert found["mean of the model's input"] > 50


def test_movement_and_gradients(tiny_model, batch):
    start = measurements.weights_of(tiny_model)
    assert all(moved == 0 < size for size, moved in measurements.movement(start, tiny_model).values())
    with torch.no_grad():
        for parameter in tiny_model.encoder.parameters():
            parameter *= 1.5
    assert measurements.movement(start, tiny_model)["encoder"][1] == pytest.approx(1 / 3)
    tiny_model(*batch).backward()
    norms = measurements.of_gradients(tiny_model)
    whole = torch.stack([p.grad.norm() for p in tiny_model.parameters() if p.grad is not None]).norm().item()
    assert math.hypot(*norms.values()) == pytest.approx(whole, rel=1e-5)


def test_captions_that_were_written():
    true = [["a dog runs"], ["a cat sits"], ["a man walks", "a man"]]
    written = ["a dog", "a dog", "a man is a man is a man is a man is"]
    found = measurements.of_written(written, true)
    assert found["different ones among them"] == pytest.approx(2 / 3)
    assert found["captions that repeat three words"] == found["captions over three times the usual length"] == 1 / 3
    assert measurements.of_written([], []) == {}


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_found(script, tiny_config, tiny_train_config, dls, capsys):
    """A warning for each finding once, the table at the end and in report.html."""
    tiny_config.label_smoothing, tiny_train_config.epochs = 0.9, 2
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    trainer.run_training()
    trainer.log.finish(trainer.model)
    said = capsys.readouterr().out
    assert said.count("WARNING: label smoothing is too strong: label_smoothing is 0.9") == 1
    assert "100%  captions that begin with BOS" in said
    page = (trainer.model_path / "report.html").read_text(encoding="utf-8")
    assert "<b>label smoothing is too strong</b>" in page and "evenness of cross-attention" in page


def test_a_finding_is_said_again_when_it_comes_back(script, tiny_model, capsys):
    diagnosis = Diagnosis(script.TrainConfig())
    diagnosis.model = SimpleNamespace(config=script.ModelConfig())
    for share in (0.5, 0.6, 0.0, 0.5):
        diagnosis.measured = HEALTHY | {"unknown words": share}
        diagnosis.report()
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["WARNING", "no longer found", "WARNING"]


def test_looking_changes_nothing(script, tiny_config, tiny_train_config, dls, monkeypatch):
    """The same weights with and without diagnosis, dropout included."""
    weights = []
    tiny_config.mlp_dropout = 0.3
    for silent in (False, True):
        if silent:
            for name in ("begin", "step", "epoch"):
                monkeypatch.setattr(Diagnosis, name, lambda *args: None)
        torch.manual_seed(0)
        trainer = script.Trainer(tiny_config, tiny_train_config, dls)
        trainer.run_training()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
