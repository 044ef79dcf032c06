"""The log of a run while it trains: metrics.csv, timings.csv, samples.md, one printed line per epoch, the curves,
report.html, what is wrong with the run, and the values that a tracker gets."""

import math
from pathlib import Path

from captioning.common.files import CURVES, write_atomically
from captioning.common.form import check
from captioning.decoding.cached_decoder import cuda_graphs_disabled
from captioning.model import summary
from captioning.pages import html_pages, plots
from captioning.training import report
from captioning.training.diagnosis import Diagnosis
from captioning.training.trackers import Tracker

SAMPLES = 8  # photos whose captions are kept for every epoch
SCORED = ({"epoch": int, "rows": [int], "captions": [str]}, None)
KEPT = {
    "steps": int,
    "points": [{str: float}],
    "scored": SCORED,
    "newest": SCORED,
    "_recent": [float],
}  # in a run's state
FORM = {  # of what a resumed run takes from its state
    "metrics": [{"epoch": int, "valid_loss": float, "valid_perplexity": float}],
    "samples": {int: [str]},
    "timings": [{"epoch": int, "training": float, "evaluation": float}],
}


class RunLog:
    """`rows` holds one dict per epoch, the rows of metrics.csv; scores are there for the epochs that have them."""

    def __init__(self, folder, config, processes, questions=False, tracker=None):
        """`config`: the train_config; `processes`: the `ProcessGroup`, of which rank 0 writes; `questions`: whether the
        validation set asks questions.

        With self-critical training CIDEr decides which epoch is the best, because perplexity does not show what that
        training improves. Raises ValueError when that is to be CIDEr and the validation set asks questions.
        """
        self.folder, self.config, self.processes, self.questions = Path(folder), config, processes, questions
        self.tracker = tracker or Tracker()
        self.best_by = "CIDEr" if config.scst_epochs else config.best_by
        if self.best_by == "CIDEr" and questions:
            raise ValueError(
                "best_by is 'CIDEr', but must be 'perplexity' for questions: CIDEr scores captions, not answers"
            )
        self.rows, self.samples = [], {}  # samples: {epoch: captions of the first scored images}
        self.timings = []  # rows of timings.csv, which unlike metrics.csv differs from run to run
        self.steps = 0  # of training, through all stages
        self.points = []  # a dict every log_steps of them: their means
        self.scored = None  # captions of the best epoch that was scored: {"epoch", "rows" of the dataset, "captions"}
        self.newest = None  # captions of the last epoch that was scored, likewise
        self._recent = [0.0, 0]  # sum of losses since the last point, and of how many labels
        self._captions = 0  # trained on in this epoch, since the run started or was resumed
        self.run = None  # a `report.Run`, from `begin` on
        self.diagnosis = Diagnosis(config)

    def state_dict(self):
        """Everything that a resumed run needs to continue the log."""
        return {
            "metrics": self.rows,
            "samples": self.samples,
            "timings": self.timings,
            "log": {name: getattr(self, name) for name in KEPT} | {"tracker": self.tracker.state_dict()},
            "diagnosis": self.diagnosis.state_dict(),
        }

    def load_state_dict(self, state):
        """Continue from `state_dict`; states of early versions have no "log" and no "diagnosis". Raises ValueError for
        parts that are of another form."""
        check(state, FORM)
        for row in (*state["metrics"], *state["timings"]):
            check({name: value for name, value in row.items() if name != "stage"}, {str: float}, "['metrics']")
        self.rows[:], self.samples, self.timings = state["metrics"], state["samples"], state["timings"]
        if "log" in state:
            log = state["log"]
            check(log, KEPT, "['log']")
            self.tracker.load_state_dict(log.get("tracker"))
            vars(self).update({name: log[name] for name in KEPT})
            if len(self._recent) != 2:
                raise ValueError("['log']['_recent'] is not a sum and a count")
        if "diagnosis" in state:
            self.diagnosis.load_state_dict(state["diagnosis"])

    def begin(self, model, tokenizer, training, dataset, configs, autocast, resumed):
        """Print a table of the model's parts, and open the tracker's run, or continue it where the run was `resumed`.

        `training`, `dataset`: the training and validation captions; `configs`: {"model": dict, "train": dict}; the
        others as in `report.Run`.
        """
        table = summary.summarize(model, self.config)
        print(summary.as_text(*table))
        if self.config.resume and not resumed:  # said when the Trainer was built, too, but much was printed since
            print(
                f"WARNING: resume is {self.config.resume!r}, but no state is there: training starts from the beginning"
            )
        self.run = report.Run(tokenizer, dataset, configs, table, autocast)
        self.tracker.begin(configs, first_step=self.steps + 1 if resumed else 0)
        if self.processes.is_main:
            self.diagnosis.begin(model, training, dataset, autocast)

    def step(self, place, lr, name, total, count, captions, batch, norm):
        """Log a training step, at `place` in epochs (1.5: half of the second one). `name`: "loss" or "reward"; `total`:
        its sum over `count` labels or photos, 0 and 0 for a skipped step; `captions`: how many this process trained on;
        `batch`: its first one; `norm`: of its gradient.
        """
        self.steps += 1
        self._captions += captions * self.processes.world_size
        self._recent = [self._recent[0] + total, self._recent[1] + count]
        if name == "loss" and self.processes.is_main:
            self.diagnosis.step(batch, place, total / count if count else None, norm)
        if self.steps % self.config.log_steps == 0:
            mean = self._recent[0] / self._recent[1] if self._recent[1] else math.nan
            self._recent = [0.0, 0]
            self.points.append({"place": place, "lr": lr, name: mean})
            self.tracker.log({f"training/{name}": mean, "training/lr": lr}, self.steps)

    def record(self, epoch, stage, lr, reported, valid_perplexity, scores):
        """Add an epoch (counted from 0), print it, write metrics.csv.

        `reported`: the mean training loss; in the stage "self-critical" the mean reward, whose loss says nothing.
        """
        train_loss = reported
        if stage == "self-critical":
            train_loss, scores = math.nan, {"reward": reported, **scores}
        row = dict(epoch=epoch + 1, stage=stage, lr=lr, train_loss=train_loss, valid_loss=math.log(valid_perplexity))
        row |= dict(train_perplexity=perplexity(train_loss), valid_perplexity=valid_perplexity, **scores)
        self.rows[:] = [*(before for before in self.rows if before["epoch"] <= epoch), row]  # not twice if done again
        if self.newest and (self.scored is None or self.is_best()):
            self.scored = self.newest
        self.tracker.log({name if name == "epoch" else f"epoch/{name}": row[name] for name in row}, self.steps)
        self._write_table(self.rows, "metrics.csv")
        training = "" if math.isnan(train_loss) else f"training perplexity {row['train_perplexity']:.3f}, "
        rest = "".join(f", {name} {value:.3f}" for name, value in scores.items())
        print(f"epoch {epoch + 1}: {training}validation perplexity {valid_perplexity:.3f}{rest}")
        if self.processes.is_main:
            new = self.newest if self.newest and self.newest["epoch"] == epoch + 1 and not self.questions else None
            self.diagnosis.epoch(
                epoch + 1, self.rows, *(report.written_and_true(new, self.run.dataset) if new else ([], []))
            )

    def time(self, epoch, training, evaluation):
        """Add an epoch (counted from 0) to timings.csv: seconds of training and evaluation, and captions trained on.

        They count from the start of the epoch, or from where the run was resumed in its middle.
        """
        row = dict(epoch=epoch + 1, training=round(training, 3), evaluation=round(evaluation, 3))
        row["captions"], self._captions = self._captions, 0
        self.timings[:] = [*(before for before in self.timings if before["epoch"] <= epoch), row]
        self.tracker.log({"epoch/captions_per_second": row["captions"] / max(training, 1e-9)}, self.steps)
        self._write_table(self.timings, "timings.csv")

    def _write_table(self, rows, name):
        import pandas as pd  # here, as evaluation below, so that captioning a photo does not wait for it

        if self.processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    def is_best(self):
        """True when the last epoch is the best so far."""
        return self.best_row() is self.rows[-1]

    def best_row(self):
        """The row of the best epoch, the first of equally good ones; None while there is none."""
        return best_row(self.rows, self.best_by)

    def score(self, epoch, model, tokenizer, dataset):
        """Caption the same validation photos in every epoch, and write the first eight captions to samples.md
        -> {"CIDEr", "BLEU-4", "METEOR"}, or {"exact_answers"} for questions; empty in epochs without scores."""
        from captioning.scoring.evaluation import score_subset

        config = self.config
        if config.score_every < 1 or config.score_images < 1 or (epoch + 1) % config.score_every:
            return {}
        load_batch = dataset.token_caches[0].batch if dataset.token_caches else None
        with cuda_graphs_disabled():  # a few batches, in the middle of training, which needs the memory
            references, captions, scores = score_subset(
                model, tokenizer, dataset, config.score_images, self.processes, load_batch, config.score_tokens
            )
        samples = list(references.items())[:SAMPLES]  # [((image, question), its true captions), ...]
        self.samples[epoch + 1] = captions[: len(samples)]
        if self.processes.is_main:
            names = [f"{Path(image).name} {question}".strip() for (image, question), _ in samples]
            html_pages.write_samples(self.folder / "samples.md", names, [true for _, true in samples], self.samples)
        self.newest = dict(epoch=epoch + 1, rows=report.first_rows(references, dataset), captions=captions)
        self.tracker.show(
            [
                (image, f"{question} {caption}".strip(), true)
                for ((image, question), true), caption in zip(samples, captions, strict=False)
            ],
            self.steps,
        )
        return scores

    def draw_curves(self):
        """loss.png, perplexity.png and a picture for each score there is."""
        for quantity in CURVES:
            if quantity in ("loss", "perplexity") or any(quantity in row for row in self.rows):
                plots.plot_curve(self.rows, quantity, self.folder / f"{quantity.lower()}.png")

    def write_report(self, model):
        """report.html of all that has happened so far; `model`: with the weights to look at. Where that fails the run
        goes on."""
        if not self.processes.is_main:
            return
        try:
            report.write_report(self.folder / "report.html", self, self.run, model)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"WARNING: report.html is not written ({reason}); the run goes on")

    def print_best(self, result):
        """Say which epoch was the best, by the `result` of `run_training`, and where the files of the run are."""
        print(
            f"best {self.best_by}: epoch {result['best_epoch'] + 1}, perplexity {result['best_perplexity']:.3f}; "
            f"checkpoint and plots are in {self.folder}"
        )

    def finish(self, model):
        """The run is over: draw the curves, write the report of the best `model`, close the tracker, print what was
        measured of the run."""
        self.draw_curves()
        print(self.diagnosis.as_table())
        self.write_report(model)
        self.tracker.finish()


def best_row(rows, best_by):
    """Of the `rows` of metrics.csv that of the best epoch by "perplexity" or "CIDEr"; None while there is none."""
    key, sign = ("CIDEr", -1) if best_by == "CIDEr" else ("valid_perplexity", 1)
    rows = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    return min(rows, key=lambda row: sign * row[key], default=None)


def perplexity(loss):
    """exp(loss), or infinity where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf
