"""Pages to look at: photos with generated and true captions as HTML, and the samples of every epoch as Markdown."""

import base64
import html
import io

from checkpoint import write_atomically
from preprocessing import load_image

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 0.2em 1em 0.2em 0; text-align: left; }
td.number, th { text-align: right; font-variant-numeric: tabular-nums; }
td.score { max-width: 20em; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(15em, 1fr)); gap: 1.5em; }
figure { margin: 0; } img { width: 100%; border-radius: 4px; } figcaption b { display: block; margin: 0.3em 0; }
ul { margin: 0; padding-left: 1.2em; color: #666; font-size: 13px; } .score { color: #666; font-size: 13px; }
"""


def thumbnail(image, side=288):
    """Any image that `load_image` takes -> a data URL of a small JPEG, so that a page is one file."""
    image = load_image(image)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_evaluation_page(path, title, scores, sections):
    """One self-contained HTML file.

    `scores`: rows (name, value, value beside it), all text, the first of them the head; `sections`: {heading: list of
    (image, caption, true captions, text of its score)}.
    """
    head, *rest = scores
    rows = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, value, beside in rest:
        if value.replace(".", "", 1).isdigit():
            cells = "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in (value, beside))
        else:
            cells = f"<td colspan=2 class=score>{html.escape(value)}</td>"  # why there is no number
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><table>{''.join(rows)}</table>",
    ]
    for heading, photos in sections.items():
        parts.append(f"<h2>{html.escape(heading)}</h2><div class=photos>")
        for image, caption, truth, shown in photos:
            true = "".join(f"<li>{html.escape(text)}</li>" for text in truth)
            parts.append(
                f'<figure><img src="{thumbnail(image)}" alt="{html.escape(caption, quote=True)}"><figcaption>'
                f"<b>{html.escape(caption) or '(empty)'}</b><ul>{true}</ul>"
                f"<span class=score>{html.escape(shown)}</span></figcaption></figure>"
            )
        parts.append("</div>")
    write_atomically(path, lambda draft: draft.write_text("\n".join(parts) + "\n", encoding="utf-8"))


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
