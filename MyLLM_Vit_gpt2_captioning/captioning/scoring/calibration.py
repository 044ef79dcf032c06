"""What a captioner's confidence is worth: it is fitted on photos whose captions can be judged, and measured on others.

A caption is right
    for Shapes      when every attribute is: the truth about a scene is known
    for questions   when it equals one of the true answers
    for photos      when its CIDEr against the true captions is at least RIGHT_CIDER
and a word when it is the true one at its place (Shapes), or else when it occurs in one of the photo's true captions.
"""

import contextlib
import math
import re
from pathlib import Path

import numpy as np
import torch

from captioning.common.progress import progress_bar
from captioning.common.stopping import stop_if_asked
from captioning.data import shapes
from captioning.decoding import confidence, familiarity
from captioning.decoding.confidence import Calibration, Confidence
from captioning.decoding.familiarity import Familiarity
from captioning.decoding.search import token_log_probabilities
from captioning.pages import plots
from captioning.scoring.pair_check import PairScorer

RIGHT_CIDER = 0.5
MAX_IMAGES = 2000  # captioned for a calibration
TRAINING_IMAGES = 1500  # a sample of them, for what the photos of training are like
TOKENS_CLUSTERED = 50_000
LEAST_HELD_OUT = 100  # photos: of fewer, none is rare
FOLDS = 5  # parts of the photos, for what must be learnt from other photos
PRIOR_COUNT = 10
LEAST_OF_EACH = 5  # right and wrong ones, of words and of captions, that a calibration needs
BINS = 15  # of equal width, of the expected calibration error (Guo et al. 2017)
MEANING = {
    "shapes": "a caption is right when every attribute is, a word when it is the true one at its place",
    "questions": "an answer is right when it equals a true one, a word when it occurs in one",
    "photos": f"a caption is right when its CIDEr is at least {RIGHT_CIDER}, a word when it occurs in a true caption",
}
_WORD = re.compile(r"\w+(?:['-]\w+)*")


# --- which captions and words are right -------------------------------------------------------------------------------


def judge(images, captions, words, references, scenes, are_answers=False, by="words"):
    """Which captions and which of their words are right -> (a key of MEANING, bools (n,), a list of bools (words,)).

    images: n paths; captions: text of each; words: the words of each; references: the true captions, or answers, of
    each; `scenes`: `shapes.true_scenes` of the dataset, which is empty for other datasets; `by` as in `metrics`.
    """
    if scenes and not are_answers:
        true = [scenes[Path(image).name] for image in images]
        right = [shapes.parse_caption(text) == scene for text, scene in zip(captions, true, strict=True)]
        right_words = [shapes.right_words(of_one, scene) for of_one, scene in zip(words, true, strict=True)]
        return "shapes", np.array(right, dtype=bool), [np.array(of_one, dtype=bool) for of_one in right_words]
    from captioning.scoring.evaluation import (
        cider_of_each,
    )  # not at the top: a captioner that only captions imports this

    right_words = []
    for of_one, true in zip(words, references, strict=True):
        known = {part for caption in true for part in _WORD.findall(caption.lower())}
        right_words.append(np.array([known.issuperset(_WORD.findall(word.lower())) for word in of_one], dtype=bool))
    if are_answers:
        right = [text in true for text, true in zip(captions, references, strict=True)]
        return "questions", np.array(right, dtype=bool), right_words
    cider = cider_of_each(dict(enumerate(captions)), dict(enumerate(references)), by)
    return "photos", np.array([cider[i] >= RIGHT_CIDER for i in range(len(captions))], dtype=bool), right_words


# --- fitting ----------------------------------------------------------------------------------------------------------


