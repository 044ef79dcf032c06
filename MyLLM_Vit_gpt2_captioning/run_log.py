"""What a run says about itself while it trains: metrics.csv, samples.md, a line an epoch, and the curves."""

import math

import pages
import plots
from checkpoint import CURVES, write_atomically


class RunLog:
    """`rows` holds a dict an epoch, the rows of metrics.csv; scores are there for the epochs that have them."""

    def __init__(self, folder, config, team, questions=False):
        """`config`: the train_config; `team`: the `distributed.Team`, whose first process writes.

        Raises ValueError when `config` does not score what decides which epoch is the best: `best_by`, and with
        self-critical training CIDEr, because perplexity does not show what that is for.
        """
        self.folder, self.config, self.team = folder, config, team
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

    def record(self, epoch, stage, lr, trained, valid_perplexity, scores):
        """Add an epoch (counted from 0), print it, write metrics.csv.

        `trained`: the training loss, or the mean reward of self-critical training, whose loss says nothing.
        """
        train_loss = trained
        if stage == "self-critical":
            train_loss, scores = math.nan, {"reward": trained, **scores}
        row = dict(epoch=epoch + 1, stage=stage, lr=lr, train_loss=train_loss, valid_loss=math.log(valid_perplexity))
        row |= dict(train_perplexity=perplexity(train_loss), valid_perplexity=valid_perplexity, **scores)
        self.rows.append(row)
        self._write_table(self.rows, "metrics.csv")
        trained = "" if math.isnan(train_loss) else f"training perplexity {row['train_perplexity']:.3f}, "
        shown = "".join(f", {name} {value:.3f}" for name, value in scores.items())
        print(f"epoch {epoch + 1}: {trained}validation perplexity {valid_perplexity:.3f}{shown}")

    def time(self, epoch, training, evaluation):
        """Add an epoch (counted from 0) to timings.csv: seconds since the run started, or went on in its middle."""
        self.timings.append(dict(epoch=epoch + 1, training=round(training, 3), evaluation=round(evaluation, 3)))
        self._write_table(self.timings, "timings.csv")

    def _write_table(self, rows, name):
        import pandas as pd  # here, as evaluation below, so that captioning a photo does not wait for it

        if self.team.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, lambda path: pd.DataFrame(rows).to_csv(path, index=False))

    def is_best(self):
        """True when the last epoch is the best so far."""
        key, sign = ("CIDEr", -1) if self.best_by == "CIDEr" else ("valid_perplexity", 1)
        *before, last = [sign * row.get(key, math.nan) for row in self.rows]
        return math.isfinite(last) and all(not math.isfinite(value) or last < value for value in before)

    def score(self, epoch, model, tokenizer, dataset):
        """Caption the same validation photos as in other epochs, log the first eight in samples.md -> {"CIDEr",
        "BLEU-4"}, or {"exact_answers"} for questions; empty in epochs that `score_every` leaves out."""
        from evaluation import score_subset

        config = self.config
        if config.score_every < 1 or config.score_images < 1 or (epoch + 1) % config.score_every:
            return {}
        look = dataset.token_caches[0].batch if dataset.token_caches else None
        truth, captions, scores = score_subset(model, tokenizer, dataset, config.score_images, self.team, look)
        self.samples[epoch + 1] = captions[:8]
        if self.team.first:
            pages.write_samples(self.folder / "samples.md", list(truth)[:8], list(truth.values())[:8], self.samples)
        return scores

    def draw_curves(self):
        """loss.png, perplexity.png and a picture for each score there is."""
        for quantity in CURVES:
            if quantity in ("loss", "perplexity") or any(quantity in row for row in self.rows):
                plots.plot_curve(self.rows, quantity, self.folder / f"{quantity.lower()}.png")


def perplexity(loss):
    """exp(loss), or infinity where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf
