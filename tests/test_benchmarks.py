"""The benchmarks' tools: who is timed when, and how numbers are shown. No test looks at a time."""

import sys
from functools import partial

import pytest
import torch

from conftest import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "benchmarks"))

import bench_data
import timing


def test_candidates_take_turns_in_rotated_order():
    calls = []
    seconds = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert list(seconds) == list("abc")
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


def test_the_clock_of_a_gpu(monkeypatch):
    """Its events, between which lies the call and the work that it asked for; what was asked before does not count."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait for it")

        def elapsed_time(self, end):
            assert end is not self
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    seconds = timing.interleaved({"work": lambda: told.append("work")}, rounds=1, warmup=0, device="cuda")
    assert seconds == {"work": [2.5]}
    assert told == ["wait", "record", "work", "record", "wait for it"]


def test_a_minute_of_the_recipe(capsys, monkeypatch):
    """The script's own training of the recipe, here a small one; what it prints follows from what it measured."""
    import bench_recipe

    monkeypatch.setattr(bench_recipe, "WARMUP", 1)
    small = ["--encoder", "vit_tiny_patch16_224", "--embed_dim", "16", "--num_heads", "2", "--depth", "2"]
    small += ["--vocab_size", "100", "--encoder_options", '{"img_size": 32, "embed_dim": 24, "depth": 1}']
    step = ["--batch_size", "20", "--num_workers", "0"]
    bench_recipe.main(["--device", "cpu", "--seconds", "0.2", "--photos", "25", *step, *small])
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    steps, photos, rate, captions = (float(cell.replace(",", "")) for cell in row[:4])
    assert steps >= 1
    assert photos == 4
    assert captions == pytest.approx(5 * rate, abs=0.3)
    minutes, _, rest = row[5].partition(" for ")
    assert rest == "10 epochs of 118,287 photos"
    assert float(minutes.replace(",", "")) == pytest.approx(
        118_287 * 10 / rate / 60, rel=0.02 + 0.05 / rate
    )  # the rate has one decimal


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([3, 1, 2], "2.00 (1.00 to 3.00)"),
        ([1234.5, 99.96, 12.34], "100 (12.3 to 1,234)"),
        ([0.0012345], "0.00123 (0.00123 to 0.00123)"),
    ],
)
def test_medians_and_ranges(values, shown):
    assert timing.median_and_range(values) == shown


def test_the_machine_in_one_line():
    line = timing.machine()
    assert "cores" in line and "torch" in line and "\n" not in line


def test_photos_of_the_input_benchmark(tmp_path, script):
    """Their JPEGs are about as large as photos', and each way makes what a model takes; a wrong size is noticed."""
    photos, small, uncompressed = bench_data.write_photos(tmp_path, (500, 375), 2)
    assert all(80_000 < path.stat().st_size < 150_000 for path in photos)
    training, validation = script.build_transforms(bench_data.IMG_SIZE, normalized=False)
    for tfms in (training, validation):
        bench_data.preprocess_all(photos, tfms, training.least_side)
        bench_data.preprocess_all(small, tfms, None)
        bench_data.preprocess_all(uncompressed, tfms, None)
    with pytest.raises(ValueError, match=r"0\.jpg: \(3, 32, 32\)"):
        bench_data.preprocess_all(photos, script.build_transforms(32)[1], None)


def test_the_benchmark_of_shards_reads_what_it_wrote(tmp_path, capsys):
    pytest.importorskip("webdataset")
    import bench_shards

    bench_shards.main(["--photos", "25", "--rounds", "1"])
    said = capsys.readouterr().out
    assert all(f"| {work} | " in said for work in ("counted", "read, grouped, shuffled"))
    with pytest.raises(ValueError, match="photos are missing"):
        path = tmp_path / "train-0.tar"
        bench_shards.write(path, bench_data.write_photos(tmp_path, (500, 375), 1)[1], 3)
        bench_shards.stream([bench_shards.reading.Shard(path, 4, {5: 4}, 0)], 4)


