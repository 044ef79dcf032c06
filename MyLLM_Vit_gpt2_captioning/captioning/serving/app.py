"""The server: an ASGI application that answers as OpenAI's API does, with limits on everything that strangers send."""

import asyncio
import hmac
import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from captioning.command_line.photo_arguments import fetch
from captioning.common.text import clean_text
from captioning.decoding.search import Options
from captioning.images.preprocessing import load_image, resize
from captioning.model.tokenizer import encode_prompt
from captioning.serving import openai_api, prometheus
from captioning.serving.addresses import OnlyOwnHosts
from captioning.serving.caption_queue import Job
from captioning.serving.openai_api import ApiError

MAX_IMAGES = 16  # of a request
MAX_TEXT = 10_000  # characters; encoding more would keep other requests waiting
DECODERS = 2  # photos that are decoded at a time, each as large as the limit on pixels allows
FETCHERS = 8  # photos that are fetched at a time
FETCH_SECONDS = 20  # for a photo that is fetched
BODY_SECONDS = 30  # for a request to arrive
LARGER = 10  # a body of up to this many times the limit is read and dropped, so that its sender reads why
PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")
CLIENT_GONE = 499  # a status that only the metrics see, as in nginx


@dataclass
class Served:
    """What a server serves, and to whom."""

    name: str  # of the model
    options: Options  # where a request says nothing else
    meaning: str = "prompt"  # of a request's text, as in `openai_api.prompt_of`
    api_key: str | None = None
    host: str = "127.0.0.1"  # what it listens on
    allow_urls: bool = False
    max_bytes: int = 20_000_000  # of a request, and of a photo that is fetched
    max_pixels: int = 50_000_000  # of a photo
    max_queue: int = 100  # requests that are not answered yet


class Metrics:
    """What Prometheus reads at /metrics."""

    def __init__(self):
        self.unanswered = 0  # requests for captions
        self.requests = prometheus.Counter("captioner_requests_total", "Requests by status.", ("path", "status"))
        self.captions = prometheus.Counter("captioner_captions_total", "Captions that were written.")
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.request_seconds = prometheus.Histogram(
            "captioner_request_seconds", "From the arrival of a request for captions to its answer.", seconds
        )
        self.batch_seconds = prometheus.Histogram("captioner_batch_seconds", "The model's work on a batch.", seconds)
        self.batch_photos = prometheus.Histogram(
            "captioner_batch_photos", "Photos in a batch.", (1, 2, 4, 8, 16, 32, 64, 128)
        )

    def on_batch(self, photos, captions, seconds):
        self.batch_photos.see(photos)
        self.batch_seconds.see(seconds)
        self.captions.add(amount=captions)

    def text(self, captions):
        """`captions`: the `CaptionQueue`."""
        waiting = prometheus.Gauge("captioner_jobs_waiting", "Requests that wait for the model.", captions.__len__)
        unanswered = prometheus.Gauge(
            "captioner_requests_unanswered", "Requests for captions that are not answered yet.", lambda: self.unanswered
        )
        return prometheus.text(
            [self.requests, unanswered, waiting, self.captions, self.request_seconds, self.batch_seconds,
             self.batch_photos]
        )  # fmt: skip


def build_app(served, captions, metrics):
    """served: a `Served`; captions: a `CaptionQueue` that is running; metrics: `Metrics` -> the FastAPI application."""
    app = FastAPI(title="Image captioning", docs_url=None, redoc_url=None, openapi_url=None)
    answering = Answering(served, captions, metrics)
    models = {
        "object": "list",
        "data": [dict(id=served.name, object="model", created=int(time.time()), owned_by="local")],
    }

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_page(request, error):
        return JSONResponse(ApiError(error.status_code, error.detail).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request, error):  # it is printed, too
        return JSONResponse(ApiError(500, "the server made a mistake", kind="server_error").body, 500)

    @app.get("/health")
    async def health():
        works = captions.works()
        return JSONResponse({"status": "ok" if works else "the model's thread has ended"}, 200 if works else 503)

    @app.get("/metrics")
    async def metrics_page(request: Request):
        check_key(request, served.api_key)
        return PlainTextResponse(metrics.text(captions), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models(request: Request):
        check_key(request, served.api_key)
        return models

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request):
        check_key(request, served.api_key)
        check_model(name, served.name)
        return models["data"][0]

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        check_key(request, served.api_key)
        return await answering.answer(request)

    if served.api_key is None:
        app.add_middleware(OnlyOwnHosts, host=served.host)
    app.add_middleware(CountRequests, counter=metrics.requests)
    return app


