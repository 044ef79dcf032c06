"""Scores of captions against reference captions, as the COCO caption evaluation defines them (Chen et al. 2015).

BLEU-1 to 4, ROUGE-L and CIDEr are computed here and equal those of the reference package pycocoevalcap to 1e-6. CIDEr
is its `Cider`, which is CIDEr-D, the variant that papers report as CIDEr. METEOR is computed in meteor.py with the
tables of pycocoevalcap; SPICE, and METEOR for comparison, are its Java programs. Where something is missing the result
is the reason, never zero.
"""

import math
import random
import shutil
import subprocess
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from captioning.scoring import intervals as bootstrap
from captioning.scoring import meteor as meteor_program
from captioning.scoring.tokenization import tokenize, warn_of_sentences_as_words

MAX_N = 4  # longest n-grams of BLEU and CIDEr
NEEDS_JAVA = "not available: needs Java"


def score_captions(candidates, references, java=None, meteor=True, java_meteor=False, intervals=False, by="words"):
    """candidates: {image id: caption}; references: {image id: [caption, ...]} -> {name of the score: value}.

    Scores are corpus scores over all images of `references`, from 0 to 1 (CIDEr from 0 to 10). METEOR and SPICE are
    numbers, or text with the reason why they are missing. `java`: None runs SPICE where possible, False does not;
    `meteor` False leaves METEOR out, `java_meteor` takes it from the Java program. With `intervals`, "intervals" holds
    95% intervals over images, {name: [low, high]}. An image without candidate is scored with an empty caption, and
    "missing candidates" counts such images. Raises ValueError that names the ids for candidates of images that
    `references` lacks and for images without references. `by`: the tokens, as in `tokenization.tokenize`.
    """
    tokenized, tokenized_references = _tokenized(candidates, references, by)
    parts = _parts(tokenized, tokenized_references, meteor and not java_meteor)
    scores = {name: value for part in parts for name, value in part.total().items()}
    if java_meteor:
        scores["METEOR"] = _java_meteor(tokenized, tokenized_references, None)
    elif meteor and "METEOR" not in scores:
        scores["METEOR"] = meteor_program.reason_against()
    scores["SPICE"] = _spice(tokenized, tokenized_references, java)
    scores["missing candidates"] = sum(image not in candidates for image in references)
    if intervals:
        scores["intervals"] = bootstrap.intervals(parts)
    return scores


def parts(candidates, references, by="words"):
    """The `intervals.Part`s of captions: the statistics of each image, in the order of `references`, from which BLEU,
    ROUGE-L, CIDEr and, where its tables are installed, METEOR are computed. Arguments and errors: `score_captions`."""
    return _parts(*_tokenized(candidates, references, by), meteor=True)


def _tokenized(candidates, references, by):
    """-> (tokenized candidates, [[tokenized reference, ...], ...]), in the order of `references`."""
    _check_images(candidates, references)
    tokenized = tokenize([candidates.get(image, "") for image in references], by)
    texts = [caption for captions in references.values() for caption in captions]
    if by == "words":
        warn_of_sentences_as_words(texts)
    all_references = iter(tokenize(texts, by))
    return tokenized, [[next(all_references) for _ in captions] for captions in references.values()]


def _parts(candidates, references, meteor):
    pairs = list(zip(candidates, references, strict=True))
    found = [
        bootstrap.Part(
            tuple(f"BLEU-{n}" for n in range(1, MAX_N + 1)), bleu_counts(candidates, references), bleu_scores
        ),
        bootstrap.mean_part("ROUGE-L", [rouge_l(candidate, captions) for candidate, captions in pairs]),
        bootstrap.mean_part("CIDEr", CiderD(references, cached_images=0).scores(candidates, references)),
    ]
    if meteor and meteor_program.reason_against() is None:
        rows = meteor_program.statistics(candidates, references)
        found.append(bootstrap.Part(("METEOR",), rows, lambda sums: meteor_program.score(sums)[..., None]))
    return found


def shuffle(candidates, seed=0):
    """{image id: caption} -> the same, every caption with another image. Raises ValueError for fewer than two."""
    images = list(candidates)
    if len(images) < 2:
        raise ValueError(f"captions of {len(images)} images cannot be given to other images")
    random.Random(seed).shuffle(images)  # each caption then goes to the next image, the last to the first
    return {image: candidates[other] for image, other in zip(images, images[1:] + images[:1], strict=True)}


def shuffled_scores(candidates, references, seed=0, by="words"):
    """`score_captions` without METEOR and SPICE, with the captions shuffled as `shuffle` does.

    This is the score that captions get without any look at their image.
    """
    scores = score_captions(shuffle(candidates, seed), references, java=False, meteor=False, by=by)
    return {name: value for name, value in scores.items() if name != "SPICE"}


