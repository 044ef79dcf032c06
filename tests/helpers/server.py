"""The server of serve.py in this process, and photos as requests carry them."""

import base64
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

from captioning.decoding.search import Options
from captioning.serving.addresses import listen
from captioning.serving.caption_queue import CaptionQueue


@contextmanager
def serving(model, tokenizer, known=None, batch_size=32, **served):
    """-> the server: its `url`, `captions` (the queue), `metrics`, and `served`, which may be changed."""
    import uvicorn

    from captioning.serving.app import Metrics, Served, build_app

    metrics = Metrics()
    served = Served("mine", Options(deterministic=True), **served)
    with (
        listen("127.0.0.1", 0) as listener,
        CaptionQueue(model, tokenizer, known, batch_size, on_batch=metrics.on_batch) as captions,
    ):
        app = build_app(served, captions, metrics)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield SimpleNamespace(url=url, captions=captions, metrics=metrics, served=served, uvicorn=server)
        finally:
            server.should_exit = True
            thread.join()


def post(url, body, kind="application/json"):
    """-> (status, the answer's JSON)."""
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(*parts):
    """Texts and images (bytes) -> the messages of a request."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
