"""Pictures of a run: nothing overlaps, nothing is cut off."""

from PIL import Image

from captioning.pages import plots


def test_long_captions_have_their_room(tmp_path):
    """A caption that never ends, above and below: the rows of the grid and the edges of the picture stay clear."""
    images = [Image.new("RGB", (60, 40 + 10 * i)) for i in range(5)]
    figure = plots.plot_captions(images, ["blue and " * 40] * 5, ["a very long truth " * 20] * 5, tmp_path / "g.png", 3)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert min(box.y0 for box in boxes[:3]) >= max(box.y1 for box in boxes[3:5])
    assert min(box.y0 for box in boxes[:5]) >= 0
    assert max(box.y1 for box in boxes[:5]) <= figure.bbox.height


def test_stages_are_marked(tmp_path):
    rows = [dict(epoch=i + 1, stage=stage, train_loss=3 - i, valid_loss=3.5 - i) for i, stage in enumerate("aab")]
    figure = plots.plot_curve(rows, "loss", tmp_path / "loss.png")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["b"]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[3, 2, 1], [3.5, 2.5, 1.5]]
    plots.show_windows()  # without a display: returns at once


def test_dollars_in_a_caption_are_no_formula(tmp_path):
    """matplotlib would read "$...$" as mathematics and stop at what it cannot parse."""
    photo = Image.new("RGB", (8, 8))
    plots.plot_captions([photo], [r"a sign says $\foo$ twice"], [r"$\bar"], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
