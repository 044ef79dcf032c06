"""Token cache: the same tokens as the encoder's, computed once; what changes them makes them anew; what interrupts the
work costs only the rest."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data import token_cache
from captioning.data.token_cache import TokenCache, fill_caches
from captioning.images.augmentation import ValidationTransforms
from captioning.model.front import FrontOutput, front_of
from conftest import REDUCED_ENCODERS, TINY_ENCODER

PHOTOS = 10


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i}.png" for i in range(PHOTOS)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


def tokens_of(model, paths):
    """What the encoder makes of the photos without a cache."""
    with torch.no_grad():
        return model.encoder.levels(
            torch.stack([token_cache.preprocess(path, **model.preprocessing) for path in paths])
        )


def assert_stored(stored, level):
    """The cache holds these tokens but for rounding: half a unit in the last place of float16, and, as the encoder saw
    the photos in batches of another size, a rounding of float32 in tokens of up to 5, which is the larger near zero."""
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), level, rtol=2**-11, atol=1e-5)


def count_images(model, monkeypatch):
    """-> a list to which the encoder adds the size of each batch of photos that it sees (not the probe's)."""
    seen, levels = [], model.encoder.levels

    def counted(images):
        if images.any():
            seen.append(len(images))
        return levels(images)

    monkeypatch.setattr(model.encoder, "levels", counted)
    return seen


@pytest.mark.parametrize("coupling", ["stepped", "final"])
@pytest.mark.parametrize("name", REDUCED_ENCODERS)
def test_tokens_and_captions_are_those_of_the_encoder(script, tiny_config, name, coupling, photos, tmp_path):
    tiny_config.encoder, tiny_config.encoder_options, tiny_config.coupling = name, REDUCED_ENCODERS[name], coupling
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    cache = TokenCache(tmp_path / "cache", model).fill(model, photos, batch_size=4)
    expected, stored = tokens_of(model, photos), cache.batch(photos)
    assert len(stored) == len(expected) == len(model.bridges)
    for ours, level in zip(stored, expected, strict=True):
        assert_stored(ours, level)
    images = torch.stack([token_cache.preprocess(path, **model.preprocessing) for path in photos])
    ids = torch.randint(0, tiny_config.vocab_size, (PHOTOS, 7))
    torch.testing.assert_close(model(stored, ids, ids), model(images, ids, ids), atol=2e-3, rtol=2e-3)
    assert torch.equal(model([level.float() for level in stored], ids), model(stored, ids))


def test_nothing_is_computed_twice(tiny_model, photos, tmp_path, monkeypatch):
    seen = count_images(tiny_model, monkeypatch)
    TokenCache(tmp_path, tiny_model).fill(tiny_model, photos[:6])
    assert sum(seen) == 6
    again = TokenCache(tmp_path, tiny_model)
    assert photos[5] in again
    assert photos[6] not in again
    again.fill(tiny_model, photos)  # only what is new
    assert sum(seen) == PHOTOS
    again.fill(tiny_model, photos)
    assert sum(seen) == PHOTOS
    assert_stored(again.batch(photos)[0], tokens_of(tiny_model, photos)[0])


@pytest.mark.parametrize("change", ["weights", "batch norm", "size", "mean", "view", "crop", "coupling"])
def test_what_changes_tokens_changes_the_cache(script, tiny_config, change, tmp_path):
    tiny_config.encoder, tiny_config.encoder_options = "resnet10t", {"img_size": 64}
    view, crop = 1 if change in ("view", "crop") else 0, 0.8
    if change in ("size", "coupling"):
        tiny_config.encoder, tiny_config.encoder_options = (
            "vit_tiny_patch16_224",
            dict(REDUCED_ENCODERS["vit_tiny_patch16_224"]),
        )
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config)
    before = TokenCache(tmp_path, model, view, crop).folder
    for parameter in model.gpt.parameters():  # the decoder has no part in them
        parameter.data.add_(1)
    assert TokenCache(tmp_path, model, view, crop).folder == before
    if change == "weights":
        next(model.encoder.parameters()).data[0] += 1e-3
    elif change == "batch norm":
        next(iter(model.encoder.buffers())).data[0] += 1e-3
    elif change == "mean":
        tiny_config.preprocessing = {"mean": [0.1, 0.2, 0.3]}
    elif change == "size":
        tiny_config.encoder_options["img_size"] = 48
    elif change == "coupling":
        tiny_config.coupling = "final"
    elif change == "view":
        view = 2
    elif change == "crop":
        crop = 0.5
    if change in ("mean", "size", "coupling"):
        torch.manual_seed(0)
        model = script.VisionGPT2Model(tiny_config)
    assert TokenCache(tmp_path, model, view, crop).folder != before


