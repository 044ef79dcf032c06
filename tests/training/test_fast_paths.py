"""What makes training fast changes no number: chunked loss, length-sorted batches, frozen parts without a graph,
accumulation, gradient checkpointing, torch.compile."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from captioning.data.batching import grouped
from captioning.model.loss import chunked_cross_entropy, label_places
from conftest import TINY_ENCODER

UNDETERMINED = ("qkv.bias", ".k.bias")  # a key's bias has gradient zero: AdamW makes steps of the rounding
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


# --- chunked loss -----------------------------------------------------------------------------------------------------


def head_inputs(tokens=23, channels=8, vocab=50):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, channels, requires_grad=True)
    return hidden, torch.randn(vocab, channels, requires_grad=True), torch.randint(vocab, (tokens,))


@pytest.mark.parametrize("rows", [1, 7, 23, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("multiple", [1, 64])
def test_chunked_loss(rows, smoothing, multiple):
    """Also with a head that is padded from 50 rows to 64."""
    hidden, weight, targets = head_inputs()
    plain = F.cross_entropy(hidden @ weight.t(), targets, label_smoothing=smoothing)
    chunked = chunked_cross_entropy(hidden, weight, targets, smoothing, 50 * rows, multiple)
    close(chunked, plain)
    expected = torch.autograd.grad(plain * 3, (hidden, weight))
    for got, grad in zip(torch.autograd.grad(chunked * 3, (hidden, weight)), expected, strict=True):
        close(got, grad)


def test_chunked_loss_computes_what_is_asked_for():
    """No gradient for a frozen head, none at all in validation, and never more scores than a chunk at a time."""
    hidden, weight, targets = head_inputs()
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    loss = chunked_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    close(hidden.grad, torch.autograd.grad(plain, hidden)[0])
    assert weight.grad is None
    shapes, linear = [], F.linear

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.append(tuple(out.shape) if func is linear else ())
            return out

    with torch.inference_mode(), Watch():
        close(chunked_cross_entropy(hidden, weight, targets, chunk=200), plain.detach())
    assert {shape for shape in shapes if shape} == {(4, 50), (3, 50)}


def test_chunked_loss_under_autocast():
    """As near to float32 as the plain loss under autocast is; the loss and the weights' gradient stay float32."""
    hidden, weight, targets = head_inputs()
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk=250, multiple=64)
    assert loss.dtype == torch.float32
    for got, grad in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, grad, atol=5e-3, rtol=5e-2)


# --- a training step --------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(tiny_config):
    """Two images with three captions each, of different lengths."""
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (6, 7))
    labels = torch.roll(ids, -1, dims=1)
    for row, length in enumerate((3, 6, 4, 2, 5, 6)):
        labels[row, length:] = -100
    return torch.randn(2, 3, 32, 32), ids, labels


