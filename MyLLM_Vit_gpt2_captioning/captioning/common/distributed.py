"""Several processes that train one model, started by torchrun: which one this is, and what they do together.

Each has a copy of the model, takes its share of every batch, and after the backward pass has the mean of all gradients
(DistributedDataParallel: Li et al. 2020). Without torchrun there is one process, and nothing here does anything.
"""

import os
import sys
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn


def rank_and_size():
    """-> (number of this process, how many there are); (0, 1) where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def only_first_speaks():
    """What is printed is printed by the first process; errors by all."""
    if rank_and_size()[0] > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as it runs)


class Team:
    """The processes together. `rank`: number of this one; `size`: how many; `first`: this is the one that writes;
    `device`: that of this process; `restarted`: torchrun has started them again because one failed."""

    def __init__(self, device):
        """`device`: as the user named it; of several GPUs each process takes its own. Joins the others (NCCL on GPUs,
        gloo elsewhere) and raises ValueError when the machine has too few GPUs."""
        self.rank, self.size = rank_and_size()
        self.first, self.device = self.rank == 0, torch.device(device)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.restarted = restarts > 0
        if self.size == 1:
            return
        if self.device.type == "cuda":
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= there:
                raise ValueError(
                    f"{there} GPUs are here: start torchrun with --nproc-per-node {there}, or --device cpu"
                )
            self.device = torch.device("cuda", place)
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not torch.distributed.is_initialized():
            if self.restarted and os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store may still hold the addresses of the processes that failed (PyTorch 2.15). Hosts count
                # restarts differently, so this is for one host; with more, see recipes/slurm.sh.
                store, rank, size = next(torch.distributed.rendezvous("env://"))
                store = torch.distributed.PrefixStore(f"restart {restarts}", store)
                torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
            else:
                torch.distributed.init_process_group(backend)
        self.restarted = self.sum(self.restarted)[0] > 0  # on any host

    def sum(self, *numbers):
        """Numbers of this process -> list of their sums over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, flags):
        """A bool tensor on the CPU -> where it is True in any process."""
        if self.size == 1:
            return flags
        count = flags.to(self.device, torch.int32)
        torch.distributed.all_reduce(count)
        return count.cpu() > 0

    def interleave(self, part):
        """Each process' list of what it made of `items[rank::size]` -> the list for all items, in their order."""
        if self.size == 1:
            return part
        parts = [None] * self.size
        torch.distributed.all_gather_object(parts, part)
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def wait(self):
        """Until all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def share(self, model):
        """-> `run(function, *args)`: calls a function that makes a loss of `model`, whose backward pass then gives the
        mean of all processes' gradients. To be made anew when other parameters train."""
        if self.size == 1:
            return _call
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(_Calls(model), device_ids, gradient_as_bucket_view=True)

    def own_random_numbers(self, seed, position):
        """Let each process but the first drop out other values than the first: a generator from (seed, rank, epoch,
        batch), so that a run that goes on there draws the same."""
        if not self.first:
            words = [seed, self.rank, position["epoch"] + 1, position["batches"]]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1)

    def leave(self):
        """Part from the others: what follows is done by each process alone."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def without_sync(run, last):
    """Around a forward and a backward pass: gradients stay with their process, unless it is the `last` of a step."""
    return run.no_sync() if not last and hasattr(run, "no_sync") else nullcontext()


def _call(function, *args):
    return function(*args)


class _Calls(nn.Module):
    """A model for DistributedDataParallel, which wants to see every forward pass, whatever makes the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)
