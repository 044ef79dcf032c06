"""Which captions of a dataset are wrong? A captioner ranks the pairs of photo and caption by likelihood ratio: how much
likelier a caption is given its own photo than given other photos of the set, on average over a sample of them.

The work grows with captions x sample, not with captions x photos. The captioner may have been trained on these very
pairs: what most captions of a set teach is stronger than what a few wrong ones do.
"""

import random
from dataclasses import dataclass

import torch

from captioning.common.progress import progress_bar
from captioning.common.stopping import stop_if_asked
from captioning.data import exclusions
from captioning.data.batching import to_device
from captioning.decoding.search import token_log_probabilities
from captioning.images.preprocessing import preprocess
from captioning.model.tokenizer import encode_caption
from captioning.pages import html_pages

OTHERS = 16  # photos of the sample
CAPTIONS_AT_A_TIME = 256
SHOWN = 40  # of the worst pairs, and of the captions that fit no photo, on the page
SEARCHED = 500  # photos among which the page looks for the one that fits such a caption best
PAGE_FILE, TABLE_FILE, EXCLUDE_FILE = "pairs.html", "pairs.csv", "exclude.csv"


@dataclass
class Pair:
    """A caption with its photo. Log-probabilities are in nats; `tokens` of the caption, EOS included. Words that a word
    list lacks count in neither: any word may stand for them."""

    image: str
    caption: str
    tokens: int
    own: float  # log-probability given its own photo
    others: float  # log of the mean probability given the photos of the sample
    best_other: float  # log-probability given the photo of the sample that fits best

    @property
    def ratio(self):
        """The log-likelihood ratio; below 0 the caption fits other photos better than its own."""
        return self.own - self.others

    @property
    def best_fit(self):
        """Log-probability per token given the photo that fits best, its own included."""
        return max(self.own, self.best_other) / self.tokens


