"""The process group: several processes, started by torchrun, that train one model (DistributedDataParallel, Li et al.
2020). Each has a copy of the model, takes its share of every batch, and after the backward pass has the mean of all
gradients. Without torchrun the world size is 1, and nothing here does anything; a single process that torchrun starts
goes the same way as several.
"""

import os
import sys
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn


def rank_and_world_size():
    """-> (rank of this process, number of processes); (0, 1) where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def silence_other_ranks():
    """Only rank 0 prints from now on; errors (stderr) are printed by all ranks."""
    if rank_and_world_size()[0] > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process runs)


class ProcessGroup:
    """`rank` of this process and `world_size`; `is_main`: this is rank 0, which writes files; `device` of this process;
    `distributed`: torchrun has started it; `restarted`: it has started the processes again because one failed."""

    def __init__(self, device, backend=None):
        """Initialise torch.distributed where torchrun has started this process, be it the only one. With processes on
        GPUs each uses cuda:LOCAL_RANK, whatever index `device` has.

        `backend`: None for NCCL between GPUs and gloo between CPUs. With "gloo" several processes may share a GPU, in
        turns: slow, but a way to test them on one. Raises ValueError when the machine has fewer GPUs than processes.
        """
        self.rank, self.world_size = rank_and_world_size()
        self.is_main, self.device = self.rank == 0, torch.device(device)
        self.distributed = "TORCHELASTIC_RUN_ID" in os.environ
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.restarted = restarts > 0
        if self.distributed and self.device.type == "cuda":
            local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= gpus and backend != "gloo":
                raise ValueError(
                    f"torchrun started more processes than there are GPUs ({gpus}): give --nproc-per-node {gpus}, or "
                    "--device cpu"
                )
            self.device = torch.device("cuda", local_rank % gpus)
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # also for what asks for no device: batches are pinned for this one
        if not self.distributed:
            return
        nccl = self.device.type == "cuda" and backend is None
        # Numbers that lie on the CPU are reduced there, by gloo: NCCL would have to wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        options = {"device_id": self.device} if nccl else {}  # the device of collectives without a tensor
        if not torch.distributed.is_initialized():
            if self.restarted and os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store may still hold the addresses of the processes that failed (PyTorch 2.15). Hosts count
                # restarts differently, so this is for one host; with more, see recipes/slurm.sh.
                store, rank, world_size = next(torch.distributed.rendezvous("env://"))
                store = torch.distributed.PrefixStore(f"restart {restarts}", store)
                options |= {"store": store, "rank": rank, "world_size": world_size}
            torch.distributed.init_process_group(backend, **options)
        self.restarted = self.all_reduce_sum(self.restarted)[0] > 0  # on any host

    def all_reduce_sum(self, *numbers):
        """Numbers of this process -> list of their sums over all processes. Does not wait for a GPU."""
        if not self.distributed:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def all_reduce_any(self, flags):
        """A bool tensor on the CPU -> where it is True in any process."""
        if not self.distributed:
            return flags
        count = flags.to(torch.int32)
        torch.distributed.all_reduce(count)
        return count > 0

    def all_gather(self, results):
        """The list that each process made from `items[rank::world_size]` -> the list for all items, in their order."""
        if not self.distributed:
            return results
        of_rank = [None] * self.world_size
        torch.distributed.all_gather_object(of_rank, results)
        gathered = [None] * sum(map(len, of_rank))
        for rank, part in enumerate(of_rank):
            gathered[rank :: self.world_size] = part
        return gathered

    def barrier(self):
        """Wait until all processes have come here."""
        if self.distributed:
            torch.distributed.barrier()

    def wrap(self, model):
        """-> `ddp(function, *args)`, which calls a function that computes a loss with `model`; the backward pass then
        averages the gradients of all processes. Wrap again when other parameters train: DDP registers its hooks once.
        """
        if not self.distributed:
            return _call
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(_AnyForward(model), device_ids, gradient_as_bucket_view=True)

    def seed_rank(self, seed, epoch, batches):
        """Seed torch's generator of every rank but 0 from (seed, rank, epoch, batches done), so that ranks drop out
        different values and a resumed run draws the same ones."""
        if not self.is_main:
            words = [seed, self.rank, epoch + 1, batches]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1)

    def destroy(self):
        """Leave the process group: each process goes on alone."""
        if self.distributed:
            torch.distributed.destroy_process_group()


def gradient_sync(ddp, enabled):
    """Around a forward and a backward pass: gradients are averaged over the processes where `enabled`, else only
    accumulated. `ddp`: from `ProcessGroup.wrap`."""
    return nullcontext() if enabled or not hasattr(ddp, "no_sync") else ddp.no_sync()


def _call(function, *args):
    return function(*args)


class _AnyForward(nn.Module):
    """A model whose `forward` runs any function: DistributedDataParallel has to see every forward pass, whichever
    function computes the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)
