"""Plots of a run: curves of loss, perplexity and scores by epoch, and a grid of photos with their captions.

matplotlib is imported in the functions that draw: its import would delay the captioning of a photo.
"""

import io
import textwrap
from itertools import pairwise

from captioning.common.printable import printable
from captioning.images.preprocessing import load_image

UNITS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity per token",
    "exact_answers": "share right",
    "reward": "mean CIDEr",
    "lr": "learning rate",
}


def plot_curve(metrics, quantity, path):
    """Write the plot of `draw_curve` to the PNG `path` -> the figure."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    draw_curve(axes, metrics, quantity)
    figure.savefig(path, dpi=120)
    return figure


def curve_as_svg(metrics, quantity, points=()):
    """The plot of `draw_curve` -> the text of an SVG picture, for a page."""
    from matplotlib.figure import Figure  # pyplot would keep all figures of a long run in memory

    figure = Figure(figsize=(5.6, 3.5))
    axes = figure.subplots()
    figure.subplots_adjust(0.14, 0.14, 0.98, 0.96)  # matplotlib's automatic layout would take most of the time
    draw_curve(axes, metrics, quantity, points)
    return _as_svg(figure, quantity)


def overlaid_as_svg(lines, along, quantity):
    """Several runs in one plot -> the text of an SVG picture. `lines`: (points (x, y), colour, whether it is dotted) of
    each; `along`: what x is. Values that are not finite are gaps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 3.2))
    axes = figure.subplots()
    figure.subplots_adjust(0.19, 0.16, 0.97, 0.96)  # room for the labels of a logarithmic axis
    for points, colour, dotted in lines:
        style = dict(linestyle=":", linewidth=1) if dotted else dict(marker="o", markersize=3, linewidth=1.5)
        axes.plot(*zip(*points, strict=True), color=colour, alpha=0.85, **style)
    if quantity == "perplexity" and any(y > 50 for points, *_ in lines for _, y in points):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=along == "epochs"))
    axes.set_xlabel(along)
    axes.set_ylabel(UNITS.get(quantity, quantity))
    axes.grid(alpha=0.3)
    return _as_svg(figure, quantity)


def colours(count):
    """-> `count` colours that are told apart, as CSS writes them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    table = colormaps["tab10"].colors if count <= 10 else colormaps["turbo"]([i / (count - 1) for i in range(count)])
    return [to_hex(colour) for colour in table[:count]]


def _as_svg(figure, salt):
    """`salt`: makes the file depend on the numbers only."""
    import matplotlib

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return svg.getvalue()


def draw_curve(axes, metrics, quantity, points=()):
    """Draw `quantity` by epoch: "loss" or "perplexity" of training and validation, "lr", or a score of captions.

    `metrics`: one dict an epoch with the keys epoch, stage, train_<quantity> and valid_<quantity>, or <quantity> in the
    epochs that have it. `points`: dicts with values from within epochs; "place" is the position in epochs. Dotted lines
    mark where training stages begin.
    """
    from matplotlib.ticker import MaxNLocator

    within_epochs = [(point["place"], point[quantity]) for point in points if quantity in point]
    series = {"training": (f"train_{quantity}", "tab:blue"), "validation": (f"valid_{quantity}", "tab:orange")}
    if f"train_{quantity}" not in metrics[0]:
        labels = {"reward": "captions drawn in training", "lr": "new layers"}
        series = {labels.get(quantity, "validation captions"): (quantity, "tab:green")}
    if quantity == "lr" and within_epochs:
        (label,) = series  # the rate rises and falls within an epoch, so its values at the ends would mislead
        axes.plot(*zip(*within_epochs, strict=True), color="tab:green", label=label)
        series = {}
    elif within_epochs:
        axes.plot(*zip(*within_epochs, strict=True), color=next(iter(series.values()))[1], alpha=0.4, linewidth=1)
    for label, (key, colour) in series.items():
        known = [(row["epoch"], row[key]) for row in metrics if key in row]
        axes.plot(*zip(*known, strict=True), marker="o", color=colour, label=label)
    for before, row in pairwise(metrics):
        if row["stage"] != before["stage"]:
            start = row["epoch"] - 1 if within_epochs else row["epoch"] - 0.5
            axes.axvline(start, color="grey", linestyle=":")
            axes.annotate(
                row["stage"],
                (start, 1),
                xytext=(3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                ha="left",
                va="top",
                fontsize=8,
                color="grey",
            )
    if quantity == "perplexity" and any(metrics[0][f"{part}_perplexity"] > 50 for part in ("train", "valid")):
        axes.set_yscale("log")  # else the first epochs would flatten the rest of the curve
    axes.set_xlabel("epoch")
    axes.set_ylabel(UNITS.get(quantity, quantity))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def plot_captions(images, generated, references, path, columns=5):
    """Write a grid of photos, each with its generated caption and a reference, to the PNG `path` -> the figure.

    `images`: PIL images; `generated`: list of str; `references`: list of str, "" for an image without a reference.
    """
    import matplotlib.pyplot as plt

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 4.1 * rows), squeeze=False, layout="constrained")
    for cell in axes.flat[len(images) :]:
        cell.axis("off")
    for cell, image, caption, reference in zip(axes.flat, images, generated, references, strict=False):
        cell.imshow(image)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
        # Unlike free text, title and label have space of their own in the layout; long captions are cut at four lines.
        cell.set_title(
            textwrap.fill(printable(caption or "(empty)"), 32, max_lines=4, placeholder=" ..."),
            fontsize=10,
            loc="left",
            parse_math=False,
        )
        if reference:
            lines = textwrap.fill(f"true: {printable(reference)}", 40, max_lines=4, placeholder=" ...")
            cell.set_xlabel(lines, fontsize=8, color="dimgrey", loc="left", parse_math=False)
    figure.savefig(path, dpi=100)
    return figure


def plot_confidence(measured, path):
    """Write two diagrams side by side to the PNG `path`: share right by confidence (a reliability diagram), and share
    wrong among the surest (risk against coverage) -> the figure.

    `measured`: {name: (list of (mean confidence, share right, count), coverage (n,), risk (n,))}.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    left.plot((0, 1), (0, 1), color="grey", linestyle=":", label="calibrated")
    for (name, (rows, coverage, risk)), colour in zip(measured.items(), ("tab:blue", "tab:orange"), strict=False):
        confidence, share, counts = zip(*rows, strict=True)
        left.plot(confidence, share, color=colour, alpha=0.4)
        sizes = [15 + 185 * count / sum(counts) for count in counts]
        left.scatter(confidence, share, sizes, color=colour, label=f"{name} (area: how many)")
        right.plot(coverage, risk, color=colour, label=name)
    left.set(xlabel="confidence", ylabel="share right", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    right.set(xlabel="coverage: share kept, the surest first", ylabel="risk: share wrong among them", xlim=(0, 1))
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    return figure


def show_windows():
    """Show the open figures if there is a display, and return when their windows are closed."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() not in ("agg", "template", "pdf", "svg", "ps", "cairo"):
        plt.show()
    plt.close("all")


def draw_demo(caption, rows, count, path):
    """Caption the first `count` readable photos of `rows`, or answer a question about each; print the texts and draw
    them with the photos to the PNG `path`.

    `rows`: a DataFrame with the columns image, caption and, for questions, prompt. `caption(images, prompt=[...])`
    returns the texts.
    """
    rows, photos = rows.drop_duplicates("image"), []
    readable = []
    for image in rows["image"]:
        if len(photos) == count:
            break
        try:
            photos.append(load_image(image))
            readable.append(image)
        except (OSError, ValueError) as error:
            print(f"warning: {error}. The demo goes on without it")
    rows = rows[rows["image"].isin(readable)]
    if rows.empty:
        return
    questions = list(rows["prompt"]) if "prompt" in rows else [""] * len(rows)
    generated = caption(list(rows["image"]), prompt=questions)
    for image, question, text, reference in zip(rows["image"], questions, generated, rows["caption"], strict=True):
        question, text, reference, name = map(printable, (question, text, reference, image.name))
        print(f"{name} {question}\n    generated: {text}\n    true:      {reference}")
    titles = [f"{question} {text}".strip() for question, text in zip(questions, generated, strict=True)]
    plot_captions(photos, titles, list(rows["caption"]), path)
