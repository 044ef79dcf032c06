"""Several processes train as one would: on the CPU, started by torchrun as users start it."""

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from captioning.common.distributed import ProcessGroup
from captioning.data import shapes
from captioning.data.batching import CaptionBatchSampler
from captioning.training.run_state import NEWEST, read_state
from conftest import TINY_ENCODER, script_module
from helpers import distributed_case

CASE = Path(distributed_case.__file__)
OPTIONS = [
    "--recipe", "shapes", "--shapes_scenes", "257", "--captions_per_image", "1", "--epochs", "2", "--batch_size", "5",
    "--accumulate", "2", "--embed_dim", "32", "--num_heads", "2", "--encoder_options", json.dumps(TINY_ENCODER),
    "--emb_dropout", "0", "--attention_dropout", "0", "--mlp_dropout", "0", "--residual_dropout", "0",
    "--score_images", "5", "--demo_images", "2", "--device", "cpu", "--precision", "float32",
]  # fmt: skip


def sampled(ranks, shares=None, groups=23, K=2, **options):
    """The epoch's batches of each process."""
    images = [image for image in range(groups) for _ in range(K)]
    batches = []
    for rank in range(ranks):
        sampler = CaptionBatchSampler(images, 4, K, seed=3, lengths=[i % 7 for i in images], window=2, **options)
        sampler.set_rank(rank, ranks, shares)
        sampler.set_epoch(1)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler)
    return batches


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_batches_of_one(ranks):
    [whole] = sampled(1, shares=ranks)
    for batch, *parts in zip(whole, *sampled(ranks), strict=True):
        assert sorted(batch) == sorted(row for part in parts for row in part)
        assert all(len(part) > 0 for part in parts)
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 2  # a group of two captions
    assert sorted(row for batch in whole for row in batch) == list(range(46))


def test_a_last_batch_too_small_for_all_joins_the_one_before():
    parts = sampled(3, groups=13)  # 6 groups a batch: 6, 6 and 1
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sum(len(batch) for part in parts for batch in part) == 26
    with pytest.raises(ValueError, match="2 photos cannot be shared by 3 processes"):
        sampled(3, groups=2)


# --- torchrun ---------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def finished(process, code=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def step_losses(path):
    totals = [*json.loads(path.read_text())]
    return [
        (total - before) / (count - seen)
        for (before, seen), (total, count) in pairwise(totals)
        if count > seen  # else an epoch has begun
    ]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """A run of 2 epochs by two torchrun agents with a process each -> (folder of the run, what both printed)."""
    folder = tmp_path_factory.mktemp("two_hosts")
    shapes.write_dataset(folder / "shapes", 257)  # the last batch of 10 is one of 7, shared as 4 and 3
    address = f"127.0.0.1:{free_port()}"
    agents = []
    for host in range(2):
        place = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", address]
        paths = ["--data_dir", folder / "shapes", "--model_path", folder / "run"]
        agents.append(torchrun(*place, CASE, folder / f"losses{host}.json", "0", "0", *OPTIONS, *paths))
    return folder, [finished(agent) for agent in agents]


@pytest.fixture(scope="module")
def one_process(two_hosts, tmp_path_factory):
    """The same run by one process with batches of twice the size."""
    folder = tmp_path_factory.mktemp("one_process")
    argv = [*OPTIONS, "--batch_size", "10", "--data_dir", two_hosts[0] / "shapes", "--model_path", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script_module, "build_trainer", script_module.build_trainer)  # given back afterwards
        distributed_case.main(folder / "losses.json", "0", "0", *map(str, argv))
    return folder


def assert_same_run(ours, theirs):
    """Metrics and weights of two runs are the same but for rounding."""
    ours_metrics, theirs_metrics = (pd.read_csv(folder / "metrics.csv") for folder in (ours, theirs))
    assert ours_metrics["epoch"].tolist() == theirs_metrics["epoch"].tolist() == [1, 2]
    for column in ("train_loss", "valid_loss", "lr", "CIDEr"):
        np.testing.assert_allclose(ours_metrics[column], theirs_metrics[column], atol=1e-4)
    ours, theirs = (load_file(folder / "captioner.safetensors") for folder in (ours, theirs))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def test_two_hosts_train_as_one_process_with_twice_the_batch(two_hosts, one_process):
    folder, printed = two_hosts
    [losses] = [step_losses(path) for path in folder.glob("losses*.json")]  # only the first process writes
    alone = step_losses(one_process / "losses.json")
    assert len(losses) >= 50
    np.testing.assert_allclose(losses[:50], alone[:50], atol=1e-5)
    assert_same_run(folder / "run", one_process / "run")
    # The captions in samples.md are the same, and one process has spoken for both.
    assert (folder / "run" / "samples.md").read_text() == (one_process / "run" / "samples.md").read_text()
    assert sorted("checkpoint and plots are in" in text for text in printed) == [False, True]
    assert (folder / "run" / "demo.png").stat().st_size > 0


