"""A training step waits for the device once, and torch.compile makes few graphs: what makes a GPU wait or compile again
is counted on a CPU.

`FakeTensorMode` runs a step on tensors that say they are on a GPU and hold no values. Whatever needs a value there (a
number, the places of true elements, a tensor from another device) is an error; `tolist` is the one that may.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from captioning.model import stages

# What copies a number or a shape that depends on values to the host, or a new tensor from it.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh")


class Waits(TorchDispatchMode):
    """Counts the operations that would make a GPU wait."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_index")) and any(
            getattr(tensor, "dtype", None) == torch.bool for tensor in torch.utils._pytree.tree_leaves(args[1:])
        )
        if name in WAITING or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """The number of elements that each `tolist` has read."""
    read, real = [], torch.Tensor.tolist

    def tolist(tensor):
        read.append(tensor.numel())
        return [1.0] * tensor.numel() if isinstance(tensor, FakeTensor) else real(tensor)

    for tensors in (torch.Tensor, FakeTensor):
        monkeypatch.setattr(tensors, "tolist", tolist)
    return read


def on_host(function):
    """`function`, which works on the loader's batch in the CPU's memory: nothing there is counted."""

    def without_modes(*args):
        with _disable_current_modes():
            return function(*args)

    return without_modes


@pytest.fixture
def make_trainer(script, tiny_config, tiny_train_config, dls, monkeypatch):
    def make(**constants):
        for key, value in constants.items():
            setattr(tiny_train_config, key, value)
        tiny_config.label_smoothing = 0.1
        trainer = script.Trainer(tiny_config, tiny_train_config, dls)
        for name in ("count", "to_device"):
            monkeypatch.setattr(trainer.objective, name, on_host(getattr(trainer.objective, name)))
        return trainer

    return make


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_wait_in_a_step(make_trainer, reads, accumulate):
    trainer = make_trainer(accumulate=accumulate, ema_decay=0.9)
    batches = [next(iter(trainer.train_dl)) for _ in range(accumulate)]
    trainer.train_step(batches)  # the first one also makes the optimizer's moments
    reads.clear()
    with Waits() as waits:
        total, count = trainer.train_step(batches)
    assert count > 0 and total > 0
    assert waits.seen == {}
    assert reads == [accumulate + 1]  # the losses and the norm of the gradient


def test_what_is_counted():
    x = torch.arange(4.0)
    with Waits() as waits:
        x.sum().item(), x[x > 1], (x > 1).nonzero(), torch.tensor([1.0]), x[torch.arange(2)]
    assert waits.seen["_local_scalar_dense"] == waits.seen["index"] == waits.seen["lift_fresh"] == 1
    assert waits.seen["nonzero"] >= 1


def test_a_step_on_a_gpu_without_values(make_trainer, reads, monkeypatch):
    """Forward pass under autocast, clipping, optimizer and schedule; autograd itself needs a real device."""
    mode = FakeTensorMode()

    def fake(tensor):
        with _disable_current_modes():
            tensor = mode.from_tensor(tensor.detach())
        with mode:
            return tensor.to("cuda")

    def backward(loss):
        assert loss.device.type == "cuda"
        for parameter in trainer.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    trainer = make_trainer(accumulate=2)
    batches = [next(iter(trainer.train_dl)) for _ in range(2)]
    for module in trainer.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        module._buffers = {name: fake(buffer) for name, buffer in module._buffers.items()}
    to_device = trainer.objective.to_device
    monkeypatch.setattr(
        trainer.objective, "to_device", lambda batch, _: [fake(part) for part in to_device(batch, torch.device("cpu"))]
    )
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    trainer.device = torch.device("cuda")
    with mode:
        trainer.autocast = partial(torch.autocast, "cuda", torch.bfloat16)
        trainer.start_schedule(1e-3, 10)
        total, count = trainer.train_step(batches)
        assert total == count > 0  # `reads` says 1 for every value
        assert reads == [3]
        for value in (torch.ones(2, device="cuda") > 0, torch.ones((), device="cuda")):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                value.nonzero() if value.dim() else value.item()
    for parameter in trainer.model.parameters():
        assert trainer.optimizer.state[parameter]["exp_avg"].device.type == "cuda"


def test_graphs_of_torch_compile(script, tiny_config, dls, monkeypatch):
    """Captions of any length, a shorter last batch and three stages: no break before the loss, five graphs."""
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"  # what stages go by
    monkeypatch.setattr(script.VisionGPT2Model, "from_pretrained", classmethod(lambda cls, config: cls(config)))
    graphs, compile_model = [], torch.compile

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend=count_graphs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = script.TrainConfig(compile=True, device="cpu", model_path=script.OUTPUT_DIR, num_workers=0)
    trainer = script.Trainer(tiny_config, config, dls)
    generator = torch.Generator().manual_seed(0)
    made = []
    for stage in ("new layers", "GPT-2 blocks", "everything"):
        stages.train_only(trainer.model, stages.trainable_names(stage, trainer.model))
        for images, length in [(4, 9), (4, 11), (4, 14), (4, 8), (2, 12), (4, 9)]:
            ids = torch.randint(40, (3 * images, length), generator=generator)
            labels = ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
            pixels = torch.randint(256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
            assert trainer.train_step([(pixels, ids, labels)])[1] > 0
        made.append(len(graphs))
    assert made == [3, 4, 5]  # the first for fixed shapes, then for any length, then for any batch; one more a stage
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("chunked_cross_entropy" in reason for reason in breaks), breaks
    torch._dynamo.reset()
