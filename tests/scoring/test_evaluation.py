"""Evaluating a captioner: the command, its files and page, somebody else's predictions, scores during training."""

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import evaluate_captions
from captioning.model.encoders import ViTEncoder
from captioning.pages import html_pages
from captioning.scoring import evaluation
from conftest import CAPTIONS
from helpers.runs import TINY


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """SPICE would start Java; test_metrics.py and test_meteor.py compare with its programs."""
    monkeypatch.setattr("captioning.scoring.metrics._reason_against", lambda java: "not available: not asked for")


@pytest.fixture
def captioner(script, tiny_model, bpe, tmp_path):
    config = {"model_config": vars(tiny_model.config), "preprocessing": tiny_model.preprocessing}
    script.checkpoint.save_checkpoint(tmp_path / "captioner", tiny_model.state_dict(), config, bpe)
    return tmp_path / "captioner"


def predictions(flickr, split="test", caption="a dog ."):
    records = json.loads((flickr / "dataset_flickr30k.json").read_text())["images"]
    return [dict(image_id=r["filename"], caption=caption) for r in records if r["split"] == split]


# --- the command ------------------------------------------------------------------------------------------------------


def test_evaluate_a_checkpoint(captioner, flickr, tmp_path, capsys):
    """Table, scores.json, predictions.json in COCO's results format and a page with every photo in it."""
    scores = evaluate_captions.main([str(captioner), "--data", str(flickr), "--split", "val", "--beam", "3"])
    folder = captioner / "evaluation_val"
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR", "shuffled"} <= scores.keys()
    written = json.loads((folder / "predictions.json").read_text())
    assert [entry["image_id"] for entry in written] == ["1008.jpg", "1009.jpg"]
    page = (folder / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count(CAPTIONS[0]) == 2
    assert "CIDEr" in capsys.readouterr().out
    again = ["--predictions", str(folder / "predictions.json"), "--data", str(flickr), "--split", "val"]
    rescored = evaluate_captions.main([*again, "--output", str(tmp_path / "again")])
    assert {name: rescored[name] for name in ("BLEU-4", "CIDEr", "ROUGE-L")} == {
        name: scores[name] for name in ("BLEU-4", "CIDEr", "ROUGE-L")
    }


def test_a_set_without_train_and_val(captioner, flickr, tmp_path, capsys):
    """Only training needs them: every split of a set is scored, and all of them at once."""
    path = flickr / "dataset_flickr30k.json"
    content = json.loads(path.read_text())
    for record in content["images"]:
        record["split"] = "test"
    path.write_text(json.dumps(content))
    argv = [str(captioner), "--data", str(flickr), "--output", str(tmp_path / "out"), "--max_images", "3"]
    of_test = evaluate_captions.main(argv)
    assert evaluate_captions.main([*argv, "--split", "all"]) == of_test
    with pytest.raises(SystemExit, match=r"split val is empty; images of the other splits: test 12; --split all"):
        evaluate_captions.main([*argv, "--split", "val"])
    findings = evaluate_captions.main([*argv, "--diagnose"])
    assert isinstance(findings, list)


def test_all_splits_are_scored_together(flickr, tmp_path):
    every = predictions(flickr) + predictions(flickr, "val") + predictions(flickr, "train")
    (tmp_path / "results.json").write_text(json.dumps(every))
    argv = ["--predictions", str(tmp_path / "results.json"), "--data", str(flickr)]
    assert evaluate_captions.main([*argv, "--split", "all"])["captions"] == len(every) == 12
    assert (tmp_path / "evaluation_all" / "scores.json").is_file()


def test_evaluation_reads_the_token_cache_of_training(captioner, flickr, tmp_path, monkeypatch):
    """The captions are the same; a second evaluation does not run the encoder on a photo: only once, on one of zeros,
    whose tokens' shapes have to be those of the cache."""
    arguments = [str(captioner), "--data", str(flickr), "--split", "val"]
    plain = evaluate_captions.main(arguments)
    cached = [*arguments, "--cache_dir", str(tmp_path / "cache")]
    assert evaluate_captions.main(cached) == plain
    embed = ViTEncoder.embed

    def only_zeros(encoder, images):
        assert len(images) == 1 and not images.any()
        return embed(encoder, images)

    monkeypatch.setattr(ViTEncoder, "embed", only_zeros)
    assert evaluate_captions.main(cached) == plain


def test_perfect_captions_get_the_best_scores(flickr, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(predictions(flickr, caption=CAPTIONS[0])))
    scores = evaluate_captions.main(["--predictions", str(file), "--data", str(flickr)])
    assert scores["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(1)


def test_missing_predictions_are_empty_and_counted(flickr, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(predictions(flickr, caption=CAPTIONS[0])[:1]))
    scores = evaluate_captions.main(["--predictions", str(file), "--data", str(flickr)])
    assert scores["BLEU-4"] < 0.9
    assert scores["missing candidates"] == 1
    assert "missing candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entries: [*entries, dict(image_id="9.jpg", caption="a")],
            "entry 2: the image '9.jpg' is not in this split",
        ),
        (lambda entries: [*entries, entries[0]], "entry 2: the image '1010.jpg' comes twice"),
        (lambda entries: [dict(image_id=[1], caption="a")], "entry 0: image_id .* must be a name and a text"),
        (lambda entries: [dict(image_id="1010.jpg", caption=None)], "entry 0: image_id .* must be a name and a text"),
        (lambda entries: {"a": 1}, 'results.json: expected .*"image_id"'),
        (lambda entries: [dict(id=1)], 'results.json: expected .*"image_id"'),
    ],
)
def test_bad_predictions_are_named(flickr, tmp_path, change, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(change(predictions(flickr))))
    with pytest.raises(SystemExit, match=message):
        evaluate_captions.main(["--predictions", str(file), "--data", str(flickr)])


