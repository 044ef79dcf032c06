"""The steps of check_gpu.py that ask: is it right? The script from end to end, CUDA graphs, gradients, several
processes, and all options that a GPU computes differently."""

import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from captioners import REPO_ROOT, make_batch, make_ours, script
from captioning.data import shapes
from captioning.decoding.cached_decoder import cuda_graphs_disabled
from captioning.decoding.search import generate_ids
from captioning.model.loss import chunked_cross_entropy
from captioning.pages import plots
from gpu_step import TINY, TINY_ENCODER, TINY_OPTIONS, fail, milliseconds, row, seconds_of, table, variant

SCRIPT = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "MyLLM_Vit_gpt2_captioning.py"

# --- the script -------------------------------------------------------------------------------------------------------


def whole_script(setting):
    """The script as a user runs it, stopped by a signal in the middle, and resumed to its end."""

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 8 if setting.dry_run else 2400)
        options = ["--recipe", "shapes", "--data_dir", folder / "shapes", "--model_path", folder / "run"]
        options += ["--device", setting.device]
        options += (
            [*TINY_OPTIONS, "--score_images", "0", "--demo_images", "0"]
            if setting.dry_run
            else ["--batch_size", "128", "--lr", "2e-3", "--score_images", "50", "--demo_images", "2"]
        )
        # A tiny run goes on for so long that the signal always comes in the middle.
        runs = {
            "stopped": ["--epochs", "200" if setting.dry_run else "10"],
            "resumed": ["--resume", "auto", "--epochs", "2" if setting.dry_run else "10"],
        }
        print(f"{SCRIPT.name} " + " ".join(map(str, options)))
        table("run", "exit code", "seconds", "perplexity", "epochs", "captions right: scenes, new combinations")
        for title, more in runs.items():
            stopped, start = title == "stopped", time.perf_counter()
            code, said = run_script([*options, *more], folder / "run" / "metrics.csv" if stopped else None, setting)
            rows = metrics(folder / "run" / "metrics.csv")
            right = re.findall(r"unseen [a-z ]+? +([\d.]+%)", said)
            perplexity = f"{math.exp(float(rows[-1]['valid_loss'])):.3f}" if rows else ""
            row(title, code, f"{time.perf_counter() - start:.1f}", perplexity, len(rows), ", ".join(right) or "-")
            expected = ["--resume auto resumes the run"] if stopped else ["resuming", "checkpoint and plots are in"]
            if code != 0 or not all(words in said for words in expected):
                fail(f"the run that was {title}: exit code {code}; the end of what it said:")
                print(said[-2000:], flush=True)
                return


