"""Calibration: what is right, what is learnt from it, and measures of confidence against values computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.decoding.confidence import Confidence
from captioning.scoring import calibration
from conftest import REPO_ROOT

SHAPES = REPO_ROOT / "examples" / "shapes"
PATHS = [SHAPES / f"scene_{i}.png" for i in range(10)]
SCENE = (("small", "red", "circle"), ("large", "blue", "square"))


# --- what is right ----------------------------------------------------------------------------------------------------


def test_shapes_are_judged_by_the_truth():
    """Each attribute at its place: swapped objects are wrong in every word that differs."""
    captions = ["there is a large blue square below a small red circle", "a large blue square above a small red circle"]
    captions.append("a small red cross above")
    words = [caption.split() for caption in captions]
    kind, right, of_words = calibration.judge(["x/a.png"] * 3, captions, words, [[""]] * 3, {"a.png": SCENE})
    assert kind == "shapes" and right.tolist() == [True, False, False]
    assert of_words[0].all()
    assert of_words[1].tolist() == [True, False, False, False, True, True, False, False, False]
    assert of_words[2].tolist() == [True, True, True, False, True]


def test_photos_are_judged_by_cider_and_words_by_the_references():
    references = [
        ["a brown dog runs on the beach .", "a dog is running"],
        ["two men ride bicycles", "cyclists on a road"],
    ]
    captions = ["a brown dog runs on the beach", "a dog rides"]
    words = [["A", "brown", "dog", "runs", "on", "the", "beach", "."], ["a", "dog", "rides"]]
    kind, right, of_words = calibration.judge(["a", "b"], captions, words, references, {})
    assert kind == "photos" and right.tolist() == [True, False]
    assert of_words[0].all() and of_words[1].tolist() == [True, False, False]


def test_answers_are_judged_by_equality():
    kind, right, of_words = calibration.judge(
        ["a.png", "a.png"], ["red", "small red"], [["red"], ["small", "red"]], [["red", "crimson"], ["red"]],
        {"a.png": SCENE}, are_answers=True,
    )  # fmt: skip
    assert kind == "questions" and right.tolist() == [True, False]
    assert [part.tolist() for part in of_words] == [[True], [False, True]]


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_a_fit_recovers_the_probabilities_it_was_drawn_from():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 2)) * 2
    truth = 1 / (1 + np.exp(-(features @ [1.0, -0.5] + 0.3)))
    fitted = calibration.fit(features, rng.random(20_000) < truth, "words")
    assert fitted.weights == pytest.approx([1.0, -0.5], abs=0.06) and fitted.bias == pytest.approx(0.3, abs=0.06)
    assert fitted(features) == pytest.approx(truth, abs=0.03)


def test_too_few_right_or_wrong_are_refused():
    with pytest.raises(ValueError, match="996 captions are right and 4 wrong, where at least 5 of each are needed"):
        calibration.fit(np.zeros((1000, 1)), np.arange(1000) >= 4, "captions")


def test_how_often_a_word_is_right():
    """Only in the captions that were chosen, a rare word near the mean of all."""
    words, right = [["a", "Cat"], ["a", "dog"], ["a", "dog"]], [[True, True], [True, False], [False, False]]
    usual = calibration.usual_log_odds(words, right, [0, 1])
    mean = 3.5 / 5
    assert usual.keys() == {"", "a", "cat", "dog"}
    odds = {word: math.exp(value) for word, value in usual.items()}
    shares = {word: value / (1 + value) for word, value in odds.items()}
    assert shares["a"] == pytest.approx((2 + 10 * mean) / 12)
    assert shares["dog"] == pytest.approx(10 * mean / 11) and shares["cat"] == pytest.approx((1 + 10 * mean) / 11)


def test_empty_captions_teach_nothing(tiny_model, bpe, tmp_path, monkeypatch):
    """A model that has hardly learnt ends its captions at once: it stays uncalibrated, and says why."""
    assert calibration.usual_log_odds([[]], [[]], [0]) == {"": 0}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    ends = torch.tensor([[bpe.eos_token_id]])
    monkeypatch.setattr("captioning.decoding.search._most_likely", lambda logits: ends.expand(len(logits), 1))
    with pytest.raises(ValueError, match="0 words are right and 0 wrong, where at least 5"):
        calibration.calibrate(tiny_model, bpe, [tmp_path / "a.png"], [["a dog"]], {})


def test_a_captioner_is_calibrated(script, tmp_path):
    """Half of the truths are made wrong in one attribute of the upper object; the captions that are right are surer."""
    model, tokenizer = script.load_captioner(SHAPES)
    truth = {path.name: tuple(map(tuple, scene)) for path, scene in zip(PATHS, scenes_of_the_example(), strict=True)}
    wrong = {name: ((*scene[0][:2], "star"), scene[1]) for name, scene in list(truth.items())[:5]}
    known = calibration.calibrate(model, tokenizer, PATHS, [[""]] * 10, truth | wrong)
    assert known.about["images"] == 10 and known.about["captions right"] == 0.5
    assert known.no_photo.shape == (model.config.depth, model.config.embed_dim)
    states = model.encoder_states(calibration_batch(model))
    assert known.no_photo[1].numpy() == pytest.approx(states[1].mean((0, 1)).detach().numpy(), abs=1e-3)
    assert known.usual["a"] > known.usual["circle"]  # articles are never wrong
    with pytest.raises(ValueError, match="words are right and 0 wrong, where"):
        calibration.calibrate(model, tokenizer, PATHS, [[""]] * 10, truth)


def scenes_of_the_example():
    stored = json.loads((SHAPES / "scenes.json").read_text())
    return [stored[path.name] for path in PATHS]


def calibration_batch(model):
    from captioning.images.preprocessing import preprocess

    return torch.stack([preprocess(path, **model.preprocessing) for path in PATHS])


# --- measuring --------------------------------------------------------------------------------------------------------


def test_reliability_and_calibration_error():
    confidences, right = [0.05, 0.1, 0.9, 1.0], [False, True, True, True]
    rows = calibration.reliability(confidences, right, bins=2)
    assert rows == [(pytest.approx(0.075), 0.5, 2), (pytest.approx(0.95), 1.0, 2)]
    assert calibration.expected_calibration_error(confidences, right, bins=2) == pytest.approx((0.425 + 0.05) / 2)


def test_risk_against_coverage():
    """The surest first; ties share their mean, whatever their order."""
    coverage, risk = calibration.risk_coverage([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0, 0.25, 1 / 3, 0.5])
    assert calibration.risk_coverage([0.5, 0.9, 0.1, 0.5], [False, True, False, True])[1] == pytest.approx(risk)


def test_measures():
    found = calibration.measure([0.9, 0.8, 0.3, 0.2], [True, False, True, False], "words")
    assert found["AUROC of wrong words"] == 0.75
    assert found["wrong words"] == found["wrong words among the surest 50%"] == 0.5
    assert "AUROC of wrong words" not in calibration.measure([0.9, 0.8], [True, True], "words")


# --- the command ------------------------------------------------------------------------------------------------------


def test_calibrate_a_captioner_and_measure_it(script, tmp_path, monkeypatch, capsys):
    import shutil

    import evaluate_captions
    from captioning.data import shapes

    monkeypatch.setattr("captioning.scoring.metrics._reason_against", lambda java: "not available: not asked for")
    monkeypatch.setattr(calibration, "LEAST_OF_EACH", 1)
    shapes.write_dataset(tmp_path / "data", train_scenes=120)
    # A truth that differs from the scene: the captioner is wrong about it.
    meta = json.loads((tmp_path / "data" / shapes.SPLIT_FILE).read_text())
    for number, image in enumerate(meta["images"]):
        if number % 3 == 0:
            size, colour, shape = image["scene"][0]
            image["scene"][0] = [size, colour, "cross" if shape != "cross" else "circle"]
    (tmp_path / "data" / shapes.SPLIT_FILE).write_text(json.dumps(meta))
    folder = shutil.copytree(SHAPES, tmp_path / "captioner", ignore=shutil.ignore_patterns("*.png"))
    arguments = [str(folder), "--data", str(tmp_path / "data")]
    plain = evaluate_captions.main([*arguments, "--split", "test"])
    evaluate_captions.main([*arguments, "--split", "val", "--calibrate"])
    said = capsys.readouterr().out
    assert "calibrated on 10 photos, 60.0% right" in said and "it does not know which photos are unlike" in said
    assert Confidence.load(folder).about["images"] == 10 and Confidence.load(folder).familiarity is None
    monkeypatch.setattr(calibration, "LEAST_HELD_OUT", 10)
    evaluate_captions.main([*arguments, "--split", "val", "--calibrate"])
    assert "it does not know" not in capsys.readouterr().out
    assert len(Confidence.load(folder).familiarity.distances) == 10
    scores = evaluate_captions.main([*arguments, "--split", "test"])
    assert {name: scores[name] for name in plain} == plain  # the captions are the same
    assert 0 < scores["calibration error of captions"] < 1 and scores["wrong captions"] > 0.2
    assert {"AUROC of wrong words", "CIDEr of the surer half"} <= scores.keys()
    written = folder / "evaluation_test"
    assert all(0 < entry["confidence"] < 1 for entry in json.loads((written / "predictions.json").read_text()))
    assert (written / "confidence.png").read_bytes().startswith(b"\x89PNG")
    page = (written / "page.html").read_text()
    assert "data:image/png;base64," in page and "Least sure" in page and "confidence 0." in page
    evaluate_captions.main([*arguments, "--split", "train", "--calibrate"])
    assert Confidence.load(folder).familiarity is None  # no photos are held out
    with pytest.raises(SystemExit, match="error: --calibrate changes a captioner: give the folder of one"):
        evaluate_captions.main(["no/folder", "--data", str(tmp_path / "data"), "--calibrate"])
