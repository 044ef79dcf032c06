"""The run says why it fails: from the numbers of measurements.py to findings, each with its likely cause and remedy.

`find` is a list of rules, the causes first: what follows from a cause that was found (one caption for all photos, say)
is not reported beside it. `Diagnosis` takes the measurements while a run goes on.
"""

import math
from dataclasses import dataclass

import torch

from captioning.common.form import check, form_of
from captioning.data import batching
from captioning.training import measurements

FIRST_LOOKS = (50, 100, 200)  # steps after which the model is looked at, beside the end of every epoch
NEW_PARTS = ("cross-attention", "refiner")  # which learn at `lr` itself
EARLY = 100  # steps before which nothing is concluded from what the model has not learned


@dataclass
class Finding:
    """`name` in a few words; `seen`: the numbers; `cause`: the likely one; `remedy`: what to try, with its constant."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self):
        return f"{self.name}: {self.seen}. Likely cause: {self.cause}. Try: {self.remedy}"


def find(m, model_config, train_config):
    """Measurements {name: number} -> list of `Finding`, the likeliest cause first. What was not measured is not
    judged."""
    findings = []

    def above(name, limit):
        return m.get(name, -math.inf) > limit

    def below(name, limit):
        return m.get(name, math.inf) < limit

    def found(name, seen, cause, remedy):
        findings.append(Finding(name, seen.format_map(_Shown(m)), cause, remedy))

    # --- the data, which no training mends ---
    if below("captions that begin with BOS", 0.5):
        found(
            "captions do not begin with [BOS]",
            "{captions that begin with BOS:.0%} of the captions of a batch do",
            "the training batches are not those of collate_fn, or its tokenizer is another one",
            "make token ids with encode_caption: writing starts from [BOS], which the model must have seen",
        )
    if below("captions whose end is a target", 0.5):
        found(
            "the end of captions is not learned",
            "[EOS] is a target in {captions whose end is a target:.0%} of the captions of a batch",
            "labels are masked where they equal the pad token, which in GPT-2 is also [EOS]",
            "mask labels by length, as collate_fn does; else captions never stop",
        )
    if above("unknown words", 0.2):
        found(
            "most captions are full of <unk>",
            "{unknown words:.0%} of the words are not in the vocabulary",
            f"a vocabulary of {model_config.vocab_size} tokens is too small for these captions",
            "a larger --vocab_size, or --tokenizer bpe, which knows all words",
        )
    if above("captions cut off", 0.2):
        found(
            "captions are cut off",
            f"{{captions cut off:.0%}} of the captions have more than seq_len {model_config.seq_len} tokens; half of "
            "them have {tokens of a caption} or more",
            "seq_len is too small for these captions",
            f"--seq_len {_next_power(2 * m.get('tokens of a caption', 16))}",
        )
    if above("photos with the commonest caption", 0.05) and above("photos", 50):
        found(
            "many photos have the same caption",
            '{photos with the commonest caption:.0%} of the training photos have "{commonest caption}"',
            "a placeholder or a fault in the annotations",
            "correct those rows or leave them out; prepare_data.py --check counts repeated captions",
        )
    if above("validation photos also in training", 0.01):
        found(
            "validation photos are in training too",
            "{validation photos also in training:.0%} of them are, byte for byte, under another name",
            "copies of photos were split by name",
            "remove the copies; until then validation loss and scores are too good",
        )
    if m.get("mean of the model's input") is not None and (
        abs(m["mean of the model's input"]) > 4 or not 0.03 < m["its standard deviation"] < 5
    ):
        found(
            "the encoder gets pixels of the wrong size",
            "mean {mean of the model's input:.2f}, standard deviation {its standard deviation:.2f}, where about 0 and "
            "1 are expected",
            "preprocessing's mean and std are not for pixels in 0..1",
            "leave --preprocessing empty: mean and std are then those of the encoder",
        )
    elif above("mean and std, difference from the encoder's own", 0.02):
        found(
            "the encoder gets other pixels than it was trained with",
            "preprocessing's mean or std differs from the encoder's own by "
            "{mean and std, difference from the encoder's own:.3f}",
            "mean and std of another encoder",
            "leave --preprocessing empty",
        )

    # --- the constants and the optimization ---
    if above("share of steps left out", 0.05) and above("steps left out", 2):
        found(
            "steps are left out",
            "in {share of steps left out:.0%} of {steps:.0f} steps loss or gradient was not finite",
            "numbers overflow: a learning rate that is too high, or float16 without a scaled loss",
            "a lower --lr, and --precision float32 to see whether it is the precision",
        )
    new_rate, far = m.get("peak learning rate over weights", 0), m.get("pretrained encoder has moved", 0)
    diverges = above("loss has risen by", 1.0) or above("loss above guessing", 0.5)
    if new_rate > 0.2 or (diverges and new_rate > 0.01):
        found(
            "the learning rate is too high",
            f"lr {train_config.lr:g} is {{peak learning rate over weights:.0%}} of the size of the weights, for each "
            "step" + (", and the loss has risen to {training loss:.2f}" if diverges else ""),
            "AdamW moves each weight by about the learning rate in every step",
            f"--lr {0.02 * train_config.lr / max(new_rate, 1e-12):.0e}, and a longer --warmup_share",
        )
    elif diverges:
        found(
            "the loss rises",
            "it is {training loss:.2f}, and was lower by {loss has risen by:.2f}",
            "a learning rate that is too high for this model, or a fault in the data from there on",
            "a lower --lr, a longer --warmup_share, a smaller --clip_norm",
        )
    if far > 0.3:
        found(
            "the pretrained encoder is overwritten",
            "its weights have moved by {pretrained encoder has moved:.0%} of their size in {steps:.0f} steps",
            "its learning rate, lr x pretrained_lr_scale, is too high: what it knew is lost",
            f"--pretrained_lr_scale {min(0.1, train_config.pretrained_lr_scale / 100):g}, or --trainable_stages 0",
        )
    if 0 < new_rate < 2e-4 and above("steps", EARLY - 1) and above("training loss over the first", 0.8):
        found(
            "the learning rate is too low",
            f"lr {train_config.lr:g} is {{peak learning rate over weights:.4%}} of the size of the weights for each "
            "step; the loss has only fallen to {training loss over the first:.0%} of what it was",
            "the weights hardly move",
            f"--lr {0.005 * train_config.lr / new_rate:.0e}",
        )
    if model_config.label_smoothing > 0.3:
        found(
            "label smoothing is too strong",
            f"label_smoothing is {model_config.label_smoothing:g}, so the true word is worth "
            f"{1 - model_config.label_smoothing:.0%} of its target",
            "the model is asked for nearly the same probability for all words",
            "--label_smoothing 0.1",
        )
    names = ("emb_dropout", "attention_dropout", "mlp_dropout", "residual_dropout")
    strong = {name: getattr(model_config, name) for name in names if getattr(model_config, name) > 0.5}
    if strong:
        found(
            "dropout is too strong",
            f"{', '.join(f'{name} is {value:g}' for name, value in strong.items())}"
            + ("; the training loss is {training loss:.2f}" if "training loss" in m else ""),
            "most of what a layer computes is thrown away in training",
            " ".join(f"--{name} 0.1" for name in strong),
        )

    # --- the photos in the captions ---
    late = above("steps", EARLY - 1) or "steps" not in m  # a finished captioner has none
    after_an_epoch = above("epochs", 0.9) or "epochs" not in m
    variance = "image tokens' variance between photos"
    at_start = m.get("variance at the start", 0)
    if below(variance, 1e-4) or below(variance, min(0.03, 0.1 * at_start)):
        collapsed = at_start > 10 * m[variance]
        found(
            "the encoder sees no difference between photos",
            f"{{{variance}:.1e}} of the variance of image tokens is between photos"
            + (", at the start it was {variance at the start:.1e}" if collapsed else ""),
            "it collapsed in training" if collapsed else "its weights or its input are broken",
            "a lower --lr and a longer --warmup_share; with post_norm or a refiner --lr 3e-4 --warmup_share 0.3",
        )
    elif late and below("cross-attention's share of the text", 3e-3):
        found(
            "cross-attention adds nothing",
            "what it adds is at most {cross-attention's share of the text:.1e} of the text's own size in any block",
            "its output layer is zero and does not train",
            "see whether cross_attn.c_proj has requires_grad and a gradient",
        )
    elif late and not findings and "loss with the own photo" in m:
        gap = m["loss with another photo"] - m["loss with the own photo"]
        right = m["captions that their own photo suits clearly better"]
        wrong = m["captions that another photo suits clearly better"]
        seen = "with another photo's captions the loss is {loss with another photo:.2f} instead of "
        seen += "{loss with the own photo:.2f}"
        if gap < 0.01 * m["loss with the own photo"] and after_an_epoch:
            found(
                "the photo makes no difference",
                seen,
                "captions do not belong to their photos (rows shifted or shuffled), or photos cannot be told apart",
                "look at prepare_data.py --check and its contact sheet; more epochs if the loss still falls",
            )
        elif wrong > 0.1 and wrong > 0.2 * (right + wrong) and after_an_epoch:
            found(
                "many captions belong to other photos",
                "{captions that another photo suits clearly better:.0%} of the captions suit another photo clearly "
                "better than their own, {captions that their own photo suits clearly better:.0%} their own",
                "a part of the rows is shifted or shuffled",
                "look at prepare_data.py --check and its contact sheet",
            )

    # --- what it writes ---
    if above("captions written", 19) and late and after_an_epoch and not findings:
        if below("different ones among them", 0.05):
            found(
                "one caption for all photos",
                "{different ones among them:.0%} of {captions written} captions are different",
                "the decoder has learned the language, but not yet to look",
                "more epochs, or a lower --lr with a longer --warmup_share; see the worth of the photo",
            )
        if above("captions over three times the usual length", 0.2):
            found(
                "captions do not stop",
                "{captions over three times the usual length:.0%} of them are over three times as long as true ones",
                "the end is not learned yet, or not a target",
                "more epochs; see the share of captions whose end is a target",
            )
        if above("captions that repeat three words", 0.2):
            found(
                "captions repeat themselves",
                "in {captions that repeat three words:.0%} of them the same three words come three times",
                "the model is unsure, and greedy search follows the likeliest loop",
                "more epochs; for writing --no_repeat_ngram_size 3 or --beam 4",
            )
    if above("epochs in which validation loss rose", 2):
        found(
            "overfitting",
            "validation loss has risen for {epochs in which validation loss rose:.0f} epochs",
            "the model learns the training captions by heart",
            "fewer --epochs, more dropout, augmentation or data; the best epoch is kept anyway",
        )
    return findings


class _Shown(dict):
    """Measurements for `str.format_map`, whose names may be any text."""

    def __missing__(self, name):
        return math.nan


def _next_power(number):
    return 2 ** math.ceil(math.log2(max(2, number)))


class Diagnosis:
    """Takes the measurements while a run goes on, prints a warning when something is found that was not found before.

    `measured`: the newest numbers; `findings`: what they mean.
    """

    def __init__(self, config):
        """`config`: the train_config."""
        self.config, self.measured, self.findings = config, {}, []
        self.steps = self.skipped = self.clipped = 0
        self.losses, self.lowest = [], math.inf  # of recent steps; the lowest mean of ten of them
        self.first = None  # mean loss of the first ten steps
        self.batch = self.model = None
        self.weights = None  # `measurements.weights_of` the model before the first step
        self.gradients = {}  # norm of each part's gradient in the last step that was looked at

    def state_dict(self):
        """What a resumed run needs to go on; the photos to look at are those of its first batch, not kept here."""
        kept = {name: getattr(self, name) for name in KEPT}
        return kept | {"found": [finding.name for finding in self.findings]}

    def load_state_dict(self, state):
        """Go on from `state_dict`. Raises ValueError for parts of another form."""
        check(state, KEPT | {"found": [str]}, "['diagnosis']")
        numbers = {name: value for name, value in state["measured"].items() if name != "commonest caption"}
        check(numbers, {str: float}, "['diagnosis']['measured']")
        self.findings = [Finding(name, "", "", "") for name in state["found"]]  # not to be said again
        vars(self).update({name: state[name] for name in KEPT})

    def begin(self, model, training, validation, autocast):
        """Look at the captions of both splits (`Dataset` of the script) and at the weights before the first step."""
        self.model, self.autocast, self.tokenizer = model, autocast, training.tokenizer
        weights = measurements.weights_of(model)
        if form_of(self.weights) != form_of(weights) or any(
            (self.weights[part].shape, self.weights[part].dtype) != (values.shape, values.dtype)
            for part, values in weights.items()
        ):
            self.weights = weights  # a new run, or a damaged state
        self.measured |= measurements.of_captions(training) | measurements.of_preprocessing(model.config)
        self.measured |= measurements.of_photos(training.captions_of, validation.captions_of)

    def step(self, batch, place, loss, norm):
        """After a training step: its first batch, how far it is (epochs), its mean loss (None where it has none, or was
        left out), the norm of its gradient before clipping (NaN or infinite for a step that was left out)."""
        if self.model is None:  # an epoch by itself, without `begin`
            return
        self.steps += 1
        self.skipped += not math.isfinite(norm)
        self.clipped += norm > self.config.clip_norm
        if loss is not None:
            self.losses = [*self.losses[-9:], loss]
            if len(self.losses) == 10:
                mean = sum(self.losses) / 10
                self.first = mean if self.first is None else self.first
                self.lowest = min(self.lowest, mean)
        if self.batch is None:
            self.batch = batch  # the probe: the same photos every time
            device = self.model.gpt.tok_emb.weight.device
            self.measured |= measurements.of_batch(batching.to_device(list(batch), device), self.model, self.tokenizer)
            self.measured["variance at the start"] = self._look().get("image tokens' variance between photos", 0)
            self.report()
        if self.steps in FIRST_LOOKS:
            self.look(place)

    def look(self, place):
        """Look at the model after `place` epochs, and print what is found."""
        parts = measurements.movement(self.weights, self.model)
        new = [self.weights[part].square().mean().sqrt().item() for part in NEW_PARTS if part in self.weights]
        self.measured |= self._look() | {
            "steps": self.steps,
            "epochs": place,
            "steps left out": self.skipped,
            "share of steps left out": self.skipped / max(1, self.steps),
            "share of steps clipped": self.clipped / max(1, self.steps),
            "peak learning rate over weights": self.config.lr / max(1e-12, min(new)),
        }
        if self.first and self.losses:
            loss = sum(self.losses) / len(self.losses)
            guessing = math.log(len(self.tokenizer))
            self.measured |= {
                "training loss": loss,
                "training loss over the first": loss / self.first,
                "loss has risen by": loss - self.lowest,
                "loss above guessing": loss - guessing,
            }
        if self.model.config.encoder_weights != "scratch" and "encoder" in parts:
            self.measured["pretrained encoder has moved"] = parts["encoder"][1]
        self.gradients = measurements.of_gradients(self.model)
        self.report()

    def _look(self):
        with self.autocast():
            device = self.model.gpt.tok_emb.weight.device
            return measurements.of_model(self.model, batching.to_device(list(self.batch), device))

    def epoch(self, place, rows, captions, true_captions):
        """After an epoch: the rows of metrics.csv, captions that were written and the true ones of their photos."""
        self.measured |= measurements.of_written(captions, true_captions)
        losses = [row["valid_loss"] for row in rows]
        rising = 0
        while rising + 1 < len(losses) and losses[-1 - rising] > losses[-2 - rising]:
            rising += 1
        self.measured["epochs in which validation loss rose"] = rising
        if self.batch is not None:
            self.look(place)

    def report(self):
        """Find what the measurements mean; print a warning for each finding that is new."""
        known = {finding.name for finding in self.findings}
        self.findings = find(self.measured, self.model.config, self.config)
        for finding in self.findings:
            if finding.name not in known:
                print(f"WARNING: {finding}")
        for name in known - {finding.name for finding in self.findings}:
            print(f"no longer found: {name}")

    def rows(self):
        """The table of all measurements: [(name, number as text)]."""
        shown = {name: value for name, value in self.measured.items() if name not in HIDDEN}
        parts = {f"gradient of {part}": norm for part, norm in self.gradients.items()}
        return [(name, as_text(name, value)) for name, value in (shown | parts).items()]

    def as_table(self):
        """All measurements and findings, to be printed."""
        found = [str(finding) for finding in self.findings] or ["nothing was found"]
        return "\n".join(["", "diagnosis:", *(f"    {value:>10}  {name}" for name, value in self.rows()), *found, ""])


KEPT = {  # in a run's state: the form of each
    "weights": ({str: torch.Tensor}, None),
    "measured": {str: (float, str)},
    "gradients": {str: float},
    "steps": int,
    "skipped": int,
    "clipped": int,
    "losses": [float],
    "lowest": float,
    "first": (float, None),
}
HIDDEN = ("commonest caption", "photos", "variance at the start", "loss above guessing", "steps left out")
SHARES = ("share", "captions that", "captions whose", "captions over", "captions cut", "photos", "unknown", "different",
          "empty", "evenness", "peak", "pretrained", "training loss over", "validation photos")  # fmt: skip


def as_text(name, value):
    """A measurement as text: shares in per cent."""
    if name.startswith(SHARES) or "share" in name:
        return f"{value:.2%}" if value and abs(value) < 0.01 else f"{value:.0%}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def of_captioner(model, training, validation, batch, written, autocast, config):
    """A finished captioner and a dataset -> `Diagnosis` with what can be told without training it.

    `training`, `validation`: `Dataset` of the script; `batch`: of `collate_fn`, on the model's device; `written`:
    captions of some photos, and for each of them its true ones; `config`: the train_config.
    """
    diagnosis = Diagnosis(config)
    diagnosis.begin(model, training, validation, autocast)
    diagnosis.batch = batch
    diagnosis.measured |= measurements.of_batch(batch, model, diagnosis.tokenizer) | diagnosis._look()
    diagnosis.measured |= measurements.of_written(*written)
    diagnosis.findings = find(diagnosis.measured, model.config, config)
    return diagnosis
