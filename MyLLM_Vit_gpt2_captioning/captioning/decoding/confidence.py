"""Confidence: the probability that a word of a finished caption is right, and that the whole caption is.

The decoder is asked twice about a finished caption: how likely is each word with the photo, and how likely is it
without one? A word that is likely both times was guessed, one that only the photo makes likely was seen. "Without a
photo" means that each decoder block attends to a single token, the mean of all image tokens of the photos that the
captioner was calibrated on. Neither question changes a caption; each costs one pass over it. A captioner that was
calibrated with `shifted` copies of the photo is asked about these, too: a word on which they disagree is unsure. None
of this tells a photo of a kind that training never showed, so such photos are found by themselves: `familiarity.py`.

Log-probabilities are no probabilities of being right. `scoring/calibration.py` learns from validation photos, whose
captions can be judged, what they are worth; the result, a `Confidence`, is part of the captioner's config.json.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from captioning.common.files import CONFIG_FILE, write_atomically
from captioning.decoding.attention_maps import group_words
from captioning.decoding.cached_decoder import next_token_logits
from captioning.decoding.familiarity import DIM, Familiarity, trust
from captioning.decoding.search import Options, caption_batches, token_log_probabilities

KEY = "confidence"  # in config.json
MAX_LOG_ODDS = 12.0  # beyond it, differences say nothing
SHIFT = 1 / 24  # of the photo's side, by which its copies are moved
SEEN = 2.0  # a word that the photo makes this many times as likely counts as seen, another one as guessed
HOW_TO_CALIBRATE = "evaluate_captions.py CAPTIONER --data DATASET --split val --calibrate"


@dataclass
class Evidence:
    """What the decoder says about one caption: log-probabilities in nats, of a word the sum over its tokens."""

    words: list[str]
    with_photo: np.ndarray  # (words,)
    without: np.ndarray  # (words,)
    agreed: np.ndarray  # (words,): of the mean probability with the photo and its shifted copies
    end: float  # of EOS, with the photo; 0 where the caption was cut off
    log_probability: float  # of all tokens behind the prompt, with the photo
    positions: list[list[int]]  # of each word's tokens in the ids

    def seen(self):
        """For each word whether the photo made it `SEEN` times as likely -> bool array (words,)."""
        return self.with_photo - self.without >= np.log(SEEN)


@dataclass
class Judged:
    """The confidence of a caption, that of its words `evidence.words`, and what they follow from; `familiarity` of the
    photo is None where nothing is known about the photos of training."""

    caption: float
    words: list[float]
    evidence: Evidence
    familiarity: float | None = None


@dataclass
class Calibration:
    """Features (n, F) -> probabilities (n,) that what they describe is right: a logistic regression (Platt 1999)."""

    weights: list[float]  # (F,)
    bias: float

    def __call__(self, features):
        log_odds = np.asarray(features, dtype=float).reshape(-1, len(self.weights)) @ np.asarray(self.weights)
        return 1 / (1 + np.exp(-np.clip(log_odds + self.bias, -MAX_LOG_ODDS, MAX_LOG_ODDS)))


@dataclass
class Confidence:
    """What a captioner needs to be asked for its confidence.

    `no_photo` (depth, embed_dim): the token that each decoder block attends to when there is no photo; `usual`: how
    often a word is right, whatever the photo, as log-odds, under "" those of a word that is not in the table; `word`
    and `caption`: a `Calibration` each; `about`: on how many photos all this was learnt, and what "right" means there;
    `shifted`: whether the photo's shifted copies are looked at; `familiarity`: what the photos of training are like,
    None where that is not known.
    """

    no_photo: torch.Tensor
    usual: dict[str, float]
    word: Calibration
    caption: Calibration
    about: dict
    shifted: bool = False
    familiarity: Familiarity | None = None

    @classmethod
    def load(cls, folder):
        """The one in config.json of a captioner's folder; None for a captioner that is not calibrated. Raises
        ValueError that names the file for one that cannot be read."""
        path = Path(folder) / CONFIG_FILE
        if (stored := json.loads(path.read_text(encoding="utf-8")).get(KEY)) is None:
            return None
        try:
            no_photo = torch.from_numpy(_from_text(stored["no_photo"], "<f4").reshape(stored["no_photo_shape"]))
            calibrations = [Calibration(**stored[name]) for name in ("word", "caption")]
            known = cls(no_photo, stored["usual"], *calibrations, stored["about"], bool(stored.get("shifted", False)))
            if photos := stored.get("familiarity"):  # captioners from before it have none
                centroids = _from_text(photos["centroids"], "<f2").reshape(-1, DIM)
                distances = np.sort(_from_text(photos["distances"], "<f4"))
                if not (centroids.size and np.isfinite(centroids).all() and np.isfinite(distances).all()):
                    raise ValueError("familiarity: no numbers to measure with")
                known.familiarity = Familiarity(torch.from_numpy(centroids), torch.from_numpy(distances))
            return known
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its {KEY} cannot be read ({error!r}); calibrate the captioner again: {HOW_TO_CALIBRATE}"
            ) from error

    def save(self, folder):
        """Write it into config.json of a captioner's folder."""
        path = Path(folder) / CONFIG_FILE
        config = json.loads(path.read_text(encoding="utf-8"))
        config[KEY] = {
            "about": self.about,
            "shifted": self.shifted,
            "word": vars(self.word),
            "caption": vars(self.caption),
            "usual": {word: round(value, 3) for word, value in self.usual.items()},
            "no_photo_shape": list(self.no_photo.shape),
            "no_photo": _as_text(self.no_photo, "<f4"),
        }
        if self.familiarity:
            centroids, distances = self.familiarity.centroids, self.familiarity.distances
            config[KEY]["familiarity"] = dict(
                centroids=_as_text(centroids, "<f2"), distances=_as_text(distances, "<f4")
            )
        write_atomically(path, lambda draft: draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))

    def judge(self, model, tokenizer, images, ids, prompt_length, pixels=None):
        """Finished captions -> a list of `Judged`, one a caption. `images`: pixels or the image tokens of
        `model.levels`; other arguments as in `log_probabilities`."""
        with torch.inference_mode():
            states = model.encoder_states(images)
        asked = self.log_probabilities(model, states, ids, prompt_length, pixels)
        photos = self.familiarity(states).repeat(len(ids) // len(states[0])) if self.familiarity else [None] * len(ids)
        judged = []
        for one, familiar in zip(evidence_of(tokenizer, *asked, ids, prompt_length), photos, strict=True):
            of_words = self.word(word_features(one, self.usual))
            of_caption = self.caption(caption_features(one, of_words))
            if familiar is not None:
                familiar = float(familiar)
                of_words, of_caption = trust(familiar) * of_words, trust(familiar) * of_caption
            judged.append(Judged(float(of_caption[0]), of_words.tolist(), one, familiar))
        return judged

    @torch.inference_mode()
    def log_probabilities(self, model, states, ids, prompt_length, pixels=None):
        """What the decoder blocks attend to, ids (B * K, T) -> `search.token_log_probabilities` with the photo and
        without it, (B * K, new) each, and a list of those with its shifted copies, which are made of `pixels`
        (B, 3, H, W) and empty unless `shifted`.

        Raises ValueError where `shifted` needs pixels and there are none.
        """
        without = no_photo_states(self.no_photo, states)
        both = [token_log_probabilities(model, s, ids, prompt_length) for s in (states, without)]
        return *both, of_shifted_copies(model, pixels, ids, prompt_length) if self.shifted else []


def _as_text(tensor, dtype):
    """Numbers of a tensor as NumPy's `dtype` -> base64 without a slash: nothing takes it for a path."""
    return base64.urlsafe_b64encode(tensor.detach().cpu().float().numpy().astype(dtype).tobytes()).decode()


def _from_text(text, dtype):
    """The result of `_as_text` -> float32 array of one dimension."""
    return np.frombuffer(base64.urlsafe_b64decode(text), dtype).astype(np.float32)


class JudgedCaptions(dict):
    """{index of an image: [`Judged` of each of its captions]}; as `observe` of `search.caption_batches` it is filled
    while captions are made."""

    def __init__(self, known, model, tokenizer):
        """`known`: the captioner's `Confidence`."""
        super().__init__()
        self.known, self.model, self.tokenizer = known, model, tokenizer

    def __call__(self, indices, levels, ids, prompt_length, pixels):
        judged = self.known.judge(self.model, self.tokenizer, levels, ids, prompt_length, pixels)
        count = len(judged) // len(indices)
        self.update((i, judged[n * count : (n + 1) * count]) for n, i in enumerate(indices))


def caption_with_confidence(model, tokenizer, images, known, options=None, **arguments):
    """Caption images with a calibrated captioner -> for each image a list of (caption, its `Judged`), one a caption.

    `known`: the captioner's `Confidence`; `options`: a `search.Options`, greedy search when not given; `arguments`:
    batch_size, prompt and load_batch of `search.caption_batches`. The captions are those of `search.caption_images`.
    """
    judged, texts = JudgedCaptions(known, model, tokenizer), {}
    options = options or Options(deterministic=True)
    for i, captions, _ in caption_batches(model, tokenizer, images, options, observe=judged, **arguments):
        texts[i] = captions
    return [list(zip(texts[i], judged[i], strict=True)) for i in range(len(images))]


def no_photo_states(no_photo, like):
    """Vectors (depth, embed_dim) -> what each decoder block attends to without a photo: (1, 1, embed_dim) each, with
    device and dtype of the encoder states `like`."""
    return [vector.to(states).view(1, 1, -1) for vector, states in zip(no_photo, like, strict=True)]


@torch.inference_mode()
def of_shifted_copies(model, pixels, ids, prompt_length):
    """`search.token_log_probabilities` with four copies of the photos in `pixels` (B, 3, H, W), moved left, right, up
    and down by SHIFT of their side; what comes in at the edge repeats it. -> list of (B * K, new)."""
    if pixels is None:
        raise ValueError(
            "the confidence of this captioner looks at shifted photos, not at cached tokens: no --cache_dir"
        )
    places = [torch.arange(side, device=pixels.device) for side in pixels.shape[-2:]]  # rows, columns
    found = []
    for axis, index in zip((-2, -1), places, strict=True):
        step = max(1, round(len(index) * SHIFT))
        for by in (step, -step):
            copy = pixels.index_select(axis, (index + by).clamp(0, len(index) - 1))
            found.append(token_log_probabilities(model, model.encoder_states(copy), ids, prompt_length))
    return found


def evidence_of(tokenizer, with_photo, without, copies, ids, prompt_length):
    """Log-probabilities of the tokens (rows, new) with the photo, without it, and a list of those with its copies; ids
    (rows, T) -> `Evidence` of each row; the words of the prompt, which nobody chose, are not in it."""
    found = []
    of_all = torch.stack([without, with_photo, *copies], dim=1).double().cpu().numpy()  # (rows, 2 + copies, new)
    for row, log_probs in zip(ids.tolist(), of_all, strict=True):
        words = [(word, positions) for word, positions in group_words(tokenizer, row) if positions[0] >= prompt_length]
        sums = [log_probs[:, [p - prompt_length for p in at]].sum(1) for _, at in words]
        sums = np.array(sums).reshape(len(words), len(log_probs))  # (words, 2 + copies)
        agreed = np.logaddexp.reduce(sums[:, 1:], axis=1) - np.log(len(log_probs) - 1)
        end = words[-1][1][-1] + 1 - prompt_length if words else 0
        own = log_probs[1]
        of_end, total = float(own[end]) if end < len(own) else 0.0, float(own.sum())
        texts, places = [word for word, _ in words], [at for _, at in words]
        found.append(Evidence(texts, sums[:, 1], sums[:, 0], agreed, of_end, total, places))
    return found


def log_odds(log_probability):
    """log p -> log(p / (1 - p)), within +-MAX_LOG_ODDS."""
    p = np.minimum(log_probability, -np.exp(-MAX_LOG_ODDS))
    return np.clip(p - np.log(-np.expm1(p)), -MAX_LOG_ODDS, MAX_LOG_ODDS)


def as_usual(words, usual):
    """The entries of the table `usual` for words -> (words,)."""
    return np.array([usual.get(word.lower(), usual[""]) for word in words])


def word_features(evidence, usual):
    """`Evidence` -> what the calibration of words looks at, (words, 3): log-odds with the photo (and its copies) and
    without it, and how often the word is right. Without the last, a word that has equally good alternatives ("there"
    for "a" at the beginning) would look as unsure as a colour that cannot be made out."""
    return np.stack([log_odds(evidence.agreed), log_odds(evidence.without), as_usual(evidence.words, usual)], 1)


def caption_features(evidence, of_words):
    """`Evidence` and the confidences (words,) of its words -> what the calibration of captions looks at, (3,): log-odds
    that all words are right if they were independent, the least sure word's, and log-odds of the end."""
    logs = np.log(of_words) if len(of_words) else np.zeros(1)
    return np.array([log_odds(logs.sum()), log_odds(logs.min()), log_odds(np.asarray(evidence.end))])


@torch.inference_mode()
def alternatives(model, tokenizer, states, ids, positions, count=5):
    """What else the decoder might have written -> for each of `positions` in `ids` (T,) a list of the `count` likeliest
    tokens there, (text, probability) each. `states`: those of one image, or `no_photo_states`."""
    hidden = model.decode(ids[None, :-1], states)[0]  # (T - 1, embed_dim)
    at = torch.tensor([position - 1 for position in positions], dtype=torch.long, device=ids.device)
    best = next_token_logits(model, hidden[at]).softmax(-1).topk(count)  # (positions, count)
    return [
        [(tokenizer.decode([token]).strip() or "(end)", p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
