"""One writer a folder: who writes there holds a lock, and another one waits, or is told who that is.

The operating system frees a lock when the process that holds it ends, however it ends, so a lock is never stale. Beside
the lock file lies what the holder says of itself.
"""

import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from captioning.common import stopping

LOCK_FILE = ".lock"
DYING = 10  # seconds in which the data workers of a process that was killed end, and with them its lock


@contextmanager
def only_writer(path, remedy):
    """Hold the lock file `path`, whose folder must exist. The same process may hold it twice.

    Raises BlockingIOError that names the process that holds it and says when that began, followed by `remedy`.
    """
    lock, path = FileLock(path, is_singleton=True), Path(path)
    try:
        lock.acquire(timeout=0 if _is_alive(_owner(path)) else DYING)
    except Timeout:
        raise BlockingIOError(f"{path.parent}: {_in_words(_owner(path))} is writing there; {remedy}") from None
    except (OSError, NotImplementedError):
        pass  # a disk without locks, or one that nobody can write to
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            _write_owner(path)
        yield
    finally:
        if outermost:
            with suppress(OSError):
                _owner_file(path).unlink()
        lock.release()


@contextmanager
def after_other_writers(path):
    """Hold the lock file `path`, whose folder must exist; wait while another process does the same work, and say so."""
    lock, path, waiting = FileLock(path), Path(path), False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if not waiting:
                print(f"{path.parent}: {_in_words(_owner(path))} is at work there; waiting until it is done")
            waiting = True
            stopping.stop_if_asked()
    try:
        _write_owner(path)
        yield
    finally:
        with suppress(OSError):
            _owner_file(path).unlink()
        lock.release()


def _owner_file(path):
    return path.with_name(f"{path.name}.owner")


def _write_owner(path):
    owner = dict(process=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
    with suppress(OSError):  # it is only for the words of an error
        _owner_file(path).write_text(json.dumps(owner), encoding="utf-8")


def _owner(path):
    try:
        owner = json.loads(_owner_file(path).read_bytes())
        return dict(process=int(owner["process"]), host=str(owner["host"]), since=str(owner["since"]))
    except (OSError, ValueError, KeyError, TypeError):  # just begun, or of a writer that is not ours
        return None


def _is_alive(owner):
    """Whether a process may still be at work; True for one on another host, which cannot be asked."""
    if owner is None or owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _in_words(owner):
    if owner is None:
        return "another process"
    return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