def metrics(path):
    """The rows of metrics.csv; none where it does not exist yet."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_script(options, stop_behind, setting):
    """-> (exit code, what the script said). Where `stop_behind` is a file, SIGTERM is sent soon after that exists. A
    run that has not ended when the step's time is over is killed: its exit code is -9."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and setting.left() > 2:
                if stop_behind is not None and stop_behind.exists():
                    time.sleep(0.05 if setting.dry_run else 0.5)
                    process.send_signal(signal.SIGTERM)
                    stop_behind = None
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return process.returncode, said.read()


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def cuda_graphs(setting):
    """Captions from CUDA graphs against those without, for batches of different images."""
    model = make_ours(setting.device, coupling="stepped", **(TINY if setting.dry_run else {}))
    with torch.no_grad():  # so that captions depend on their images, and words are not repeated for ever
        for name, parameter in model.gpt.trf_blocks.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8 if "cross_attn" in name else 3)
    model.config.eos_token_id = -1
    B, tokens, side = (2, 5, 32) if setting.dry_run else (32, 20, 224)
    pixels, _ = make_batch(3 * B, 1, 2, setting.device, model.config.vocab_size, side)
    batches = [part * scale for part, scale in zip(pixels.split(B), (1.0, 2.0, 0.5), strict=True)]
    start = torch.full((B, 1), model.config.vocab_size - 1, device=setting.device)
    ways = {
        "greedy": dict(deterministic=True),
        "beam 4": dict(num_beams=4),
        "draws, 5 an image": dict(num_return_sequences=5, seed=0),
    }
    table("precision", "captions", "same ids", "different captions", "first, ms", "second", "steady", "without graphs")
    for precision, context in (("float32", contextlib.nullcontext), ("bf16", setting.autocast)):
        for way, options in ways.items():
            with variant(precision, way), context(), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                results = {}

                def generate(images, key, options=options, results=results):
                    results[key] = generate_ids(model, images, start, tokens, **options)

                plain, graphed = [], []
                with cuda_graphs_disabled():
                    for number, images in enumerate([batches[0], *batches]):
                        plain += seconds_of(partial(generate, images, ("plain", number)), setting)
                for number, images in enumerate([batches[0], *batches, *batches]):
                    graphed += seconds_of(partial(generate, images, ("graphs", number)), setting)
                same = torch.cat(
                    [
                        results["plain", 0 if number == 0 else (number - 1) % 3 + 1] == results["graphs", number]
                        for number in range(7)
                    ]
                )
                share = same.float().mean().item()
                different = len(set(map(tuple, torch.cat([results["plain", n] for n in (1, 2, 3)]).tolist())))
                steady = statistics.median(graphed[3:])
                times = [*graphed[:2], steady, statistics.median(plain[1:])]
                row(precision, way, f"{share:.2%}", different, *map(milliseconds, times))
                if share < 1:
                    rows = (~same.all(1)).sum().item()
                    fail(f"{precision}, {way}: {rows} of {len(same)} captions from CUDA graphs differ")
            for message in {str(warning.message) for warning in warned if "without CUDA graphs" in str(warning)}:
                fail(f"{precision}, {way}: {message}")


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(setting):
    """Loss and gradients on the device against those on the CPU in float64, and the chunked loss against PyTorch's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    off = dict(emb_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0, residual_dropout=0.0)
    sizes = (
        TINY
        if setting.dry_run
        else dict(
            encoder_options=dict(img_size=64, patch_size=16, embed_dim=192, depth=4, num_heads=3),
            embed_dim=128,
            num_heads=4,
            depth=4,
            vocab_size=5003,
        )
    )
    table("loss and gradients, float32", "loss, relative error", "worst gradient, relative error", "of")
    for coupling in ("stepped", "final"):
        with variant(coupling):
            model = make_ours(coupling=coupling, normalize_tokens=True, label_smoothing=0.1, **off, **sizes)
            config = model.config
            pixels, ids = make_batch(4, 3, 9, vocab_size=config.vocab_size, img_size=model.preprocessing["img_size"])
            labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
            labels[::2, 5:] = -100
            found = {}
            for device, dtype in (("cpu", torch.float64), (setting.device, torch.float32)):
                model.train().to(device, dtype).zero_grad()
                loss = model(pixels.to(device, dtype), ids.to(device), labels.to(device))
                loss.backward()
                grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
                found[device, dtype] = loss.item(), grads
            (expected, reference), (loss, grads) = found.values()
            whole = math.sqrt(sum(float(grad.norm()) ** 2 for grad in reference.values()))
            errors = {  # a gradient that should be 0, as that of the keys' bias, has no relative error of its own
                name: float((grads[name] - grad).norm() / max(grad.norm(), 1e-3 * whole))
                for name, grad in reference.items()
            }
            worst = max(errors, key=errors.get)
            loss_error = abs(loss - expected) / expected
            row(coupling, f"{loss_error:.1e}", f"{errors[worst]:.1e}", f"{worst} (of {len(errors)})")
            if errors.keys() != grads.keys() or max(loss_error, errors[worst]) > 1e-3:
                fail(f"{coupling}: the gradients are not those of the CPU")
    chunked_loss(setting)


def chunked_loss(setting):
    """The chunked loss under bf16 autocast, against F.cross_entropy of all logits in float32."""
    N, V, C = (20, 203, 16) if setting.dry_run else (6670, 50257, 768)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(setting.device)
    weight = (torch.randn(V, C, generator=generator) * 0.05).to(setting.device)
    targets = torch.randint(V, (N,), generator=generator).to(setting.device)

    def whole(hidden, weight, targets, smoothing):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, label_smoothing=smoothing)

    def result(function, smoothing, bf16):
        inputs = [part.clone().requires_grad_() for part in (hidden, weight)]
        with setting.autocast() if bf16 else contextlib.nullcontext():
            loss = function(*inputs, targets, smoothing)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    ways = {
        "F.cross_entropy, bf16": (whole, True),
        "chunked, float32": (chunked_cross_entropy, False),
        "chunked, bf16": (chunked_cross_entropy, True),
        "chunked, bf16, head not padded": (partial(chunked_cross_entropy, multiple=1), True),
    }
    table("loss of the head", "smoothing", "loss, relative error", "hidden states' gradient", "weights' gradient", "ms")
    for smoothing in (0.0, 0.1):
        expected = result(whole, smoothing, bf16=False)
        for way, (function, bf16) in ways.items():
            with variant(way, smoothing):
                found = result(function, smoothing, bf16)
                errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
                seconds = seconds_of(lambda f=function, b=bf16: result(f, smoothing, b), setting, 3, 1)  # noqa: B023
                row(way, smoothing, *(f"{error:.1e}" for error in errors), milliseconds(statistics.median(seconds)))
                if max(errors) > (3e-2 if bf16 else 1e-4):
                    fail(f"{way}, smoothing {smoothing}: the loss or a gradient is wrong")


# --- several processes ------------------------------------------------------------------------------------------------


RANK_OPTIONS = [
    "--recipe", "shapes", "--captions_per_image", "1", "--epochs", "1", "--accumulate", "2", "--embed_dim", "32",
    "--num_heads", "2", "--encoder_options", json.dumps(TINY_ENCODER), "--emb_dropout", "0", "--attention_dropout",
    "0", "--mlp_dropout", "0", "--residual_dropout", "0", "--precision", "float32", "--num_workers", "0",
]  # fmt: skip


def ranks(setting):
    """Two processes that share the device, and one through the backend for GPUs, against one without torchrun."""

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 40 if setting.dry_run else 120)
        options = [*RANK_OPTIONS, "--data_dir", str(folder / "shapes"), "--device", setting.device]
        alone = train_as_rank(folder / "alone.json", "", folder / "alone", *options, "--batch_size", "10")
        backend = "NCCL" if setting.cuda else "gloo"
        table("processes", "backend", "steps", "largest difference of a loss", "seconds")
        for count, wanted in [(2, "gloo"), (1, "")] if setting.cuda else [(1, "")]:
            with variant(count, wanted or backend):
                start, losses_file = time.perf_counter(), folder / f"{count}.json"
                constants = [*options, "--batch_size", str(10 // count)]
                torchrun([count, __file__, losses_file, wanted, folder / f"run{count}", *constants], setting)
                losses = json.loads(losses_file.read_text())
                largest = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
                seconds = f"{time.perf_counter() - start:.1f}"
                row(count, wanted or backend, len(losses), f"{largest:.1e}", seconds)
                if not largest < 1e-3:
                    fail(f"{count} processes, {wanted or backend}: the losses are not those of one process")


def torchrun(arguments, setting):
    """Run torchrun with the number of processes, their file and its arguments. Raises RuntimeError where it fails."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1, setting.left() - 10))
        finally:
            process.terminate()  # it ends its processes, which a kill would leave
            process.wait()
            said.seek(0)
            end = said.read()[-1500:]
            if process.returncode:
                print(end, flush=True)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}; the end of what it said stands above")


