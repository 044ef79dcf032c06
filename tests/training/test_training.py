"""The Trainer: what trains, what does not, what is measured and what is kept."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from captioning.model.stages import norm_of_one_value
from captioning.training import out_of_memory, schedule
from conftest import TINY_ENCODER
from helpers.runs import change_loss


@pytest.fixture
def trainer(script, tiny_config, tiny_train_config, dls):
    torch.manual_seed(0)
    return script.Trainer(tiny_config, tiny_train_config, dls)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "resnet10t"])
def test_frozen_parameters_and_buffers_are_bit_identical(
    script, tiny_config, tiny_train_config, dls, pretend_pretrained, encoder
):
    """An epoch a stage: new layers, then the GPT-2 blocks, then everything. The ResNet has BatchNorm buffers."""
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"
    if encoder == "resnet10t":
        tiny_config.encoder, tiny_config.coupling = encoder, "final"
        tiny_config.encoder_options = {"output_stride": 8}  # 4 x 4 tokens from 32 pixels; one would need no attention
    tiny_train_config.freeze_epochs_gpt, tiny_train_config.freeze_epochs_all, tiny_train_config.epochs = 1, 2, 3
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    model, names = trainer.model, set(trainer.model.state_dict())
    kept = {name for name in names if "running_" in name or "num_batches" in name}  # also while the weights train
    assert bool(kept) == (encoder == "resnet10t")
    names -= kept
    new = {name for name in names if any(part in name for part in ("cross_attn", "ln_cross", "bridges"))}
    blocks = {name for name in names if name.startswith("gpt.trf_blocks")}

    for epoch, expected in enumerate((new, new | blocks, names)):
        before = snapshot(model)
        trainer.train_one_epoch(epoch)
        trainer.valid_one_epoch(epoch)
        # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is rounding noise.
        assert changed(model, before) <= expected
        assert expected - changed(model, before) <= {name for name in names if name.endswith(".k.bias")}


@pytest.mark.parametrize(
    ("encoder", "decoder", "stages"),
    [
        ("pretrained", "pretrained", ["new layers", "GPT-2 blocks", "everything"]),
        ("pretrained", "scratch", ["new layers", "new layers", "everything"]),
        ("scratch", "scratch", ["everything", "everything", "everything"]),
    ],
)
def test_stages_are_those_that_change_something(
    script, tiny_config, tiny_train_config, dls, pretend_pretrained, encoder, decoder, stages
):
    tiny_config.encoder_weights, tiny_config.decoder_weights = encoder, decoder
    tiny_train_config.freeze_epochs_gpt, tiny_train_config.freeze_epochs_all = 1, 2
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    seen = []
    for epoch in range(3):
        trainer.enter_stage(epoch)
        seen.append(trainer.stage)
    assert seen == stages


def test_parameter_groups(script, tiny_config, tiny_train_config, dls, pretend_pretrained):
    tiny_config.encoder_weights = tiny_config.decoder_weights = "pretrained"
    tiny_train_config.pretrained_lr_scale, tiny_train_config.weight_decay = 0.1, 0.05
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(of) == len(list(trainer.model.parameters()))

    def group(name):
        return of[id(trainer.model.get_parameter(name))]

    for name, peak, decay in (
        ("gpt.trf_blocks.0.cross_attn.q.weight", 1e-3, 0.05),
        ("gpt.trf_blocks.0.cross_attn.q.bias", 1e-3, 0.0),
        ("gpt.trf_blocks.0.ln_cross.scale", 1e-3, 0.0),
        ("gpt.trf_blocks.0.self_attn.qkv.weight", 1e-4, 0.05),
        ("gpt.trf_blocks.0.ln_1.scale", 1e-4, 0.0),
        ("gpt.tok_emb.weight", 1e-4, 0.0),
        ("gpt.pos_emb.weight", 1e-4, 0.0),
        ("encoder.vit.pos_embed", 1e-4, 0.0),
        ("encoder.vit.cls_token", 1e-4, 0.0),
        ("encoder.vit.blocks.0.attn.qkv.weight", 1e-4, 0.05),
    ):
        assert group(name)["max_lr"] == pytest.approx(peak), name
        assert group(name)["initial_lr"] == pytest.approx(peak / 25), name  # OneCycle starts at lr / 25
        assert group(name)["weight_decay"] == decay, name


def test_schedule_can_be_rebuilt_at_the_current_step(script, tiny_config, tiny_train_config, dls):
    """Half a run, then a longer one: the learning rate is that of the longer schedule at this step."""

    def trainer(epochs):
        tiny_train_config.epochs = epochs
        return script.Trainer(tiny_config, tiny_train_config, dls)

    def advance(trainer, steps):
        for _ in range(steps):
            trainer.optimizer.step()
            trainer.scheduler.step()

    short, long = trainer(2), trainer(4)
    steps = len(dls[0])
    advance(short, steps)
    advance(long, steps)
    assert short.scheduler.get_last_lr() != long.scheduler.get_last_lr()
    short.rebuild_schedule(epochs=4)
    assert short.scheduler.get_last_lr() == pytest.approx(long.scheduler.get_last_lr())
    advance(short, 3 * steps)
    advance(long, 3 * steps)
    assert short.scheduler.get_last_lr() == pytest.approx(long.scheduler.get_last_lr())


def test_validation_perplexity_is_over_all_tokens_at_once(trainer, dls):
    model, total = trainer.model.eval(), []
    with torch.no_grad():
        for images, input_ids, labels in dls[1]:
            logits = model.gpt.logits(model.decode(input_ids, model.encoder_states(images)))
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total.append(losses[labels.flatten() != -100])
    assert trainer.valid_one_epoch(0) == pytest.approx(torch.cat(total).mean().exp().item(), rel=1e-5)


def test_losses_are_weighted_by_tokens(script, trainer, monkeypatch):
    """The first batch has loss 1 (30 tokens), the others 2 (10 tokens each): not the mean of the batches' means."""
    calls = []

    def loss(objective, batch):
        calls.append(batch)
        value = torch.tensor(1.0 if batch is calls[0] else 2.0)
        return trainer.model.gpt.tok_emb.weight.sum() * 0 + value, value

    monkeypatch.setattr(script.CrossEntropy, "loss", loss)
    monkeypatch.setattr(script.CrossEntropy, "to_device", lambda _, batch, device: batch)
    monkeypatch.setattr(script.CrossEntropy, "count", lambda _, batch: 30 if not calls or batch is calls[0] else 10)
    n = len(trainer.train_dl)
    assert trainer.train_one_epoch(0) == pytest.approx((30 + 20 * (n - 1)) / (30 + 10 * (n - 1)))
    assert n > 1
    trainer.valid_dl = trainer.train_dl
    calls.clear()
    assert trainer.valid_one_epoch(0) == pytest.approx(math.exp((30 + 20 * (n - 1)) / (30 + 10 * (n - 1))))


def test_averaged_weights(script, tiny_config, tiny_train_config, dls):
    """average += (weights - average) * (1 - decay) after every step, decay = min(ema_decay, step / (9 + step));
    the average is what is validated, scored and saved, and trained weights differ from it."""
    tiny_train_config.ema_decay, tiny_train_config.epochs = 0.3, 2
    torch.manual_seed(0)
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    expected, step, decays = None, trainer.train_step, []

    def stepped(batches):
        nonlocal expected
        reported, n = step(batches), len(decays)
        decays.append(0 if n == 0 else min(0.3, n / (9 + n)))
        weights = trainer.model.gpt.tok_emb.weight.detach()
        expected = weights.clone() if n == 0 else expected.lerp(weights, 1 - decays[-1])
        return reported

    trainer.train_step = stepped
    for epoch in range(2):
        trainer.train_one_epoch(epoch)
    assert decays[0] == 0 < decays[1] < 0.3 == decays[-1]
    torch.testing.assert_close(trainer.eval_model.gpt.tok_emb.weight, expected)
    assert (trainer.model.gpt.tok_emb.weight - expected).abs().max() > 1e-5
    by_average = trainer.valid_one_epoch(0)
    trainer.save_model()
    trainer.load_best_model()
    assert torch.equal(trainer.model.gpt.tok_emb.weight, trainer.eval_model.gpt.tok_emb.weight)
    trainer.average = None
    assert trainer.valid_one_epoch(0) == by_average


def test_label_smoothing(script, tiny_config, bpe):
    """(1 - s) * -log p(target) + s * mean of -log p over all tokens, in training only."""
    tiny_config.label_smoothing = 0.2
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).train()
    images, ids = torch.randn(1, 3, 32, 32), torch.tensor([[5, 6, 7]])
    labels = torch.tensor([[6, 7, -100]])
    log_p = torch.cat([model(images, ids[:, :n]) for n in (1, 2)], dim=1)[0].log_softmax(-1)
    plain, spread = -log_p[[0, 1], [6, 7]].mean(), -log_p.mean()
    assert model(images, ids, labels).item() == pytest.approx((0.8 * plain + 0.2 * spread).item(), rel=1e-5)
    assert model.eval()(images, ids, labels).item() == pytest.approx(plain.item(), rel=1e-5)


def test_precision(script, tiny_config, tiny_train_config, dls, monkeypatch):
    """bf16 on request, also on a CPU: the matrices multiply in it, weights and loss stay float32."""
    torch.manual_seed(0)
    plain = script.Trainer(tiny_config, tiny_train_config, dls)
    tiny_train_config.precision = "bf16"
    torch.manual_seed(0)
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    batch = next(iter(dls[0]))
    with trainer.autocast():
        loss, _ = trainer.objective.loss(trainer.objective.to_device(batch, trainer.device))
    exact, _ = plain.objective.loss(plain.objective.to_device(batch, plain.device))
    assert loss.dtype == torch.float32
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    with trainer.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert trainer.train_one_epoch(0) == pytest.approx(plain.train_one_epoch(0), rel=2e-2)
    tiny_train_config.precision = "half"
    with pytest.raises(ValueError, match="precision is 'half', but must be one of 'auto', 'float32', 'bf16'"):
        script.Trainer(tiny_config, tiny_train_config, dls)


