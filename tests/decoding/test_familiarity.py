"""Familiarity: photos with parts that no training photo had are found, and lower the confidence."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data import shapes
from captioning.decoding import familiarity
from captioning.decoding.confidence import Confidence, caption_with_confidence
from captioning.decoding.familiarity import CENTROIDS, DIM, UNUSUAL, Familiarity, distances_of, is_strange, trust
from captioning.decoding.search import Options, caption_images
from captioning.scoring import calibration
from captioning.scoring.pair_check import PairScorer
from conftest import REPO_ROOT
from helpers.calibrated import calibrated_copy, known_of

SHAPES = REPO_ROOT / "examples" / "shapes"


@pytest.fixture(scope="module")
def example():
    from MyLLM_Vit_gpt2_captioning import load_captioner

    return load_captioner(SHAPES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Paths of 100 scenes."""
    data = tmp_path_factory.mktemp("familiar") / "shapes"
    shapes.write_dataset(data, 100)
    return sorted(map(str, (data / shapes.IMAGE_FOLDER).iterdir()))[:100]


@pytest.fixture(scope="module")
def familiar(example, scenes):
    """Of the first 50 scenes, with the others held out."""
    scorer = PairScorer(*example)
    held_out = [familiarity.projected(scorer.encode(scenes[start : start + 25])) for start in (50, 75)]
    return calibration.familiar_photos(scorer.encode, scenes[:50], held_out, batch_size=20)


def test_the_share_of_held_out_photos_that_are_as_unlike():
    """Of tokens all alike but for one, whose distance is three times the mean of the worst three."""
    assert familiarity.WORST == 3
    centroid = torch.randn(1, DIM)
    known = Familiarity(centroid, torch.tensor([1.0, 2.0, 3.0, 3.0]))
    direction = torch.nn.functional.normalize(torch.randn(DIM), dim=0)

    def share(distance):
        tokens = centroid.repeat(2, 5, 1)  # (2, 5, DIM)
        tokens[0, 3] += 3 * distance * direction
        assert distances_of(tokens, centroid).tolist() == pytest.approx([distance, 0], abs=1e-4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(familiarity, "projected", lambda states: states[0])
            strange, same = known([tokens])
        assert same == 1
        return strange

    assert [share(distance) for distance in (0.5, 1.5, 2.5, 3.5)] == pytest.approx([1, 4 / 5, 3 / 5, 1 / 5])


def test_trust():
    assert trust([1 / 1001, UNUSUAL / 2, UNUSUAL, 1]).tolist() == pytest.approx([0.0333, 0.5, 1, 1], abs=1e-4)
    assert is_strange(UNUSUAL / 2) and not is_strange(UNUSUAL) and not is_strange(None)


def test_the_projection_all_but_keeps_distances():
    """Of what the first block attends to, however long the vectors are."""
    tokens = torch.randn(1, 40, 320, generator=torch.Generator().manual_seed(0))
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    seen = familiarity.projected([5 * tokens, None])
    assert seen.shape == (1, 40, DIM)
    ratio = torch.nn.functional.pdist(seen[0]) / torch.nn.functional.pdist(tokens[0])
    assert 0.9 < ratio.mean() < 1.1 and ratio.std() < 0.2
    assert torch.equal(familiarity.projected([tokens.half()]), familiarity.projected([tokens.half().float()]))


def test_a_strange_photo_is_found_and_its_captions_are_unsure(example, scenes, familiar, tmp_path):
    """As sure as before of the others; no caption changes, and each caption of a photo is told of it."""
    model, tokenizer = example
    assert len(familiar.distances) == 50 and familiar.centroids.shape[1] == DIM
    assert (familiar.distances.diff() >= 0).all()
    pixels = np.asarray(Image.open(scenes[2])).copy()
    pixels[:32, :32] = 255 * np.random.default_rng(0).integers(0, 2, (32, 32, 3))
    Image.fromarray(pixels).save(tmp_path / "strange.png")
    photos = [scenes[0], str(tmp_path / "strange.png"), scenes[1]]
    options = Options(num_beams=2, num_return_sequences=2)
    plain, known = known_of(model), known_of(model)
    known.familiarity = familiar
    before, after = (caption_with_confidence(model, tokenizer, photos, one, options) for one in (plain, known))
    texts = [[caption for caption, _ in of_image] for of_image in after]
    assert texts == caption_images(model, tokenizer, photos, **vars(options))
    assert {judged.familiarity for of_image in before for _, judged in of_image} == {None}
    for share, of_before, of_after in zip((None, 1 / 51, None), before, after, strict=True):
        for (_, old), (_, new) in zip(of_before, of_after, strict=True):
            assert is_strange(new.familiarity) == (share is not None)
            assert new.familiarity == pytest.approx(share) or share is None
            factor = share / UNUSUAL if share else 1
            assert new.caption == pytest.approx(factor * old.caption, abs=1e-6)
            assert new.words == pytest.approx([factor * word for word in old.words], abs=1e-6)


def test_nothing_is_rounded_under_autocast(example, scenes):
    states = PairScorer(*example).encode(scenes[:4])
    tokens = familiarity.projected(states)
    distances = distances_of(tokens, tokens[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(familiarity.projected(states), tokens)
        assert torch.equal(distances_of(tokens, tokens[0]), distances)


def test_training_photos_that_cannot_be_read(example, scenes, tmp_path):
    """Their batch is left out; with none left, nothing is familiar."""
    scorer, gone = PairScorer(*example), str(tmp_path / "gone.png")
    held_out = [familiarity.projected(scorer.encode(scenes[90:]))]
    known = calibration.familiar_photos(scorer.encode, [*scenes[:2], gone, scenes[2]], held_out, batch_size=2)
    assert len(known.centroids) == scorer.encode(scenes[:2])[0].size(1) * 2  # a token each
    assert calibration.familiar_photos(scorer.encode, [gone], held_out) is None


def test_it_is_kept_in_the_config(familiar, tmp_path):
    folder = calibrated_copy(SHAPES, tmp_path / "calibrated")
    known = Confidence.load(folder)
    assert known.familiarity is None  # as of captioners from before
    known.familiarity = familiar
    known.save(folder)
    loaded = Confidence.load(folder).familiarity
    assert torch.equal(loaded.centroids, familiar.centroids) and torch.equal(loaded.distances, familiar.distances)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "config.json").stat().st_size < 100_000 + 90 * CENTROIDS
    for name, damaged in (("centroids", "AAAA"), ("centroids", ""), ("distances", "AADAfw=="), ("distances", 3)):
        changed = config["confidence"]["familiarity"] | {name: damaged}
        stored = config["confidence"] | {"familiarity": changed}
        (folder / "config.json").write_text(json.dumps(config | {"confidence": stored}))
        with pytest.raises(ValueError, match=r"config\.json: its confidence cannot be read .*--calibrate"):
            Confidence.load(folder)
