"""Evaluation of a model: caption a set of photos, then score all captions together."""

from captioning.common.progress import progress_bar
from captioning.common.stopping import stop_if_asked
from captioning.decoding.search import Options, caption_batches
from captioning.scoring import intervals, metrics
from captioning.scoring.tokenization import tokenize


def predict(
    model, tokenizer, images, prompts="", batch_size=64, title="captions", load_batch=None, observe=None, **options
):
    """Caption photos with a progress bar -> (captions, for each whether it ended with EOS), both lists.

    Greedy unless `options`, those of `search.Options`, say otherwise; `load_batch` and `observe` as in
    `search.caption_batches`.
    """
    options = Options(**dict(deterministic=options.get("num_beams", 1) == 1) | options)
    captions, finished = [""] * len(images), [False] * len(images)
    bar = progress_bar(len(images), title)
    for i, texts, flags in caption_batches(model, tokenizer, images, options, batch_size, prompts, load_batch, observe):
        captions[i], finished[i] = texts[0], flags[0]
        bar.update(1)
        stop_if_asked()
    bar.close()
    return captions, finished


def score(candidates, references, finished=None, java=None, java_meteor=False, objects=None, by="words"):
    """All scores of captions in one dict: those of `metrics.score_captions`, with `objects` (a
    `hallucination.PhotoObjects`) what captions name that is not in the photo, their 95% intervals over images under
    "intervals", the counts of `describe_captions`, and under "shuffled" the scores with every caption given to another
    image, which must be far lower (CHAIRi and CHAIRs: higher).

    candidates {image: caption}, references {image: [captions]}; the other arguments as in `metrics`.
    """
    scores = metrics.score_captions(candidates, references, java, java_meteor=java_meteor, intervals=True, by=by)
    named = objects.parts(candidates) if objects else []
    scores |= {name: value for part in named for name, value in part.total().items()}
    scores["intervals"] |= intervals.intervals(named) if named else {}
    scores |= metrics.describe_captions(candidates, finished, by)
    if len(candidates) > 1:
        shuffled = metrics.shuffle(candidates)
        scores["shuffled"] = metrics.shuffled_scores(candidates, references, by=by)
        named = objects.parts(shuffled) if objects else []
        scores["shuffled"] |= {name: value for part in named for name, value in part.total().items()}
    return scores


def exact_answers(answers, references):
    """The share of answers to questions that equal, letter for letter, one of their list of reference answers, with its
    95% interval over questions -> {"exact answers": share, "intervals": {"exact answers": [low, high]}}."""
    right = [answer in truth for answer, truth in zip(answers, references, strict=True)]
    part = intervals.mean_part("exact answers", right)
    return part.total() | {"intervals": intervals.intervals([part])}


def evaluate(model, dataloader, tokenizer, device=None, java=False, **options):
    """Caption every image of `dataloader`'s dataset (a `Dataset` of the script) and score the captions -> dict.

    `options` are those of `search.Options`, for example num_beams=4. For questions about images the score is the share
    of exact answers. SPICE is left out unless `java` is true.
    """
    dataset, model = dataloader.dataset, model if device is None else model.to(device)
    if any(dataset.prompts):
        references = {}  # {(image, question): [answers]}
        for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
            references.setdefault((image, prompt), []).append(caption)
        images, prompts = zip(*references, strict=True)
        answers, _ = predict(model, tokenizer, list(images), list(prompts), **options)
        return exact_answers(answers, references.values())
    images = list(dataset.captions_of)
    captions, finished = predict(model, tokenizer, images, **options)
    return score(dict(zip(images, captions, strict=True)), dataset.captions_of, finished, java)


def score_subset(model, tokenizer, dataset, count, processes, load_batch=None, by="words"):
    """Caption the first `count` images of a `Dataset`, or answer its first `count` questions, together with the other
    `processes` (a `ProcessGroup`); images in `unreadable_photos` are left out.

    -> ({(image, question or ""): reference captions}, captions, {"CIDEr", "BLEU-4", "METEOR"} or {"exact_answers"});
    METEOR is missing where its tables are not installed. `by`: the tokens that scores count, as in `metrics`.
    """
    references, flags = {}, dataset.unreadable_photos.flags
    flags.copy_(processes.all_reduce_any(flags))  # each process has loaded other photos
    for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
        if image not in dataset.unreadable_photos and ((image, prompt) in references or len(references) < count):
            references.setdefault((image, prompt), []).append(caption)
    images, prompts = (list(column) for column in zip(*references, strict=True))
    own = slice(processes.rank, None, processes.world_size)
    captions, _ = predict(model, tokenizer, images[own], prompts[own], title="scoring", load_batch=load_batch)
    captions = processes.all_gather(captions)
    if any(prompts):
        scores = {"exact_answers": exact_answers(captions, references.values())["exact answers"]}
    else:
        by_image = dict(zip(images, references.values(), strict=True))
        scores = metrics.score_captions(dict(zip(images, captions, strict=True)), by_image, java=False, by=by)
        scores = {name: scores[name] for name in ("CIDEr", "BLEU-4", "METEOR") if isinstance(scores[name], float)}
    return references, captions, scores


def table_rows(scores):
    """Scores -> table rows of text (name, value, 95% interval, value for shuffled captions), the header first; without
    intervals or shuffled scores their column is left out."""
    shuffled, certain = scores.get("shuffled", {}), scores.get("intervals", {})

    def as_text(value):
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    columns = [("", "score", "95% interval", "shuffled")]
    for name, value in scores.items():
        if name not in ("shuffled", "intervals"):
            interval = " to ".join(map(as_text, certain[name])) if name in certain else ""
            beside = as_text(shuffled[name]) if isinstance(shuffled.get(name), float) else ""
            columns.append((name, as_text(value), interval, beside))
    shown = [True, True, bool(certain), bool(shuffled)]
    return [tuple(cell for cell, show in zip(row, shown, strict=True) if show) for row in columns]


def as_table(scores):
    """Scores -> the table as one text, a line a score."""
    rows = table_rows(scores)
    widths = [32, *(max(len(row[i]) for row in rows if not row[1].startswith("not")) for i in range(1, len(rows[0])))]

    def line(name, *cells):
        return f"{name:{widths[0]}s} " + "  ".join(f"{c:>{w}s}" for c, w in zip(cells, widths[1:], strict=True))

    return "\n".join(line(*row).rstrip() for row in rows)


def cider_of_each(candidates, references, by="words"):
    """{image: caption}, {image: [captions]} -> {image: its CIDEr}, with document frequencies from these references."""
    images = list(candidates)
    tokenized = [tokenize(references[image], by) for image in images]
    scores = metrics.CiderD(tokenized).scores(tokenize([candidates[image] for image in images], by), tokenized)
    return dict(zip(images, map(float, scores), strict=True))
