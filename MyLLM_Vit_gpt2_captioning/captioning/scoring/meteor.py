"""METEOR 1.5 for English in Python, without Java: what `java -jar meteor-1.5.jar - - -stdio -l en -norm` computes.

Where it comes from:

- Banerjee and Lavie (2005): stages of matches, the alignment with the fewest chunks, the penalty on fragmentation.
- Denkowski and Lavie (2011): content and function words are weighted, paraphrases match phrases, the normalization
  splits words at hyphens and removes the periods of acronyms after tokenizing as the Moses toolkit does.
- Denkowski and Lavie (2014): the formulas below and the parameters for English; the usage text of the program gives the
  width of its beam, 40.
- The tables (function words, WordNet's synonyms, paraphrases) are read from the installed package pycocoevalcap.
- From comparing its results with the program's, not from the program's source: synonyms of inflected words are found
  with WordNet's detachment rules; an entry of the paraphrase table counts in both directions; how its search weighs
  matches, see `_align`.

Among equally good alignments the program now and then takes another one; docs/evaluation.md has the differences.
"""

import gzip
import re
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

import numpy as np

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75  # weights of recall, fragmentation (two), content words
STAGES = ("exact", "stem", "synonym", "paraphrase")
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
BEAM = 40  # partial alignments that are kept
MAX_PHRASE = 7  # words in the longest entry of the paraphrase table
NEEDS = "not available: needs pip install -r requirements-extra.txt"

# Columns of the statistics of a caption: length and function words of both sides, for each stage the matched content
# and function words of both sides, chunks, matched words of both sides.
LENGTHS, MATCHES, CHUNKS, MATCHED = slice(0, 4), slice(4, 20), 20, slice(21, 23)


def reason_against():
    """What is missing for METEOR, as text; None where nothing is."""
    installed = find_spec("snowballstemmer") and find_spec("pycocoevalcap") and _folder().is_dir()
    return None if installed else NEEDS


def statistics(candidates, references):
    """Tokenized captions and the tokenized references of each -> (len(candidates), 23) float64: the statistics of each
    caption against the reference for which it scores best. `score` makes scores of their rows and of sums of them.

    Raises ValueError when a caption has no references.
    """
    references = [[normalize(reference) for reference in captions] for captions in references]
    paraphrases = read_paraphrases(frozenset(" ".join(words) for captions in references for words in captions))
    rows = np.zeros((len(candidates), 23))
    for row, candidate, captions in zip(rows, candidates, references, strict=True):
        words = normalize(candidate)
        pairs = np.stack([_pair_statistics(words, reference, paraphrases) for reference in captions])
        row[:] = pairs[np.argmax(score(pairs))]
    return rows


def score(statistics):
    """Statistics, or sums of them over captions, (..., 23) -> METEOR, (...), from 0 to 1."""
    statistics = np.asarray(statistics, dtype=float)
    lengths, matches = statistics[..., LENGTHS], statistics[..., MATCHES].reshape(*statistics.shape[:-1], 4, 4)
    candidate_length, reference_length, candidate_functions, reference_functions = np.moveaxis(lengths, -1, 0)
    weighted = np.einsum("...sc,s->...c", matches, STAGE_WEIGHTS)  # content of both sides, function words of both sides
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = DELTA * weighted[..., 0] + (1 - DELTA) * weighted[..., 2]
        precision /= DELTA * (candidate_length - candidate_functions) + (1 - DELTA) * candidate_functions
        recall = DELTA * weighted[..., 1] + (1 - DELTA) * weighted[..., 3]
        recall /= DELTA * (reference_length - reference_functions) + (1 - DELTA) * reference_functions
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        chunks, matched = statistics[..., CHUNKS], statistics[..., MATCHED]
        fragmentation = chunks / matched.mean(axis=-1)
        return np.nan_to_num((1 - GAMMA * fragmentation**BETA) * mean)