def test_both_captioners_are_one_model(tmp_path):
    """Ours and Hugging Face's have the same loss in every way that is timed, and the same ids."""
    from bench_generate import hf_generate, naive_generate
    from bench_train import WAYS, loss_of
    from captioners import make_batch, make_pair
    from captioning.decoding.search import generate_ids

    options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    ours, theirs = make_pair(
        encoder_options=options, embed_dim=24, num_heads=2, depth=2, vocab_size=60, eos_token_id=59
    )
    images, ids = make_batch(2, 3, 7, vocab_size=60, img_size=32)
    levels = ours.levels(images)
    losses = [loss_of(way, ours, theirs, images, ids, levels).item() for way in WAYS]
    assert losses == pytest.approx([losses[0]] * len(WAYS), abs=1e-5)
    ours.config.eos_token_id, theirs.generation_config.eos_token_id = -1, None
    start = ids[::3, :1]
    expected = hf_generate(theirs, levels)
    assert expected.shape == (2, 20)
    assert torch.equal(generate_ids(ours, levels, start, 20, deterministic=True)[:, 1:], expected)
    assert torch.equal(naive_generate(ours, images, start), expected)


def test_a_row_has_a_cell_for_each_head_on_a_gpu_too(capsys, monkeypatch):
    import bench_generate

    times = {"generate": [0.3, 0.1, 0.2], "ours": [0.1, 0.1, 0.1]}
    monkeypatch.setattr(bench_generate, "interleaved", lambda *args, **options: times)
    monkeypatch.setattr(bench_generate, "peak_on_a_gpu", lambda function: 0.5)
    candidates = {name: lambda: torch.zeros(8, 20) for name in times}
    for device, more in (("cpu", []), ("cuda", ["80", "0.50"])):
        bench_generate.compare("greedy", candidates, "generate", 3, device)
        _, row = capsys.readouterr().out.splitlines()
        assert row.strip("| ").split(" | ") == ["greedy", "ours", "100 (100 to 100)", "2.00", "100.0%", *more]


def test_results_keep_other_sections(tmp_path, monkeypatch):
    import run_all

    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "RESULTS.md")
    assert run_all.read_results() == {}
    monkeypatch.setattr(run_all, "run", lambda name: f"2000-01-01. {name}: 1 | 2\n")
    run_all.main(["generate"])
    run_all.main(["data"])
    found = {title: text.strip() for title, text in run_all.read_results().items()}
    assert "check_gpu.py --results" in found.pop(run_all.ONE_GPU)
    assert found == {
        title: f"2000-01-01. {name}: 1 | 2" if name in ("generate", "data") else "not measured"
        for name, (title, _, _) in run_all.SECTIONS.items()
    }
    with pytest.raises(SystemExit):
        run_all.main(["speed"])


def test_a_way_that_runs_out_of_memory_has_a_row_and_the_others_are_timed(capsys, monkeypatch):
    import bench_train
    from captioners import make_pair

    options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    pair = make_pair(encoder_options=options, embed_dim=24, num_heads=2, depth=1, vocab_size=60, eos_token_id=59)
    as_used, *others = bench_train.WAYS[:3]
    step_itself, interleaved = bench_train.Step.__call__, bench_train.interleaved

    def on_a_small_gpu(step):
        if step.loss.args[0] == as_used:
            raise RuntimeError("from a library") from torch.OutOfMemoryError("CUDA out of memory")
        step.device = "cpu"
        step_itself(step)
        return 1.5

    monkeypatch.setattr(bench_train, "peak_on_a_gpu", on_a_small_gpu)
    monkeypatch.setattr(bench_train, "make_inputs", partial(make_inputs_on_the_cpu, bench_train.make_inputs))
    monkeypatch.setattr(bench_train, "measured_rate", lambda device: 1e9)
    monkeypatch.setattr(bench_train, "interleaved", lambda steps, *args, **options: interleaved(steps, 1, 0))
    bench_train.compare(*pair, False, 2, 1, "cuda")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[2] for row in rows] == [as_used, *others]
    assert rows[0][3].strip("| ") == "out of memory"
    assert all(float(row[3].split()[0].replace(",", "")) > 0 for row in rows[1:])


def make_inputs_on_the_cpu(make_inputs, ours, images, device):
    return make_inputs(ours, images, "cpu")
