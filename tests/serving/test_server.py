"""The server as clients see it: OpenAI's own client unmodified, and what it refuses. Captions are those of
`caption_images`."""

import concurrent.futures
import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from captioning.decoding.confidence import caption_with_confidence
from captioning.decoding.search import caption_images
from captioning.serving import app, openai_api
from conftest import REPO_ROOT
from helpers.calibrated import known_of
from helpers.image_files import png
from helpers.server import data_url, post, serving, user

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [str(SHAPES / f"scene_{i}.png") for i in range(10)]
PHOTOS = [(SHAPES / f"scene_{i}.png").read_bytes() for i in range(10)]


@pytest.fixture(scope="module")
def loaded():
    """-> (model, tokenizer, its `Confidence`)."""
    from MyLLM_Vit_gpt2_captioning import load_captioner

    model, tokenizer = load_captioner(SHAPES)
    return model, tokenizer, known_of(model)


@pytest.fixture(scope="module")
def captions(loaded):
    """The greedy captions of the scenes."""
    return caption_images(*loaded[:2], SCENES)


@pytest.fixture(scope="module")
def server(loaded):
    with serving(*loaded) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def client_of(server, key="none", **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **dict(max_retries=0) | options)


def ask(client, *parts, **options):
    return client.chat.completions.create(model="mine", messages=user(*parts), **options)


def texts(answer):
    return [choice.message.content for choice in answer.choices]


