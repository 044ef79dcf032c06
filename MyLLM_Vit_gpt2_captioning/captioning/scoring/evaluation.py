"""How good are the captions of a model? Caption a set of photos, then score them all together."""

from captioning.common.progress import progress_bar
from captioning.decoding.search import Options, caption_batches
from captioning.scoring import metrics
from captioning.scoring.ptb_tokenization import tokenize


def predict(model, tokenizer, images, prompts="", batch_size=64, title="captions", look=None, **options):
    """Caption photos (greedily unless `options`, those of `decoding.Options`, say otherwise) with a progress bar ->
    (captions, for each whether it came to its end by itself). `look` as in `decoding.caption_batches`."""
    options = Options(**dict(deterministic=options.get("num_beams", 1) == 1) | options)
    captions, ended = [""] * len(images), [False] * len(images)
    bar = progress_bar(len(images), title)
    for place, texts, ends in caption_batches(model, tokenizer, images, options, batch_size, prompts, look):
        captions[place], ended[place] = texts[0], ends[0]
        bar.update(1)
    bar.close()
    return captions, ended


def score(candidates, references, ended=None, java=None):
    """Everything there is to say about captions: `metrics.score_captions`, what `describe_captions` counts, and under
    "shuffled" the same scores with every caption given to another image, which must be far lower.

    candidates {image: caption}, references {image: [captions]}; `ended` and `java` as in `metrics`.
    """
    scores = metrics.score_captions(candidates, references, java=java)
    scores |= metrics.describe_captions(candidates, ended)
    if len(candidates) > 1:
        scores["shuffled"] = metrics.shuffled_scores(candidates, references)
    return scores


def exact_answers(answers, truth):
    """Share of answers that are right to the letter, for questions about images; several right ones are a list each."""
    return sum(answer in right for answer, right in zip(answers, truth, strict=True)) / len(truth)


def evaluate(model, dataloader, tokenizer, device=None, java=False, **options):
    """Caption every image of `dataloader`'s dataset (a `Dataset` of the script) and score the captions -> dict.

    `options` are those of `decoding.Options`, for example num_beams=4. For questions about images the score is the
    share of exact answers. METEOR and SPICE are left out unless `java` is true.
    """
    dataset, model = dataloader.dataset, model if device is None else model.to(device)
    if any(dataset.prompts):
        right = {}
        for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
            right.setdefault((image, prompt), []).append(caption)
        images, prompts = zip(*right, strict=True)
        answers, _ = predict(model, tokenizer, list(images), list(prompts), **options)
        return {"exact answers": exact_answers(answers, right.values())}
    images = list(dataset.captions_of)
    captions, ended = predict(model, tokenizer, images, **options)
    return score(dict(zip(images, captions, strict=True)), dataset.captions_of, ended, java)


def score_subset(model, tokenizer, dataset, count, team, look=None):
    """Caption, together with the other processes of `team`, the first `count` images of a `Dataset` (without
    `unreadable_photos`), or answer its first `count` questions -> ({(image, question or ""): true captions}, captions,
    {"CIDEr", "BLEU-4"} or {"exact_answers"})."""
    truth, flags = {}, dataset.unreadable_photos.flags
    flags.copy_(team.any(flags))  # each process has seen other photos
    for image, prompt, caption in zip(dataset.images, dataset.prompts, dataset.captions, strict=True):
        if image not in dataset.unreadable_photos and ((image, prompt) in truth or len(truth) < count):
            truth.setdefault((image, prompt), []).append(caption)
    images, prompts = (list(column) for column in zip(*truth, strict=True))
    mine = slice(team.rank, None, team.size)
    captions, _ = predict(model, tokenizer, images[mine], prompts[mine], title="scoring", look=look)
    captions = team.interleave(captions)
    if any(prompts):
        scores = {"exact_answers": exact_answers(captions, truth.values())}
    else:
        references = dict(zip(images, truth.values(), strict=True))
        scores = metrics.score_captions(dict(zip(images, captions, strict=True)), references, java=False)
        scores = {name: scores[name] for name in ("CIDEr", "BLEU-4")}
    return truth, captions, scores


def table_rows(scores):
    """Scores as rows of text (name, value, value for shuffled captions), the first row the head."""
    shuffled = scores.get("shuffled", {})

    def text(value):
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    rows = [("", "score", "shuffled" if shuffled else "")]
    for name, value in scores.items():
        if name != "shuffled":
            rows.append((name, text(value), text(shuffled[name]) if isinstance(shuffled.get(name), float) else ""))
    return rows


def as_table(scores):
    """Scores as lines to print."""
    return "\n".join(f"{name:32s} {value:>10s} {beside:>10s}".rstrip() for name, value, beside in table_rows(scores))


def cider_of_each(candidates, references):
    """{image: caption}, {image: [captions]} -> {image: its CIDEr}, with document frequencies from these references."""
    images = list(candidates)
    tokens = [tokenize(references[image]) for image in images]
    scorer = metrics.CiderD(tokens)
    each = scorer.scores(tokenize([candidates[image] for image in images]), tokens)
    return dict(zip(images, map(float, each), strict=True))
