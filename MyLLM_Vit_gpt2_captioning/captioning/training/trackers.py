"""Who else is told how a run goes: TensorBoard, Weights & Biases or trackio, behind one small object.

A tracker never ends a run: what it cannot do is said in one warning, and from then on nothing is asked of it. The
libraries are imported when a run begins that wants one; requirements-extra.txt lists them.
"""

import math
import uuid
from pathlib import Path

from captioning.images.preprocessing import load_image

FOLDER = "tensorboard"  # in the run's folder: the event files; Weights & Biases makes a folder "wandb" there
UPLOAD_SECONDS = 120  # for what is left at the end of a run; without a network it would wait for ever
THUMBNAIL = 288  # pixels, the longer side of a photo that is shown


class Tracker:
    """Told the same run under the same `id` when the run is resumed: keep `state_dict()` with the run's state."""

    def __init__(self, name="none", folder=".", project="", entity="", run_name=""):
        """`name`: one of TRACKERS; `folder`: the run's; the others are those of Weights & Biases and of trackio.

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
        """Go on as the run that gave this state; with another tracker it is a new run."""
        if state and state["name"] == self.name:
            self.id = state["id"]

    def begin(self, config, first_step=0):
        """Open the run. `config`: a dict that JSON can hold; `first_step`: what the tracker knows of this step and
        later ones comes from work that is done again."""
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
        """The run is over: write what is left."""
        if self._backend:
            self._try(self._backend.finish)
        self._backend = None

    def _try(self, do, *args):
        try:
            return do(*args)
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

        # Readers forget what earlier files in this folder say of `first_step` and later ones.
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
        # An axis of our own: wandb's own step never goes back, and would drop what a resumed run does again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values, step):
        self.run.log({**values, "step": step})

    def show(self, samples, step):
        pictures = [self.image(photo, caption=_words(caption, truth)) for photo, caption, truth in samples]
        self.run.log({"samples": pictures, "step": step})

    def finish(self):
        self.run.finish()


class Trackio:
    """A run of trackio, in its own folder of this machine (TRACKIO_DIR): trackio show."""

    def __init__(self, tracker, config, first_step):
        import trackio

        self.image, self.end = trackio.Image, trackio.finish
        name = f"{tracker.run_name or tracker.folder.name}-{tracker.id}"  # what tells its runs apart
        self.run = trackio.init(project=tracker.project, name=name, resume="allow", config=config)

    def log(self, values, step):
        self.run.log(values, step=step)

    def show(self, samples, step):
        pictures = {
            f"samples/{number}": self.image(photo, caption=_words(caption, truth))
            for number, (photo, caption, truth) in enumerate(samples, start=1)
        }
        self.run.log(pictures, step=step)

    def finish(self):
        self.end()


TRACKERS = {"none": None, "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def _cell(value):
    """What stands in a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _words(caption, truth):
    return f"{caption or '(empty)'} (true: {'; '.join(truth)})"
