"""The DataLoader of everything here that loads photos: in training, for the token cache, for photo store and shards."""

import atexit
import signal
import threading
import weakref

import torch
import torch.utils.data

from captioning.common.stopping import leave_signals_to_the_main_process

_running = weakref.WeakSet()  # iterators with worker processes


@atexit.register
def end_workers():
    """End all workers of this process; the next epoch of a loader starts new ones. At the end of a run, since garbage
    collection first closes the queue on which workers are told, and then waits 5 seconds for each."""
    for batches in list(_running):
        batches.ended = True
        batches._shutdown_workers()


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose workers leave signals to the main process, and whose random numbers are its own: how often
    workers start must not shift those of the model. Raises ChildProcessError when a worker was killed."""

    def __init__(self, dataset, *args, **options):
        options |= dict(generator=torch.Generator(), worker_init_fn=leave_signals_to_the_main_process)
        super().__init__(dataset, *args, **options)

    def __iter__(self):
        if getattr(self._iterator, "_shutdown", False):  # of persistent workers, which were ended
            self._iterator = None
        batches = _without_sigchld_handler(super().__iter__)
        if self.num_workers:
            _running.add(batches)
            for worker in batches._workers:  # those that were not told get a SIGTERM, which they leave alone
                worker._popen.terminate = worker._popen.kill
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                if getattr(batches, "ended", False):
                    raise RuntimeError("a run ended, and with it the processes that were loading photos here") from None
                return
            except (OSError, ValueError) as error:
                if not str(error).startswith("Caught "):
                    raise
                # Of a worker: torch puts the worker's traceback around what it says, which is one line.
                said = str(error).rstrip().splitlines()[-1].partition(": ")[2]
                raise type(error)(said) from None
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise ChildProcessError(
                    f"a process that loads photos was killed, most likely because memory was full ({error}): give "
                    "fewer of them with --num_workers N"
                ) from None
            yield batch


def _without_sigchld_handler(make_iterator):
    """`make_iterator()`, without the handler that torch then sets: it raises the end of a worker wherever this process
    is, which may be the middle of an optimizer step. Whoever waits for the worker's batch is told as well."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return make_iterator()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return make_iterator()
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