def check_key(request, api_key):
    """Raise ApiError unless the request has the key, where there is one."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    # Compared in a time that does not depend on where they differ.
    if api_key is not None and not (
        kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode())
    ):
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "no API key, or a wrong one: send the header Authorization: Bearer KEY",
                       code="invalid_api_key", headers=headers)  # fmt: skip


def check_model(name, served):
    if name != served:
        raise ApiError(404, f"the model {name!r} does not exist; {served!r} is served", "model", "model_not_found")


class CountRequests:
    """ASGI middleware that counts answers by path and status."""

    def __init__(self, app, counter):
        self.app, self.counter = app, counter

    async def __call__(self, scope, receive, send):
        path = next((known for known in PATHS if scope["path"].startswith(known)), "other")

        async def counted(message):
            if message["type"] == "http.response.start":
                self.counter.add(path, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # a mistake of the server, which is answered outside of all middleware
            self.counter.add(path, 500)
            raise


class Answering:
    """Requests for captions, from their arrival to the answer."""

    def __init__(self, served, captions, metrics):
        self.served, self.captions, self.metrics = served, captions, metrics
        self.decoders, self.fetchers = ThreadPoolExecutor(DECODERS), ThreadPoolExecutor(FETCHERS)

    async def answer(self, request):
        """-> the response. Raises ApiError."""
        metrics, start = self.metrics, time.perf_counter()
        if metrics.unanswered >= self.served.max_queue:
            problem = f"{metrics.unanswered} requests wait already; try again later"
            raise ApiError(429, problem, None, "rate_limit_exceeded", "rate_limit_error", {"Retry-After": "1"})
        metrics.unanswered += 1
        try:
            body = await self.read_body(request)
            asked, prompt, options, images = await self.in_thread(self.decoders, self.read, body)
            photos = await asyncio.gather(*(self.load(*image) for image in images))
            del body, images  # by far the largest of what would wait
            asked.messages.clear()
            job = Job(photos, prompt, options, bool(asked.logprobs))
            captions = await self.caption(request, job)
        finally:
            metrics.unanswered -= 1
        if captions is None:
            return PlainTextResponse("", CLIENT_GONE)
        metrics.request_seconds.see(time.perf_counter() - start)
        answer = openai_api.Answer(asked, self.captions.tokenizer, captions, self.served.meaning)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(answer.completion())

    async def read_body(self, request):
        """-> bytes, at most `max_bytes` of them. Raises ApiError. Only JSON is taken: what a page elsewhere may have a
        browser send without asking is not."""
        limit, body, size = self.served.max_bytes, bytearray(), 0
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        body += chunk
                    elif size > LARGER * limit:
                        break
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} s") from None
        if size > limit:
            raise ApiError(
                413, f"the request has more than {limit:,} bytes; shrink its images", code="request_too_large"
            )
        return body

    def read(self, body):
        """Bytes -> (request, prompt, options, [(parameter, URL)] of the images). Raises ApiError."""
        model = self.captions.model
        request = openai_api.read_request(body)
        check_model(request.model, self.served.name)
        text, images = openai_api.read_messages(request.messages)
        if len(images) > MAX_IMAGES:
            raise ApiError(400, f"{len(images)} images; at most {MAX_IMAGES} can be in one request", "messages")
        prompt = openai_api.prompt_of(text, self.served.meaning)
        if len(prompt) > MAX_TEXT:
            problem = f"the text has more than {MAX_TEXT:,} characters"
            raise ApiError(400, problem, "messages", "context_length_exceeded")
        cleaned = clean_text(prompt, model.config.caption_case)
        tokens = len(encode_prompt(self.captions.tokenizer, cleaned)) - 1  # without BOS
        if tokens > (room := model.config.seq_len - 3):  # what captioning would cut off
            problem = f"the text has {tokens} tokens; the model reads at most {room}"
            raise ApiError(400, problem, "messages", "context_length_exceeded")
        return request, prompt, openai_api.options_of(request, self.served.options, model.config.seq_len), images

    async def caption(self, request, job):
        """-> what `job.answer` becomes; None when nobody waits for it any more. Raises ApiError."""
        self.captions.add(job)
        answer, gone = asyncio.wrap_future(job.answer), asyncio.create_task(until_gone(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()  # and the job, if it still waits
            return None
        gone.cancel()
        if answer.exception():
            raise ApiError(500, "captioning failed; the server's log says why", kind="server_error")
        return answer.result()

    async def load(self, param, url):
        """The URL of an image -> pixels as the model takes them, (img_size, img_size, 3) uint8. Raises ApiError."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            content = await self.in_thread(self.decoders, openai_api.read_data_url, url, param)
        elif scheme not in ("http", "https"):
            raise ApiError(400, f"{param}: only data: URLs and, where the server allows them, http: and https:", param)
        elif not self.served.allow_urls:
            raise ApiError(400, f"{param}: this server fetches nothing from URLs; send the image in a data URL", param)
        else:
            content = await self.in_thread(self.fetchers, self.fetch, param, url)
        return await self.in_thread(self.decoders, self.decode, param, content)

    def fetch(self, param, url):
        try:
            return fetch(url, self.served.max_bytes, FETCH_SECONDS, FETCH_SECONDS, only_public=True)
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", param) from None

    def decode(self, param, content):
        preprocessing = self.captions.model.preprocessing
        try:
            image = load_image(io.BytesIO(content), None, self.served.max_pixels, preprocessing.get("grey16", "full"))
            return np.asarray(resize(image, preprocessing["img_size"], preprocessing["resample"]))
        except ValueError as error:
            reason = str(error).removeprefix("the image: ").partition("; replace the file")[0]
            raise ApiError(400, f"{param}: {reason}", param, "invalid_image") from None

    @staticmethod
    async def in_thread(pool, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def until_gone(request):
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