def describe_captions(candidates, finished=None, by="words"):
    """Counts of {image id: caption} -> {name of the count: value}.

    `finished`: for each caption, in the same order, whether it ended with EOS; without it "ended with EOS" is left out.
    Words are the tokens that scores are computed from: lowercased, without punctuation. Raises ValueError when there
    are no captions or `finished` has another length.
    """
    if not candidates:
        raise ValueError("no captions to describe")
    captions = [caption.split() for caption in tokenize(list(candidates.values()), by)]
    counts = {
        "captions": len(captions),
        f"mean length in {by}": sum(map(len, captions)) / len(captions),
        "distinct captions": len({caption.strip() for caption in candidates.values()}),
        "vocabulary used": len({word for caption in captions for word in caption}),
    }
    if finished is not None:
        if len(finished) != len(captions):
            raise ValueError(f"{len(captions)} captions, but {len(finished)} values for whether they ended")
        counts["ended with EOS"] = sum(map(bool, finished)) / len(captions)  # a share
    return counts


def _check_images(candidates, references):
    if not references:
        raise ValueError("no references: there is nothing to score against")
    for problem, images in (
        ("candidates of images that are not among the references", [i for i in candidates if i not in references]),
        ("images without references", [image for image, captions in references.items() if not captions]),
    ):
        if images:
            names = ", ".join(map(str, images[:5])) + (", ..." if len(images) > 5 else "")
            raise ValueError(f"{len(images)} {problem}: {names}")


# --- BLEU and ROUGE-L -------------------------------------------------------------------------------------------------


def ngrams(caption):
    """Tokens joined by spaces -> Counter of all n-grams (tuples) up to MAX_N."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def bleu(candidates, references):
    """Tokenized candidates and a list of references for each -> [BLEU-1, ..., BLEU-4] of the corpus.

    Papineni et al. 2002 with the closest reference's length (the shorter of two equally close ones).
    """
    return bleu_scores(bleu_counts(candidates, references).sum(axis=0)).tolist()


def bleu_counts(candidates, references):
    """-> (len(candidates), 2 + 2 * MAX_N): lengths of the candidate and of the closest reference; for each n the
    n-grams of the candidate that a reference has, then for each n all of them."""
    rows = np.zeros((len(candidates), 2 + 2 * MAX_N))
    for row, candidate, captions in zip(rows, candidates, references, strict=True):
        length = len(candidate.split())
        row[0] = length
        row[1] = min((abs(len(caption.split()) - length), len(caption.split())) for caption in captions)[1]
        max_counts = Counter()
        for caption in captions:
            for ngram, count in ngrams(caption).items():
                max_counts[ngram] = max(max_counts[ngram], count)  # the largest count in any reference
        for ngram, count in ngrams(candidate).items():
            row[1 + len(ngram)] += min(count, max_counts[ngram])
            row[1 + MAX_N + len(ngram)] += count
    return rows


def bleu_scores(sums):
    """Sums of rows of `bleu_counts` (..., 2 + 2 * MAX_N) -> BLEU-1 to 4 (..., MAX_N)."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's: no precision is 0, and nothing is divided by 0
    ratio = (sums[..., :1] + tiny) / (sums[..., 1:2] + small)
    brevity_penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    precisions = (sums[..., 2 : 2 + MAX_N] + tiny) / (sums[..., 2 + MAX_N :] + small)
    return np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_N + 1)) * brevity_penalty


def sentence_bleu(candidates, references):
    """As `bleu` -> BLEU-4 of each candidate (len(candidates),). From n = 2 on, 1 is added to the n-grams that a
    reference has and to all (Lin & Och 2004), since else it is 0 without four words in a row of a reference."""
    counts = bleu_counts(candidates, references)
    counts[:, 3 : 2 + MAX_N] += 1
    counts[:, 3 + MAX_N :] += 1
    return bleu_scores(counts)[:, -1]


def rouge_l(candidate, references):
    """A tokenized candidate and its references -> ROUGE-L (Lin 2004): the F-measure of the longest common subsequence,
    with recall weighted by beta = 1.2; precision and recall are each the maximum over the references."""
    beta = 1.2
    words = candidate.split(" ")  # an empty caption is one empty word, as in pycocoevalcap
    precision = recall = 0.0
    for caption in references:
        reference = caption.split(" ")
        common = _longest_common_subsequence(words, reference)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(reference))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(first, second):
    """Length of the longest common subsequence of two lists of words, by the bit-parallel algorithm of Hyyro (2004).

    `bits` has a bit for each word of `first`; those that end at 0 count the subsequence.
    """
    positions = {}  # {word: bits of its positions in `first`}
    for i, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << i
    all_bits = (1 << len(first)) - 1
    bits = all_bits
    for word in second:
        matches = bits & positions.get(word, 0)
        bits = (bits + matches | bits - matches) & all_bits
    return len(first) - bits.bit_count()


