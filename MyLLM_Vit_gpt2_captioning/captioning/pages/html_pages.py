"""HTML pages with photos and their captions, and the sample captions of every epoch as Markdown.

A page is one self-contained file: it embeds its pictures and loads nothing.
"""

import base64
import io
from functools import lru_cache
from pathlib import Path

from captioning.common.files import write_atomically
from captioning.common.printable import in_html, in_markdown
from captioning.images.preprocessing import load_image

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1.2em; color: #1f2328; }
h1 { font-size: 1.7em; margin: 0.2em 0; } h2 { font-size: 1.2em; margin: 2em 0 0.6em; }
table { border-collapse: collapse; margin: 0.6em 0; }
td, th { padding: 0.25em 1.4em 0.25em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.score { max-width: 20em; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(15em, 1fr)); gap: 1.5em; }
figure { margin: 0; } img { width: 100%; border-radius: 4px; } figcaption b { display: block; margin: 0.3em 0; }
ul { margin: 0; padding-left: 1.2em; color: #59636e; font-size: 13px; } .score { color: #59636e; font-size: 13px; }
"""
GREY = (  # an SVG picture
    b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"><rect width="4" height="3" fill="#ddd"/></svg>'
)


def thumbnail(image, side=288):
    """Any image that `load_image` takes -> the data URL of a JPEG of at most `side` pixels a side."""
    image = load_image(image)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url("image/jpeg", buffer.getvalue())


_thumbnail_of_file = lru_cache(256)(thumbnail)  # a run's report shows the same photos after every epoch


def data_url(kind, content):
    """The content of a file (bytes) and its MIME type `kind` -> its data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_page(path, title, parts, style=""):
    """Write an HTML page of `parts` (HTML text), with the CSS `style` after the common one."""
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{in_html(title)}</title><style>{STYLE}{style}</style>"
    )
    write_atomically(path, lambda draft: draft.write_text("\n".join([head, *parts]) + "\n", encoding="utf-8"))


def photo_grid(photos):
    """(image, caption, reference captions, text of its score) of each photo -> HTML; unreadable photos are grey."""
    parts = ["<div class=photos>"]
    for image, caption, references, score in photos:
        items = "".join(f"<li>{in_html(text)}</li>" for text in references)
        parts.append(
            f'<figure><img src="{photo_url(image)}" alt="{in_html(caption)}"><figcaption>'
            f"<b>{in_html(caption) or '(empty)'}</b><ul>{items}</ul>"
            f"<span class=score>{in_html(score)}</span></figcaption></figure>"
        )
    return "\n".join([*parts, "</div>"])


def photo_url(image):
    """Any image that `load_image` takes -> the data URL of its thumbnail, or of a grey area if it cannot be read."""
    try:
        return _thumbnail_of_file(image) if isinstance(image, (str, Path)) else thumbnail(image)
    except (OSError, ValueError):  # the file was removed or damaged after it was captioned
        return data_url("image/svg+xml", GREY)


def write_evaluation_page(path, title, scores, sections, diagram=None):
    """Write the page of evaluate_captions.py.

    `scores`: rows of text, the name first, then its values, the header in front; `sections`: {heading: photos as
    `photo_grid` takes them}; `diagram`: the content of a PNG with the diagrams of the confidence.
    """
    (first, *titles), *rest = scores
    rows = [f"<tr><th>{in_html(first)}</th>" + "".join(f"<th class=number>{in_html(t)}</th>" for t in titles)]
    for name, value, *others in rest:
        if value.replace(".", "", 1).isdigit():
            cells = "".join(f"<td class=number>{in_html(cell)}</td>" for cell in (value, *others))
        else:  # the reason why there is no number
            cells = f"<td colspan={1 + len(others)} class=score>{in_html(value)}</td>"
        rows.append(f"<tr><td>{in_html(name)}</td>{cells}</tr>")
    parts = [f"<h1>{in_html(title)}</h1><table>{''.join(rows)}</table>"]
    if diagram:
        parts += [
            "<h2>Confidence</h2>",
            f'<img src="{data_url("image/png", diagram)}" alt="diagrams of the confidence">',
        ]
    for heading, photos in sections.items():
        parts += [f"<h2>{in_html(heading)}</h2>", photo_grid(photos)]
    write_page(path, title, parts)


def table(rows):
    """Rows of text, the header first -> HTML; all columns but the first hold numbers."""

    def line(cells, tag):
        name, *numbers = map(in_html, cells)
        return (
            f"<tr><{tag}>{name}</{tag}>" + "".join(f"<{tag} class=number>{cell}</{tag}>" for cell in numbers) + "</tr>"
        )

    head, *body = rows
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>"


def side_by_side(photos):
    """(image, [(name of a system, its caption, note), ...], reference captions) of each photo -> HTML."""
    parts = ["<div class=photos>"]
    for image, captions, references in photos:
        rows = "".join(
            f"<tr><td class=score>{in_html(name)}</td><td>{in_html(caption) or '(empty)'}"
            f" <span class=score>{in_html(note)}</span></td></tr>"
            for name, caption, note in captions
        )
        items = "".join(f"<li>{in_html(text)}</li>" for text in references)
        parts.append(
            f'<figure><img src="{photo_url(image)}" alt=""><figcaption><table>{rows}</table><ul>{items}</ul>'
            "</figcaption></figure>"
        )
    return "\n".join([*parts, "</div>"])


