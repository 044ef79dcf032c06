"""compare_runs.py: runs beside each other, from the files in their folders, which are made by hand here."""

import math
import re
from types import SimpleNamespace

import pytest
from PIL import Image
from scipy import stats

import compare_runs
from captioning.command_line.recipes import as_toml
from captioning.pages.html_pages import write_samples
from captioning.scoring.intervals import mean_interval
from captioning.training import compared_runs

CONSTANTS = dict(lr=1e-4, seed=0, epochs=3, scst_epochs=0, best_by="perplexity", encoder_options={"depth": 2})


@pytest.fixture
def run(tmp_path):
    """-> a function that makes the folder `name` of a run from its perplexities by epoch and its constants."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("dog.png", "cat.png"):
        Image.new("RGB", (8, 8), "red").save(photos / name)

    def make(name, perplexities=(9.0, 4.0, 5.0), ciders=(0.1, 0.2, 0.3), timings=True, **constants):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        values = CONSTANTS | {"model_path": folder, "data_dir": photos} | constants
        (folder / "recipe.toml").write_text(as_toml(train_config=SimpleNamespace(**values)))
        rows = [
            f"{i},all,0.001,2.5,{math.log(p)},12.1,{p},{'' if c is None else c}"
            for i, (p, c) in enumerate(zip(perplexities, ciders, strict=True), 1)
        ]
        head = "epoch,stage,lr,train_loss,valid_loss,train_perplexity,valid_perplexity,CIDEr"
        (folder / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
        if timings:
            times = [f"{i},1800,1800,{500 + i}" for i in range(1, len(rows) + 1)]
            (folder / "timings.csv").write_text("\n".join(["epoch,training,evaluation,captions", *times]) + "\n")
        by_epoch = {i: [f"{name} | dog {i}", f"{name} cat {i}"] for i, c in enumerate(ciders, 1) if c is not None}
        write_samples(folder / "samples.md", ["dog.png", "cat.png what is it"], [["a *dog*"], ["a cat"]], by_epoch)
        return folder

    return make


def read(*folders):
    runs, left_out = compared_runs.read_runs(folders)
    assert left_out == []
    return compared_runs.name_runs(runs)


def test_one_page_of_all_runs(run, tmp_path, capsys):
    """The table is printed, the page is in the folder of the runs, with a colour a setting and the photos inside."""
    run("runs/a")
    run("runs/b", seed=1)
    run("runs/c", lr=3e-4)
    compare_runs.main([str(path) for path in sorted((tmp_path / "runs").iterdir())])
    printed = capsys.readouterr().out
    assert re.search(r"^c +lr 0\.0003 +0 +3 +2 +4\.000 +0\.200 +1,506 +3\.000$", printed, re.MULTILINE)
    assert re.search(r"^lr +0\.0001 +0\.0003$", printed, re.MULTILINE)
    page = (tmp_path / "runs" / "compared_runs.html").read_text()
    assert page.count("data:image/svg+xml") == 9, "loss, perplexity and CIDEr against three axes"
    assert page.count("data:image/jpeg") == 2, "both photos, one named with a question behind it"
    assert "runs/c | dog 2" in page, "the caption of the best epoch, as it was written"
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page), "it loads nothing"


def test_a_folder_of_runs_and_earlier_ones(run, tmp_path):
    """With or without the * of a shell, whose files and parts of a run are passed over; no run comes twice."""
    folder = run("a")
    run("a/earlier/2026-01-01", seed=3)
    (folder / "last").mkdir()
    names = ["a", "a/earlier/2026-01-01"]
    for given in ([folder], [tmp_path], [folder, tmp_path], [folder, *folder.iterdir()]):
        assert [run.name for run in read(*given)] == names


def test_only_constants_that_differ_and_matter(run):
    """The seed, and where files lie, do not make another setting."""
    folders = [run("a"), run("b", seed=1, log_steps=7), run("c", encoder_options={"depth": 3}), run("d", dropout=0.1)]
    runs = read(*folders)
    short, deep, dropout = 'encoder_options {"depth": 2}, dropout -', 'encoder_options {"depth": 3}, dropout -', "0.1"
    assert compared_runs.constants_table(runs) == [
        ("constant", short, deep, f'encoder_options {{"depth": 2}}, dropout {dropout}'),
        ("encoder_options", '{"depth": 2}', '{"depth": 3}', '{"depth": 2}'),
        ("dropout", "-", "-", dropout),
    ]
    assert [run.setting for run in runs][:2] == [short, short]
    [name] = {run.setting for run in read(folders[0], run("e", encoder="a long name " * 9)) if run.name == "e"}
    assert name == "like e"
    assert compared_runs.constants_table(read(folders[0], folders[1])) == []


def test_the_best_epoch_is_the_one_that_the_run_kept(run):
    assert [r.best["epoch"] for r in read(run("a"), run("b", best_by="CIDEr"), run("c", scst_epochs=1))] == [2, 3, 3]


def test_seeds_of_one_setting_have_a_mean_and_an_interval(run):
    """A seed counts once, and a run that is not finished not at all."""
    folders = [run(f"s{seed}", (9.0, 4.0 + seed, 8.0), seed=seed) for seed in range(3)]
    folders += [run("again", (9.0, 4.0, 8.0)), run("stopped", (2.0,), (0.5,), seed=5), run("other", lr=1.0)]
    head, row, other = compared_runs.seeds_table(read(*folders))
    half = 4.302653 / math.sqrt(3)  # Student's t with 2 degrees of freedom, of values with standard deviation 1
    assert head[:3] == ("setting", "seeds", "perplexity, 95% interval")
    assert row[:3] == ("lr 0.0001", "3", f"5.000 ({5 - half:.3f} to {5 + half:.3f})")
    assert other[:3] == ("lr 1", "1", "4.000")
    assert compared_runs.seeds_table(read(folders[0], folders[-1])) == []
    [stopped] = [row for row in compared_runs.runs_table(read(*folders)) if row[0] == "stopped"]
    assert stopped[3] == "1 of 3"


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = [0.52, 0.55, 0.49, 0.53]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((sum(values) / 4, low, high))


def test_hours_and_captions_only_where_they_are_known(run):
    """A run of an early version has no counts; one whose second epoch was not timed has them for the first alone."""
    folder = run("a")
    (folder / "timings.csv").write_text("epoch,training,evaluation\n1,3600,0\n3,3600,0\n")
    [with_gap] = read(folder)
    assert [row.get("hours") for row in with_gap.rows] == [1.0, None, None]
    assert not any("captions" in row for row in with_gap.rows)
    [untimed] = read(run("b", timings=False))
    assert not any("hours" in row for row in untimed.rows)


def test_a_photo_is_shown_with_the_caption_of_the_best_epoch_that_was_scored(run):
    [a, b] = read(run("a"), run("b", ciders=(0.1, None, 0.3), lr=1.0))
    shown = compared_runs.same_photos([a, b])
    assert shown[0][1] == [
        ("photo", "dog.png", ""), ("a", "a | dog 2", "epoch 2"), ("b", "b | dog 1", "epoch 1"),
    ]  # fmt: skip
    assert shown[0][0].is_file() and shown[1][0].is_file()
    assert shown[0][2] == ("a *dog*",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", None, "metrics.csv: is missing"),
        ("metrics.csv", b"", "metrics.csv: damaged (No columns"),
        ("metrics.csv", b"epoch,valid_loss,valid_perplexity\n", "metrics.csv: no epoch is finished yet"),
        ("metrics.csv", b"epoch,valid_loss\n1,2\n", "metrics.csv: damaged (no column valid_perplexity)"),
        ("metrics.csv", b"epoch,valid_loss,valid_perplexity\n1,x,2\n", "metrics.csv: damaged (Unable to parse"),
        ("metrics.csv", b"epoch,valid_loss,valid_perplexity\n1.5,1,2\n", "damaged (an epoch is not an integer)"),
        ("metrics.csv", b"epoch,valid_loss,valid_perplexity\ninf,1,2\n", "metrics.csv: damaged ("),
        ("metrics.csv", b"epoch,valid_loss,valid_perplexity\n2,1,2\n1,1,2\n", "damaged (the epochs are not in their"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv: damaged ("),
        ("recipe.toml", None, "recipe.toml: is missing"),
        ("recipe.toml", b"lr = ", "recipe.toml: damaged (Invalid value"),
        ("recipe.toml", b"epochs = 'three'", "recipe.toml: damaged (epochs and seed have to be integers)"),
        ("timings.csv", b"epoch\n1\n", "timings.csv: damaged (no column training, evaluation)"),
        ("samples.md", b"\xff", "samples.md: damaged ("),
        ("samples.md", b"# nothing\n", "samples.md: damaged (there is no caption in it)"),
    ],
)
def test_a_damaged_run_is_one_line_and_the_others_are_compared(run, capsys, name, content, message):
    damaged, whole = run("damaged"), run("whole")
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_bytes(content)
    compare_runs.main([str(damaged), str(whole)])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("left out: ") and "damaged" in first and message in first
    assert second.startswith("run ")


def test_names_of_others_do_not_act(run, tmp_path, capsys):
    """A folder, a constant and a caption with what a terminal or a browser would act on."""
    folder = run("a<script>\x1b[31m", encoder="<b>x\x1b</b>")
    run("plain")
    write_samples(folder / "samples.md", ["<img src=x>"], [["</td>"]], {1: ["<script>1</script>"]})
    compare_runs.main([str(tmp_path)])
    assert "\x1b" not in capsys.readouterr().out
    page = (tmp_path / "compared_runs.html").read_text()
    assert "\x1b" not in page and "<script" not in page and "<b>x" not in page and "<img src=x>" not in page


def test_without_a_run_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare_runs.main([str(tmp_path), str(tmp_path / "nowhere")])
    assert stop.value.code == "error: there is no run to compare; give the folders of runs, such as captioner"
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"left out: {tmp_path}: not the folder of a run (recipe.toml and metrics.csv are missing)"
    assert second == f"left out: {tmp_path / 'nowhere'}: there is no such folder"


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file: cannot be made .* choose another with --output FOLDER$"):
        compare_runs.main([str(run("a")), "--output", str(tmp_path / "file" / "page.html")])


def test_many_settings_have_a_colour_each():
    from captioning.pages.plots import colours

    for count in (1, 10, 11, 60):
        assert len(set(colours(count))) == count
