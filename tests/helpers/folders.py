"""Folders with other permissions than pytest's."""

import contextlib
import os
import tempfile
from pathlib import Path

PLACE = tempfile.gettempdir()  # the system's; pytest's own folder may be entered by its owner only


@contextlib.contextmanager
def for_everybody():
    """A temporary folder that everybody may enter, as root has to who gives up its rights in `read_only`."""
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


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