# --- CIDEr ------------------------------------------------------------------------------------------------------------


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with document frequencies from given references.

    It also serves as a reward: `scores` takes any number of candidates of an image, and caches its computations on the
    references of up to `cached_images` images (some 50 KB each at 5 captions).
    """

    SIGMA = 6.0  # width, in words, of the Gaussian penalty on a length unlike the reference's

    def __init__(self, references, cached_images=4096):
        """references: the tokenized captions of each image, [[str, ...], ...]; an n-gram's document frequency is the
        number of images in whose references it occurs. Raises ValueError when there are none."""
        if not references:
            raise ValueError("CIDEr needs the references of at least one image for its document frequencies")
        self.log_images = math.log(len(references))
        frequencies = Counter(ngram for captions in references for ngram in set().union(*map(ngrams, captions)))
        self.log_frequencies = {ngram: math.log(count) for ngram, count in frequencies.items() if count > 1}
        self._indexed = lru_cache(cached_images)(self._index)

    def scores(self, candidates, references):
        """Tokenized candidates, and the references of each: [[str, ...], ...] -> (len(candidates),) float64.

        Raises ValueError when a candidate has no references.
        """
        scores = np.zeros(len(candidates))
        for i, (candidate, captions) in enumerate(zip(candidates, references, strict=True)):
            if not captions:
                raise ValueError(f"candidate {i} has no references")
            scores[i] = self._score(candidate, self._indexed(tuple(captions)))
        return scores

    def _tf_idf(self, caption):
        """-> ({ngram: term frequency * inverse document frequency}, norm for each n (MAX_N), length in words)."""
        weights, squares = {}, [0.0] * MAX_N
        for ngram, count in ngrams(caption).items():
            weight = count * (self.log_images - self.log_frequencies.get(ngram, 0.0))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], len(caption.split())

    def _index(self, captions):
        """References of an image -> ({ngram: [(index of the reference, weight), ...]}, norms (references, MAX_N),
        lengths (references))."""
        postings, norms, lengths = {}, [], []
        for i, caption in enumerate(captions):
            weights, norm, length = self._tf_idf(caption)
            norms.append(norm)
            lengths.append(length)
            for ngram, weight in weights.items():
                postings.setdefault(ngram, []).append((i, weight))
        return postings, norms, lengths

    def _score(self, candidate, index):
        """A tokenized candidate and the `_index` of its references -> CIDEr-D, the mean over the references."""
        postings, reference_norms, reference_lengths = index
        weights, norms, length = self._tf_idf(candidate)
        products = [[0.0] * MAX_N for _ in reference_norms]  # (references, MAX_N)
        for ngram, weight in weights.items():
            for i, reference_weight in postings.get(ngram, ()):
                # Clipped, so that repeating a word of the reference earns nothing.
                products[i][len(ngram) - 1] += min(weight, reference_weight) * reference_weight
        total = 0.0
        for product, reference_norm, reference_length in zip(products, reference_norms, reference_lengths, strict=True):
            similarity = sum(p / (a * b) for p, a, b in zip(product, norms, reference_norm, strict=True) if a and b)
            total += similarity * math.exp(-((length - reference_length) ** 2) / (2 * self.SIGMA**2))
        return 10 * total / (MAX_N * len(products))


# --- Java programs ----------------------------------------------------------------------------------------------------


def _reason_against(java):
    """The reason why pycocoevalcap's Java programs cannot run; None when they can."""
    if java is False:
        return "not available: not asked for"
    if shutil.which("java") is None:
        return NEEDS_JAVA
    if find_spec("pycocoevalcap") is None:
        return "not available: needs pip install -r requirements-extra.txt"
    return None


def _run_java(scorer_class, candidates, references):
    """The corpus score of tokenized captions, or text with the reason why the program failed."""
    scorer = scorer_class()
    try:
        score, _ = scorer.compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        if hasattr(scorer, "lock"):  # a failed Meteor still holds its lock, and its __del__ would wait for it
            scorer.lock.release()
        return f"not available: its Java program failed ({error})"
    return float(score)


def _java_meteor(candidates, references, java):
    if reason := _reason_against(java):
        return reason
    from pycocoevalcap.meteor.meteor import Meteor

    return _run_java(Meteor, candidates, references)


def _spice(candidates, references, java):
    if reason := _reason_against(java):
        return reason
    import pycocoevalcap.spice

    folder = Path(pycocoevalcap.spice.__file__).parent / "lib"
    # Without these files Spice() would start a download of 400 MB.
    if not all((folder / f"stanford-corenlp-3.6.0{part}.jar").is_file() for part in ("", "-models")):
        return "not available: needs the Stanford CoreNLP 3.6.0 jars, see pycocoevalcap/spice/get_stanford_models.py"
    from pycocoevalcap.spice.spice import Spice

    return _run_java(Spice, candidates, references)
