"""One writer a folder."""

import json
import os
import signal
import socket
import threading

import pytest

from captioning.common import locks
from captioning.common.locks import LOCK_FILE, after_other_writers, only_writer
from helpers.other_process import holding


@pytest.fixture
def held(tmp_path):
    """Another process, which holds the lock of `tmp_path`."""
    with holding(tmp_path / LOCK_FILE) as process:
        yield process


def test_a_second_writer_is_told_who_the_first_is(held, tmp_path):
    who = rf"process {held.pid} on {socket.gethostname()} \(since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    with (
        pytest.raises(BlockingIOError, match=f"^{tmp_path}: {who} is writing there; wait$"),
        only_writer(tmp_path / LOCK_FILE, "wait"),
    ):
        pass


def test_a_lock_is_never_stale(held, tmp_path):
    """Killed, the first one leaves its files behind, and they mean nothing."""
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert json.loads((tmp_path / ".lock.owner").read_text())["process"] == held.pid
    with only_writer(tmp_path / LOCK_FILE, ""):
        assert json.loads((tmp_path / ".lock.owner").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".lock.owner").exists()


def test_the_same_process_may_hold_it_twice(tmp_path):
    with only_writer(tmp_path / LOCK_FILE, ""):
        with only_writer(tmp_path / LOCK_FILE, ""):
            pass
        assert (tmp_path / ".lock.owner").exists()


def test_a_writer_that_waits_says_for_whom(held, tmp_path, capsys):
    threading.Timer(0.7, held.kill).start()
    with after_other_writers(tmp_path / LOCK_FILE):
        said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: process {held.pid} on ")
    assert said.endswith("is at work there; waiting until it is done\n")


def test_an_owner_that_nobody_can_read(held, tmp_path):
    for content in (b"", b"[]", b'{"process": "x"}', b"\xff"):
        (tmp_path / ".lock.owner").write_bytes(content)
        with pytest.raises(BlockingIOError, match="another process is writing"), only_writer(tmp_path / LOCK_FILE, ""):
            pass


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """The work is done all the same."""

    class NoLocks(locks.FileLock):
        def acquire(self, *args, **options):
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(locks, "FileLock", NoLocks)
    with only_writer(tmp_path / LOCK_FILE, ""):
        pass
