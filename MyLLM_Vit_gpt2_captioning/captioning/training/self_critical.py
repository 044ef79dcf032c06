"""Self-critical sequence training (Rennie et al. 2017): after cross-entropy the model learns from its own captions.

Captions are drawn for each photo and rewarded with their CIDEr. What lies above the photo's baseline becomes likelier,
what lies below less likely: the gradient of -(reward - baseline) * log p(caption). The baseline is the reward of the
greedy caption, or the mean reward of the photo's other draws, which costs nothing more (Luo 2020). In place of draws
the captions that beam search ends with may be used, as Cornia et al. (2020, Meshed-Memory Transformer) do: they are few
good captions that differ, so what is learnt is which of them is best.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data

from captioning.data.batching import CaptionBatchSampler, build_loader, stack
from captioning.decoding.cached_decoder import next_token_scores
from captioning.decoding.search import generate_ids
from captioning.model.tokenizer import encode_caption

BASELINES = ("mean", "greedy")
DRAWS = ("sample", "beam")
# Rewarded as a word of its own, in draws that ended and in all references: without it a caption that breaks off ("a man
# in a") loses nothing, and the model learns to break off.
END_WORD = "<end>"


class SelfCritical:
    """Draws and rewards captions for the photos of a training `Dataset`; `loader` yields batches for `loss`."""

    def __init__(self, dataset, config):
        """`config`: the train_config; its batch_size counts the captions that a step draws.

        Raises ValueError for questions (their answers are no captions), an unknown baseline and too few samples.
        """
        # Here, so that captioning a photo does not wait for it: the tokenizer's rules are large when they are compiled.
        from captioning.scoring.metrics import CiderD
        from captioning.scoring.ptb_tokenization import tokenize

        samples, baseline, self.draws = config.scst_samples, config.scst_baseline, config.scst_draws
        if any(dataset.prompts):
            raise ValueError(
                "self-critical training rewards captions; this dataset asks questions: set --scst_epochs 0"
            )
        if baseline not in BASELINES:
            raise ValueError(f"scst_baseline {baseline!r} is not one of {', '.join(BASELINES)}")
        if self.draws not in DRAWS:
            raise ValueError(f"scst_draws {self.draws!r} is not one of {', '.join(DRAWS)}")
        if samples < 2 and (baseline == "mean" or self.draws == "beam"):
            raise ValueError(f"scst_samples {samples}: a beam, and the mean of a photo's other draws, need at least 2")
        self.tokenizer, self.samples, self.baseline = dataset.tokenizer, samples, baseline
        self.photos = list(dataset.captions_of)
        texts = [caption for photo in self.photos for caption in dataset.captions_of[photo]]
        words = iter(tokenize(texts))
        self.references = [[f"{next(words)} {END_WORD}" for _ in dataset.captions_of[photo]] for photo in self.photos]
        self.cider = CiderD(self.references, cached_images=20_000)  # at most some 1 GB
        # A draw that goes on for ever would hold up its batch: nearly all true captions are at most this long.
        lengths = [len(encode_caption(self.tokenizer, text, dataset.max_length)) for text in texts]
        self.max_tokens = int(np.quantile(lengths, 0.99))
        per_step = max(1, config.batch_size // samples)
        self.unreadable_photos = dataset.unreadable_photos
        sampler = CaptionBatchSampler(self.photos, per_step, seed=dataset.seed)
        self.loader = build_loader(_PhotoDataset(dataset, self.photos), sampler, _collate, config)

    def loss(self, model, images, places, autocast):
        """A batch of `loader` -> (loss, a scalar whose gradient is the policy's; mean reward of the draws).

        images: what the model takes, B of them; places (B,): which of `photos` they are.
        """
        with autocast():
            levels = images if isinstance(images, list) else model.levels(images)  # once for draws and loss
        bos = torch.full((len(places), 1), self.tokenizer.bos_token_id, device=levels[0].device)
        draw = partial(generate_ids, model, levels, bos, max_tokens=self.max_tokens)
        with autocast():
            beams = self.samples if self.draws == "beam" else 1
            ids = draw(
                num_return_sequences=self.samples, num_beams=beams
            ).clone()  # (B * samples, T); out of inference mode
        rewards = self.rewards(ids, places.repeat_interleave(self.samples)).view(-1, self.samples)  # (B, samples)
        if self.baseline == "mean":
            baselines = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        else:
            with autocast():
                greedy = draw(deterministic=True)  # (B, T)
            baselines = self.rewards(greedy, places)[:, None]
        readable = torch.tensor([self.photos[place] not in self.unreadable_photos for place in places.tolist()])
        advantages = ((rewards - baselines) * readable[:, None]).to(ids.device).flatten()  # (B * samples,)
        targets = ids[:, 1:]
        ends = targets == self.tokenizer.eos_token_id
        real = ends.cumsum(1) - ends.long() == 0  # (B * samples, T - 1): up to the first EOS, which counts
        with autocast():
            hidden = model.decode(ids[:, :-1], model.encoder_states(levels))
            surprise = F.cross_entropy(next_token_scores(model, hidden[real]), targets[real], reduction="none")
        # Minimising reward-weighted -log p raises the probability of what was better than its baseline.
        return (surprise * advantages[:, None].expand_as(real)[real]).mean(), float(rewards.mean())

    def rewards(self, ids, places):
        """Captions ids (rows, T) that begin with BOS, places (rows,) of their photos -> CIDEr, float32 (rows,)."""
        from captioning.scoring.ptb_tokenization import tokenize

        texts = tokenize([self.tokenizer.decode(row[1:]) for row in ids.tolist()])
        ended = (ids[:, 1:] == self.tokenizer.eos_token_id).any(1).tolist()
        texts = [f"{text} {END_WORD}" if end else text for text, end in zip(texts, ended, strict=True)]
        scores = self.cider.scores(texts, [self.references[place] for place in places.tolist()])
        return torch.tensor(scores, dtype=torch.float32)


class _PhotoDataset(torch.utils.data.Dataset):
    """Each photo of a caption dataset once: (what the model takes, its place)."""

    def __init__(self, dataset, photos):
        self.dataset, self.photos, self.unreadable_photos = dataset, photos, dataset.unreadable_photos

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch)

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, place):
        return self.dataset.look(self.photos[place], place), place


def _collate(batch):
    images, places = zip(*batch, strict=True)
    return stack(images), torch.tensor(places)
