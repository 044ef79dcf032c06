"""CUDA graphs: work that a GPU repeats without waiting for Python.

A decoding step is hundreds of kernels so small that each is over before Python has asked for the next. A graph records
them once and then starts them all with a single call.
"""

import threading
import warnings
from contextlib import nullcontext
from functools import cache

import torch

_recording = threading.Lock()


class CudaGraphs:
    """Functions that are run once, recorded the second time and replayed from then on.

    `run(key, function)`: a function without arguments or result, which reads and writes tensors that stay where they
    are for as long as this object is used. The recording repeats the same kernels on the same addresses: what the
    function asks of Python, shapes and numbers included, must follow from `key`, and it may not wait for the GPU.
    """

    def __init__(self, device):
        self.device = device
        self.replays = {}  # {key: None after the first run, then what replays the recording}
        self.records = True
        self.pool = None

    def run(self, key, function):
        """Do what `function` does. It is run itself when `key` is new, which also loads its kernels: a recording may
        not. A function that cannot be recorded is run itself every time, with a warning."""
        if self.records and key in self.replays and self.replays[key] is None:
            try:
                self.replays[key] = self.record(function)
            except RuntimeError as error:
                self.records = False
                cause = error.__context__ or error  # the end of a recording only says that something went wrong in it
                warnings.warn(f"decoding goes on without CUDA graphs, more slowly: {cause}", stacklevel=2)
        replay = self.replays.setdefault(key, None)
        (replay or function)()

    def record(self, function):
        """-> a function that repeats what `function` asks of the GPU; nothing is done now.

        The method of PyTorch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). All
        recordings share one pool of memory: what they leave there is needed by none of the others.
        """
        # One at a time, and whatever happens the stream of before is the current one again.
        with _recording, torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Data loaders pin memory in a thread of their own, which would break a recording that minds all threads.
            with (
                torch.cuda.graph(graph, self.pool, _stream(self.device), capture_error_mode="thread_local"),
                _autocast_without_cache(self.device.type),
            ):
                function()
        return graph.replay


@cache
def _stream(device):
    """Where all recordings of a device are made: cuBLAS keeps memory for each stream it has ever worked on."""
    return torch.cuda.Stream(device)


def _autocast_without_cache(device):
    """Autocast as it is, but without keeping weights that it has cast: they would lie in the recording's memory."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
