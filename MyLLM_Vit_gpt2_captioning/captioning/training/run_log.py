"""What a run says about itself while it trains: metrics.csv, samples.md, a line an epoch, the curves, report.html, and
what a tracker is told."""

import math
from pathlib import Path

from captioning.common.files import CURVES, write_atomically
from captioning.decoding.cached_decoder import cuda_graphs_disabled
from captioning.model import summary
from captioning.model.checkpoint import portable
from captioning.pages import html_pages, plots
from captioning.training import report
from captioning.training.trackers import Tracker

SAMPLES = 8  # photos whose captions are kept for every epoch


class RunLog:
    """`rows` holds a dict an epoch, the rows of metrics.csv; scores are there for the epochs that have them."""

    def __init__(self, folder, config, team, questions=False, tracker=None):
        """`config`: the train_config; `team`: the `distributed.Team`, whose first process writes.

        Raises ValueError when `config` does not score what decides which epoch is the best: `best_by`, and with
        self-critical training CIDEr, because perplexity does not show what that is for.
        """
        self.folder, self.config, self.team, self.questions = folder, config, team, questions
        self.tracker = tracker or Tracker()
        if config.log_steps < 1:
            raise ValueError(f"log_steps is {config.log_steps}, but a point needs at least 1 step")
        if config.epochs + config.scst_epochs < 1:
            raise ValueError("epochs 0 and scst_epochs 0: there is nothing to train")
        self.best_by = "CIDEr" if config.scst_epochs else config.best_by
        scored = config.score_every == 1 and config.score_images > 0 and not questions
        if self.best_by not in ("perplexity", "CIDEr") or (self.best_by == "CIDEr" and not scored):
            raise ValueError(
                f"best_by is {self.best_by!r}: it is perplexity, or for captions with score_every 1 CIDEr, "
                "which scst_epochs needs"
            )
        self.rows, self.samples = [], {}  # samples: {epoch: captions of the first scored images}
        self.timings = []  # rows of timings.csv, which unlike metrics.csv is another one every time
        self.steps = 0  # of training, through all stages
        self.points = []  # a dict every log_steps of them: what they were like on average
        self.scored = None  # captions of the best epoch that was scored: {"epoch", "rows" of the dataset, "captions"}
        self.newest = None  # those of the last epoch that was
        self._recent = [0.0, 0]  # sum of losses since the last point, and of how many labels
        self._captions = 0  # trained on in this epoch, since the run started or went on

    def state_dict(self):
        """What there is beside rows, samples and timings, for a run that goes on."""
        kept = ("steps", "points", "scored", "newest", "_recent")
        return {name: getattr(self, name) for name in kept} | {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state):
        """Go on from `state_dict`; a state of before there was one is empty."""
        state = dict(state)
        self.tracker.load_state_dict(state.pop("tracker", None))
        vars(self).update(state)

    def begin(self, trainer):
        """Print what the model consists of, and open the tracker's run, or the one that goes on."""
        self.summary = summary.summarize(trainer.model, self.config)
        print(summary.as_text(*self.summary))
        configs = {"model": trainer.model.config, "train": self.config}
        configs = {name: portable(config, trainer.state.root) for name, config in configs.items()}
        self.tracker.begin(configs, first_step=self.steps + 1 if trainer.state.resumed else 0)

    def step(self, place, lr, name, total, count, batches):
        """A step is done, at `place` in epochs (1.5: half of the second one). `name`: "loss" or "reward", `total` its
        sum over `count` labels or photos, 0 and 0 for a step that was left out; `batches`: those of this process."""
        self.steps += 1
        captions = sum(len(batch[-1]) for batch in batches) * (1 if name == "loss" else self.config.scst_samples)
        self._captions += captions * self.team.size
        self._recent = [self._recent[0] + total, self._recent[1] + count]
        if self.steps % self.config.log_steps == 0:
            mean = self._recent[0] / self._recent[1] if self._recent[1] else math.nan
            self._recent = [0.0, 0]
            self.points.append({"place": place, "lr": lr, name: mean})
            self.tracker.log({f"training/{name}": mean, "training/lr": lr}, self.steps)

    def record(self, epoch, stage, lr, trained, valid_perplexity, scores):
        """Add an epoch (counted from 0), print it, write metrics.csv.

        `trained`: the training loss, or the mean reward of self-critical training, whose loss says nothing.
        """
        train_loss = trained
        if stage == "self-critical":
            train_loss, scores = math.nan, {"reward": trained, **scores}
        row = dict(epoch=epoch + 1, stage=stage, lr=lr, train_loss=train_loss, valid_loss=math.log(valid_perplexity))
        row |= dict(train_perplexity=perplexity(train_loss), valid_perplexity=valid_perplexity, **scores)
        self.rows[:] = [*(before for before in self.rows if before["epoch"] <= epoch), row]  # not twice if done again
        if self.newest and (self.scored is None or self.is_best()):
            self.scored = self.newest
        self.tracker.log({name if name == "epoch" else f"epoch/{name}": row[name] for name in row}, self.steps)
        self._write_table(self.rows, "metrics.csv")
        trained = "" if math.isnan(train_loss) else f"training perplexity {row['train_perplexity']:.3f}, "
        shown = "".join(f", {name} {value:.3f}" for name, value in scores.items())
        print(f"epoch {epoch + 1}: {trained}validation perplexity {valid_perplexity:.3f}{shown}")

    def time(self, epoch, training, evaluation):
        """Add an epoch (counted from 0) to timings.csv: seconds since the run started, or went on in its middle, and
        on how many captions it trained in these."""
        row = dict(epoch=epoch + 1, training=round(training, 3), evaluation=round(evaluation, 3))
        row["captions"], self._captions = self._captions, 0
        self.timings[:] = [*(before for before in self.timings if before["epoch"] <= epoch), row]
        self.tracker.log({"epoch/captions_per_second": row["captions"] / max(training, 1e-9)}, self.steps)
        self._write_table(self.timings, "timings.csv")

    def _write_table(self, rows, name):
        import pandas as pd  # here, as evaluation below, so that captioning a photo does not wait for it

        if self.team.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    def is_best(self):
        """True when the last epoch is the best so far."""
        return self.best_row() is self.rows[-1]

    def best_row(self):
        """The row of the best epoch, the first of equally good ones; None while there is none."""
        key, sign = ("CIDEr", -1) if self.best_by == "CIDEr" else ("valid_perplexity", 1)
        rows = [row for row in self.rows if math.isfinite(row.get(key, math.nan))]
        return min(rows, key=lambda row: sign * row[key], default=None)

    def score(self, epoch, model, tokenizer, dataset):
        """Caption the same validation photos as in other epochs, log the first eight in samples.md -> {"CIDEr",
        "BLEU-4"}, or {"exact_answers"} for questions; empty in epochs that `score_every` leaves out."""
        from captioning.scoring.evaluation import score_subset

        config = self.config
        if config.score_every < 1 or config.score_images < 1 or (epoch + 1) % config.score_every:
            return {}
        look = dataset.token_caches[0].batch if dataset.token_caches else None
        with cuda_graphs_disabled():  # a few batches, in the middle of training, which needs the memory
            truth, captions, scores = score_subset(model, tokenizer, dataset, config.score_images, self.team, look)
        shown = list(truth.items())[:SAMPLES]
        self.samples[epoch + 1] = captions[: len(shown)]
        names = [f"{Path(image).name} {prompt}".strip() for (image, prompt), _ in shown]
        if self.team.first:
            html_pages.write_samples(self.folder / "samples.md", names, [true for _, true in shown], self.samples)
        self.newest = dict(epoch=epoch + 1, rows=report.rows_of(truth, dataset), captions=captions)
        told = zip(shown, captions, strict=False)
        self.tracker.show([(image, f"{q} {text}".strip(), true) for ((image, q), true), text in told], self.steps)
        return scores

    def draw_curves(self):
        """loss.png, perplexity.png and a picture for each score there is."""
        for quantity in CURVES:
            if quantity in ("loss", "perplexity") or any(quantity in row for row in self.rows):
                plots.plot_curve(self.rows, quantity, self.folder / f"{quantity.lower()}.png")

    def write_report(self, trainer):
        """report.html of all that has happened so far. It is for looking at: that it fails ends no run."""
        if not self.team.first:
            return
        try:
            report.write_report(self.folder / "report.html", trainer)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"WARNING: report.html is not written ({reason}); the run goes on")

    def finish(self, trainer):
        """The run is over: the curves, the report with the best weights, and what the tracker has left to write."""
        self.draw_curves()
        self.write_report(trainer)
        self.tracker.finish()


def perplexity(loss):
    """exp(loss), or infinity where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf
