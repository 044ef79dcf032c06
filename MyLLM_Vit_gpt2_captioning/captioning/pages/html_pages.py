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


def write_evaluation_page(path, title, scores, sections):
    """Write the page of evaluate_captions.py.

    `scores`: rows of text (name, value, value for shuffled captions), the header first; `sections`: {heading: photos
    as `photo_grid` takes them}.
    """
    (first, *titles), *rest = scores
    rows = [f"<tr><th>{in_html(first)}</th>" + "".join(f"<th class=number>{in_html(t)}</th>" for t in titles)]
    for name, value, shuffled in rest:
        if value.replace(".", "", 1).isdigit():
            cells = "".join(f"<td class=number>{in_html(cell)}</td>" for cell in (value, shuffled))
        else:
            cells = f"<td colspan=2 class=score>{in_html(value)}</td>"  # the reason why there is no number
        rows.append(f"<tr><td>{in_html(name)}</td>{cells}</tr>")
    parts = [f"<h1>{in_html(title)}</h1><table>{''.join(rows)}</table>"]
    for heading, photos in sections.items():
        parts += [f"<h2>{in_html(heading)}</h2>", photo_grid(photos)]
    write_page(path, title, parts)


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
