"""Self-critical sequence training (Rennie et al. 2017): after cross-entropy the model learns from its own captions.

Captions are drawn for each photo and rewarded with their CIDEr, or with it and BLEU-4. What lies above the photo's
baseline becomes likelier, what lies below less likely: the gradient of -(reward - baseline) * log p(caption). The
baseline is the reward of the greedy caption, or the mean reward of the photo's other draws, which costs nothing more
(Luo 2020). In place of draws the captions that beam search ends with may be used, as Cornia et al. (2020, Meshed-
Memory Transformer) do: they are few good captions that differ, so what is learned is which of them is best.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data

from captioning.data.batching import CaptionBatchSampler, build_loader, stack, to_device
from captioning.decoding.cached_decoder import next_token_logits
from captioning.decoding.search import generate_ids, until_first_eos
from captioning.model.tokenizer import encode_caption

# Rewarded as a word of its own, in draws that ended and in all references: without it a caption that breaks off ("a man
# in a") loses nothing, and the model learns to break off.
END_WORD = "<end>"


class SelfCritical:
    """The objective of self-critical training, with the interface of `cross_entropy.CrossEntropy`: draws and
    rewards captions for the photos of a training `Dataset`, and reports the mean reward of a batch's photos."""

    name, stage = "reward", "self-critical"
    dropout = False  # the draws are made without dropout, and so is the step that learns from them

    def __init__(self, model, dataset, config):
        """`config`: the train_config; its batch_size counts the captions that a step draws.

        Raises ValueError for questions: their answers are no captions.
        """
        # Here, so that captioning a photo does not wait for it: the tokenizer's rules are large when they are compiled.
        from captioning.scoring.metrics import CiderD
        from captioning.scoring.tokenization import tokenize

        self.by = config.score_tokens
        self.model, self.tokenizer = model, dataset.tokenizer
        self.samples, self.baseline, self.draws = config.scst_samples, config.scst_baseline, config.scst_draws
        self.bleu_weight = config.scst_bleu
        if any(dataset.prompts):
            raise ValueError(
                "self-critical training rewards captions; this dataset asks questions: set --scst_epochs 0"
            )
        self.photos = list(dataset.captions_of)
        texts = [caption for photo in self.photos for caption in dataset.captions_of[photo]]
        words = iter(tokenize(texts, self.by))
        self.references = [[f"{next(words)} {END_WORD}" for _ in dataset.captions_of[photo]] for photo in self.photos]
        self.cider = CiderD(self.references, cached_images=20_000)  # at most some 1 GB
        # A draw that goes on for ever would hold up its batch: nearly all true captions are at most this long.
        lengths = [len(encode_caption(self.tokenizer, text, dataset.max_length)) for text in texts]
        self.max_tokens = int(np.quantile(lengths, 0.99))
        self.captions_per_image, self.images = self.samples, len(self.photos)
        per_step = max(1, config.batch_size // self.samples)
        self.unreadable_photos = dataset.unreadable_photos
        sampler = CaptionBatchSampler(self.photos, per_step, seed=dataset.seed)
        self.loader = build_loader(_PhotosOnce(dataset, self.photos), sampler, _collate, config)

    def count(self, batch):
        """How many photos a batch of `loader` has."""
        return len(batch[1])

    def captions_in(self, batch):
        """How many captions are drawn for a batch of `loader`."""
        return self.samples * len(batch[1])

    def to_device(self, batch, device):
        """A batch of `loader` with its images on the device; the indices of their `photos` (B,) are read on the CPU."""
        images, indices = batch
        return to_device(images, device), indices

    def loss(self, batch):
        """The result of `to_device` -> (loss, a scalar whose gradient is the policy gradient; mean reward of the
        draws, as a tensor). Called under autocast."""
        model, (images, indices) = self.model, batch
        levels = images if isinstance(images, list) else model.levels(images)  # once for draws and loss
        bos = torch.full((len(indices), 1), self.tokenizer.bos_token_id, device=levels[0].device)  # (B, 1)
        generate = partial(generate_ids, model, levels, bos, max_tokens=self.max_tokens)
        beams = self.samples if self.draws == "beam" else 1
        ids = generate(num_return_sequences=self.samples, num_beams=beams)  # (B * samples, T)
        ids = ids.clone()  # out of inference mode
        torch.clear_autocast_cache()  # of weights that were cast in inference mode, which no gradient could pass
        rewards = self.rewards(ids, indices.repeat_interleave(self.samples)).view(-1, self.samples)  # (B, samples)
        if self.baseline == "mean":
            baselines = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        else:
            baselines = self.rewards(generate(deterministic=True), indices)[:, None]  # (B, 1)
            torch.clear_autocast_cache()
        readable = torch.tensor([self.photos[i] not in self.unreadable_photos for i in indices.tolist()])  # (B,)
        advantages = ((rewards - baselines) * readable[:, None]).to(ids.device).flatten()  # (B * samples,)
        targets = ids[:, 1:]
        real = until_first_eos(targets, self.tokenizer.eos_token_id)  # (B * samples, T - 1)
        hidden = model.decode(ids[:, :-1], model.encoder_states(levels))
        nll = F.cross_entropy(next_token_logits(model, hidden[real]), targets[real], reduction="none")
        # Minimising reward-weighted -log p raises the probability of what was better than its baseline.
        return (nll * advantages[:, None].expand_as(real)[real]).mean(), rewards.mean().to(ids.device)

    def rewards(self, ids, indices):
        """Ids of captions (rows, T) that begin with BOS, indices (rows,) of their photos -> CIDEr of each, and
        `scst_bleu` times BLEU-4 on top of it, float32 (rows,)."""
        from captioning.scoring.metrics import sentence_bleu
        from captioning.scoring.tokenization import tokenize

        texts = tokenize([self.tokenizer.decode(row[1:]) for row in ids.tolist()], self.by)
        ended = (ids[:, 1:] == self.tokenizer.eos_token_id).any(1).tolist()
        texts = [f"{text} {END_WORD}" if end else text for text, end in zip(texts, ended, strict=True)]
        references = [self.references[i] for i in indices.tolist()]
        scores = np.asarray(self.cider.scores(texts, references))
        if self.bleu_weight:
            scores = scores + self.bleu_weight * sentence_bleu(texts, references)
        return torch.tensor(scores, dtype=torch.float32)


class _PhotosOnce(torch.utils.data.Dataset):
    """Each photo of a caption dataset once: (the model's input, index of the photo)."""

    def __init__(self, dataset, photos):
        self.dataset, self.photos, self.unreadable_photos = dataset, photos, dataset.unreadable_photos

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch)

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, i):
        return self.dataset.load_input(self.photos[i], i), i


def _collate(batch):
    images, indices = zip(*batch, strict=True)
    return stack(images), torch.tensor(indices)