class _Observer:
    """What `search.caption_batches` shows of captions: ids, log-probabilities with the photo, and beside them the mean
    of all image tokens."""

    def __init__(self, model, shifted):
        self.model, self.shifted, self.batches, self.sums, self.images = model, shifted, [], 0, 0
        self.tokens = {}  # {index of an image: its tokens, projected (N, familiarity.DIM)}

    @torch.inference_mode()
    def __call__(self, indices, levels, ids, prompt_length, pixels):
        states = self.model.encoder_states(levels)
        means = torch.stack([tokens.float().mean((0, 1)) for tokens in states])  # (depth, embed_dim)
        self.sums, self.images = self.sums + len(indices) * means, self.images + len(indices)
        self.tokens |= dict(zip(indices, familiarity.projected(states).half().cpu(), strict=True))
        log_probs = token_log_probabilities(self.model, states, ids, prompt_length)
        copies = confidence.of_shifted_copies(self.model, pixels, ids, prompt_length) if self.shifted else []
        self.batches.append((indices, [tokens[:0] for tokens in states], ids, prompt_length, log_probs, copies))

    def evidence(self, tokenizer):
        """-> (mean image token of each decoder block (depth, embed_dim), {index of an image: `Evidence`})."""
        no_photo, found = self.sums / self.images, {}
        for indices, like, ids, prompt_length, with_photo, copies in self.batches:
            states = confidence.no_photo_states(no_photo, like)
            without = token_log_probabilities(self.model, states, ids, prompt_length)
            rows = confidence.evidence_of(tokenizer, with_photo, without, copies, ids, prompt_length)
            found |= dict(zip(indices, rows, strict=True))
        return no_photo, found


def calibrate(
    model, tokenizer, images, references, scenes, prompts="", load_batch=None, batch_size=64, shifted=False, by="words",
    training=(), load_training=None,
):  # fmt: skip
    """Caption photos greedily and learn from which of the captions are right -> `Confidence`.

    `images`: paths; `references`: a list of true captions (or answers) for each; `scenes` as in `judge`;
    `prompts`: a question for each, or "". At most MAX_IMAGES of them are captioned. `shifted`: the confidence also
    looks at four shifted copies of the photo, which `load_batch` must not replace by tokens; `training`: some photos of
    the training split, which say what is familiar, or none; `load_training`: as `load_batch`, for these. Raises
    ValueError when there are too few right or wrong captions or words to learn from.
    """
    from captioning.scoring.evaluation import predict

    images, references = images[:MAX_IMAGES], references[:MAX_IMAGES]
    prompts = prompts[:MAX_IMAGES] if isinstance(prompts, list) else prompts
    observer = _Observer(model, shifted)
    options = dict(title="calibration", load_batch=load_batch, observe=observer, batch_size=batch_size)
    captions, _ = predict(model, tokenizer, images, prompts, **options)
    if not observer.images:
        raise ValueError("there is no caption to learn from")
    no_photo, evidence = observer.evidence(tokenizer)
    evidence = [evidence[i] for i in range(len(images))]
    are_answers = bool(prompts and any(prompts))
    words = [one.words for one in evidence]
    kind, right, right_words = judge(images, captions, words, references, scenes, are_answers, by)
    # A word's usual share must not know the caption it is used for: for fitting it comes from the other photos.
    of_words = [None] * len(images)
    for fold in range(FOLDS):
        usual = usual_log_odds(words, right_words, [i for i in range(len(images)) if i % FOLDS != fold])
        for i in range(fold, len(images), FOLDS):
            of_words[i] = confidence.word_features(evidence[i], usual)
    word = fit(of_words, right_words, "words")
    of_captions = [confidence.caption_features(one, word(seen)) for one, seen in zip(evidence, of_words, strict=True)]
    about = {"images": len(images), "captions right": float(right.mean()), "meaning": MEANING[kind]}
    usual = usual_log_odds(words, right_words, range(len(images)))
    known = Confidence(no_photo, usual, word, fit(of_captions, right, "captions"), about, shifted)
    first = {image: i for i, image in reversed(list(enumerate(images)))}  # a photo may be asked about many times
    if training and len(first) >= LEAST_HELD_OUT:
        held_out = [observer.tokens[i][None] for i in first.values()]
        scorer = PairScorer(model, tokenizer, load_training, batch_size)
        known.familiarity = familiar_photos(scorer.encode, training, held_out, batch_size)
    return known


