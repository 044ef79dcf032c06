"""Trackers: TensorBoard, Weights & Biases or trackio get a run's metrics and sample captions, behind one interface.

A tracker never ends a run: its first error is printed as a warning, and the run goes on without it. Its library is
imported when a run begins; requirements-extra.txt lists the libraries.
"""

import math
import uuid
from pathlib import Path

from captioning.common.form import check
from captioning.common.printable import in_markdown, printable
from captioning.images.preprocessing import load_image

FOLDER = "tensorboard"  # in the run's folder: the event files; Weights & Biases makes a folder "wandb" there
UPLOAD_SECONDS = 120  # for the last upload of a run; without a network wandb would wait for ever
THUMBNAIL = 288  # pixels of the longer side of a sample photo


class Tracker:
    """One run of a tracker. A resumed run continues it under the same `id`: keep `state_dict()` in the run's state."""

    def __init__(self, name="none", folder=".", project="", entity="", run_name=""):
        """`name`: one of TRACKERS; `folder`: of the run; `project`, `entity` and `run_name` as in Weights & Biases.

        Raises ValueError for another name. Nothing is imported or written before `begin`.
        """
        if name not in TRACKERS:
            raise ValueError(f"tracker {name!r} is not one of {', '.join(TRACKERS)}")
        self.name, self.folder = name, Path(folder).resolve()
        self.project, self.entity, self.run_name = project, entity, run_name
        self.id = uuid.uuid4().hex[:8]  # not from `random`, whose numbers a run may depend on
        self._backend = None

    def state_dict(self):
        return {"name": self.name, "id": self.id}

    def load_state_dict(self, state):
        """Continue the tracker's run from `state_dict`; a state of another tracker is ignored: that is a new run."""
        check(state, ({"name": str, "id": (str, None)}, None), "['tracker']")
        if state and state["name"] == self.name:
            self.id = state["id"]

    def begin(self, config, first_step=0):
        """Open the run. `config`: a dict that JSON can hold; `first_step`: a resumed run repeats the steps from here
        on, so that values which the tracker already has for them are replaced."""
        if self.name != "none":
            self._backend = self._try(TRACKERS[self.name], self, config, first_step)

    def log(self, values, step):
        """{name: number or text} at a step of the run; numbers that are not finite are left out."""
        values = {name: value for name, value in values.items() if isinstance(value, str) or math.isfinite(value)}
        if self._backend:
            self._try(self._backend.log, values, step)

    def show(self, samples, step):
        """[(photo, its generated caption, its true captions), ...], the same photos every time."""
        if self._backend:
            self._try(self._show, samples, step)

    def _show(self, samples, step):
        small = []
        for photo, caption, truth in samples:
            photo = load_image(photo)
            photo.thumbnail((THUMBNAIL, THUMBNAIL))
            small.append((photo, caption, truth))
        self._backend.show(small, step)

    def finish(self):
        """The run is over: write what is still buffered."""
        if self._backend:
            self._try(self._backend.finish)
        self._backend = None

    def _try(self, function, *args):
        try:
            return function(*args)
        except Exception as error:
            remedy = ""
            if isinstance(error, ImportError):
                remedy = "; pip install -r requirements-extra.txt brings it"
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(". :")
            print(f"WARNING: tracker {self.name}: {reason}{remedy}. Training goes on without it")
            self._backend = None


class TensorBoard:
    """Event files in `folder`/tensorboard: tensorboard --logdir captioner."""

    def __init__(self, tracker, config, first_step):
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop the values of `first_step` and later ones from earlier files in this folder.
        self.writer = SummaryWriter(tracker.folder / FOLDER, purge_step=first_step)
        for name, section in config.items():
            rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in section.items())
            self.writer.add_text(f"configuration/{name}", f"| constant | value |\n| --- | --- |\n{rows}", first_step)

    def log(self, values, step):
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, samples, step):
        import numpy as np

        rows = ["| photo | generated | true |", "| ---: | --- | --- |"]
        for number, (photo, caption, truth) in enumerate(samples, start=1):
            self.writer.add_image(f"samples/{number}", np.asarray(photo), step, dataformats="HWC")
            rows.append(f"| {number} | {_cell(caption)} | {_cell('; '.join(truth))} |")
        self.writer.add_text("samples", "\n".join(rows), step)

    def finish(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb; with the environment variable WANDB_MODE=offline it stays in `folder`/wandb."""

    def __init__(self, tracker, config, first_step):
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(
            project=tracker.project or None,
            entity=tracker.entity or None,
            name=tracker.run_name or f"{tracker.folder.name}-{tracker.id}",
            id=tracker.id,
            resume="allow",
            dir=tracker.folder,
            config=config,
            allow_val_change=True,  # a resumed run may have another lr or device
            settings=wandb.Settings(finish_timeout=UPLOAD_SECONDS),
        )
        # An x-axis of our own: wandb's own step never goes back, and would drop the steps that a resumed run repeats.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values, step):
        self.run.log({**values, "step": step})

    def show(self, samples, step):
        pictures = [self.image(photo, caption=_caption_and_truth(caption, truth)) for photo, caption, truth in samples]
        self.run.log({"samples": pictures, "step": step})

    def finish(self):
        self.run.finish()


class Trackio:
    """A run of trackio, in its own folder of this machine (TRACKIO_DIR): trackio show."""

    def __init__(self, tracker, config, first_step):
        import trackio

        self.image, self.end = trackio.Image, trackio.finish
        name = f"{tracker.run_name or tracker.folder.name}-{tracker.id}"  # the name identifies a run
        self.run = trackio.init(project=tracker.project, name=name, resume="allow", config=config)

    def log(self, values, step):
        self.run.log(values, step=step)

    def show(self, samples, step):
        pictures = {
            f"samples/{number}": self.image(photo, caption=_caption_and_truth(caption, truth))
            for number, (photo, caption, truth) in enumerate(samples, start=1)
        }
        self.run.log(pictures, step=step)

    def finish(self):
        self.end()


TRACKERS = {"none": None, "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def _cell(value):
    """A value as the cell of a Markdown table."""
    return in_markdown(value)


def _caption_and_truth(caption, truth):
    return printable(f"{caption or '(empty)'} (true: {'; '.join(truth)})")