def test_a_photo_that_changed_is_computed_again(tiny_model, photos, tmp_path, monkeypatch):
    cache = TokenCache(tmp_path / "cache", tiny_model).fill(tiny_model, photos)
    before = cache.batch(photos)[0]
    seen = count_images(tiny_model, monkeypatch)
    Image.new("RGB", (50, 40), (200, 30, 30)).save(photos[3])
    after = cache.fill(tiny_model, photos).batch(photos)[0]
    assert sum(seen) == 1
    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [i == 3 for i in range(PHOTOS)]
    assert torch.equal(TokenCache(tmp_path / "cache", tiny_model).batch(photos)[0], after)


def test_a_photo_is_the_same_however_it_is_named(tiny_model, photos, tmp_path, monkeypatch):
    cache = TokenCache(tmp_path / "cache", tiny_model).fill(tiny_model, photos)
    seen = count_images(tiny_model, monkeypatch)
    monkeypatch.chdir(tmp_path)
    cache.fill(tiny_model, ["photos/2.png", "photos/../photos/3.png"])
    assert not seen
    assert torch.equal(cache["photos/2.png"][0], cache[photos[2]][0])


def test_interrupted_work_goes_on(tiny_model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SYNC_EVERY", 4)
    whole = TokenCache(tmp_path / "whole", tiny_model).fill(tiny_model, photos, batch_size=2).batch(photos)
    levels, calls = tiny_model.encoder.levels, []

    def interrupted(images):
        calls.append(len(images))
        if len(calls) == 5:  # the probe, then two batches that are on the disk, then one that is not
            raise KeyboardInterrupt
        return levels(images)

    monkeypatch.setattr(tiny_model.encoder, "levels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path / "cut", tiny_model).fill(tiny_model, photos, batch_size=2)
    cut = TokenCache(tmp_path / "cut", tiny_model)
    assert [path in cut for path in photos] == [True] * 4 + [False] * 6
    # A crash may leave half a line and tokens that no line speaks of.
    with (cut.folder / "index.jsonl").open("a") as file:
        file.write('["half a li')
    with (cut.folder / "level_1.float16").open("ab") as file:
        file.write(b"12345")
    monkeypatch.setattr(tiny_model.encoder, "levels", levels)
    seen = count_images(tiny_model, monkeypatch)
    cut = TokenCache(tmp_path / "cut", tiny_model).fill(tiny_model, photos, batch_size=2)
    assert sum(seen) == 6
    assert all(map(torch.equal, cut.batch(photos), whole))
    lines = (cut.folder / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == [str(path) for path in photos]


def test_too_small_a_disk_is_refused_before_the_work(tiny_model, photos, tmp_path, monkeypatch, capsys):
    """The size is that of all views together."""
    seen = count_images(tiny_model, monkeypatch)
    jobs = [(TokenCache(tmp_path, tiny_model, view), photos, None) for view in range(2)]
    tokens = 5 * 24 * 2 * 2  # numbers of a photo on two levels, in bytes
    free = SimpleNamespace(free=token_cache.SPARE_BYTES + tokens * 2 * PHOTOS - 1)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(
        OSError, match=r"tokens take 0\.00 GB, 1\.07 GB are free, 1 GB to spare: .*--cache_dir FOLDER, fewer --cache_v"
    ):
        fill_caches(tiny_model, jobs)
    assert not seen
    free.free += 1
    fill_caches(tiny_model, jobs)
    assert sum(seen) == 2 * PHOTOS
    message = f"{2 * PHOTOS} views of photos x 5 x 24 + 5 x 24 numbers take 0.00 GB in {tmp_path}"
    assert message in capsys.readouterr().out
    fill_caches(tiny_model, jobs)
    assert "token cache" not in capsys.readouterr().out  # nothing to say when nothing is missing


def test_two_runs_fill_one_cache(tiny_model, photos, tmp_path, monkeypatch):
    """A run that starts while another is at work changes nothing there, and then waits for it."""
    monkeypatch.setattr(token_cache, "SYNC_EVERY", 2)
    first, levels, second = TokenCache(tmp_path, tiny_model), tiny_model.encoder.levels, []

    def with_visitor(images):
        if images.any() and len(second) < 5:
            with (first.folder / "index.jsonl").open("ab") as file:  # a line of which the half is on the disk
                file.write(b'["half')
            second.append(TokenCache(tmp_path, tiny_model))
            assert second[-1].rows % 2 == 0
            os.truncate(first.folder / "index.jsonl", (first.folder / "index.jsonl").stat().st_size - 6)
        return levels(images)

    monkeypatch.setattr(tiny_model.encoder, "levels", with_visitor)
    first.fill(tiny_model, photos, batch_size=2)
    assert [cache.rows for cache in second] == [0, 2, 4, 6, 8]
    seen = count_images(tiny_model, monkeypatch)
    late = second[0].fill(tiny_model, photos)
    assert not seen
    assert torch.equal(late.batch(photos)[0], first.batch(photos)[0])


@pytest.mark.parametrize(
    "damage", ["short level", "damaged line", "no manifest", "half a manifest", "no shape", "no level"]
)
def test_a_damaged_cache_is_mended(tiny_model, photos, tmp_path, monkeypatch, damage):
    """As after a copy that broke off: rows without tokens are computed again, never served as zeros."""
    cache = TokenCache(tmp_path, tiny_model).fill(tiny_model, photos)
    expected, level = cache.batch(photos), cache.folder / "level_1.float16"
    if damage == "short level":
        os.truncate(level, 7 * 5 * 24 * 2 + 3)
    elif damage == "damaged line":
        lines = (cache.folder / "index.jsonl").read_bytes().splitlines(keepends=True)
        (cache.folder / "index.jsonl").write_bytes(b"".join([*lines[:7], b"\0" * 30 + b"\n", *lines[8:]]))
    elif damage == "half a manifest":
        os.truncate(cache.folder / "manifest.json", 40)
    elif damage == "no shape":
        (cache.folder / "manifest.json").write_text('{"shapes": [[], [5, 24]]}')
    else:
        (cache.folder / "manifest.json" if damage == "no manifest" else level).unlink()
    seen = count_images(tiny_model, monkeypatch)
    again = TokenCache(tmp_path, tiny_model)
    kept = 7 if damage in ("short level", "damaged line") else 0
    assert sum(path in again for path in photos) == kept
    again.fill(tiny_model, photos)
    assert sum(seen) == PHOTOS - kept
    assert all(map(torch.equal, again.batch(photos), expected))
    assert len((cache.folder / "index.jsonl").read_text().splitlines()) == PHOTOS
    assert TokenCache(tmp_path, tiny_model).rows == PHOTOS


def test_tokens_that_float16_cannot_hold_name_the_photo(tiny_model, photos, tmp_path, monkeypatch):
    levels = tiny_model.encoder.levels

    def large(images):
        tokens = levels(images)
        tokens[0][-1, 0, 0] = 1e6 if len(images) == 3 else 0
        return tokens

    monkeypatch.setattr(tiny_model.encoder, "levels", large)
    with pytest.raises(ValueError, match=r"2\.png: its tokens do not fit float16"):
        TokenCache(tmp_path, tiny_model).fill(tiny_model, photos[:3])


def test_an_unreadable_photo_is_named_and_the_rest_is_kept(tiny_model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SYNC_EVERY", 2)
    photos[4].write_bytes(b"not a photo")
    with pytest.raises(ValueError, match=r"4\.png: not a readable image"):
        TokenCache(tmp_path, tiny_model).fill(tiny_model, photos, batch_size=2)
    kept = TokenCache(tmp_path, tiny_model)
    assert [path in kept for path in photos] == [True] * 4 + [False] * 6
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
        kept.fill(tiny_model, [tmp_path / "none.png"])


def test_views_are_augmented_as_in_training(tiny_model, photos, tmp_path):
    captions = {str(path): ["a dog"] for path in photos}
    captions[str(photos[0])] = ["a dog on the left"]
    views = [TokenCache(tmp_path, tiny_model, view, 0.5).fill(tiny_model, photos, captions) for view in range(3)]
    plain, first, second = (cache.batch(photos)[0] for cache in views)
    assert_stored(plain, tokens_of(tiny_model, photos)[0])
    for a, b in ((plain, first), (first, second)):
        assert all((x != y).any() for x, y in zip(a, b, strict=True))
    again = TokenCache(tmp_path / "again", tiny_model, 1, 0.5).fill(tiny_model, photos, captions)
    assert torch.equal(again.batch(photos)[0], first)
    # Photo 0 says left: a view in which it would be mirrored without that caption does not mirror it.
    unlike = []
    for view in range(1, 6):
        careful = token_cache._AugmentedView(tiny_model.preprocessing, dict(view=view, crop_scale=0.5), captions)
        careless = token_cache._AugmentedView(tiny_model.preprocessing, dict(view=view, crop_scale=0.5), {})
        unlike.append([bool((careful(str(path)) != careless(str(path))).any()) for path in photos])
    assert any(row[0] for row in unlike)
    assert not any(any(row[1:]) for row in unlike)
    # Where the captions now forbid it, the photo is computed again.
    captions[str(photos[1])] = ["a dog on the right"]
    rows = views[1].rows
    assert views[1].fill(tiny_model, photos, captions).rows == rows + 1


def test_a_pickled_cache_reads_the_same_files(tiny_model, photos, tmp_path):
    """As a spawned data worker gets it: without a copy of the tokens."""
    cache = TokenCache(tmp_path, tiny_model).fill(tiny_model, photos)
    expected = cache[photos[2]]
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    assert all(map(torch.equal, pickle.loads(pickled)[photos[2]], expected))


def test_mixed_precision_is_for_a_gpu(tiny_model, photos, tmp_path, monkeypatch):
    """There tokens are computed as training would, into another cache; on a CPU float32 stays the only one."""
    plain = TokenCache(tmp_path, tiny_model)
    assert {TokenCache(tmp_path, tiny_model, precision=p).folder for p in ("auto", "float32", "bf16")} == {plain.folder}
    tokens = TokenCache(tmp_path, tiny_model, precision="bf16").fill(tiny_model, photos).batch(photos)[0]
    assert_stored(tokens, tokens_of(tiny_model, photos)[0])
    monkeypatch.setattr(token_cache, "MIXED_PRECISION_DEVICES", ("cpu",))  # as if it were one
    mixed = TokenCache(tmp_path, tiny_model, precision="bf16")
    assert TokenCache(tmp_path, tiny_model, precision="float32").folder == plain.folder != mixed.folder
    with torch.autocast("cpu", torch.bfloat16):
        expected = tokens_of(tiny_model, photos)[0]
    stored = mixed.fill(tiny_model, photos, batch_size=PHOTOS).batch(photos)[0]
    assert torch.equal(stored, expected.half())
    assert not torch.equal(stored, tokens)


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(tiny_config, tiny_train_config, tmp_path):
    """Configs of a captioner whose encoder stays frozen."""
    import timm
    from safetensors.torch import save_file

    options = REDUCED_ENCODERS["vit_tiny_patch16_224"]
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", **options).state_dict(), tmp_path / "vit.safetensors")
    tiny_config.encoder_weights, tiny_config.trainable_stages = str(tmp_path / "vit.safetensors"), 0
    tiny_train_config.cache_tokens, tiny_train_config.cache_dir = True, tmp_path / "cache"
    return tiny_config, tiny_train_config


def build(script, configs):
    model_cfg, train_cfg = script.complete_configs(*configs)
    model_cfg.tokenizer = "word"
    df = script._load_flickr_dataframe(train_cfg.data_dir, train_cfg.image_dir)
    torch.manual_seed(0)
    return script.build_trainer(model_cfg, train_cfg, df)


@pytest.mark.parametrize("views", [1, 3])
def test_training_reads_tokens_and_never_runs_the_encoder(script, frozen, views, monkeypatch):
    frozen[1].cache_views, frozen[1].epochs, frozen[1].num_workers = views, 2, 1 if views == 3 else 0
    trainer = build(script, frozen)
    assert len(list(frozen[1].cache_dir.iterdir())) == views
    levels = trainer.model.encoder.levels  # the summary and the report look at one photo at a time
    monkeypatch.setattr(trainer.model.encoder, "levels", lambda images: levels(images) if len(images) == 1 else 1 / 0)
    result = trainer.run_training()
    assert result["best_perplexity"] > 1
    assert "CIDEr" in trainer.metrics[0]
    if views > 1:
        dataset = trainer.train_dl.dataset
        seen = set()
        for epoch in range(20):
            dataset.set_epoch(epoch)
            seen.add(dataset[0][0][0].sum().item())
        assert len(seen) == views


def test_the_same_loss_with_and_without_cache(script, frozen):
    """Validation sees the photos as they are in both."""
    cached = build(script, frozen)
    assert isinstance(cached.valid_dl.dataset[0][0], list)
    frozen[1].cache_tokens = False
    plain = build(script, frozen)
    assert plain.valid_dl.dataset[0][0].shape == (3, 32, 32)
    assert plain.valid_one_epoch(0) == pytest.approx(cached.valid_one_epoch(0), rel=1e-4)


def test_computing_tokens_does_not_change_the_run(script, frozen):
    """The same seed gives the same loss whether the tokens are there or not, dropout included."""
    frozen[0].mlp_dropout = 0.3
    first = build(script, frozen).train_one_epoch(0)
    assert build(script, frozen).train_one_epoch(0) == first


def test_an_encoder_that_trains_is_not_cached(script, frozen):
    frozen[0].trainable_stages, frozen[1].epochs, frozen[1].freeze_epochs_all = -1, 2, 1
    with pytest.raises(
        ValueError,
        match=r"cache_tokens: \d+ parameters of the encoder train \(the first is vit\.cls_token\), so its tokens "
        "change: set --trainable_stages 0",
    ):
        build(script, frozen)
    frozen[1].freeze_epochs_all = 2
    build(script, frozen)
    frozen[0].encoder_weights = "scratch"
    with pytest.raises(ValueError, match="an encoder from scratch has to train; leave out --cache_tokens"):
        build(script, frozen)
    frozen[0].encoder_weights = str(frozen[1].cache_dir.parent / "vit.safetensors")
    frozen[1].cache_views = 0
    with pytest.raises(ValueError, match="cache_views is 0, but must be at least 1"):
        build(script, frozen)


def test_a_refiner_is_trained_on_cached_features(script, frozen, tmp_path):
    import timm
    from safetensors.torch import save_file

    model_cfg, _ = frozen
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.safetensors")
    model_cfg.encoder, model_cfg.encoder_options = "resnet10t", {"img_size": 64}
    model_cfg.encoder_weights, model_cfg.coupling = str(tmp_path / "resnet.safetensors"), "final"
    model_cfg.refiner = dict(width=32, grid=2, layers=1, heads=2)
    trainer = build(script, frozen)
    before = trainer.model.encoder.refiner.positions.clone()
    trainer.train_one_epoch(0)
    assert (trainer.model.encoder.refiner.positions != before).any()


# --- in front of stages that train ------------------------------------------------------------------------------------


def with_front(script, config, name, coupling, last, feature_levels=1):
    """A captioner of a pretrained encoder (random weights that are called so) whose `last` stages train."""
    config.encoder, config.encoder_options, config.coupling = name, REDUCED_ENCODERS[name], coupling
    config.feature_levels, config.trainable_stages, config.depth = feature_levels, last, 3
    torch.manual_seed(0)
    model = script.VisionGPT2Model(config).eval()
    model.config.encoder_weights = "pretrained"
    return model


@pytest.mark.parametrize("coupling", ["stepped", "final"])
@pytest.mark.parametrize("name", REDUCED_ENCODERS)
def test_what_follows_the_front_is_what_the_encoder_makes(script, tiny_config, name, coupling, photos, tmp_path):
    """Loss and gradients of the last stages are those of the whole encoder."""
    maps = 2 if name.startswith(("resnet", "convnext", "tf_", "swin")) else 1
    model = with_front(script, tiny_config, name, coupling, 1, maps)
    if name.startswith("beit"):  # it adds class token and positions between its parts
        assert front_of(model) == (0, 0)
        return
    model.pretrained_layers_trainable(True)
    cache = TokenCache(tmp_path / "cache", model).fill(model, photos, batch_size=4)
    stored = cache.batch(photos)
    assert isinstance(stored, FrontOutput)
    images = torch.stack([token_cache.preprocess(path, **model.preprocessing) for path in photos])
    ids = torch.randint(0, tiny_config.vocab_size, (PHOTOS, 7))
    behind = [p for n, p in model.encoder.named_parameters() if n not in model.encoder.weights_before(1)]
    assert behind
    found = []
    for batch in (stored, images):
        loss = model(batch, ids, ids)
        found.append([loss, *torch.autograd.grad(loss, behind, allow_unused=True)])
    assert any(gradient is not None and gradient.any() for gradient in found[0][1:])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:  # not of the pooling that nothing uses
            assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-6


def test_only_what_does_not_follow_is_kept(script, tiny_config, photos, tmp_path):
    """In front of the last stage but one of an EfficientNet its second map is what enters, in front of the last it is
    kept; a ViT keeps the levels in front of the last step that the front ends with."""
    name = "tf_efficientnet_lite0"
    kept = [front_of(with_front(script, tiny_config, name, "final", last, 2)) for last in (1, 2)]
    assert kept == [(1, 1), (2, 0)]
    name = "vit_tiny_patch16_224"
    for last, levels in ((1, 0), (2, 0)):
        assert front_of(with_front(script, tiny_config, name, "stepped", last)) == (last, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REDUCED_ENCODERS, name, REDUCED_ENCODERS[name] | {"depth": 6})
        model = with_front(script, tiny_config, name, "stepped", 1)  # steps of two blocks: after 2 and 4 come 5 and 6
        with torch.no_grad():  # as CLIP and large ViTs have it: beside one huge channel no difference is large
            model.encoder.vit.pos_embed[..., 0] += 300
        assert front_of(model) == (1, 2)
        cache = TokenCache(tmp_path, model).fill(model, photos)
    N, C = cache.batch(photos).entering.shape[1:]
    files = {file.name: file.stat().st_size for file in cache.folder.glob("*.float16")}
    assert files == dict.fromkeys(["entering.float16", "level_0.float16", "level_1.float16"], PHOTOS * N * C * 2)


def test_dropout_in_the_front_is_off(script, tiny_config, photos):
    """Also in training, as when its output was computed; behind it dropout is on."""
    drops = dict(patch_drop_rate=0.5, pos_drop_rate=0.5, proj_drop_rate=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REDUCED_ENCODERS, "vit_tiny_patch16_224", TINY_ENCODER | drops)
        model = with_front(script, tiny_config, "vit_tiny_patch16_224", "stepped", 1)
    model.pretrained_layers_trainable(True)
    vit = model.train().encoder.vit
    assert not any(
        module.training for part in (vit.pos_drop, vit.patch_drop, vit.blocks[0]) for module in part.modules()
    )
    assert all(module.training for module in vit.blocks[1].modules())
    images = torch.stack([token_cache.preprocess(path, **model.preprocessing) for path in photos])
    in_training = model.encoder.front(images, 1).entering
    assert torch.equal(in_training, model.eval().encoder.front(images, 1).entering)


def test_only_weights_of_the_front_change_its_cache(script, tiny_config, photos, tmp_path):
    model = with_front(script, tiny_config, "tf_efficientnet_lite0", "final", 2)
    cache = TokenCache(tmp_path, model).fill(model, photos)
    state = model.encoder.state_dict()
    behind = set(state) - set(model.encoder.weights_before(2))
    for name in ("cnn.blocks.5.0.conv_pw.weight", "cnn.bn2.running_mean"):
        assert name in behind
        state[name].add_(1)
    assert not TokenCache(tmp_path, model).missing(photos)
    state["cnn.blocks.4.0.bn1.running_mean"].add_(1)
    other = TokenCache(tmp_path, model)
    assert other.folder != cache.folder
    assert len(other.missing(photos)) == PHOTOS


@pytest.fixture
def tuned(frozen, tmp_path):
    """Configs of a captioner whose encoder's last stage trains, from the first epoch on."""
    frozen[0].trainable_stages, frozen[1].freeze_epochs_gpt, frozen[1].freeze_epochs_all = 1, 0, 0
    return frozen


def use_efficientnet(configs, folder):
    import timm
    from safetensors.torch import save_file

    name, config = "tf_efficientnet_lite0", configs[0]
    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), folder / "cnn.safetensors")
    config.encoder, config.encoder_options, config.feature_levels = name, REDUCED_ENCODERS[name], 2
    config.encoder_weights, config.coupling = str(folder / "cnn.safetensors"), "final"


@pytest.mark.parametrize("family", ["vit", "cnn"])
def test_training_behind_the_front_is_training(script, tuned, family, tmp_path, monkeypatch):
    """The same epoch with and without cache but for float16's rounding, and no photo passes the front again."""
    if family == "cnn":
        use_efficientnet(tuned, tmp_path)
    for name in ("emb", "attention", "mlp", "residual"):
        setattr(tuned[0], f"{name}_dropout", 0.0)
    cached = build(script, tuned)
    start = {name: p.clone() for name, p in cached.model.encoder.named_parameters()}
    monkeypatch.setattr(cached.model.encoder, "levels", lambda images: 1 / 0)
    losses = [cached.train_one_epoch(0), cached.valid_one_epoch(0)]
    tuned[1].cache_tokens = False
    plain = build(script, tuned)
    photo = plain.model.preprocessing
    tfms = ValidationTransforms(photo["img_size"], photo["mean"], photo["std"], normalized=False)
    plain.train_dl.dataset.tfms = tfms  # a cache of one view holds the photos as they are
    assert losses == pytest.approx([plain.train_one_epoch(0), plain.valid_one_epoch(0)], rel=1e-3)
    trained = {name for name, p in cached.model.encoder.named_parameters() if (p != start[name]).any()}
    behind = {name for name in start if name not in cached.model.encoder.weights_before(1)}
    assert trained
    assert trained <= behind


def test_a_run_behind_a_front_goes_on_and_its_cache_serves_the_evaluation(script, tuned, tmp_path, monkeypatch):
    use_efficientnet(tuned, tmp_path)
    tuned[1].epochs, tuned[1].cache_views = 2, 2
    whole = build(script, tuned)
    computed = []
    monkeypatch.setattr(TokenCache, "_compute", lambda *args: computed.append(args))
    whole.run_training()
    tuned[1].model_path = tmp_path / "resumed"
    first = build(script, tuned)
    monkeypatch.setattr(first, "_run_epoch", lambda epoch, run=first._run_epoch: run(epoch) if epoch == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.run_training()
    tuned[1].resume = "auto"
    resumed = build(script, tuned)
    resumed.run_training()
    assert [row["valid_loss"] for row in resumed.metrics] == [row["valid_loss"] for row in whole.metrics]
    model, _ = script.load_captioner(tmp_path / "resumed")
    photos = list(resumed.valid_dl.dataset.captions_of)
    assert not TokenCache(tuned[1].cache_dir, model).missing(photos)
    assert not computed


def test_self_critical_training_behind_a_front(script, tuned):
    tuned[1].epochs, tuned[1].scst_epochs, tuned[1].scst_lr, tuned[1].pretrained_lr_scale = 1, 1, 1e-2, 1.0
    trainer = build(script, tuned)
    trainer.start_self_critical()
    start = {name: p.clone() for name, p in trainer.model.encoder.named_parameters()}
    trainer.stage = None
    trainer.enter_stage(0)
    trainer.objective = trainer.self_critical
    trainer.train_one_epoch(0)
    changed = {name for name, p in trainer.model.encoder.named_parameters() if (p != start[name]).any()}
    assert changed
    assert not changed & set(trainer.model.encoder.weights_before(1))