def normalize(caption):
    """A caption, tokenized or not -> list of lowercased words, as the program's -norm makes them."""
    text = caption.lower().translate(_QUOTES)
    text = re.sub(r"''|``", '"', text)
    # "t-shirt"; the letters beside a hyphen are consumed, so "tug-o-war" keeps its second one.
    text = re.sub(r"([^\W_])-([^\W_])", r"\1 \2", text)
    text = re.sub(r"([^\w\s.',-]|_|\.{2,})", r" \1 ", text)
    text = re.sub(r"(?<!\d),|,(?!\d)", " , ", text)  # not the comma of 3,000
    text = re.sub(r"([^\W\d_])'([^\W\d_])|(\d)'(s)", r"\1\3 \n\2\4", text)  # "dog's" -> "dog" "'s"
    text = text.replace("'", " ' ").replace("\n", "'")
    return [word.replace(".", "") if _ACRONYM.fullmatch(word) else word for word in text.split()]


_QUOTES = str.maketrans("\u2018\u2019`\u201c\u201d", "'''\"\"")
_ACRONYM = re.compile(r"[a-z]\.(?:[a-z]\.)*[a-z]\.?")


# --- the tables -------------------------------------------------------------------------------------------------------


def _folder():
    return Path(next(iter(find_spec("pycocoevalcap").submodule_search_locations))) / "meteor"


@lru_cache(1)
def _tables():
    """-> (set of function words, {word: set of synsets}, {irregular form: set of base forms})."""
    with zipfile.ZipFile(_folder() / "meteor-1.5.jar") as jar:

        def lines(name):
            return jar.read(name).decode().split("\n")

        synsets, exceptions = lines("synonym/english.synsets"), lines("synonym/english.exceptions")
        functions = set(lines("function/english.words"))
    bases = {}
    for base, forms in zip(exceptions[0::2], exceptions[1::2], strict=False):
        for form in forms.split():
            bases.setdefault(form, set()).add(base)
    numbers = {word: frozenset(ids.split()) for word, ids in zip(synsets[0::2], synsets[1::2], strict=False)}
    return functions, numbers, bases


# WordNet's detachment rules for nouns, verbs, adjectives: the first that leads to a word of the table is used.
DETACHMENTS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


@lru_cache(1 << 16)
def _synsets(word):
    """The synsets of a word and of its base form."""
    _, synsets, bases = _tables()
    forms = {word} | bases.get(word, set())
    if word not in bases and len(word) > 2 and not word.endswith("ss"):
        stripped = (word.removesuffix(end) + new for end, new in DETACHMENTS if word.endswith(end))
        forms |= {next((form for form in stripped if form in synsets), word)}
    return frozenset().union(*(synsets.get(form, frozenset()) for form in forms))


@lru_cache(1)
def _stemmer():
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@lru_cache(1 << 16)
def _stem(word):
    return _stemmer().stemWord(word)


@lru_cache(2)  # a run scores captions against the same references after every epoch
def read_paraphrases(references, block=1 << 24):
    """A frozenset of normalized captions -> {phrase of one of them: {phrase with the same meaning: 1, or 2 where the
    table has the pair in both directions}}. Reading takes seconds."""
    phrases = {
        " ".join(words[i : i + n]).encode()
        for words in map(str.split, references)
        for i in range(len(words))
        for n in range(1, MAX_PHRASE + 1)
    }
    found, rest, place, held = {}, b"", 0, None
    with gzip.open(_folder() / "data" / "paraphrase-en.gz") as file:
        while chunk := file.read(block):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            # Three lines an entry: its probability, a phrase, its paraphrase. `place`: of this chunk's first line.
            first, second = lines[(1 - place) % 3 :: 3], lines[(2 - place) % 3 :: 3]
            if place == 2:  # the paraphrase of an entry whose phrase was in the chunk before
                first = [held, *first]
            for ours, theirs in ((first, second), (second, first)):
                # Nearly all entries are of other phrases: `compress` and `map` pass over them without a line of Python.
                for phrase, meaning in compress(zip(ours, theirs, strict=False), map(phrases.__contains__, ours)):
                    counts, meaning = found.setdefault(phrase.decode(), {}), meaning.decode()
                    counts[meaning] = counts.get(meaning, 0) + 1
            place = (place + len(lines)) % 3
            held = first[-1] if place == 2 else None
    return found


# --- matches and alignment --------------------------------------------------------------------------------------------


