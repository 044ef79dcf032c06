"""Wrong captions of a dataset: they are ranked first, listed, and left out of training."""

import csv
import json
import math
import shutil
import signal
import tarfile

import pandas as pd
import pytest

import prepare_data
from captioning.common.stopping import Stopped, listening
from captioning.data import exclusions, shapes, sources
from captioning.scoring.pair_check import PairScorer
from conftest import REPO_ROOT

SHAPES = REPO_ROOT / "examples" / "shapes"
SWAPPED = (3, 20, 41)  # the scenes whose first captions go around


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Shapes with 60 training scenes, of which three have a caption of another -> (folder, the wrong pairs)."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_dataset(folder, train_scenes=60)
    lines = (folder / "results.csv").read_text().splitlines()
    rows = [line.split("| ") for line in lines[1:]]
    places = [2 * scene for scene in SWAPPED]
    texts = [rows[place][2] for place in places]
    for place, text in zip(places, texts[1:] + texts[:1], strict=True):
        rows[place][2] = text
    (folder / "results.csv").write_text("\n".join([lines[0], *("| ".join(row) for row in rows)]) + "\n")
    return folder, {(f"images/{rows[place][0]}", rows[place][2]) for place in places}


def read(path):
    with open(path, newline="") as file:
        return [(row["image"], row["caption"]) for row in csv.DictReader(file)]


def test_wrong_captions_come_first_and_are_left_out(damaged, tmp_path, capsys):
    """From the command to the rows that training gets; the data stays as it is."""
    folder, wrong = damaged
    before = (folder / "results.csv").read_bytes()
    argv = ["--check", str(folder), "--with", str(SHAPES), "--drop_worst", "2.5%", "--report", str(tmp_path)]
    prepare_data.main([*argv, "--others", "8"])
    said = capsys.readouterr().out
    assert "120 captions compared with 8 other photos" in said and "the worst 3 are in" in said
    assert set(read(tmp_path / "pairs.csv")[:3]) == set(read(tmp_path / "exclude.csv")) == wrong
    assert len(read(tmp_path / "pairs.csv")) == 120
    page = (tmp_path / "pairs.html").read_text()
    assert all(text in page for _, text in wrong) and "fits best" in page and "fit no photo" in page
    df = sources.load_usable(folder, "", None, "flickr8k", exclude=str(tmp_path / "exclude.csv"))
    assert "left out 3 of" in capsys.readouterr().out
    assert len(df[df["split"] == "train"]) == 117
    assert not wrong & {(exclusions.name_of(i, folder), c) for i, c in zip(df["image"], df["caption"], strict=True)}
    assert (folder / "results.csv").read_bytes() == before


def test_a_signal_stops_the_check(script, damaged):
    """It may take an hour."""
    model, tokenizer = script.load_captioner(SHAPES)
    photos = sorted((damaged[0] / "images").iterdir())[:2]
    scorer = PairScorer(model, tokenizer)
    for check in (
        lambda: scorer.rank({photo: ["a small red circle"] for photo in photos}),
        lambda: scorer.best_photos(["a small red circle"], photos),
    ):
        with listening("start again"), pytest.raises(Stopped, match="start again"):
            signal.raise_signal(signal.SIGTERM)
            check()


def test_a_captions_own_photo_is_not_among_the_others(script, damaged):
    """With all photos as the sample the ratio is the one computed by hand, without it."""
    folder, _ = damaged
    df = sources.load(folder)
    captions_of = df.groupby("image", sort=False)["caption"].agg(list).iloc[:4].to_dict()
    scorer = PairScorer(*script.load_captioner(SHAPES), batch_size=3)
    images, pairs = list(captions_of), scorer.rank(captions_of, others=99)
    assert [pair.ratio for pair in pairs] == sorted(pair.ratio for pair in pairs) and len(pairs) == 8
    for pair in pairs:
        given = {image: float(scorer.score([pair.caption], scorer.encode([image]))[0].exp()) for image in images}
        own = given.pop(pair.image)
        assert pair.own == pytest.approx(math.log(own), abs=1e-3)
        assert pair.others == pytest.approx(math.log(sum(given.values()) / 3), abs=1e-3)
    [(best, _)] = scorer.best_photos([pairs[-1].caption], images)
    assert best == pairs[-1].image


