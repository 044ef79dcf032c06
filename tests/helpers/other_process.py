"""Another process that holds a lock, until it is killed."""

import os
import subprocess
import sys
from contextlib import contextmanager

from conftest import REPO_ROOT

HOLD = """
import sys, time
from captioning.common.locks import only_writer
with only_writer(sys.argv[1], ""):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(lock_file):
    """-> the process (Popen) that holds `lock_file`; it ends behind the block."""
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning")}
    command = [sys.executable, "-c", HOLD, str(lock_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