class PairScorer:
    """Log-probabilities of captions given photos, by a captioner in eval mode."""

    def __init__(self, model, tokenizer, load_batch=None, batch_size=64):
        """`load_batch` as in `search.caption_batches`; `batch_size`: photos that are encoded at a time."""
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device = next(model.parameters()).device
        self.load_batch = load_batch or self._preprocessed

    def _preprocessed(self, images):
        return torch.stack([preprocess(image, **self.model.preprocessing) for image in images])  # (B, 3, H, W)

    @torch.inference_mode()
    def encode(self, images):
        """Photos -> what each decoder block attends to, (B, N, embed_dim) each."""
        return self.model.encoder_states(to_device(self.load_batch(images), self.device))

    @torch.inference_mode()
    def score(self, captions, states):
        """Log-probabilities of captions given photos -> float tensor (len(captions),).

        `states` of B photos: those of one photo are for all captions, else each photo has equally many of them, which
        lie side by side.
        """
        config = self.model.config
        rows = [torch.tensor(encode_caption(self.tokenizer, caption, config.seq_len)) for caption in captions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.eos_token_id).to(self.device)
        log_probs = token_log_probabilities(self.model, states, ids, prompt_length=1)  # (captions, T - 1)
        return log_probs.masked_fill(ids[:, 1:] == config.unk_token_id, 0).sum(1).float()

    def rank(self, captions_of, others=OTHERS, seed=0):
        """{path of a photo: its captions} -> list of `Pair`, the worst first; `others`: how many photos are sampled."""
        images = list(captions_of)
        sample = random.Random(seed).sample(images, min(others, len(images)))
        states_of_sample = [self.encode([image]) for image in sample]
        by_count = {}  # photos with equally many captions share a batch
        for image, captions in captions_of.items():
            by_count.setdefault(len(captions), []).append(image)
        pairs, bar = [], progress_bar(len(images), "pairs")
        for count, same in by_count.items():
            size = min(self.batch_size, max(1, CAPTIONS_AT_A_TIME // count))
            for start in range(0, len(same), size):
                batch = same[start : start + size]
                pairs += self._score_batch(batch, captions_of, sample, states_of_sample)
                bar.update(len(batch))
                stop_if_asked()
        bar.close()
        return sorted(pairs, key=lambda pair: pair.ratio)

    def _score_batch(self, images, captions_of, sample, states_of_sample):
        own_image = [image for image in images for _ in captions_of[image]]
        captions = [caption for image in images for caption in captions_of[image]]
        own = self.score(captions, self.encode(images))  # (captions,)
        given = torch.stack([self.score(captions, states) for states in states_of_sample])  # (sample, captions)
        is_own = torch.tensor([[image == other for image in own_image] for other in sample], device=self.device)
        given = given.masked_fill(is_own, -torch.inf)
        mean = given.logsumexp(0) - (~is_own).sum(0).log()
        ids = [encode_caption(self.tokenizer, caption, self.model.config.seq_len)[1:] for caption in captions]
        lengths = [sum(token != self.model.config.unk_token_id for token in row) for row in ids]
        columns = own.tolist(), mean.tolist(), given.amax(0).tolist()
        return [Pair(*row) for row in zip(own_image, captions, lengths, *columns, strict=True)]

    def best_photos(self, captions, images):
        """For each caption the photo that fits it best -> list of (photo, log-probability)."""
        best = [(None, -torch.inf)] * len(captions)
        for start in range(0, len(images), self.batch_size):
            stop_if_asked()
            batch = images[start : start + self.batch_size]
            states = self.encode(batch)
            for n, image in enumerate(batch):
                given = self.score(captions, [tokens[n : n + 1] for tokens in states]).tolist()
                best = [
                    max(old, (image, new), key=lambda found: found[1]) for old, new in zip(best, given, strict=True)
                ]
        return best


def check_pairs(scorer, captions_of, data_dir, report_dir, others=OTHERS, drop=None, seed=0):
    """Rank the pairs of a dataset, write the table of all, the page of the worst, and with `drop` (a share) the list of
    so many of the worst for `exclude` -> list of `Pair`, the worst first.

    captions_of: {path of a photo: its captions}. Raises ValueError for fewer than two photos.
    """
    if len(captions_of) < 2:
        raise ValueError(f"{data_dir}: {len(captions_of)} photo has no others to be compared with")
    pairs = scorer.rank(captions_of, others, seed)
    report_dir.mkdir(parents=True, exist_ok=True)

    def write(name, chosen):
        columns = ("ratio", "log_probability", "best_fit_per_token")
        rows = [(p.image, p.caption, f"{p.ratio:.3f}", f"{p.own:.3f}", f"{p.best_fit:.3f}") for p in chosen]
        exclusions.write_list(report_dir / name, rows, data_dir, columns)

    write(TABLE_FILE, pairs)
    misfits = sorted(pairs, key=lambda pair: pair.best_fit)[:SHOWN]
    searched = random.Random(seed).sample(list(captions_of), min(SEARCHED, len(captions_of)))
    title = f"Pairs of {data_dir}, worst first"
    write_page(report_dir / PAGE_FILE, title, scorer, pairs[:SHOWN], misfits, searched, captions_of)
    negative = sum(pair.ratio < 0 for pair in pairs)
    print(
        f"{len(pairs):,} captions compared with {min(others, len(captions_of))} other photos: {negative:,} fit these "
        f"better than their own. The worst are in {report_dir / PAGE_FILE}, all in {report_dir / TABLE_FILE}"
    )
    if drop is not None:
        worst = pairs[: round(drop * len(pairs))]
        write(EXCLUDE_FILE, worst)
        print(
            f"the worst {len(worst):,} are in {report_dir / EXCLUDE_FILE}: train with --exclude on it to leave them out"
        )
    return pairs


def write_page(path, title, scorer, worst, misfits, searched, captions_of):
    """Write the page of the worst pairs, beside the photo among `searched` that fits each caption best, and of the
    captions that fit no photo well."""
    best = scorer.best_photos([pair.caption for pair in worst], searched)
    cards = []
    for pair, (image, log_probability) in zip(worst, best, strict=True):
        rest = [caption for caption in captions_of[pair.image] if caption != pair.caption]
        note = f"ratio {pair.ratio:.1f} nats; log p given its photo {pair.own:.1f}, the best {log_probability:.1f}"
        cards.append(dict(own=pair.image, best=image, caption=pair.caption, others=rest, note=note))
    photos = [
        (p.image, p.caption, [], f"{p.best_fit:.2f} nats a token given the photo that fits best") for p in misfits
    ]
    html_pages.write_pairs_page(path, title, cards, photos)