def _pair_statistics(candidate, reference, paraphrases):
    """Normalized words of a caption and of a reference -> list of the 23 statistics."""
    functions, _, _ = _tables()
    matches, chunks = _align(_matches(candidate, reference, paraphrases), len(reference))
    counts = [[0, 0, 0, 0] for _ in STAGES]
    matched = [0, 0]
    for stage, i, length, j, reference_length in matches:
        for side, words in enumerate((candidate[i : i + length], reference[j : j + reference_length])):
            matched[side] += len(words)
            for word in words:
                counts[stage][side + 2 * (word in functions)] += 1
    lengths = [len(candidate), len(reference)]
    lengths += [sum(word in functions for word in words) for words in (candidate, reference)]
    if chunks == 1 and matched == lengths[:2]:
        chunks = 0  # a caption that matches as a whole is not fragmented, and adds no chunk to those of its corpus
    return [*lengths, *(count for row in counts for count in row), chunks, *matched]


def _matches(candidate, reference, paraphrases):
    """All matches (stage, start and length in the candidate, start and length in the reference), by reference word."""
    matches = []
    for j, word in enumerate(reference):
        for i, other in enumerate(candidate):
            if word == other:
                matches.append((0, i, 1, j, 1))
                continue
            if _stem(word) == _stem(other):
                matches.append((1, i, 1, j, 1))
            if _synsets(word) & _synsets(other):
                matches.append((2, i, 1, j, 1))
    places = {}  # of the candidate's phrases
    for i in range(len(candidate)):
        for length in range(1, min(MAX_PHRASE, len(candidate) - i) + 1):
            places.setdefault(" ".join(candidate[i : i + length]), []).append((i, length))
    for j in range(len(reference)):
        for length in range(1, min(MAX_PHRASE, len(reference) - j) + 1):
            meanings = paraphrases.get(" ".join(reference[j : j + length]), {})
            for phrase in sorted(places.keys() & meanings.keys()):
                matches += [(3, i, words, j, length) for i, words in places[phrase]] * meanings[phrase]
    return matches


def _align(matches, reference_length):
    """Matches -> (those of the best alignment, its number of chunks).

    No word is in two matches. A match whose words are in no other match is always taken. The rest is a beam search over
    the reference's words for what the papers ask: as many words as possible, then as few chunks as possible. As in the
    program, a match that is not exact counts as half as many words, rounded down on each side, so that a single word's
    one is only taken where it costs no chunk; among equals, more matches are better.
    """
    covered = {}  # (side, word): number of matches
    for _, i, length, j, words in matches:
        for key in [*((0, k) for k in range(i, i + length)), *((1, k) for k in range(j, j + words))]:
            covered[key] = covered.get(key, 0) + 1
    certain, possible, taken = {}, {}, 0
    for match in matches:
        _, i, length, j, words = match
        keys = [*((0, k) for k in range(i, i + length)), *((1, k) for k in range(j, j + words))]
        if all(covered[key] == 1 for key in keys):
            certain[j] = match
            taken |= ((1 << length) - 1) << i
        else:
            possible.setdefault(j, []).append(match)
    # A path: words counted (negative), chunks, matches (negative), sum of reference positions (the sort key); then the
    # candidate's and the reference's word behind the last match, the candidate's words taken (bits), the matches.
    paths = [(0, 0, 0, 0, -1, -1, taken, ())]
    for j in range(reference_length):
        longer = []
        for path in paths:
            counted, chunks, number, places, next_i, next_j, used, chosen = path
            if next_j > j:  # inside a phrase
                longer.append(path)
                continue
            for match in [certain[j]] if j in certain else possible.get(j, ()):
                stage, i, length, _, words = match
                bits = ((1 << length) - 1) << i
                if j not in certain and used & bits:
                    continue
                gain = length + words if stage == 0 else length // 2 + words // 2
                added = (i, j) != (next_i, next_j)
                step = (counted - gain, chunks + added, number - 1, places + j)
                longer.append((*step, i + length, j + words, used | bits, (*chosen, match)))
            if j not in certain:
                longer.append(path)
        longer.sort(key=lambda path: path[:4])
        paths = longer[:BEAM]
    return paths[0][-1], paths[0][1]
