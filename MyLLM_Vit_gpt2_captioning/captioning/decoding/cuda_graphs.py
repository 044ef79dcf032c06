"""CUDA graphs: capture the kernels of a function once, then replay them without waiting for Python.

A decoding step is hundreds of kernels so small that each is over before Python has launched the next. A graph launches
them all with a single call.
"""

import threading
import warnings
from contextlib import nullcontext
from functools import cache

import torch

MIN_FREE_SHARE = 0.125  # of a GPU's memory; with less, what is cached is freed before a capture

_capture_lock = threading.Lock()


class CudaGraphs:
    """Functions that run eagerly the first time, are captured the second time and replayed from then on.

    `run(key, function)`: a function without arguments or result, which reads and writes tensors that keep their
    addresses as long as this object is used. A graph repeats the same kernels on the same addresses, so everything that
    the function does in Python, with shapes and numbers, must depend on `key` only, and it may not synchronise with the
    GPU.
    """

    def __init__(self, device):
        self.device = device
        self.replays = {}  # {key: None after the eager run, then the function that replays the graph}
        self.enabled = True
        self.pool = None

    def run(self, key, function):
        """Do what `function` does.

        The first run of a `key` is eager, which also loads the kernels: that is not allowed during capture. A function
        that cannot be captured stays eager, with a warning.
        """
        if self.enabled and key in self.replays and self.replays[key] is None:
            try:
                self.replays[key] = self.capture(function)
            except RuntimeError as error:
                self.enabled = False
                cause = error.__context__ or error  # the end of a capture only says that something in it failed
                warnings.warn(f"decoding goes on without CUDA graphs, more slowly: {cause}", stacklevel=2)
        replay = self.replays.setdefault(key, None)
        (replay or function)()

    def capture(self, function):
        """-> a function that replays the kernels of `function`; nothing is computed during the capture.

        The method of PyTorch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). All
        graphs share one memory pool: none of them needs what another has left there.
        """
        # One capture at a time; whatever happens, the current stream is restored.
        with _capture_lock, torch.cuda.device(self.device), torch.cuda.stream(_capture_stream(self.device)):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            # A capture cannot use memory that the allocator keeps for other work. `torch.cuda.graph` waits for the
            # device and frees that before every capture, and a decoder has up to a hundred.
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total * MIN_FREE_SHARE:
                torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # "thread_local", because data loaders pin memory in a thread of their own, which would invalidate a capture
            # that watches all threads.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                with _autocast_without_cache(self.device.type):
                    function()
            finally:
                graph.capture_end()
        return graph.replay


@cache
def _capture_stream(device):
    """The one stream for all captures of a device: cuBLAS keeps a workspace for every stream it has ever run on."""
    return torch.cuda.Stream(device)


def _autocast_without_cache(device):
    """The current autocast mode, but without its cache of cast weights, which would lie in the graph's memory pool."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
