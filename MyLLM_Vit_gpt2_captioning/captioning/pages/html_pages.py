"""Pages to look at: what HTML pages share, photos with generated and true captions, and the samples of every epoch as
Markdown. A page is one file: pictures are inside, and nothing is loaded from elsewhere."""

import base64
import html
import io
from functools import lru_cache
from pathlib import Path

from captioning.common.files import write_atomically
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


def thumbnail(image, side=288):
    """Any image that `load_image` takes -> a data URL of a small JPEG, so that a page is one file."""
    image = load_image(image)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url("image/jpeg", buffer.getvalue())


_thumbnail_of_file = lru_cache(256)(thumbnail)  # a run's report shows the same photos after every epoch


def data_url(kind, content):
    """Bytes of a file of this MIME type -> the address that stands for them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_page(path, title, parts, style=""):
    """One self-contained HTML file of `parts`, HTML as text, with `style` on top of what pages have in common."""
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    write_atomically(path, lambda draft: draft.write_text("\n".join([head, *parts]) + "\n", encoding="utf-8"))


def photo_grid(photos):
    """(image, caption, true captions, text of its score) of each photo -> HTML; a photo that cannot be read is grey."""
    parts = ["<div class=photos>"]
    for image, caption, truth, shown in photos:
        true = "".join(f"<li>{html.escape(text)}</li>" for text in truth)
        parts.append(
            f'<figure><img src="{photo_url(image)}" alt="{html.escape(caption, quote=True)}"><figcaption>'
            f"<b>{html.escape(caption) or '(empty)'}</b><ul>{true}</ul>"
            f"<span class=score>{html.escape(shown)}</span></figcaption></figure>"
        )
    return "\n".join([*parts, "</div>"])


def photo_url(image):
    """Any image that `load_image` takes -> a data URL of its thumbnail, or of a grey one where it cannot be read."""
    try:
        return _thumbnail_of_file(image) if isinstance(image, (str, Path)) else thumbnail(image)
    except (OSError, ValueError):  # it was there when it was captioned
        return data_url("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"><rect '
                        b'width="4" height="3" fill="#ddd"/></svg>')  # fmt: skip


def write_evaluation_page(path, title, scores, sections):
    """One self-contained HTML file.

    `scores`: rows (name, value, value beside it), all text, the first of them the head; `sections`: {heading: list of
    (image, caption, true captions, text of its score)}.
    """
    (first, *numbers), *rest = scores
    rows = [f"<tr><th>{html.escape(first)}</th>" + "".join(f"<th class=number>{html.escape(n)}</th>" for n in numbers)]
    for name, value, beside in rest:
        if value.replace(".", "", 1).isdigit():
            cells = "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in (value, beside))
        else:
            cells = f"<td colspan=2 class=score>{html.escape(value)}</td>"  # why there is no number
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    parts = [f"<h1>{html.escape(title)}</h1><table>{''.join(rows)}</table>"]
    for heading, photos in sections.items():
        parts += [f"<h2>{html.escape(heading)}</h2>", photo_grid(photos)]
    write_page(path, title, parts)


def write_samples(path, names, references, by_epoch):
    """What the same images were called after every epoch -> Markdown.

    names: the images' names; references: for each image its true captions; by_epoch: {epoch: [a caption an image]}.
    """
    lines = ["# The same images after every epoch", ""]
    for i, (name, truth) in enumerate(zip(names, references, strict=True)):
        lines += [f"## {name}", "", *(f"- true: {text}" for text in truth), "", "| epoch | caption |", "| ---: | --- |"]
        lines += [f"| {epoch} | {captions[i].replace('|', chr(92) + '|')} |" for epoch, captions in by_epoch.items()]
        lines.append("")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda draft: draft.write_text("\n".join(lines), encoding="utf-8"))