def text_table(rows):
    """Rows of text, the header first -> the table as one text; all columns but the first are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([f"{name:{widths[0]}s}", *(f"{c:>{w}s}" for c, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    )
    return "\n".join(line.rstrip() for line in lines)


WORDS_STYLE = """
section { border-top: 1px solid #d0d7de; padding: 1.2em 0; }
.caption { font-size: 1.25em; line-height: 1.9; } .caption span { border-radius: 4px; padding: 0.15em 0.25em; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(15em, 1fr)); gap: 1.4em; }
.words td, .words th { padding: 0 0.6em 0 0; font-size: 13px; } .words h3 { margin: 0.3em 0 0; font-size: 1.1em; }
.whole { width: 15em; } .seen { color: #1a7f37; } .guessed { color: #9a6700; }
"""


def shade(confidence):
    """A CSS background: the less sure, the redder."""
    return f"background: rgba(207, 34, 46, {0.55 * (1 - confidence):.2f})"


def write_words_page(path, title, captions):
    """Write the page that explains captions word by word.

    captions: dicts with `photo` (a PIL image), `caption`, `confidence`, and `words`, a list of dicts with `word`,
    `confidence`, `seen` (or guessed), `map` (a PIL image: where the word looked), and `with_photo` and `without`: the
    likeliest (text, probability) at its place.
    """
    parts = [
        f"<h1>{in_html(title)}</h1><p>A word is <b class=seen>seen</b> when the photo makes it at least twice as "
        "likely as it is without one, else <b class=guessed>guessed</b>: it would have been written anyway. The redder "
        "its ground, the less sure it is. Under each word: where the model looked, and what was likeliest in its "
        "place.</p>"
    ]
    for one in captions:
        text = " ".join(
            f'<span style="{shade(word["confidence"])}" title="confidence {word["confidence"]:.2f}">'
            f"{in_html(word['word'])}</span>"
            for word in one["words"]
        )
        alt = in_html(one["caption"])
        parts.append(
            f'<section><img class=whole src="{photo_url(one["photo"])}" alt="{alt}">'
            f"<p class=caption>{text or '(empty)'}</p><p>confidence {one['confidence']:.2f}</p><div class=words>"
        )
        for word in one["words"]:
            rows = "".join(
                f"<tr><td>{in_html(a)}</td><td class=number>{p:.0%}</td>"
                f"<td>{in_html(b)}</td><td class=number>{q:.0%}</td></tr>"
                for (a, p), (b, q) in zip(word["with_photo"], word["without"], strict=True)
            )
            kind = "seen" if word["seen"] else "guessed"
            parts.append(
                f'<figure><img src="{photo_url(word["map"])}" alt="where it looked"><figcaption>'
                f"<h3>{in_html(word['word'])}</h3><span class={kind}>{kind}</span>, confidence "
                f"{word['confidence']:.2f}<table><tr><th colspan=2>with the photo</th><th colspan=2>without</th></tr>"
                f"{rows}</table></figcaption></figure>"
            )
        parts.append("</div></section>")
    write_page(path, title, parts, WORDS_STYLE)


PAIRS_STYLE = """
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(30em, 1fr)); gap: 2em; }
.pairs > div > div { display: grid; grid-template-columns: 1fr 1fr; gap: 0.8em; } .pairs b { display: block; }
"""


def write_pairs_page(path, title, pairs, misfits):
    """Write the page of pairs of photo and caption that are probably wrong.

    pairs: dicts with `own` and `best` (images: the caption's photo, and the one that fits it best), `caption`, `others`
    (the photo's other captions) and `note`; misfits: photos as `photo_grid` takes them, whose captions fit no photo.
    """
    parts = [f"<h1>{in_html(title)}</h1>", "<h2>Captions that fit other photos better</h2><div class=pairs>"]
    for pair in pairs:
        figures = "".join(
            f'<figure><img src="{photo_url(pair[key])}" alt="{text}"><figcaption class=score>{text}: '
            f"{in_html(Path(pair[key]).name)}</figcaption></figure>"
            for key, text in (("own", "its photo"), ("best", "fits best"))
        )
        items = "".join(f"<li>{in_html(text)}</li>" for text in pair["others"])
        parts.append(
            f"<div><b>{in_html(pair['caption']) or '(empty)'}</b><div>{figures}</div>"
            f"<span class=score>{in_html(pair['note'])}; other captions of its photo:</span><ul>{items}</ul></div>"
        )
    parts += ["</div>", "<h2>Captions that fit no photo well</h2>", photo_grid(misfits)]
    write_page(path, title, parts, PAIRS_STYLE)


def write_samples(path, names, references, by_epoch):
    """Write the captions of the same images after every epoch, as Markdown.

    names: the images' names; references: the reference captions of each image; by_epoch: {epoch: [a caption an image]}.
    """
    lines = ["# The same images after every epoch", ""]
    for i, (name, captions_of_image) in enumerate(zip(names, references, strict=True)):
        lines += [f"## {in_markdown(name)}", "", *(f"- true: {in_markdown(text)}" for text in captions_of_image), ""]
        lines += ["| epoch | caption |", "| ---: | --- |"]
        lines += [f"| {epoch} | {in_markdown(captions[i])} |" for epoch, captions in by_epoch.items()]
        lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda draft: draft.write_text("\n".join(lines), encoding="utf-8"))