def test_an_empty_split_is_an_error(captioner, flickr):
    for name in ("1010.jpg", "1011.jpg"):
        (flickr / "flickr30k_images" / name).unlink()
    with pytest.raises(SystemExit, match="the split test is empty; images of the other splits: train 8, val 2"):
        evaluate_captions.main([str(captioner), "--data", str(flickr)])


def test_coco_numbers_its_images():
    assert evaluate_captions.image_id(Path("train2017/000000000139.jpg")) == 139
    assert evaluate_captions.image_id(Path("val2014/COCO_val2014_000000391895.jpg")) == 391895
    assert evaluate_captions.image_id(Path("1234.jpg")) == "1234.jpg"


def test_questions_are_scored_by_exact_answers(captioner, flickr, tmp_path):
    rows = [
        dict(image=f"{1000 + i}.jpg", prompt="a red dog", caption="?", split="test" if i > 9 else "train")
        for i in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--captions_file", str(tmp_path / "questions.jsonl"), "--data", str(flickr)]
    assert evaluate_captions.main([str(captioner), *arguments])["exact answers"] == 0.0
    written = json.loads((captioner / "evaluation_test" / "predictions.json").read_text())
    assert [entry["question"] for entry in written] == ["a red dog"] * 2


def test_questions_with_several_right_answers(captioner, flickr, tmp_path, monkeypatch):
    rows = [
        dict(image=f"{1000 + i}.jpg", prompt="q", answer=["a", "b"], split="test" if i > 9 else "train")
        for i in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(evaluate_captions, "predict", lambda m, t, images, prompts, **o: (["b"] * len(images), []))
    arguments = ["--captions_file", str(tmp_path / "questions.jsonl"), "--data", str(flickr)]
    assert evaluate_captions.main([str(captioner), *arguments])["exact answers"] == 1.0


def test_a_long_question_is_cut_as_in_training(tiny_model, bpe, flickr):
    photo = flickr / "flickr30k_images" / "1000.jpg"
    from captioning.decoding.search import caption_images

    assert isinstance(caption_images(tiny_model, bpe, [photo], prompt=["two young men stand " * 20])[0], str)


# --- in Python and in training ----------------------------------------------------------------------------------------


def test_evaluate_takes_a_dataloader(tiny_model, dls, bpe):
    scores = evaluation.evaluate(tiny_model, dls[1], bpe, "cpu", num_beams=2)
    assert {"BLEU-4", "CIDEr", "shuffled"} <= scores.keys()
    captions, ended = evaluation.predict(tiny_model, bpe, list(dls[1].dataset.captions_of), max_tokens=3)
    assert len(captions) == len(ended) == 2


def test_training_scores_and_logs_samples(script, flickr, tmp_path):
    """Every second epoch: in metrics.csv, in samples.md with the captions of the same images, in cider.png."""
    out = tmp_path / "captioner"
    script.main(["--data_dir", str(flickr), "--model_path", str(out), *TINY, "--epochs", "4", "--score_every", "2"])
    table = pd.read_csv(out / "metrics.csv")
    assert table["CIDEr"].notna().tolist() == [False, True, False, True]
    samples = (out / "samples.md").read_text()
    assert samples.count("## 100") == 2
    assert samples.count(f"- true: {CAPTIONS[1]}") == 2
    assert "| 2 | " in samples and "| 4 | " in samples and "| 3 | " not in samples
    with Image.open(out / "cider.png") as image:
        assert min(image.size) > 300


def test_the_best_epoch_by_cider(script, tiny_config, tiny_train_config, dls, monkeypatch):
    """Perplexity would keep the last epoch, CIDEr keeps the second."""
    tiny_train_config.epochs, tiny_train_config.best_by = 3, "CIDEr"
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    perplexities, ciders = iter([5.0, 4.0, 3.0]), iter([0.1, 0.5, 0.3])
    monkeypatch.setattr(trainer, "train_one_epoch", lambda epoch: 1.0)
    monkeypatch.setattr(trainer, "valid_one_epoch", lambda epoch: next(perplexities))
    monkeypatch.setattr(trainer, "score_one_epoch", lambda epoch: {"CIDEr": next(ciders)})
    assert trainer.run_training() == {"best_perplexity": 4.0, "best_epoch": 1}
    tiny_train_config.best_by = "CIDEr"
    dls[1].dataset.prompts[0] = "what ?"
    with pytest.raises(ValueError, match="best_by is 'CIDEr', but must be 'perplexity' for questions"):
        script.Trainer(tiny_config, tiny_train_config, dls)
    tiny_train_config.best_by = "BLEU"
    with pytest.raises(ValueError, match="best_by is 'BLEU', but must be one of 'perplexity', 'CIDEr'"):
        script.Trainer(tiny_config, tiny_train_config, dls)


def test_samples_and_page_escape_what_captions_hold(tmp_path):
    photo = Image.new("RGB", (8, 8))
    caption = '<script>alert("a | b")</script>'
    html_pages.write_samples(tmp_path / "samples.md", ["1.jpg"], [["a dog"]], {1: [caption]})
    assert "a \\| b" in (tmp_path / "samples.md").read_text()
    html_pages.write_evaluation_page(tmp_path / "page.html", "t", [("", "score", ""), ("CIDEr", "1", "")],
                                {"Best": [(photo, caption, ["<b>"], "x")]})  # fmt: skip
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_table_puts_shuffled_scores_beside(tmp_path):
    scores = {"CIDEr": 0.5, "METEOR": "not available: needs Java", "missing candidates": 2}
    scores["shuffled"] = {"CIDEr": 0.1}
    assert evaluation.table_rows(scores) == [
        ("", "score", "shuffled"), ("CIDEr", "0.5000", "0.1000"), ("METEOR", "not available: needs Java", ""),
        ("missing candidates", "2", ""),
    ]  # fmt: skip
    assert evaluation.as_table(scores).splitlines()[1].split() == ["CIDEr", "0.5000", "0.1000"]


def test_a_captioner_that_is_looked_at(captioner, flickr, capsys):
    """--diagnose says what is wrong with a captioner, here one that has not been trained, and with a dataset; nothing
    is written."""
    before = sorted(captioner.rglob("*"))
    findings = evaluate_captions.main([str(captioner), "--data", str(flickr), "--split", "val", "--diagnose"])
    said = capsys.readouterr().out
    assert "100%  captions that begin with BOS" in said
    assert "different ones among them" in said
    assert all(str(finding) in said for finding in findings)
    assert sorted(captioner.rglob("*")) == before


# --- systems compared -------------------------------------------------------------------------------------------------


def test_compare_a_checkpoint_with_predictions(captioner, flickr, tmp_path, capsys):
    """A table, comparison.json, and a page with both captions of the photos that changed."""
    file = tmp_path / "perfect.json"
    file.write_text(json.dumps(predictions(flickr, caption=CAPTIONS[0])))
    arguments = ["--compare", str(captioner), str(file), "--data", str(flickr), "--output", str(tmp_path / "out")]
    [result] = evaluate_captions.main(arguments)
    assert result["other"] == str(file)
    assert result["scores"]["BLEU-4"]["scores"][1] == pytest.approx(1, abs=1e-6)
    assert result["scores"]["BLEU-4"]["interval"][0] > 0.5
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == [result]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 and CAPTIONS[0] in page
    assert "95% interval" in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(flickr, tmp_path):
    whole, half = tmp_path / "whole.json", tmp_path / "half.json"
    whole.write_text(json.dumps(predictions(flickr)))
    half.write_text(json.dumps(predictions(flickr)[:1]))
    arguments = ["--data", str(flickr), "--output", str(tmp_path / "out"), "--compare"]
    with pytest.raises(SystemExit, match=r"half.json has no caption of 1 images that .*whole.json has \(1011.jpg\)"):
        evaluate_captions.main([*arguments, str(whole), str(half)])
    for systems in ([str(whole)], [str(whole), str(whole)]):
        with pytest.raises(SystemExit, match="two or more different systems"):
            evaluate_captions.main([*arguments, *systems])
    assert not (tmp_path / "out").exists()


def test_ids_are_those_of_the_annotation_file(captioner, flickr, tmp_path):
    """What pycocotools compares: COCO's `images` may have ids that no file name has."""
    photos = flickr / "flickr30k_images"
    images = [dict(id=700 + i, file_name=f"{1000 + i}.jpg") for i in range(4)]
    annotations = [dict(id=i, image_id=700 + i, caption=f"caption {i}") for i in range(4)]
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps(dict(images=images, annotations=annotations)))
    arguments = ["--data", str(flickr), "--captions_file", str(file), "--image_dir", str(photos), "--split", "val"]
    evaluate_captions.main([str(captioner), *arguments])
    written = captioner / "evaluation_val" / "predictions.json"
    assert [entry["image_id"] for entry in json.loads(written.read_text())] == [700, 701, 702, 703]
    forms = [700, "701", "val2017/1002.jpg", "1003"]  # as a number, as a text, with a folder, without the ending
    results = tmp_path / "results.json"
    text = json.dumps([dict(image_id=name, caption=f"caption {i}") for i, name in enumerate(forms)])
    results.write_text("\ufeff" + text, encoding="utf-8")
    scores = evaluate_captions.main(["--predictions", str(results), *arguments])
    assert scores["BLEU-1"] == pytest.approx(1) and scores["missing candidates"] == 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (139, ["a/COCO_val2014_000000000139.jpg"]),
        ("139", ["a/COCO_val2014_000000000139.jpg"]),
        ("COCO_val2014_000000000139", ["a/COCO_val2014_000000000139.jpg"]),
        ("val2014\\COCO_val2014_000000000139.jpg", ["a/COCO_val2014_000000000139.jpg"]),
        ("1.jpg", ["a/1.jpg", "b/1.jpg"]),
        ("b/1.jpg", ["b/1.jpg"]),
        (7, ["b/photo_007.png"]),
        ("photo_008", []),
    ],
)
def test_forms_of_an_image_id(name, found):
    paths = [Path(p) for p in ("a/COCO_val2014_000000000139.jpg", "a/1.jpg", "b/1.jpg", "b/photo_007.png")]
    finder = evaluate_captions.ImageFinder({path: evaluate_captions.image_id(path) for path in paths})
    assert [path.as_posix() for path in finder.find(name)] == found


def test_a_results_file_that_may_mean_two_images_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([dict(image_id="1.jpg", caption="a dog")]))
    with pytest.raises(ValueError, match=r"entry 0: the image '1.jpg' may be a/1.jpg or b/1.jpg; give its id"):
        ids = {Path("a/1.jpg"): "1.jpg", Path("b/1.jpg"): "1.jpg"}
        evaluate_captions.read_predictions(tmp_path / "results.json", ids)
