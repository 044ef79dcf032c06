"""Ctrl-C, SIGTERM and SIGUSR1: asked to stop, a command goes on to the next point where all it has made is whole.

A signal handler runs between any two instructions. An exception raised there may end up in a garbage collector's
callback, where Python prints and forgets it, or in the middle of an optimizer step. So the handler only sets a flag,
and the loops read it: `with listening(...)` around the work, `stop_if_asked()` in every loop.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

from captioning.common.distributed import rank_and_world_size

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
ECHO = 0.1  # seconds in which a signal is the first one once more: timeout(1) sends it to a process and to its group


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop. What was made so far is kept; the message says how to go on."""


_signals = []  # names of the signals that came since somebody listens
_how_to_go_on = []  # of the work that is going on, the innermost last; empty: nobody listens


@contextmanager
def listening(how_to_go_on):
    """Inside, the first of `SIGNALS` makes `stop_if_asked` raise Stopped, with the words `how_to_go_on`; a second one
    ends the process at once. Outside of the main thread, which alone may set handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    if not _how_to_go_on:
        _signals.clear()
        before = {number: signal.signal(number, _ask) for number in SIGNALS}
    _how_to_go_on.append(how_to_go_on)
    try:
        yield
    finally:
        _how_to_go_on.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(number, frame):
    name = signal.Signals(number).name
    if not _signals:
        with suppress(OSError):  # not print, which may be what was interrupted
            os.write(2, f"\n{name}: stopping as soon as all is saved; once more ends at once\n".encode())
    _signals.append(name)
    if rank_and_world_size()[1] > 1:
        return  # all stop behind the same step; torchrun itself ends those that take too long
    for known in SIGNALS:
        signal.signal(known, signal.SIG_IGN)
    time.sleep(ECHO)
    for known in SIGNALS:
        signal.signal(known, signal.SIG_DFL)


def asked():
    """The name of the signal that has come to this process, or None."""
    return _signals[0] if _signals and _how_to_go_on else None


def stop(name):
    """Raise Stopped for the signal `name`."""
    _signals.clear()
    raise Stopped(f"stopped by {name}; {_how_to_go_on[-1]}")


def stop_if_asked():
    """Raise Stopped when a signal has come. Where several processes train together none of them stops by itself, or the
    others would wait for it: `RunState.stop_if_asked` stops them all."""
    if asked() and rank_and_world_size()[1] == 1:
        stop(asked())


def leave_signals_to_the_main_process(worker_id=None):
    """The `worker_init_fn` of every DataLoader: Ctrl-C in a terminal, and many a batch system, signals the workers too,
    which then must not end before the process that waits for their batch. They end when it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