def gradients(model, images, ids, labels):
    model.zero_grad(set_to_none=True)
    loss = model(images, ids, labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        close(got[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_in_chunks(tiny_model, batch, monkeypatch):
    whole = gradients(tiny_model, *batch)
    monkeypatch.setattr(tiny_model, "loss", lambda *inputs: chunked_cross_entropy(*inputs, chunk=5 * len(inputs[1])))
    assert_same(gradients(tiny_model, *batch), whole)


def test_a_padded_head_changes_nothing(tiny_model, batch, monkeypatch):
    """Loss and gradients to 1e-6, and the checkpoint: the rows that pad the head are no parameters."""
    tiny_model.double()  # so that another order of sums makes no difference of its own
    batch = batch[0].double(), *batch[1:]
    plain, names = gradients(tiny_model, *batch), tiny_model.state_dict().keys()
    monkeypatch.setattr(tiny_model, "loss", partial(chunked_cross_entropy, multiple=1024))
    loss, padded = gradients(tiny_model, *batch)
    assert loss == pytest.approx(plain[0].item(), rel=1e-6)
    whole, padded_whole = (torch.cat([grads[name].flatten() for name in plain[1]]) for grads in (plain[1], padded))
    assert (padded_whole - whole).norm() <= 1e-6 * whole.norm()
    assert tiny_model.state_dict().keys() == names
    assert tiny_model.gpt.tok_emb.weight.grad.shape == tiny_model.gpt.tok_emb.weight.shape


def test_places_of_labels(tiny_model, batch):
    """Found by the model or handed to it: the same loss."""
    images, ids, labels = batch
    places = label_places(labels)
    assert torch.equal(labels.flatten()[places], labels[labels != -100])
    close(tiny_model(images, ids, labels, places), tiny_model(images, ids, labels))


def test_padding_changes_nothing(tiny_model, batch):
    """A caption's loss is the same in a batch of its length and among longer ones."""
    images, ids, labels = batch
    padded = gradients(tiny_model, images, F.pad(ids, (0, 9)), F.pad(labels, (0, 9), value=-100))
    assert_same(padded, gradients(tiny_model, images, ids, labels))


@pytest.mark.parametrize("coupling", ["stepped", "final"])
def test_gradient_checkpointing(script, tiny_config, batch, coupling):
    """Same numbers, dropout included, though blocks run again."""
    tiny_config.coupling = coupling
    tiny_config.mlp_dropout = tiny_config.residual_dropout = tiny_config.attention_dropout = 0.3
    model = script.VisionGPT2Model(tiny_config).train()
    torch.manual_seed(2)
    plain = gradients(model, *batch)
    runs = []
    for block in (*model.gpt.trf_blocks, *model.encoder.vit.blocks):
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    model.checkpoint_gradients()
    torch.manual_seed(2)
    assert_same(gradients(model, *batch), plain)
    blocks = len(model.gpt.trf_blocks) + len(model.encoder.vit.blocks)
    assert len(runs) == 2 * blocks
    model.eval()
    with torch.inference_mode():
        model(*batch)
    assert len(runs) == 3 * blocks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled(script, tiny_config, tiny_train_config, dls):
    """An epoch of batches of several lengths. One block of each kind, as every kernel is a run of the C++ compiler."""
    tiny_config.depth, tiny_config.encoder_options = 1, TINY_ENCODER | dict(depth=1)
    losses, weights = [], []
    for compiled in (False, True):
        tiny_train_config.compile = compiled
        torch.manual_seed(0)
        trainer = script.Trainer(tiny_config, tiny_train_config, dls)
        assert (trainer.objective.model is trainer.model) != compiled
        losses.append((trainer.train_one_epoch(0), trainer.valid_one_epoch(0)))
        weights.append(trainer.model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights[0].items():
        if not name.endswith(UNDETERMINED):
            close(weights[1][name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("trainable", [0, 1])
@pytest.mark.parametrize("coupling", ["stepped", "final"])
def test_frozen_blocks_keep_no_activations(script, tiny_config, batch, trainable, coupling):
    """Nor is any graph built in front of the first block that trains."""
    tiny_config.coupling, tiny_config.trainable_stages = coupling, trainable
    tiny_config.encoder_weights = "pretrained"
    model = script.VisionGPT2Model(tiny_config).train()
    model.pretrained_layers_trainable(True)
    saved, outputs = [], []
    for block in model.encoder.vit.blocks:
        block.register_forward_hook(lambda _, inputs, out: outputs.append((out.requires_grad, len(saved))))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(*batch)
    blocks = len(model.encoder.vit.blocks)
    assert [grad for grad, _ in outputs] == [False] * (blocks - trainable) + [True] * trainable
    assert all(count == 0 for grad, count in outputs if not grad)
    assert len(saved) > 0


def test_grouped():
    assert list(grouped(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(grouped([], 2)) == []


def test_accumulated_batches_are_one_large_batch(script, tiny_config, tiny_train_config, bpe):
    """Batches of 4 by threes against batches of 12: the same steps, though batches have different numbers of labels."""
    df = script._load_flickr_dataframe(tiny_train_config.data_dir, tiny_train_config.image_dir)
    weights, losses, rates = [], [], []
    for batch_size, accumulate in ((12, 1), (4, 3)):
        tiny_train_config.batch_size, tiny_train_config.accumulate = batch_size, accumulate
        tiny_train_config.length_window = 1
        torch.manual_seed(0)
        trainer = script.Trainer(
            tiny_config, tiny_train_config, script.build_dataloaders(df, bpe, tiny_config, tiny_train_config)
        )
        for epoch in range(2):
            losses.append(trainer.train_one_epoch(epoch))
        rates.append((trainer.scheduler.last_epoch, trainer.scheduler.total_steps))
        weights.append(trainer.model.state_dict())
    assert rates[0] == rates[1]
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-5)
    for name, tensor in weights[0].items():
        if not name.endswith(UNDETERMINED):
            close(weights[1][name], tensor, msg=lambda text, name=name: f"{name}: {text}")