def test_run_keeps_the_best_epoch(trainer, tiny_train_config, monkeypatch):
    trainer.rebuild_schedule(epochs=3)
    perplexities, saved = iter([9.0, 5.0, 7.0]), []
    monkeypatch.setattr(trainer, "valid_one_epoch", lambda epoch: next(perplexities))
    monkeypatch.setattr(trainer, "save_model", lambda best: saved.append(best["best_epoch"]))
    assert trainer.run_training() == {"best_perplexity": 5.0, "best_epoch": 1}
    assert saved == [0, 1]
    table = pd.read_csv(tiny_train_config.model_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["valid_perplexity"].tolist() == [9.0, 5.0, 7.0]
    assert table["valid_loss"].tolist() == pytest.approx([math.log(9), math.log(5), math.log(7)])


def test_one_bad_loss_is_skipped(trainer, monkeypatch):
    calls = []
    change_loss(trainer, monkeypatch, lambda loss: loss * (math.nan if calls.append(loss) or len(calls) == 2 else 1))
    assert math.isfinite(trainer.train_one_epoch(0))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("scaled", [False, True])
def test_bad_gradients_change_nothing_and_end_the_run(trainer, scaled):
    """Clipping would turn an infinite gradient into NaN weights. `scaled` is the fp16 path, its scaler on the CPU."""
    if scaled:
        trainer.scaler = torch.amp.GradScaler("cpu")
    before, scale = snapshot(trainer.model), trainer.scaler.get_scale()
    calls = []
    trainer.model.gpt.tok_emb.weight.register_hook(lambda grad: calls.append(1) or (grad * math.inf))
    trainer.train_config.max_bad_steps = 3
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite"):
        trainer.train_one_epoch(0)
    assert len(calls) == 3
    assert not changed(trainer.model, before)
    assert trainer.scheduler.last_epoch == 0
    assert (trainer.scaler.get_scale() < scale) == scaled  # an overflow makes the scaler take a smaller scale


def test_scaled_gradients_give_the_same_steps(script, tiny_config, tiny_train_config, dls):
    """The fp16 path without overflow: clipping sees unscaled gradients, so the weights are the same."""
    weights = []
    for scaled in (False, True):
        torch.manual_seed(0)
        trainer = script.Trainer(tiny_config, tiny_train_config, dls)
        if scaled:
            trainer.scaler = torch.amp.GradScaler("cpu")
        trainer.train_one_epoch(0)
        weights.append(snapshot(trainer.model))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


def test_more_epochs_than_planned(trainer):
    """The learning rate stays at the end of the schedule."""
    for epoch in range(2):
        trainer.train_one_epoch(epoch)
    assert trainer.scheduler.last_epoch == trainer.scheduler.total_steps


def test_an_epoch_without_a_good_step_has_no_loss(trainer, monkeypatch):
    change_loss(trainer, monkeypatch, lambda loss: loss * math.nan)
    assert math.isnan(trainer.train_one_epoch(0))


def test_interrupt_keeps_the_best_epoch(trainer, tiny_train_config, monkeypatch, capsys):
    """Ctrl-C in the second epoch, and in its save: what was saved is the first epoch's."""
    trainer.rebuild_schedule(epochs=2)
    perplexities, real_save = iter([9.0, 5.0]), trainer.save_model
    monkeypatch.setattr(trainer, "valid_one_epoch", lambda epoch: next(perplexities))

    def save(best):
        if best["best_epoch"] == 1:
            raise KeyboardInterrupt
        real_save(best)

    monkeypatch.setattr(trainer, "save_model", save)
    assert trainer.run_training() == {"best_perplexity": 9.0, "best_epoch": 0}
    assert "stopped early: interrupted; the best epoch is kept" in capsys.readouterr().out
    assert json.loads((tiny_train_config.model_path / "config.json").read_text())["best_epoch"] == 0


def test_dropout_does_not_depend_on_the_number_of_workers(script, tiny_config, tiny_train_config, flickr, bpe):
    """Two epochs with dropout, loaded by the process itself and by a worker that lives on."""
    tiny_config.emb_dropout, tiny_train_config.epochs = 0.2, 2
    losses = []
    for workers in (0, 1):
        tiny_train_config.num_workers = workers
        df = script._load_flickr_dataframe(flickr, flickr / "flickr30k_images")
        torch.manual_seed(0)
        model_config, _ = script.complete_configs(model=tiny_config)
        dls = script.build_dataloaders(df, bpe, model_config, tiny_train_config)
        trainer = script.Trainer(tiny_config, tiny_train_config, dls)
        losses.append([trainer.train_one_epoch(0), trainer.valid_one_epoch(0), trainer.train_one_epoch(1)])
    assert losses[0] == losses[1]


def test_validation_that_is_never_finite_is_an_error(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "valid_one_epoch", lambda epoch: math.nan)
    with pytest.raises(FloatingPointError, match="never finite"):
        trainer.run_training()


def test_trainer_takes_eos_from_the_tokenizer(script, tiny_config, tiny_train_config, dls, bpe):
    tiny_config.eos_token_id = 7
    tiny_train_config.device = torch.device("cpu")
    trainer = script.Trainer(tiny_config, tiny_train_config, dls)
    assert trainer.model.config.eos_token_id == bpe.eos_token_id
    trainer.save_model()  # config.json can hold a device that was given as an object


def test_too_small_a_vocabulary_is_refused(script, tiny_config, tiny_train_config, dls):
    tiny_config.vocab_size = 10
    with pytest.raises(ValueError, match="tokens, vocab_size is 10"):
        script.Trainer(tiny_config, tiny_train_config, dls)


def test_losses_that_stay_bad_end_the_run(trainer, monkeypatch, capsys):
    """The best epoch so far is kept; without one the error is raised."""
    trainer.train_config.max_bad_steps = 3
    trainer.rebuild_schedule(epochs=3)
    change_loss(trainer, monkeypatch, lambda loss: loss * (math.nan if trainer.metrics else 1))
    assert trainer.run_training()["best_epoch"] == 0
    assert "3 steps in a row were not finite: try a lower --lr" in capsys.readouterr().out
    trainer.best["best_epoch"], trainer.bad_steps = None, 0
    with pytest.raises(FloatingPointError):
        trainer.run_training()


def test_checkpoint_files(script, trainer, tiny_train_config, tmp_path):
    (tmp_path / "vit.safetensors").touch()
    trainer.model.config.encoder_weights = str(tmp_path / "vit.safetensors")
    trainer.save_model()
    folder = tiny_train_config.model_path
    own = trainer.model.state_dict()
    weights = load_file(folder / "captioner.safetensors")
    trainer.model.load_state_dict(weights, strict=True)
    twin = torch.load(folder / "captioner.pt", weights_only=True)
    assert own.keys() == weights.keys() == twin.keys()
    assert all(torch.equal(weights[key], twin[key]) for key in own)
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"] == {
        "img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bicubic"
    }  # fmt: skip
    assert config["model_config"]["encoder_options"] == TINY_ENCODER
    assert config["model_config"]["encoder_weights"] == "vit.safetensors"
    assert str(folder.parent) not in json.dumps(config)  # a shared config names no private folder