def get(url, **headers):
    """-> (status, text)."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- answers ----------------------------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mine"]
    assert client.models.retrieve("mine").object == "model"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist; 'mine' is served"):
        client.models.retrieve("gpt")


def test_fifty_at_once_are_captioned_together(server, client, captions):
    before = server.metrics.batch_photos.lines()[-1]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda i: texts(ask(client, PHOTOS[i % 10])), range(50)))
    assert found == [[captions[i % 10]] for i in range(50)]
    batches = int(server.metrics.batch_photos.lines()[-1].split()[-1]) - int(before.split()[-1])
    assert batches < 50


def test_a_caption_comes_with_its_confidence(loaded, client):
    model, tokenizer, known = loaded
    [[(caption, judged)]] = caption_with_confidence(model, tokenizer, SCENES[:1], known)
    [choice] = ask(client, "What is in this image?", PHOTOS[0]).choices
    assert choice.message.content == caption
    assert choice.finish_reason == "stop"
    assert choice.confidence == pytest.approx(judged.caption, abs=1e-4)
    [shown] = choice.captions
    assert [word["word"] for word in shown["words"]] == caption.split()
    assert [word["confidence"] for word in shown["words"]] == pytest.approx(judged.words, abs=1e-4)


def test_several_images_have_a_line_each(client, captions):
    answer = ask(client, *PHOTOS[:3])
    assert texts(answer) == ["\n".join(captions[:3])]
    [choice] = answer.choices
    assert [one["caption"] for one in choice.captions] == captions[:3]
    assert choice.confidence == min(one["confidence"] for one in choice.captions)


def test_how_words_are_chosen(loaded, client, captions):
    model, tokenizer, _ = loaded
    draws = dict(temperature=1.5, top_p=0.9, top_k=20)
    drawn = caption_images(model, tokenizer, SCENES[:1], deterministic=False, num_return_sequences=4, seed=5, **draws)
    del draws["top_k"]
    for _ in range(2):
        answer = ask(client, PHOTOS[0], n=4, seed=5, **draws, extra_body={"top_k": 20})
        assert texts(answer) == drawn[0]
    best = caption_images(model, tokenizer, SCENES[:1], num_beams=3, num_return_sequences=3)
    assert texts(ask(client, PHOTOS[0], n=3)) == best[0]
    assert texts(ask(client, PHOTOS[0], temperature=0, top_p=1)) == captions[:1]
    assert len({*texts(ask(client, PHOTOS[0], temperature=2, n=8))}) > 1


def test_the_text_is_what_the_caption_begins_with(loaded, client):
    model, tokenizer, _ = loaded
    answer = ask(client, "a large", PHOTOS[0])
    assert texts(answer) == caption_images(model, tokenizer, SCENES[:1], prompt="a large")
    begun = len(tokenizer.encode("a large")) + 1
    assert answer.usage.prompt_tokens == begun
    whole = begun + answer.usage.completion_tokens
    assert answer.usage.total_tokens == whole == len(tokenizer.encode(texts(answer)[0])) + 2  # BOS and EOS
    assert [word["word"] for word in answer.choices[0].captions[0]["words"]] == texts(answer)[0].split()[2:]


def test_the_text_is_a_question(loaded, server, client, monkeypatch):
    """The answer does not repeat it."""
    monkeypatch.setattr(server.served, "meaning", "question")
    model, tokenizer, _ = loaded
    for question in ("a large", "What ?"):
        assert texts(ask(client, question, PHOTOS[0])) == caption_images(
            model, tokenizer, SCENES[:1], prompt=[question]
        )
    monkeypatch.setattr(server.served, "meaning", "ignore")
    assert texts(ask(client, "a large", PHOTOS[0])) == caption_images(model, tokenizer, SCENES[:1])


@pytest.mark.parametrize(
    ("text", "is_instruction"),
    [
        ("Describe this image in detail.", True),
        ("What's in this image?", True),
        ("Please write a caption", True),
        ("How many dogs are there?", True),
        ("a man", False),
        ("two whatnots", False),
        ("", False),
    ],
)
def test_instructions_are_no_prompt(text, is_instruction):
    assert openai_api.prompt_of(text, "prompt") == ("" if is_instruction else text)


def test_the_last_message_counts(client, captions):
    """And the newest images; what the assistant and the system said is nothing that a captioner reads."""
    messages = [
        {"role": "system", "content": "you are a poet"},
        *user(PHOTOS[0]),
        {"role": "assistant", "content": "a poem"},
        *user("a large", PHOTOS[1]),
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "Describe it."},
    ]
    assert texts(client.chat.completions.create(model="mine", messages=messages)) == captions[1:2]


def test_log_probabilities_and_a_caption_that_is_cut_off(loaded, client, captions):
    _, tokenizer, _ = loaded
    whole, cut = (ask(client, PHOTOS[0], logprobs=True, max_completion_tokens=n).choices[0] for n in (40, 3))
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    of_tokens = whole.logprobs.content
    assert "".join(token.token for token in of_tokens) == captions[0] + tokenizer.decode(
        [tokenizer.eos_token_id], skip_special_tokens=False
    )
    assert all(-3 < token.logprob <= 0 for token in of_tokens)
    assert [token.token for token in cut.logprobs.content] == [token.token for token in of_tokens[:3]]
    assert "".join(token.token for token in cut.logprobs.content) == cut.message.content


def test_a_stream(client, captions):
    chunks = list(ask(client, *PHOTOS[:2], stream=True, n=2, stream_options={"include_usage": True}))
    whole = ask(client, *PHOTOS[:2], n=2)
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == ["stop"]
        assert (own[0].delta.role, own[-1].confidence) == ("assistant", choice.confidence)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(server):
    body = json.dumps(dict(model="mine", messages=user(PHOTOS[0]), stream=True)).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_without_calibration_there_is_no_confidence(loaded, server, client, monkeypatch, captions):
    monkeypatch.setattr(server.captions, "known", None)
    [choice] = ask(client, PHOTOS[0]).choices
    assert (choice.message.content, choice.confidence) == (captions[0], None)
    assert choice.captions == [{"caption": captions[0], "confidence": None, "words": None}]


def test_unknown_parameters_are_ignored(client, captions):
    answer = ask(client, PHOTOS[0], user="me", frequency_penalty=0, tools=[], extra_body={"mystery": 1})
    assert texts(answer) == captions[:1]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(temperature=2.5), "temperature: input should be less than or equal to 2"),
        (dict(top_p=0), "top_p: input should be greater than 0"),
        (dict(n=11), "n: input should be less than or equal to 10"),
        (dict(n=2, temperature=0), "n must be 1 with temperature 0"),
        (dict(max_tokens=0), "max_tokens: input should be greater than or equal to 1"),
        (dict(seed="one"), "seed: input should be a valid integer"),
        (dict(stop=["."]), "stop is not supported"),
        (dict(tools=[{"type": "function"}]), "tools is not supported"),
        (dict(response_format={"type": "json_object"}), "response_format is not supported"),
        (dict(logprobs=True, top_logprobs=3), "top_logprobs is not supported"),
        (dict(messages=[]), "messages: list should have at least 1 item"),
        (dict(messages=user("a man")), "no image: give the user's message a content part of type image_url"),
        (dict(messages=[{"content": "x"}]), "messages.0.role is missing"),
        (dict(messages=user(*PHOTOS[:1] * 17)), "17 images; at most 16"),
        (dict(messages=user("a " * 40, PHOTOS[0])), "the text has 40 tokens; the model reads at most 29"),
        (dict(messages=user("a" * 10_001, PHOTOS[0])), "the text has more than 10,000 characters"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content.0 must be "),
        (dict(messages=[{"role": "user", "content": None}]), "messages.0.content must be a text or a list"),
    ],
)
def test_bad_requests(client, options, said):
    with pytest.raises(openai.BadRequestError, match="Error code: 400") as refused:
        client.chat.completions.create(**dict(model="mine", messages=user(PHOTOS[0])) | options)
    assert refused.value.body["message"].startswith(said)
    assert refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,@@@", "what follows the comma is not base64"),
        ("data:image/png,abc", "a data URL must be base64"),
        (data_url(b"hello"), "not a readable image (cannot identify image file the image)"),
        (data_url(png(20_000, 20_000, 8, 2, b"\0")), "not a readable image (Image size (400000000"),
        (data_url(png(8000, 7000, 8, 2, b"\0")), "not a readable image (it has 8000 x 7000 pixels,"),
        ("file:///etc/passwd", "only data: URLs"),
        ("http://example.org/photo.jpg", "this server fetches nothing from URLs"),
    ],
    ids=["base64", "no base64", "text", "bomb", "pixels", "file", "URL"],
)
def test_bad_images(client, url, said):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="mine", messages=messages)
    assert refused.value.body["message"].startswith(f"messages.0.content.0.image_url.url: {said}")
    assert refused.value.body["param"] == "messages.0.content.0.image_url.url"


def test_urls_lead_to_public_addresses_only(server, client, monkeypatch):
    """Whoever asks must not reach this machine's network through it, even if a name leads elsewhere on second look."""
    monkeypatch.setattr(server.served, "allow_urls", True)
    monkeypatch.setenv("NO_PROXY", "*")
    own = f"{server.url}/health"

    def refused(url):
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="mine", messages=messages)
        return error.value.body["message"]

    for url in (own, "http://10.0.0.1/x.png", "http://[::1]/x.png", "http://169.254.169.254/latest"):
        assert re.search(r"could not be fetched \(it is at .*, which is no public address\)$", refused(url))
    monkeypatch.setattr("captioning.command_line.photo_arguments.check_public", lambda *_: None)  # looked up before
    assert refused(own).endswith("could not be fetched (127.0.0.1 is 127.0.0.1, which is no public address)")
    monkeypatch.setattr("captioning.command_line.public_addresses.is_public", lambda address: True)
    assert "not a readable image" in refused(own)  # it was fetched


