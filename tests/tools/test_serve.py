"""The command that starts the server: what it refuses, and how it ends."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest

import serve
from captioning.scoring.calibration import MEANING
from conftest import REPO_ROOT
from helpers.server import user

SHAPES = REPO_ROOT / "examples" / "shapes"
PHOTO = (SHAPES / "scene_0.png").read_bytes()


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)


@pytest.fixture
def started(monkeypatch):
    """What would be served -> a list of `Served`."""
    app = pytest.importorskip("captioning.serving.app")
    import uvicorn

    served, build = [], app.build_app
    monkeypatch.setattr(app, "build_app", lambda *args: served.append(args[0]) or build(*args))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    return served


@pytest.mark.parametrize("library", ["fastapi", "uvicorn"])
def test_without_a_library_it_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "captioning.serving.app", raising=False)
    with pytest.raises(SystemExit, match=rf"error: the server needs {library}: pip install -r requirements-extra\.txt"):
        serve.main([])


def test_what_cannot_be_served(tmp_path, started, monkeypatch):
    with pytest.raises(SystemExit, match="others could use the server; set a key in the environment"):
        serve.main(["--checkpoint", str(SHAPES), "--host", "0.0.0.0"])
    monkeypatch.setenv(serve.KEY_VARIABLE, "")  # no key either
    with pytest.raises(SystemExit, match="others could use the server"):
        serve.main(["--checkpoint", str(SHAPES), "--host", "192.168.1.2"])
    with pytest.raises(SystemExit, match="nothing_here"):
        serve.main(["--checkpoint", str(tmp_path / "nothing_here")])
    with serve.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"error: cannot listen on 127.0.0.1, port {port} .*choose another"):
            serve.main(["--checkpoint", str(SHAPES), "--port", port])
    assert not started


def test_what_is_served(started, monkeypatch, capsys):
    base = ["--checkpoint", str(SHAPES), "--port", "0"]
    serve.main(base)
    out, err = capsys.readouterr()
    assert re.match(r"http://127\.0\.0\.1:\d+/v1 serves examples/shapes \(without an API key; text: prompt;", out)
    assert "not calibrated" in err
    monkeypatch.setenv(serve.KEY_VARIABLE, "secret")
    serve.main(
        [*base, "--model_name", "mine", "--host", "0.0.0.0", "--beam", "4", "--text", "ignore", "--max-queue", "7"]
    )
    assert "secret" not in capsys.readouterr().out
    first, second = started
    assert (first.name, first.api_key, first.options.num_beams, first.allow_urls) == ("examples/shapes", None, 1, False)
    assert (second.name, second.api_key, second.options.num_beams) == ("mine", "secret", 4)
    assert (second.meaning, second.max_queue, second.host) == ("ignore", 7, "0.0.0.0")


def test_a_captioner_of_questions_is_asked_them(started, monkeypatch):
    known = SimpleNamespace(about={"meaning": MEANING["questions"]})
    monkeypatch.setattr(serve.Confidence, "load", lambda folder: known)
    for argv in ([], ["--text", "prompt"]):
        serve.main(["--checkpoint", str(SHAPES), "--port", "0", *argv])
    assert [served.meaning for served in started] == ["question", "prompt"]


def test_names_tell_no_paths(tmp_path):
    assert serve.name_of(SHAPES) == "examples/shapes"
    assert serve.name_of(tmp_path) == tmp_path.name
    assert serve.name_of("user/repo") == "user/repo"


def test_sigterm_ends_it_when_all_is_answered():
    pytest.importorskip("fastapi")
    command = [sys.executable, str(REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "serve.py"), "--port", "0"]
    environment = {key: value for key, value in os.environ.items() if key != serve.KEY_VARIABLE}
    with subprocess.Popen(
        [*command, "--checkpoint", str(SHAPES)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = process.stdout.readline().split()[0]
            # Long enough that the second one waits when the signal comes.
            body = json.dumps(dict(model="examples/shapes", messages=user(*[PHOTO] * 16), n=10, seed=1, temperature=1))

            def ask(_):
                request = urllib.request.Request(
                    f"{url}/chat/completions", body.encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request) as answer:
                    return len(json.load(answer)["choices"])

            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                answers = [pool.submit(ask, i) for i in range(2)]
                metrics = f"{url.removesuffix('/v1')}/metrics"
                while "captioner_requests_unanswered 2" not in urllib.request.urlopen(metrics).read().decode():
                    assert not any(answer.done() for answer in answers)
                process.send_signal(signal.SIGTERM)
                assert [answer.result() for answer in answers] == [10] * 2
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