@pytest.fixture(scope="module")
def interrupted(two_hosts, tmp_path_factory):
    """That run, one of whose two processes is killed; started again, it is asked to stop -> (its folder, its words)."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    run = torchrun(
        "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", CASE, folder.parent / "losses.json", "30", "8",
        *OPTIONS, "--data_dir", two_hosts[0] / "shapes", "--model_path", folder, "--save_minutes", "0",
    )  # fmt: skip
    return folder, finished(run)


def test_a_killed_process_is_started_again(interrupted):
    """That it then trains as if nothing had happened is seen below, at the end of the run."""
    folder, out = interrupted
    assert f"resuming {folder / 'last' / NEWEST}: epoch 2, batch" in out, out


def test_a_run_goes_on_with_another_number_of_processes(two_hosts, interrupted, capsys):
    folder, out = interrupted
    assert "stopped by a signal to another process" in out
    _, state = read_state(folder / "last")
    assert state["position"]["batches"] > 0
    options = [*OPTIONS, "--data_dir", two_hosts[0] / "shapes", "--model_path", folder, "--resume", "auto"]
    script_module.main(list(map(str, options)))
    assert "the run had 2 processes, now it has 1: a batch of them all stays 10 captions" in capsys.readouterr().out
    assert_same_run(folder, two_hosts[0] / "run")


# --- one process, and the device and backend of a process -------------------------------------------------------------


@pytest.fixture
def started_by_torchrun(monkeypatch):
    """This process is as torchrun starts the only one."""
    names = dict(TORCHELASTIC_RUN_ID="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    for name, value in (names | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_one_process_of_torchrun_goes_the_way_of_several(
    script, tiny_config, tiny_train_config, dls, started_by_torchrun
):
    """It goes the way of several, through DistributedDataParallel, to the steps of a process without torchrun."""
    trainers, sums = {}, {}
    for name in ("torchrun", "alone"):
        torch.manual_seed(0)
        trainer = trainers[name] = script.Trainer(tiny_config, tiny_train_config, dls)
        batches = list(trainer.train_dl)
        sums[name] = [trainer.train_step([batch, batch]) for batch in batches]
        assert isinstance(trainer.ddp, torch.nn.parallel.DistributedDataParallel) == (name == "torchrun")
        trainer.processes.destroy()
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
    np.testing.assert_allclose(sums["torchrun"], sums["alone"], rtol=1e-6)
    for a, b in zip(*(trainer.model.parameters() for trainer in trainers.values()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "backend", "local_rank", "expected"),
    [
        ("cuda", None, 0, ("cuda:0", "cpu:gloo,cuda:nccl", "cuda:0")),
        ("cuda:1", None, 0, ("cuda:0", "cpu:gloo,cuda:nccl", "cuda:0")),  # each process has the GPU of its rank
        ("cuda", "gloo", 1, ("cuda:0", "gloo", None)),  # two share the only GPU
        ("cpu", None, 1, ("cpu", "gloo", None)),
    ],
)
def test_device_and_backend_of_a_process(monkeypatch, started_by_torchrun, device, backend, local_rank, expected):
    begun, current = [], []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **options: begun.append((name, options)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor)
    processes = ProcessGroup(device, backend)
    [(name, options)] = begun
    found = options.get("device_id")
    assert (str(processes.device), name, None if found is None else str(found)) == expected
    assert current == ([processes.device] if processes.device.type == "cuda" else [])


def test_more_processes_than_gpus(monkeypatch, started_by_torchrun):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"more processes than there are GPUs \(1\): give --nproc-per-node 1"):
        ProcessGroup("cuda")


def test_a_second_gpu_is_the_current_one(monkeypatch):
    """What names no device, as pinned memory does not, uses the one that the run was given."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert ProcessGroup("cuda:1").device == torch.device("cuda:1")
    ProcessGroup("cuda"), ProcessGroup("cpu")
    assert current == [torch.device("cuda:1")]
