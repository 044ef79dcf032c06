"""The objective of ordinary training: predict the next token of every caption.

An objective is what `Trainer.train_step` trains on; `self_critical.SelfCritical` is the other one. It has a `loader`,
whose batches its methods take; the `name` of the number that an epoch reports; a `stage`, what metrics.csv calls it,
where that is not the stage of the parameters; `dropout`, whether a step has dropout; the number of `images` of an
epoch; `captions_per_image`; and the methods `count`, `captions_in` and `loss`.
"""

from captioning.model.loss import IGNORED_LABEL


class CrossEntropy:
    """The mean cross-entropy over the labels of a batch of `collate_fn`."""

    name, stage, dropout = "loss", None, True

    def __init__(self, model, loader):
        """`model`: a `VisionGPT2Model`, compiled or not."""
        self.model, self.loader = model, loader
        self.captions_per_image = getattr(loader.dataset, "captions_per_image", 1)
        self.images = len(loader.dataset) // self.captions_per_image

    def count(self, batch):
        """How many labels of a batch the loss is the mean of."""
        return int((batch[2] != IGNORED_LABEL).sum())

    def captions_in(self, batch):
        """How many captions a batch has."""
        return len(batch[2])

    def loss(self, batch):
        """A batch on the model's device, (images, input_ids, labels) -> (loss, a scalar; its value as a number). Called
        under autocast."""
        loss = self.model(*batch)
        return loss, loss.item()
