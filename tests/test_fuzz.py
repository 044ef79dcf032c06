"""Some of the inputs of fuzz.py, in this process; and the damage it does is found when it is not mended."""

import os
import time

import pytest

import fuzz

# Inputs of each kind: those that are read in no time. The others need minutes: `make soak`.
COUNTS = dict(config=15, weights=15, tokenizer=15, token_cache=15, photo_store=10, shard_records=5, tar=10,
              annotations=15, results=20, zip=30)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_read_or_refused(kind, root):
    fuzz.prepare(kind, root / kind, root / "work")
    outcomes = set()
    for number in range(COUNTS[kind]):
        outcome, words, where = fuzz.try_input(kind, number, 0, root / kind, root / "work")
        assert outcome in ("read", "refused"), f"{where}: {outcome}: {words} (fuzz.py --only {kind} --first {number})"
        outcomes.add(outcome)
    assert "refused" in outcomes or kind == "tar"  # of which what is broken is left out, with a warning


def test_what_is_wrong_is_seen(root, monkeypatch):
    """A reader that fails as none may: by a class that commands do not print, namelessly, in a file of another."""

    def trying(read):
        monkeypatch.setitem(fuzz.KINDS, "zip", (*fuzz.KINDS["zip"][:2], read, *fuzz.KINDS["zip"][3:]))
        return fuzz.try_input("zip", 0, 0, root / "zip", root / "work")[0]

    def fails(error):
        def read(folder):
            raise error

        return read

    if not (root / "zip").is_dir():
        fuzz.prepare("zip", root / "zip", root / "work")
    assert trying(fails(KeyError("x"))) == "KeyError"
    assert trying(fails(ValueError("something is wrong"))) == "names no file"
    assert trying(fails(ValueError("photos.zip: \x1b[31m"))) == "control characters"
    assert trying(fails(ValueError("photos.zip: can't allocate memory"))) == "memory"
    assert trying(lambda folder: (folder / "other").write_text("x")) == "changes files"


def test_processes_that_hang_or_die(root, monkeypatch):
    if not (root / "zip").is_dir():
        fuzz.prepare("zip", root / "zip", root / "work")
    monkeypatch.setattr(fuzz, "WAIT", 0)
    kind = fuzz.KINDS["zip"]
    monkeypatch.setitem(fuzz.KINDS, "zip", (*kind[:2], lambda folder: os._exit(1), *kind[3:]))
    assert [r[1] for r in fuzz.run_batch("zip", 0, 1, 0, root / "zip", root / "work")] == ["dies"]
    monkeypatch.setitem(fuzz.KINDS, "zip", (*kind[:2], lambda folder: time.sleep(60), *kind[3:]))
    assert [r[1] for r in fuzz.run_batch("zip", 0, 1, 0, root / "zip", root / "work")] == ["hangs"]
