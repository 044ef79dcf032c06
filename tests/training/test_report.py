"""The report of a run: one file that holds it all, and that ends no run."""

import html
import json
import re

import pandas as pd
import pytest

from captioning.pages import html_pages, plots
from captioning.training import report
from conftest import CAPTIONS, make_flickr, script_module, tiny_model_of, tiny_training_of, trainers_of
from helpers.runs import TINY, stop_after


def sections(page):
    """{heading: HTML of the section}"""
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL))


def test_the_page_of_a_whole_run(script, flickr, tmp_path, capsys):
    out = tmp_path / "captioner"
    script.main(["--data_dir", str(flickr), "--model_path", str(out), *TINY, "--log_steps", "1"])
    page = (out / "report.html").read_text()
    shown = sections(page)
    assert list(shown) == [
        "Curves", "Epochs", "The same photos after every epoch", "Best captions after epoch 2",
        "Where it looks for each word", "Diagnosis", "Model", "Constants", "Environment",
    ]  # fmt: skip
    assert shown["Curves"].count("data:image/svg+xml;base64,") == 5  # loss, perplexity, lr, BLEU-4, CIDEr
    row = pd.read_csv(out / "metrics.csv").iloc[1]
    cells = re.findall(r"<td.*?>(.*?)</td>", shown["Epochs"])
    assert f"{row['valid_loss']:.3f}" in cells and f"{row['train_perplexity']:.3f}" in cells
    samples = shown["The same photos after every epoch"]
    assert samples.count("data:image/jpeg;base64,") == 2
    assert samples.count(f"<li>{html.escape(CAPTIONS[0])}</li>") == 2
    assert "<dt>embed_dim</dt><dd>32</dd>" in shown["Constants"]
    assert "<dt>torch</dt>" in shown["Environment"] and "<dt>device</dt>" in shown["Environment"]
    summary = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cross-attention")]
    assert len(summary) == 1  # printed when the run begins
    assert re.search(r"<td>cross-attention</td>.*8,448", shown["Model"])


@pytest.fixture(scope="module")
def one_epoch(bpe, tmp_path_factory):
    """A run of one epoch -> (its trainer, its folder, its page)."""
    folder = tmp_path_factory.mktemp("one_epoch")
    training = tiny_training_of(make_flickr(folder / "data"), folder)
    trainer = trainers_of(script_module, tiny_model_of(bpe), training, bpe)(folder / "run", epochs=1)
    trainer.run_training()
    return trainer, folder / "run", (folder / "run" / "report.html").read_text()


def test_nothing_is_loaded_from_elsewhere(one_epoch):
    _, folder, page = one_epoch
    assert "<script" not in page and "@import" not in page and "@font-face" not in page
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert str(folder.parent) not in page  # no private folder either