def test_what_is_no_request(server):
    assert post(server.url, b"{}", "text/plain")[0] == 415
    for body, said in (
        (b"", "the body: invalid JSON: "),
        (b'{"model":', "the body: invalid JSON: "),
        (b"[" * 100_000, "the body: invalid JSON: "),
        (b"[]", "the body: input should be an object"),
        (b"{}", "model: field required"),
        (b'{"model": "mine", "messages": ["hello"]}', "messages.0: input should be an object"),
    ):
        status, answer = post(server.url, body)
        assert status == 400
        assert answer["error"]["message"].startswith(said)
    status, answer = post(server.url, json.dumps(dict(model="\x1b[31mgpt", messages=user("x"))).encode())
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "\\x1b[31mgpt" in answer["error"]["message"]
    assert get(f"{server.url}/v1/chat/completions")[0] == 405
    assert get(f"{server.url}/docs")[0] == 404


def test_the_limit_on_bytes(server, client, monkeypatch):
    monkeypatch.setattr(server.served, "max_bytes", 100_000)
    with pytest.raises(openai.APIStatusError, match="more than 100,000 bytes") as refused:
        ask(client, bytes(200_000))
    assert refused.value.status_code == 413


def test_a_request_that_does_not_arrive(server, monkeypatch):
    import http.client

    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_key(server, loaded, captions):
    with serving(*loaded, api_key="sésame") as guarded:
        for sent in ({}, *({"Authorization": value} for value in ("Bearer wrong", "Basic x", "Bearer "))):
            for path in ("/v1/models", "/v1/models/mine", "/metrics"):
                status, text = get(guarded.url + path, **sent)
                assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(guarded, "wrong"), PHOTOS[0])
        assert get(f"{guarded.url}/health") == (200, '{"status":"ok"}')
        key = "sésame".encode().decode("latin-1")  # as the bytes of a header
        assert get(f"{guarded.url}/v1/models", Authorization=f"Bearer {key}", Host="captions.example")[0] == 200