def test_load_best_model(script, trainer, tiny_train_config, tmp_path):
    trainer.save_model()
    saved = snapshot(trainer.model)
    for path in (None, tiny_train_config.model_path / "captioner.pt", tiny_train_config.model_path):
        nn.init.zeros_(trainer.model.gpt.tok_emb.weight)
        trainer.load_best_model(path)
        assert not changed(trainer.model, saved)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: not found"):
        trainer.load_best_model(tmp_path / "gone.pt")


def test_damaged_or_foreign_weights_change_nothing(trainer, tmp_path):
    saved = snapshot(trainer.model)
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(ValueError, match=r"half\.safetensors: damaged, or not a weights file"):
        trainer.load_best_model(tmp_path / "half.safetensors")
    foreign = dict(saved)
    del foreign["gpt.final_norm.scale"]
    foreign["head.weight"] = torch.zeros(2)
    foreign["gpt.pos_emb.weight"] = torch.zeros(3, 32)
    torch.save(foreign, tmp_path / "foreign.pt")
    with pytest.raises(ValueError) as error:
        trainer.load_best_model(tmp_path / "foreign.pt")
    for problem in (
        "gpt.final_norm.scale: missing", "head.weight: unknown",
        "gpt.pos_emb.weight: shape (3, 32) where (24, 32) is needed",
    ):  # fmt: skip
        assert problem in str(error.value)
    assert not changed(trainer.model, saved)


