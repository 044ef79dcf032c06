"""Self-critical training: rewards are CIDEr against the photo's own captions, the gradient is the policy's, and the
captions get better."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from captioning.data.unreadable_photos import UnreadablePhotos
from captioning.model.tokenizer import CaptionTokenizer
from captioning.scoring.metrics import CiderD
from captioning.scoring.ptb_tokenization import tokenize
from captioning.training import self_critical
from captioning.training.self_critical import END_WORD, SelfCritical

SUBJECTS = ("dog", "cat", "man", "girl", "bird", "boy")


class Photos:
    """A training dataset of six photos, each a plain colour with two captions of its own."""

    def __init__(self):
        self.captions_of = {f"{name}.jpg": [f"a {name} runs .", f"the {name} is here ."] for name in SUBJECTS}
        self.unreadable_photos = UnreadablePhotos(self.captions_of, 0)
        texts = [text for captions in self.captions_of.values() for text in captions]
        self.tokenizer = CaptionTokenizer.train(texts, 100, "word")
        self.prompts, self.max_length, self.seed = [""] * len(texts), 24, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def load_input(self, path, row):
        image = torch.zeros(3, 32, 32)
        image[row % 3] = 1.0 + row // 3
        return image


def config(**changes):
    values = dict(scst_samples=4, scst_draws="sample", scst_baseline="mean", batch_size=24, num_workers=0)
    return SimpleNamespace(**values | dict(device="cpu", score_tokens="words", scst_bleu=0.0) | changes)


@pytest.fixture
def photos():
    return Photos()


@pytest.fixture
def model(script, tiny_config, photos):
    tiny_config.vocab_size, tiny_config.eos_token_id = len(photos.tokenizer), photos.tokenizer.eos_token_id
    torch.manual_seed(0)
    return script.VisionGPT2Model(tiny_config)


def ids_of(tokenizer, captions, length=8):
    """Captions as `generate_ids` returns them: BOS, the words, then EOS to the end; "..." has no EOS."""
    rows = []
    for caption in captions:
        words = tokenizer.encode(caption.removesuffix(" ..."))
        row = [tokenizer.bos_token_id, *words]
        fill = words[-1] if caption.endswith("...") else tokenizer.eos_token_id
        rows.append(row + [fill] * (length - len(row)))
    return torch.tensor(rows)


def test_rewards_of_a_language_without_spaces_count_characters(model, photos):
    photos.captions_of = {"1.jpg": ["狗在草地上奔跑"], "2.jpg": ["两个孩子玩耍"]}
    photos.tokenizer = CaptionTokenizer.train([text for [text] in photos.captions_of.values()], 100, "character")
    scst = SelfCritical(model, photos, config(score_tokens="characters"))
    ids = ids_of(photos.tokenizer, ["狗在草地上奔跑", "狗在草地", "两个孩子"], length=10)
    full, part, wrong = scst.rewards(ids, torch.tensor([0, 0, 0])).tolist()
    assert full == pytest.approx(10) and 0 < part < full and wrong < part
    by_words = SelfCritical(model, photos, config()).rewards(ids, torch.tensor([0, 0, 0])).tolist()
    assert by_words[1] == pytest.approx(by_words[2])  # half of a caption is worth no more than a wrong one


def test_rewards_are_cider_with_the_end_as_a_word(model, photos):
    scst = SelfCritical(model, photos, config())
    captions = ["a dog runs .", "a dog runs .", "a cat runs .", "a dog", ""]
    places = torch.tensor([0, 1, 0, 0, 0])
    rewards = scst.rewards(ids_of(photos.tokenizer, captions), places)
    references = [
        [f"{text} {END_WORD}" for text in tokenize(list(captions))] for captions in photos.captions_of.values()
    ]
    candidates = [f"{text} {END_WORD}" for text in tokenize(captions)]
    expected = CiderD(references).scores(candidates, [references[i] for i in places])
    assert rewards.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    right, other_photo, other_subject, short, empty = rewards.tolist()
    assert right > 3 > other_subject
    assert right > short > empty >= 0
    assert other_photo == pytest.approx(other_subject)
    # The same words, but the caption does not come to its end: that is worth less.
    broken_off = scst.rewards(ids_of(photos.tokenizer, ["a dog runs ..."]), places[:1])
    assert broken_off.item() < right - 0.5


def test_bleu_is_rewarded_beside_cider(model, photos):
    """With the smoothing of Lin & Och; worked out by hand."""
    captions, places = (
        ["a dog runs .", "a dog runs ...", "dog", "a cat sleeps and a dog runs .", ""],
        torch.zeros(5).long(),
    )
    ids = ids_of(photos.tokenizer, captions, length=12)
    cider = SelfCritical(model, photos, config()).rewards(ids, places)
    both = SelfCritical(model, photos, config(scst_bleu=0.5)).rewards(ids, places)
    bleu = (2 * (both - cider)).tolist()
    assert bleu[0] == pytest.approx(1)  # with END_WORD four words, all of the reference
    # "dog <end>": 2 of 2 words and 0 of 1 pairs, each with 1 more, no longer n-gram; the reference has 4 words
    assert bleu[2] == pytest.approx(math.exp(1 - 4 / 2) * (1 * 1 / 2 * 1 * 1) ** (1 / 4), abs=1e-4)
    assert 0 < bleu[1] < bleu[0] and 0 < bleu[3] < bleu[0] and bleu[4] < 0.3


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_gradient_is_that_of_rewarded_log_probabilities(model, photos, baseline, monkeypatch):
    scst = SelfCritical(model, photos, config(scst_samples=2, scst_baseline=baseline))
    drawn = ids_of(photos.tokenizer, ["a dog runs .", "a cat", "the cat is here .", "the the ..."])
    greedy = ids_of(photos.tokenizer, ["a dog", "a cat runs ."])
    monkeypatch.setattr(
        self_critical, "generate_ids", lambda *args, deterministic=False, **options: greedy if deterministic else drawn
    )
    images, places = torch.stack([photos.load_input("", 0), photos.load_input("", 1)]), torch.tensor([0, 1])
    model.eval()
    loss, reward = scst.loss((images, places))
    gradient = torch.autograd.grad(loss, list(model.gpt.parameters()))

    rewards = scst.rewards(drawn, places.repeat_interleave(2))
    if baseline == "mean":
        baselines = rewards.view(2, 2).flip(1).flatten()  # of two draws, the other one's
    else:
        baselines = scst.rewards(greedy, places).repeat_interleave(2)
    total, words = 0.0, 0
    for row, (ids, advantage) in enumerate(zip(drawn, rewards - baselines, strict=True)):
        image = images[row // 2][None]
        for t in range(1, len(ids)):
            log_p = model(image, ids[None, :t])[0, 0].log_softmax(-1)[ids[t]]
            total, words = total - advantage * log_p, words + 1
            if ids[t] == photos.tokenizer.eos_token_id:
                break  # what follows the end is padding
    expected = torch.autograd.grad(total / words, list(model.gpt.parameters()))
    assert reward == pytest.approx(rewards.mean().item())
    assert loss.item() == pytest.approx((total / words).item(), abs=1e-5)
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_every_weight_has_a_gradient_in_mixed_precision(model, photos, baseline):
    """The draws run in inference mode; autocast must not hand their casts of weights to the step that learns."""
    scst = SelfCritical(model, photos, config(scst_samples=2, scst_baseline=baseline))
    scst.rewards = lambda ids, indices: torch.arange(len(ids)).float()
    images = torch.stack([photos.load_input("", 0), photos.load_input("", 1)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = scst.loss((images, torch.tensor([0, 1])))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.gpt.trf_blocks[0].cross_attn.q.weight.grad.any()


def test_a_constant_reward_teaches_nothing(model, photos, monkeypatch):
    scst = SelfCritical(model, photos, config())
    monkeypatch.setattr(scst, "rewards", lambda ids, places: torch.full((len(ids),), 0.7))
    loss, reward = scst.loss((torch.stack([photos.load_input("", 0)]), torch.tensor([0])))
    loss.backward()
    assert reward == pytest.approx(0.7)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("draws", "baseline"), [("sample", "mean"), ("sample", "greedy"), ("beam", "mean")])
def test_captions_get_better(model, photos, draws, baseline):
    """After a little cross-entropy rewards alone take the draws most of the way to captions of their photos."""
    scst = SelfCritical(model, photos, config(scst_samples=8, scst_draws=draws, scst_baseline=baseline, batch_size=48))
    images = torch.stack([photos.load_input(path, row) for row, path in enumerate(photos.captions_of)])
    ids = ids_of(photos.tokenizer, [captions[0] for captions in photos.captions_of.values()])
    labels = torch.cat([ids[:, 1:], torch.full((6, 1), -100)], dim=1)

    def train(steps, lr, loss_of):
        optimizer, values = torch.optim.AdamW(model.train().parameters(), lr=lr), []
        for _ in range(steps):
            loss, value = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(value)
        return values

    torch.manual_seed(0)
    train(40, 3e-3, lambda: (model(images, ids, labels), 0))
    rewards = train(100, 1e-3, lambda: scst.loss((images, torch.arange(6))))
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def test_draws_end_where_true_captions_do(model, photos):
    scst = SelfCritical(model, photos, config())
    assert scst.max_tokens == 7  # [BOS] the dog is here . [EOS]


def test_questions_are_refused(model, photos):
    photos.prompts[3] = "what is it ?"
    with pytest.raises(ValueError, match="this dataset asks questions: set --scst_epochs 0"):
        SelfCritical(model, photos, config())


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_with_both_stages(script, tiny_config, tiny_train_config, dls, monkeypatch):
    tiny_train_config.epochs, tiny_train_config.scst_epochs, tiny_train_config.scst_lr = 2, 2, 3e-4
    tiny_train_config.scst_samples = 2
    torch.manual_seed(0)
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    ciders, loaded = iter([0.3, 0.2, 0.25, 0.4]), []
    real_load = trainer.load_best_model
    monkeypatch.setattr(trainer, "score_one_epoch", lambda epoch: {"CIDEr": next(ciders)})
    monkeypatch.setattr(trainer, "load_best_model", lambda: loaded.append(len(trainer.metrics)) or real_load())
    assert trainer.run_training()["best_epoch"] == 3  # by CIDEr, whatever the perplexity
    assert loaded == [2]  # it starts from the best epoch of cross-entropy
    stages = [row["stage"] for row in trainer.metrics]
    assert stages == ["everything"] * 2 + ["self-critical"] * 2
    assert [("reward" in row, math.isnan(row["train_loss"])) for row in trainer.metrics] == [(False, False)] * 2 + [
        (True, True)
    ] * 2
    assert max(group["max_lr"] for group in trainer.optimizer.param_groups) == 3e-4
    stored = load_file(tiny_train_config.model_path / "captioner.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in trainer.model.state_dict().items())
    trainer.log.draw_curves()
    assert (tiny_train_config.model_path / "reward.png").is_file()


def test_a_run_with_rewards_only(script, tiny_config, tiny_train_config, dls):
    tiny_train_config.epochs, tiny_train_config.scst_epochs, tiny_train_config.scst_samples = 0, 1, 2
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.self_critical.rewards = lambda ids, places: torch.arange(len(ids)).float()
    ciders = iter([0.3, 0.4])
    trainer.score_one_epoch = lambda epoch: {"CIDEr": next(ciders)}
    assert trainer.run_training()["best_epoch"] == 0
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())
    assert [row["epoch"] for row in trainer.metrics] == [0, 1]  # first what it starts from


def test_what_rewards_start_from_may_stay_the_best(script, tiny_config, tiny_train_config, dls):
    tiny_train_config.epochs, tiny_train_config.scst_epochs, tiny_train_config.scst_samples = 0, 2, 2
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.self_critical.rewards = lambda ids, places: torch.arange(len(ids)).float()
    ciders = iter([0.5, 0.4, 0.3])
    trainer.score_one_epoch = lambda epoch: {"CIDEr": next(ciders)}
    assert trainer.run_training()["best_epoch"] == -1
    stored = load_file(tiny_train_config.model_path / "captioner.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in before.items())


def test_nothing_to_train(script, tiny_config, tiny_train_config, dls):
    tiny_train_config.epochs = 0
    with pytest.raises(ValueError, match="epochs is 0 and scst_epochs is 0: there is nothing to train"):
        script.Trainer(tiny_config, tiny_train_config, dls)


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_bf16_and_averaged_weights(script, tiny_config, tiny_train_config, dls, baseline):
    tiny_train_config.epochs, tiny_train_config.scst_epochs, tiny_train_config.scst_samples = 1, 1, 2
    tiny_train_config.precision, tiny_train_config.ema_decay, tiny_train_config.scst_baseline = "bf16", 0.5, baseline
    torch.manual_seed(0)
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    trainer.self_critical.rewards = lambda ids, places: (torch.arange(len(ids)) % 2).float()
    trainer.run_training()
    assert [row["stage"] for row in trainer.metrics] == ["everything", "self-critical"]
    assert (trainer.eval_model.gpt.tok_emb.weight - trainer.model.gpt.tok_emb.weight).abs().max() > 0
    trainer.load_best_model()
    assert torch.equal(trainer.eval_model.gpt.tok_emb.weight, trainer.model.gpt.tok_emb.weight)


def test_frozen_layers_stay_frozen(script, tiny_config, tiny_train_config, dls, monkeypatch):
    monkeypatch.setattr(script.VisionGPT2Model, "from_pretrained", classmethod(lambda cls, config: cls(config)))
    tiny_config.encoder_weights, tiny_config.trainable_stages = "pretrained", 0
    tiny_train_config.epochs, tiny_train_config.scst_epochs, tiny_train_config.scst_samples = 0, 1, 2
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    assert not any(p.requires_grad for p in trainer.model.encoder.parameters())
    assert not trainer.model.encoder.training
    assert all(p.requires_grad for p in trainer.model.gpt.parameters())


def test_it_needs_a_score_every_epoch(script, tiny_config, tiny_train_config, dls):
    tiny_train_config.scst_epochs, tiny_train_config.score_every = 1, 2
    with pytest.raises(ValueError, match="score_every is 2, but must be 1: scst_epochs needs CIDEr every epoch"):
        script.Trainer(tiny_config, tiny_train_config, dls)