def test_words_that_a_word_list_lacks_do_not_count(script):
    """A captioner never writes <unk>: its probability of one is 0."""
    model, tokenizer = script.load_captioner(SHAPES)
    scenes = [str(SHAPES / f"scene_{i}.png") for i in (0, 2)]
    truth = ["a small blue triangle above a small white circle", "above a large blue cross is a large red square"]
    captions_of = {scene: [caption] for scene, caption in zip(scenes, truth, strict=True)}
    (model.config.unk_token_id,) = tokenizer.encode(" blue")
    for pair in PairScorer(model, tokenizer).rank(captions_of):
        assert pair.ratio > 1 and math.isfinite(pair.own) and math.isfinite(pair.best_fit)
        assert pair.tokens == len(tokenizer.encode(pair.caption))  # EOS, but not the word


def test_photos_with_other_numbers_of_captions(script):
    scorer = PairScorer(*script.load_captioner(SHAPES))
    scenes = [str(SHAPES / f"scene_{i}.png") for i in (0, 2, 4)]
    truth = ["a small blue triangle above a small white circle", "above a large blue cross is a large red square"]
    captions_of = {scenes[0]: [truth[0]], scenes[1]: [truth[0], truth[1], truth[1]], scenes[2]: [truth[1]]}
    pairs = scorer.rank(captions_of, others=3)
    assert {(p.image, p.caption) for p in pairs[:2]} == {(scenes[1], truth[0]), (scenes[2], truth[1])}
    assert all(pair.ratio < 0 for pair in pairs[:2]) and all(pair.ratio > 0 for pair in pairs[2:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shrink", "x", "--with", "y"], "--with CAPTIONER needs --check FOLDER"),
        (["--check", "x", "--drop_worst", "2%"], "--drop_worst needs both"),
        (["--check", "x", "--with", "y", "--drop_worst", "2"], "--drop_worst must be a percentage above 0%"),
        (["--check", "x", "--with", "y", "--drop_worst", "nan%"], "--drop_worst must be a percentage above 0%"),
        (["--check", "x", "--with", "y", "--drop_worst", "200%"], "--drop_worst must be a percentage above 0%"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(argv)
    assert message in stop.value.code and "\n" not in stop.value.code


def test_a_bad_list_is_named(damaged, tmp_path):
    folder, _ = damaged
    path = tmp_path / "exclude.csv"

    def load():
        return sources.load_usable(folder, "", None, "flickr8k", exclude=str(path))

    with pytest.raises(FileNotFoundError, match=r"exclude\.csv: no such file"):
        load()
    path.write_text("image,text\na.png,a dog\n")
    with pytest.raises(
        ValueError, match=r"exclude\.csv: not a list of pairs to exclude \(line 2: no image and caption"
    ):
        load()
    path.write_bytes(b"image,caption\n\xff,a dog\n")
    with pytest.raises(ValueError, match=r"exclude\.csv: not a list of pairs to exclude"):
        load()
    path.write_text("image,caption\nimages/a.png,a dog\n")
    with pytest.raises(ValueError, match=r"exclude\.csv: none of its 1 pairs is in .*shapes; it was written for other"):
        load()


def test_questions_are_not_ranked(tmp_path):
    shapes.write_questions(tmp_path / "questions", train_scenes=4)
    with pytest.raises(SystemExit, match="asks questions, and only captions can be ranked"):
        prepare_data.main(["--check", str(tmp_path / "questions"), "--with", str(SHAPES)])


def test_a_run_leaves_them_out(script, damaged, tmp_path):
    """`exclude` reaches the training captions, and a copy of the dataset elsewhere has the same names."""
    folder, wrong = damaged
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "exclude.csv"
    exclusions.write_list(path, [(folder / image, caption) for image, caption in sorted(wrong)], folder)
    argv = ["--data_dir", str(copy), "--exclude", str(path), "--tokenizer", "bpe", "--device", "cpu"]
    _, train, _ = script.read_configs(argv)
    df = script.load_data(train, tmp_path)
    assert (df["split"] == "train").sum() == 117
    assert json.loads((copy / shapes.SPLIT_FILE).read_text())["images"]


def test_tar_shards_refuse_a_list(tmp_path):
    """They are read as a stream; leaving the list out of account in silence would be worse."""
    with tarfile.open(tmp_path / "val-000000.tar", "w"):
        pass
    rows = pd.DataFrame({"image": [tmp_path / "val-000000.tar" / "1.jpg"], "caption": ["a dog"], "split": ["val"]})
    path = tmp_path / "exclude.csv"
    path.write_text("image,caption\n1.jpg,a dog\n")
    with pytest.raises(ValueError, match="holds tar shards, which are read as a stream"):
        exclusions.without_excluded(rows, path, tmp_path)
