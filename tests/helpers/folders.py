"""Folders that may not be written."""

import contextlib
import os


@contextlib.contextmanager
def read_only(folder):
    """`folder` may not be written, not even by a test that runs as root."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
