"""Whole runs: the command line of a tiny one, one that is stopped in a chosen step, two that have to be the same."""

import json
import signal

import torch

from conftest import TINY_ENCODER

TINY = [
    "--embed_dim", "32", "--num_heads", "2", "--depth", "2", "--seq_len", "24", "--vocab_size", "300",
    "--tokenizer", "bpe", "--decoder_weights", "scratch", "--encoder_weights", "scratch",
    "--encoder", "vit_tiny_patch16_224", "--encoder_options", json.dumps(TINY_ENCODER),
    "--epochs", "2", "--batch_size", "4", "--captions_per_image", "2", "--device", "cpu", "--num_workers", "0",
    "--demo_images", "2",
]  # fmt: skip


def stop_after(trainer, steps, reason):
    """The run is stopped in its so-manieth step from now: `reason` is a signal, or an exception of the step itself."""
    step, count = trainer.train_step, 0

    def counted(batches):
        nonlocal count
        count += 1
        if count == steps and isinstance(reason, Exception):
            torch.rand(3)  # as dropout would, before whatever fails
            raise reason
        reported = step(batches)
        if count == steps:
            signal.raise_signal(reason)
        return reported

    trainer.train_step = counted


def change_loss(trainer, monkeypatch, change):
    """Training batches have the loss `change(loss)`, a tensor."""
    real = trainer.objective.loss

    def changed(batch):
        loss = change(real(batch)[0])
        return loss, loss.detach()

    monkeypatch.setattr(trainer.objective, "loss", changed)


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("captioner.safetensors", "metrics.csv", "samples.md")}


def assert_same_run(trainer, result, folder, whole):
    assert result == whole[0]
    assert files(folder) == whole[1]
    for name, tensor in whole[2].items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