def test_captions_are_text_never_markup(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", epochs=1)
    nasty = '<script>alert("1")</script> & "x"'
    trainer.valid_dl.dataset.captions[:] = [nasty] * len(trainer.valid_dl.dataset)
    monkeypatch.setattr("captioning.scoring.evaluation.predict", lambda *args, **options: ([nasty] * 2, [True] * 2))
    trainer.run_training()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert html.escape(nasty, quote=False) in page.replace("&quot;", '"')


def test_best_and_worst_by_cider(make_trainer, tmp_path, monkeypatch):
    """Of ten photos the one with the true caption comes first, and the empty one is the worst."""
    monkeypatch.setattr(report, "SHOWN", 1)
    trainer = make_trainer(tmp_path / "run", epochs=1, score_images=8)
    trainer.valid_dl = trainer.train_dl  # has eight photos
    trainer.run_training()
    dataset = trainer.valid_dl.dataset
    dataset.captions[:] = [
        f"{caption} {path[-5]}" for path, caption in zip(dataset.images, dataset.captions, strict=True)
    ]
    captions = ["a dog"] * 8
    captions[3], captions[5] = dataset.captions[dataset.images.index(list(dataset.captions_of)[3])], ""
    trainer.log.scored["captions"] = captions
    trainer.log.write_report(trainer.eval_model)
    shown = sections((tmp_path / "run" / "report.html").read_text())
    assert f"<b>{captions[3]}</b>" in shown["Best captions after epoch 1"]
    assert shown["Best captions after epoch 1"].count("<figure>") == 1
    assert "CIDEr 0.00" in shown["Worst captions after epoch 1"]


def test_questions_are_right_or_wrong(script, flickr, tmp_path, monkeypatch):
    rows = [
        dict(image=f"{1000 + i}.jpg", prompt="what is it ?", answer="a dog", split="val" if i > 7 else "train")
        for i in range(12)
    ]
    (flickr / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(
        "captioning.scoring.evaluation.predict", lambda *a, **o: (["a dog", "a cat", "a dog", "?"], [True] * 4)
    )
    arguments = ["--data_dir", str(flickr), "--captions_file", str(flickr / "questions.jsonl")]
    script.main([*arguments, "--model_path", str(tmp_path / "run"), *TINY, "--epochs", "1"])
    shown = sections((tmp_path / "run" / "report.html").read_text())
    assert shown["Right answers after epoch 1"].count("<b>what is it ? a dog</b>") == 2
    assert "<b>what is it ? a cat</b>" in shown["Wrong answers after epoch 1"]
    assert "<b>what is it ?</b>" in shown["The same photos after every epoch"]


def test_a_resumed_run_has_its_whole_history(make_trainer, tmp_path):
    """Stopped in the middle of the third epoch: the page after it is that of the run that was never stopped."""
    pages_of = []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        changes = dict(log_steps=1, score_every=2)  # so that the resumed epoch brings no captions of its own
        trainer = make_trainer(folder, **changes)
        if stop:
            stop_after(trainer, 2 * len(trainer.train_dl) + stop, RuntimeError("out of memory"))
            with pytest.raises(RuntimeError):
                trainer.run_training()
            trainer = make_trainer(folder, resume="auto", **changes)
        trainer.run_training()
        page = sections((folder / "report.html").read_text())
        page = {name: page[name] for name in page if name not in ("Constants", "Epochs", "Diagnosis")}  # paths; seconds
        pages_of.append(page)
        assert [row["epoch"] for row in trainer.log.timings] == [1, 2, 3]
        assert len(trainer.log.points) == trainer.log.steps == 3 * len(trainer.train_dl)
        assert trainer.log.diagnosis.steps == trainer.log.steps
        assert trainer.log.diagnosis.first > trainer.log.diagnosis.lowest
    assert "Best captions after epoch 2" in pages_of[0]
    assert pages_of[0] == pages_of[1]


def test_a_report_that_fails_ends_no_run(make_trainer, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path / "run", epochs=2)
    monkeypatch.setattr(plots, "curve_as_svg", lambda *args: [][0])
    assert trainer.run_training()["best_epoch"] is not None
    said = capsys.readouterr().out
    assert said.count("WARNING: report.html is not written (IndexError: list index out of range); the run goes on") == 2
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_photo_that_is_gone_is_grey(one_epoch, tmp_path):
    photo = html_pages.photo_url(str(tmp_path / "gone.jpg"))
    assert photo.startswith("data:image/svg+xml;base64,")
    assert photo not in one_epoch[2]


def test_an_epoch_that_is_done_again_comes_once(make_trainer, tmp_path, monkeypatch):
    """Stopped after the epoch was recorded, before its state was: on resume it is recorded again."""
    trainer = make_trainer(tmp_path / "run", epochs=2)

    def stop(*args):
        raise RuntimeError("disk")

    monkeypatch.setattr(trainer, "save_model", stop)
    with pytest.raises(RuntimeError):
        trainer.run_training()
    trainer = make_trainer(tmp_path / "run", epochs=2, resume="auto")
    trainer.run_training()
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["epoch"].tolist() == [1, 2]


def test_throughput_counts_what_was_trained_in_the_time(make_trainer, tmp_path):
    """Sixteen captions an epoch; in self-critical training those that were drawn; of a resumed epoch the rest."""
    trainer = make_trainer(tmp_path / "run", epochs=1, scst_epochs=1, scst_samples=3)
    trainer.run_training()
    table = pd.read_csv(tmp_path / "run" / "timings.csv")
    assert table["captions"].tolist() == [16, 8 * 3]
    assert report.captions_per_second(dict(epoch=1, training=4.0, captions=16)) == 4
    assert report.captions_per_second(dict(epoch=1, training=4.0)) is None  # written by an earlier version
    trainer = make_trainer(tmp_path / "other", epochs=1)
    stop_after(trainer, 1, RuntimeError())
    with pytest.raises(RuntimeError):
        trainer.run_training()
    trainer = make_trainer(tmp_path / "other", epochs=1, resume="auto")
    stop_after(trainer, 3, RuntimeError())
    with pytest.raises(RuntimeError):
        trainer.run_training()
    trainer = make_trainer(tmp_path / "other", epochs=1, resume="auto")
    trainer.run_training()
    assert pd.read_csv(tmp_path / "other" / "timings.csv")["captions"].tolist() == [8]


def test_the_learning_rate_between_epochs(tmp_path):
    rows = [dict(epoch=i + 1, stage=stage, lr=0.5) for i, stage in enumerate("aab")]
    points = [dict(place=i / 4, lr=i, loss=1.0) for i in range(12)]
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.draw_curve(axes, rows, "lr", points)
    assert list(axes.lines[0].get_ydata()) == list(range(12))
    assert [text.get_text() for text in axes.texts] == ["b"]
    assert axes.lines[1].get_xdata()[0] == 2  # the third epoch begins where the second ends
    first = plots.curve_as_svg(rows, "lr", points)
    assert first.startswith("<?xml") and first == plots.curve_as_svg(rows, "lr", points)


def test_long_runs_show_some_of_their_epochs(one_epoch, monkeypatch):
    trainer, folder, _ = one_epoch
    samples = {epoch: [f"after {epoch}", "b"] for epoch in range(1, 101)}
    monkeypatch.setattr(trainer.log, "samples", samples)
    trainer.log.write_report(trainer.eval_model)
    samples = sections((folder / "report.html").read_text())["The same photos after every epoch"]
    shown = [int(epoch) for epoch in re.findall(r"<td>after (\d+)</td>", samples)]
    assert len(shown) == 8 and shown == sorted(shown) and (shown[0], shown[-1]) == (1, 100)