def sample_of_training(images):
    """Paths -> TRAINING_IMAGES of them, or all where there are fewer."""
    return [images[i] for i in np.random.RandomState(0).permutation(len(images))[:TRAINING_IMAGES]]


def familiar_photos(encode, training, held_out, batch_size=64):
    """What the photos of training are like, and how unlike them other photos are -> `Familiarity`; None where no photo
    can be read.

    encode: photos -> what the decoder blocks attend to; training: paths of photos; held_out: the
    `familiarity.projected` tokens of other photos, in batches.
    """
    from sklearn.cluster import MiniBatchKMeans

    tokens, bar = [], progress_bar(len(training), "familiar photos")
    for start in range(0, len(training), batch_size):
        batch = training[start : start + batch_size]
        # A batch with a photo that cannot be read, or whose tokens are in no cache, is left out: others say the same.
        with contextlib.suppress(OSError, ValueError, KeyError):
            tokens.append(familiarity.projected(encode(batch)).flatten(0, 1).cpu().numpy())  # (B * N, DIM)
        bar.update(len(batch))
        stop_if_asked()
    bar.close()
    if not tokens:
        return None
    tokens = np.concatenate(tokens)
    tokens = tokens[np.random.RandomState(0).permutation(len(tokens))[:TOKENS_CLUSTERED]]
    count = min(familiarity.CENTROIDS, len(tokens))
    means = MiniBatchKMeans(count, batch_size=4096, max_iter=20, n_init=1, random_state=0).fit(tokens)
    centroids = torch.from_numpy(means.cluster_centers_).half().float()  # as they are stored
    distances = torch.cat([familiarity.distances_of(batch.float().cpu(), centroids) for batch in held_out])
    return Familiarity(centroids, distances.sort().values)


def usual_log_odds(words, right, chosen):
    """How often each word is right -> {word: log-odds}, under "" those of all words together.

    words: lists of the words of captions; right: for each list whether its words are right; chosen: the captions that
    count. The share of a rare word is drawn to that of all, as if it had come PRIOR_COUNT times more often.
    """
    counts = {"": [0, 0]}  # {word: [times right, times]}
    for i in chosen:
        for word, is_right in zip(words[i], right[i], strict=True):
            for key in ("", word.lower()):
                of_word = counts.setdefault(key, [0, 0])
                of_word[0], of_word[1] = of_word[0] + bool(is_right), of_word[1] + 1
    mean = (counts[""][0] + 0.5) / (counts[""][1] + 1)
    shares = {word: (a + PRIOR_COUNT * mean) / (n + PRIOR_COUNT) for word, (a, n) in counts.items()}
    return {word: math.log(share / (1 - share)) for word, share in shares.items()}


def fit(features, right, what):
    """A `Calibration` for the rows of `features`, each of which is right or not; both may come in parts.

    Raises ValueError with `what` when fewer than LEAST_OF_EACH are right or wrong.
    """
    from sklearn.linear_model import LogisticRegression

    features, right = np.vstack(features), np.hstack(right)
    counts = int(right.sum()), int((~right).sum())
    if min(counts) < LEAST_OF_EACH:
        raise ValueError(
            f"{counts[0]:,} {what} are right and {counts[1]:,} wrong, where at least {LEAST_OF_EACH} of each are needed"
        )
    model = LogisticRegression(max_iter=1000).fit(features, right)
    return Calibration(model.coef_[0].tolist(), float(model.intercept_[0]))