def test_a_pickle_that_runs_code_is_not_loaded(trainer, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="damaged, or a pickle that holds more than tensors"):
        trainer.load_best_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_interrupted_write_keeps_the_old_file(script, tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")

    def fail(draft):
        draft.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        script.checkpoint.write_atomically(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("weights", "old")]


def test_generate_caption(trainer, flickr):
    photo = flickr / "flickr30k_images" / "1000.jpg"
    caption = trainer.generate_caption(photo, max_tokens=5, deterministic=True)
    assert isinstance(caption, str)
    assert trainer.generate_caption(Image.open(photo), max_tokens=5, deterministic=True) == caption
    assert trainer.generate_caption([photo, Image.open(photo)], max_tokens=5, deterministic=True) == [caption] * 2
    several = trainer.generate_caption(photo, 5, num_beams=3, num_return_sequences=2, prompt="a red")
    assert len(several) == 2
    assert all(text.startswith("a red") for text in several)


def test_configs_may_hold_only_the_promised_fields(script, dls, tmp_path, monkeypatch, pretend_pretrained):
    """What a config lacks has the value at the top of the script."""
    promised_model = SimpleNamespace(
        embed_dim=32, num_heads=2, depth=2, seq_len=24, vocab_size=300, emb_dropout=0.0, attention_dropout=0.0,
        mlp_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    promised_train = SimpleNamespace(
        epochs=1, freeze_epochs_gpt=1, freeze_epochs_all=2, lr=1e-3, device="cpu", batch_size=4, model_path=tmp_path
    )
    for key, value in dict(encoder_options=TINY_ENCODER, encoder="vit_tiny_patch16_224", eos_token_id=0).items():
        monkeypatch.setattr(script.model_config, key, value)
    trainer = script.Trainer(promised_model, promised_train, dls)
    assert trainer.train_config.clip_norm == script.train_config.clip_norm
    assert set(trainer.run_training()) == {"best_perplexity", "best_epoch"}


def test_fp16_goes_on_from_a_state_of_another_precision(tiny_model):
    """A state without the scale of a loss leaves the scaler as it is; one with it brings it along."""
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    scheduler = schedule.one_cycle(optimizer, 3, 0.1)
    saved = dict(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), average=None, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for state, scale in (({}, 8.0), (torch.amp.GradScaler("cpu", init_scale=2.0).state_dict(), 2.0)):
        schedule.load_optimization_state(saved | {"scaler": state}, optimizer, scheduler, scaler, None, 1.0, 0.1)
        assert scaler.get_scale() == scale
    bf16 = torch.amp.GradScaler("cpu", enabled=False)
    schedule.load_optimization_state(
        saved | {"scaler": scaler.state_dict()}, optimizer, scheduler, bf16, None, 1.0, 0.1
    )
    assert bf16.state_dict() == {}


def test_a_batch_too_large_for_the_gpu(trainer, monkeypatch):
    """Said in one line with the memory there is and what to change; the run's state is saved."""
    GiB = 2**30

    def train_step(batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity ...")

    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GiB, 80 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 69 * GiB)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.run_training()
    assert str(error.value) == (
        "a batch of 4 captions of 2 photos does not fit into the GPU's 80.0 GiB of memory, of which other processes "
        "use 10.0: try --batch_size 2 --accumulate 2 for the same step or --gradient_checkpointing true for the same "
        "batch"
    )
    assert (trainer.model_path / "last" / "state.pt").is_file()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (dict(batch_size=640, captions_per_image=5), "--batch_size 320 --accumulate 2 for the same step or --grad"),
        (dict(batch_size=5, captions_per_image=5), "try --gradient_checkpointing true for the same batch"),
        (dict(batch_size=4, gradient_checkpointing=True), "--batch_size 2 --accumulate 2 for the same step"),
        (dict(batch_size=1, gradient_checkpointing=True), "try a smaller encoder or decoder"),
    ],
)
def test_what_to_change_when_memory_is_short(script, changes, remedy):
    said = out_of_memory.advice(script.TrainConfig(**changes), 24 * 2**30, 0)
    assert remedy in said and "24.0 GiB of memory: try" in said


def test_a_batch_of_one_photo_that_batch_norm_cannot_train_on_is_refused_before_training(
    script, tiny_config, tiny_train_config, bpe, monkeypatch
):
    """A CNN whose last feature map has one place at 32 pixels; 8 training photos leave one for the last batch of 7."""
    config = script.complete(tiny_config, script.model_config)
    config.encoder, config.encoder_options, config.coupling = "test_resnet", {"img_size": 32}, "final"
    train = script.complete(tiny_train_config, script.train_config)
    df = script._load_flickr_dataframe(train.data_dir, train.image_dir)

    def make(batch_size, **changes):
        train.batch_size, train.captions_per_image = batch_size, 1
        model = dataclasses.replace(config, **changes)
        one_each = df.drop_duplicates("image")
        return script.Trainer(model, train, script.build_dataloaders(one_each, bpe, model, train))

    monkeypatch.setattr(script.Trainer, "enter_stage", lambda self, epoch: None)
    for batch_size in (7, 1):
        with pytest.raises(ValueError, match=f"epoch has one photo, .* change batch_size {batch_size} so that"):
            make(batch_size)
    model = make(4).model
    assert "bn" in norm_of_one_value(model)
    model.config.encoder_weights = "weights.pth"
    assert norm_of_one_value(model) is None  # pretrained: its norms keep their statistics
    make(7, encoder_options={"img_size": 64})
