"""What test_distributed.py starts with torchrun: a run of the script that writes the loss of every step, and may fail.

    distributed_case.py LOSSES.json KILL STOP --recipe shapes ...

The last process kills itself in step KILL, and when it has been started again it is asked to stop behind step STOP,
counted from there. 0 means never.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "MyLLM_Vit_gpt2_captioning"))

import MyLLM_Vit_gpt2_captioning as script
from captioning.scoring import meteor

meteor.read_paraphrases = lambda references: {}  # takes seconds, in every process; as in conftest.py


def main(losses_file, kill, stop, *argv):
    processes = script.ProcessGroup("cpu")
    totals, build = [], script.build_trainer

    def recorded(*args):
        trainer = build(*args)
        step, count = trainer.train_step, 0

        def watched(batches):
            nonlocal count
            count += 1
            totals.append((trainer.state.position["total"], trainer.state.position["count"]))
            last = processes.rank == processes.world_size - 1
            if last and count == int(kill) and not processes.restarted:
                os.kill(os.getpid(), signal.SIGKILL)
            reported = step(batches)
            if last and count == int(stop) and processes.restarted:
                signal.raise_signal(signal.SIGTERM)
            return reported

        trainer.train_step = watched
        return trainer

    script.build_trainer = recorded
    try:
        script.main(argv)
    except script.Stopped as reason:
        print(reason)
    if processes.is_main:
        Path(losses_file).write_text(json.dumps(totals))


if __name__ == "__main__":
    main(*sys.argv[1:])