def calibrate_run(model, tokenizer, training, dataset, config):
    """Calibrate the captioner of a run, which was just trained, on its validation photos: those of the script's
    `Dataset`; `training`: that of the training photos; `config`: the train_config. Prints how that went; where too
    little can be learnt from those photos the captioner stays uncalibrated."""
    references = {}  # {(path, question or ""): true captions}
    for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
        if image not in dataset.unreadable_photos:
            references.setdefault((image, prompt), []).append(caption)
    images, prompts = (list(column) for column in zip(*references, strict=True))
    load_batch = dataset.token_caches[0].batch if dataset.token_caches else None
    scenes = shapes.true_scenes(config.data_dir)
    try:
        truth = list(references.values()), scenes, prompts
        # A streamed dataset has no list of photos.
        photos = [image for image in training.captions_of if image not in training.unreadable_photos]
        options = dict(by=config.score_tokens, training=sample_of_training(photos))
        known = calibrate(model, tokenizer, images, *truth, load_batch, load_training=load_batch, **options)
    except (OSError, ValueError) as error:  # the run is over, and its captioner is whole without
        print(f"the captioner is not calibrated and has no confidence: {error}")
        return
    known.save(config.model_path)
    print(describe(known))


def describe(known):
    """A `Confidence` -> a line on what it was learnt from."""
    about = known.about
    photos = f"calibrated on {about['images']:,} photos, {about['captions right']:.1%} right ({about['meaning']})"
    return photos if known.familiarity else f"{photos}; it does not know which photos are unlike those of training"


# --- measuring --------------------------------------------------------------------------------------------------------


def reliability(confidences, right, bins=BINS):
    """Confidences (n,) and whether each was right (n,) -> for each bin of equal width that is not empty (mean
    confidence, share that is right, count)."""
    confidences, right = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    return [
        (float(confidences[places == i].mean()), float(right[places == i].mean()), int((places == i).sum()))
        for i in range(bins)
        if (places == i).any()
    ]


def expected_calibration_error(confidences, right, bins=BINS):
    """The mean distance between confidence and share right of `reliability`'s bins, weighted by their counts (Guo et
    al. 2017)."""
    rows = reliability(confidences, right, bins)
    return sum(abs(mean - share) * count for mean, share, count in rows) / sum(count for *_, count in rows)


def risk_coverage(confidences, right):
    """-> (coverage (n,), risk (n,)): of the surest k of n the share that is wrong, for k from 1 to n. Those of equal
    confidence share their mean, so that their order does not count."""
    confidences, wrong = np.asarray(confidences, dtype=float), 1.0 - np.asarray(right, dtype=float)
    _, groups = np.unique(-confidences, return_inverse=True)  # the surest are the first
    means = np.bincount(groups, wrong) / np.bincount(groups)  # (different confidences,)
    counts = np.arange(1, len(wrong) + 1)
    return counts / len(wrong), np.cumsum(means[np.sort(groups)]) / counts


def measure(confidences, right, what):
    """Confidences (n,) and whether each was right (n,) -> {name of a measure of `what`: value}; without an AUROC where
    all are right, or all wrong."""
    from sklearn.metrics import roc_auc_score

    right = np.asarray(right, dtype=bool)
    _, risk = risk_coverage(confidences, right)
    measures = {f"wrong {what}": float((~right).mean())}
    for share in (0.5, 0.7, 0.9):
        measures[f"wrong {what} among the surest {share:.0%}"] = float(risk[max(1, round(share * len(risk))) - 1])
    measures[f"calibration error of {what}"] = expected_calibration_error(confidences, right)
    if right.any() and not right.all():
        measures[f"AUROC of wrong {what}"] = float(roc_auc_score(~right, -np.asarray(confidences)))
    return measures


def measure_captions(judged, truth, path):
    """How good the confidence of captions is -> {name of a measure: value}; draws the diagrams to the PNG `path`.

    judged: a `confidence.Judged` of each caption; truth: the result of `judge`.
    """
    import matplotlib.pyplot as plt

    _, right, right_words = truth
    of_words = [sure for one in judged for sure in one.words]
    series = {"captions": ([one.caption for one in judged], right), "words": (of_words, np.hstack(right_words))}
    measures = {}
    for what, (confidences, are_right) in series.items():
        measures |= measure(confidences, are_right, what)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = {what: (reliability(*pair), *risk_coverage(*pair)) for what, pair in series.items()}
    plt.close(plots.plot_confidence(drawn, path))
    return measures