def test_only_its_own_addresses_are_answered_without_a_key(server):
    for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("evil.example", 421), ("[::1", 421)):
        assert get(f"{server.url}/v1/models", Host=host)[0] == status


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(server, monkeypatch):
    """The model works until the event is set -> the event."""
    go_on, caption = threading.Event(), server.captions._caption

    def wait(jobs):
        assert go_on.wait(30)
        return caption(jobs)

    monkeypatch.setattr(server.captions, "_caption", wait)
    yield go_on
    go_on.set()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_too_many_requests(server, client, captions, busy, monkeypatch):
    monkeypatch.setattr(server.served, "max_queue", 3)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, client, photo) for photo in PHOTOS[:3]]
        until(lambda: server.metrics.unanswered == 3)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, PHOTOS[3])
        assert refused.value.body["code"] == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "1"
        busy.set()
        assert [texts(answer.result()) for answer in answers] == [[caption] for caption in captions[:3]]
    assert texts(ask(client, PHOTOS[3])) == captions[3:4]


def test_nobody_works_for_clients_that_have_gone(server, client, busy):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, PHOTOS[0])
        until(lambda: server.metrics.unanswered == 1 and not len(server.captions))  # the model has it
        with pytest.raises(openai.APITimeoutError):
            ask(client_of(server, timeout=0.2), PHOTOS[1])
        until(lambda: server.metrics.unanswered == 1)
        before = server.metrics.captions.values[()]
        busy.set()
        first.result()
    assert server.metrics.captions.values[()] == before + 1
    assert '{path="/v1/chat/completions",status="499"}' in get(f"{server.url}/metrics")[1]


def test_a_batch_that_fails_is_not_the_last(server, client, captions, monkeypatch, capfd):
    def fail(jobs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.captions, "_caption", fail)
        with pytest.raises(openai.InternalServerError, match="captioning failed; the server's log says why"):
            ask(client, PHOTOS[0])
    assert "RuntimeError: out of memory" in capfd.readouterr().err
    assert texts(ask(client, PHOTOS[0])) == captions[:1]


def test_what_is_asked_is_answered_before_it_ends(loaded, captions):
    with serving(*loaded) as ending, concurrent.futures.ThreadPoolExecutor(3) as pool:
        caption, go_on = ending.captions._caption, threading.Event()
        ending.captions._caption = lambda jobs: go_on.wait(30) and caption(jobs)
        client = client_of(ending)
        answers = [pool.submit(ask, client, photo) for photo in PHOTOS[:3]]
        until(lambda: ending.metrics.unanswered == 3)
        ending.uvicorn.should_exit = True  # what uvicorn does when a signal comes
        until(lambda: not ending.uvicorn.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError):
            ask(client_of(ending), PHOTOS[3])
        go_on.set()
        assert [texts(answer.result()) for answer in answers] == [[caption] for caption in captions[:3]]


def test_metrics(server):
    text = get(f"{server.url}/metrics")[1]
    samples = re.findall(r"^(captioner_\w+)(?:\{.*\})? ([\d.e+-]+)$", text, re.MULTILINE)
    assert len(samples) == len([line for line in text.splitlines() if not line.startswith("#")])
    values = dict(samples)
    assert int(values["captioner_batch_photos_sum"]) > int(values["captioner_batch_photos_count"]) > 0
    assert float(values["captioner_captions_total"]) >= float(values["captioner_batch_photos_sum"])
    assert float(values["captioner_batch_seconds_sum"]) > 0
    assert values["captioner_jobs_waiting"] == values["captioner_requests_unanswered"] == "0"
    assert get(f"{server.url}/health") == (200, '{"status":"ok"}')