def train_as_rank(losses_file, backend, folder, *argv):
    """Train an epoch of the script's Trainer as this process of the group -> mean loss of each step, also written."""
    if backend:
        script.ProcessGroup = partial(script.ProcessGroup, backend=backend)
    model_config, train_config, _ = script.read_configs([*argv, "--model_path", str(folder)])
    torch.manual_seed(train_config.seed)
    trainer = script.build_trainer(model_config, train_config, script.load_data(train_config, script.DATA_DIR))
    losses, step = [], trainer.train_step

    def recorded(batches):
        total, count = step(batches)
        losses.append(total / count)
        return total, count

    trainer.train_step = recorded
    trainer.train_one_epoch(0)
    if trainer.processes.is_main:
        Path(losses_file).write_text(json.dumps(losses))
    trainer.processes.destroy()
    return losses


# --- all else ---------------------------------------------------------------------------------------------------------


def options(setting):
    """Small runs of the script's `main`, each with another option: they end, and their numbers are finite."""
    real_capability = torch.cuda.get_device_capability
    from_pretrained = script.VisionGPT2Model.from_pretrained
    plots.plot_curve = plots.draw_demo = lambda *_, **__: None  # for the rest of this process
    pretend = ["--encoder_weights", "pretrained", "--decoder_weights", "pretrained"]  # frozen at first; still random
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_dataset(folder / "shapes", 8 if setting.dry_run else 240)
        common = ["--recipe", "shapes", "--data_dir", str(folder / "shapes"), "--device", setting.device]
        common += ["--demo_images", "0", "--epochs", "1"]
        common += [*TINY_OPTIONS, "--score_images", "0"] if setting.dry_run else ["--num_workers", "2"]
        cached = [*pretend, "--trainable_stages", "0", "--cache_tokens", "true", "--cache_dir", str(folder / "cache")]
        stages = [*pretend, "--epochs", "3", "--freeze_epochs_gpt", "1", "--freeze_epochs_all", "2"]
        variants = {
            "--deterministic true": ["--deterministic", "true"],
            "--deterministic true, again": ["--deterministic", "true"],
            "all three stages": stages,
            "self-critical": ["--scst_epochs", "1", "--score_images", "2"],
            "fp16 with a scaler": [],
            "--ema_decay 0.9": ["--ema_decay", "0.9"],
            "--gradient_checkpointing true": ["--gradient_checkpointing", "true"],
            "token cache": cached,
        }
        perplexities = {}
        table("run", "perplexity", "seconds")
        for number, (title, argv) in enumerate(variants.items()):
            with variant(title):
                start = time.perf_counter()
                if "pretrained" in argv:
                    script.VisionGPT2Model.from_pretrained = classmethod(lambda cls, config: cls(config))
                if title.startswith("fp16"):
                    torch.cuda.get_device_capability = lambda *args: (7, 5)
                said = io.StringIO()
                try:
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                        result = script.main([*common, *argv, "--model_path", str(folder / str(number))])
                except BaseException:
                    print(said.getvalue()[-1500:])
                    raise
                finally:
                    script.VisionGPT2Model.from_pretrained = from_pretrained
                    torch.cuda.get_device_capability = real_capability
                    torch.use_deterministic_algorithms(False)
                perplexities[title] = result["best_perplexity"]
                row(title, f"{result['best_perplexity']:.6f}", f"{time.perf_counter() - start:.1f}")
                if not math.isfinite(result["best_perplexity"]):
                    fail(f"{title}: the perplexity is not finite")
        twice = {perplexity for title, perplexity in perplexities.items() if title.startswith("--deterministic")}
        if len(twice) > 1:
            fail("two runs with --deterministic true differ")


if __name__ == "__main__":  # one of the processes of `ranks`
    train_as_rank(*sys.argv[1:])
