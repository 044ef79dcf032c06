"""The objective of ordinary training: predict the next token of every caption.

An objective is what `Trainer.train_step` trains on; `self_critical.SelfCritical` is the other one. It has a `loader`,
whose batches its methods take; the `name` of the number that an epoch reports; a `stage`, what metrics.csv calls it,
where that is not the stage of the parameters; `dropout`, whether a step has dropout; the number of `images` of an
epoch; `captions_per_image`; and the methods `count`, `captions_in`, `to_device` and `loss`.
"""

from captioning.data import batching
from captioning.model.loss import IGNORED_LABEL, label_places
from captioning.model.stages import norm_of_one_value


def check_batches(model, loader):
    """Raise ValueError when a batch of the training `loader` may have a single photo, of which a BatchNorm that
    normalises with the batch sees a single value a channel: it cannot, and training would end there, maybe after an
    hour."""
    if loader.batch_sampler.photos_in_smallest_batch() > 1:
        return
    if norm := norm_of_one_value(model):
        raise ValueError(
            f"a batch of an epoch has one photo, of which {norm} sees one value a channel (img_size "
            f"{model.preprocessing['img_size']}), and BatchNorm cannot train on one value: change batch_size "
            f"{loader.batch_sampler.groups_per_batch * loader.batch_sampler.captions_per_image} so that the last batch "
            "of an epoch has more, or give a larger img_size in encoder_options"
        )


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

    def to_device(self, batch, device):
        """A batch of `loader` -> the arguments of the model on its device. The places of the labels are found before,
        because how many there are decides the shapes of what follows: found on a GPU, the step would wait for it."""
        places = label_places(batch[2])  # (real labels,)
        return batching.to_device([*batch, places.pin_memory() if device.type == "cuda" else places], device)

    def loss(self, inputs):
        """The result of `to_device` -> (loss, a scalar; its value as a tensor). Called under autocast."""
        loss = self.model(*inputs)
        return loss, loss.detach()
