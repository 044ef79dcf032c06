"""OpenAI's chat completions for a captioner: what a request may say, what it means here, and how it is answered.

https://platform.openai.com/docs/api-reference/chat. As in other compatible servers, parameters that are unknown are
ignored, and known ones that would change the answer but cannot be honoured are refused.
"""

import base64
import binascii
import json
import re
import time
import uuid

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from captioning.common.printable import printable
from captioning.decoding.search import Options

MAX_TOKENS = 50  # of a caption, unless the request says otherwise
MAX_CHOICES = 10
# A text that speaks to the model, where a captioner is to begin its caption with it.
INSTRUCTION = re.compile(
    r"(please|can you|could you|would you|you are|what|whats|describe|caption|summari[sz]e|explain|tell|write|give|"
    r"generate|create|provide|produce|identify|analy[sz]e)\b|.*\?$",
    re.IGNORECASE | re.DOTALL,
)
# Parameters that would change the answer -> whether a value leaves it as it is.
NOT_SUPPORTED = {
    "stop": lambda value: not value,
    "tools": lambda value: not value,
    "functions": lambda value: not value,
    "logit_bias": lambda value: not value,
    "top_logprobs": lambda value: not value,
    "presence_penalty": lambda value: not value,
    "frequency_penalty": lambda value: not value,
    "audio": lambda value: not value,
    "modalities": lambda value: value in (None, ["text"]),
    "response_format": lambda value: value in (None, {"type": "text"}),
}


class ApiError(Exception):
    """What is answered instead of captions: an HTTP status and OpenAI's error object."""

    def __init__(self, status, message, param=None, code=None, kind="invalid_request_error", headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": printable(message), "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The parameters that mean something here; `extra` ones are kept, to refuse some of them."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[dict] = Field(min_length=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # not OpenAI's, but other servers'; -1, too, means all
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def read_request(body):
    """Bytes -> `ChatRequest`. Raises ApiError that names the parameter."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise ApiError(400, f"{param or 'the body'}: {problem}", param) from None
    for name, value in (request.model_extra or {}).items():
        if name in NOT_SUPPORTED and not NOT_SUPPORTED[name](value):
            raise ApiError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
    return request


def read_messages(messages):
    """-> (the text of the last message of the user, [(name of the parameter, its URL)] of the images in the user's last
    message that has any). Other messages are context, which a captioner does not have.

    Raises ApiError for messages of another form, and where there is no image.
    """
    text, images = None, []
    for i in reversed(range(len(messages))):
        if not isinstance(role := messages[i].get("role"), str):
            raise ApiError(400, f"messages.{i}.role is missing", f"messages.{i}.role")
        if role != "user":
            continue
        texts, images = _read_content(messages[i].get("content"), f"messages.{i}.content")
        text = " ".join(texts).strip() if text is None else text
        if images:
            return text, images
    raise ApiError(400, "no image: give the user's message a content part of type image_url", "messages", "no_image")


def _read_content(content, name):
    """-> (texts, [(parameter, URL)])."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ApiError(400, f"{name} must be a text or a list of parts", name)
    texts, images = [], []
    for j, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "image_url" and isinstance(value, dict) and isinstance(value.get("url"), str):
            images.append((f"{name}.{j}.image_url.url", value["url"]))
        else:
            wanted = '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "..."}}'
            raise ApiError(400, f"{name}.{j} must be {wanted}", f"{name}.{j}")
    return texts, images


def prompt_of(text, meaning):
    """The text of a request -> what the captioner continues. `meaning` says what the text is: a "prompt" that the
    caption begins with, a "question", or nothing ("ignore"). An instruction is no prompt: describing the photo is what
    a captioner does anyway."""
    if meaning == "ignore" or (meaning == "prompt" and INSTRUCTION.match(text)):
        return ""
    return text


def options_of(request, default, seq_len):
    """A `ChatRequest` -> `search.Options`. `default`: those of the server, where the request says nothing of sampling.
    Raises ApiError for options that contradict each other."""
    n, max_tokens = request.n or 1, request.max_completion_tokens or request.max_tokens or MAX_TOKENS
    common = dict(num_return_sequences=n, max_tokens=min(max_tokens, seq_len))
    top_p, top_k = request.top_p or 1.0, max(0, request.top_k or 0)
    if request.temperature == 0:
        if n > 1:
            raise ApiError(400, "n must be 1 with temperature 0, which has one caption; leave temperature out", "n")
        return Options(deterministic=True, **common)
    if request.temperature is not None or top_p < 1 or top_k:
        temperature = 1.0 if request.temperature is None else request.temperature
        return Options(temperature=temperature, top_p=top_p, top_k=top_k, seed=request.seed, **common)
    beams = max(default.num_beams, n)
    return Options(deterministic=True, num_beams=beams, length_penalty=default.length_penalty, **common)


def read_data_url(url, param):
    """A data URL -> bytes. Raises ApiError for one that is not base64."""
    head, _, data = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise ApiError(400, f"{param}: a data URL must be base64, data:image/jpeg;base64,...", param)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: what follows the comma is not base64", param) from None


class Answer:
    """The answer to one request. `captions`: for each photo a list of `Captioned`, one a choice; `meaning` as in
    `prompt_of`: the answer to a question does not repeat the question, a caption is whole."""

    def __init__(self, request, tokenizer, captions, meaning):
        self.request, self.tokenizer, self.meaning = request, tokenizer, meaning
        self.choices = list(zip(*captions, strict=True))  # a tuple of `Captioned`, one a photo, for each choice
        self.head = dict(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=request.model)

    def _texts(self, choice):
        """One line a photo."""
        for one in choice:
            ids = one.ids[one.prompt_length if self.meaning == "question" else 1 :]
            text = self.tokenizer.decode(ids).strip()
            yield text.replace("\n", " ") if len(choice) > 1 else text

    def _extras(self, choice):
        """What is not OpenAI's: the confidence, that of the least sure caption where there are several; the captions
        one by one, with that of their words. None for a captioner that is not calibrated."""
        captions = []
        for one, text in zip(choice, self._texts(choice), strict=True):
            confidence = words = None
            if one.judged:
                confidence = round(one.judged.caption, 4)
                words = [
                    {"word": word, "confidence": round(sure, 4)}
                    for word, sure in zip(one.judged.evidence.words, one.judged.words, strict=True)
                ]
            captions.append({"caption": text, "confidence": confidence, "words": words})
        known = [one["confidence"] for one in captions if one["confidence"] is not None]
        return {"confidence": min(known, default=None), "captions": captions}

    def _log_probs(self, choice):
        """The model's log-probabilities, at temperature 1, of the tokens behind the prompt."""
        if not self.request.logprobs:
            return None
        content = []
        for one in choice:
            for token, log_prob in zip(one.ids[one.prompt_length :], one.log_probs, strict=True):
                text = self.tokenizer.decode([token], skip_special_tokens=False)
                whole = "\ufffd" not in text  # else a part of a character, whose bytes are not known here
                of_text = list(text.encode()) if whole else None
                content.append(dict(token=text, logprob=log_prob, bytes=of_text, top_logprobs=[]))
        return {"content": content, "refusal": None}

    def _usage(self):
        prompt = sum(one.prompt_length for one in self.choices[0])
        new = sum(len(one.ids) - one.prompt_length for choice in self.choices for one in choice)
        return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    @staticmethod
    def _finish_reason(choice):
        return "stop" if all(one.finished for one in choice) else "length"

    def completion(self):
        """-> the answer as a whole, a dict."""
        choices = [
            dict(
                index=index,
                message=dict(role="assistant", content="\n".join(self._texts(choice)), refusal=None),
                finish_reason=self._finish_reason(choice),
                logprobs=self._log_probs(choice),
                **self._extras(choice),
            )
            for index, choice in enumerate(self.choices)
        ]
        return dict(**self.head, object="chat.completion", choices=choices, usage=self._usage())

    def events(self):
        """-> the answer as server-sent events (str): a caption is one piece, because it is chosen as a whole."""
        usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        for index, choice in enumerate(self.choices):
            yield self._event(index, dict(role="assistant", content=""))
            for n, text in enumerate(self._texts(choice)):
                yield self._event(index, dict(content="\n" * (n > 0) + text))
            end = dict(finish_reason=self._finish_reason(choice), logprobs=self._log_probs(choice))
            yield self._event(index, {}, **end, **self._extras(choice))
        if usage:
            yield self._as_event(choices=[], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, index, delta, finish_reason=None, logprobs=None, **extras):
        choice = dict(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs, **extras)
        return self._as_event(choices=[choice])

    def _as_event(self, **entries):
        return f"data: {json.dumps(dict(**self.head, object='chat.completion.chunk', **entries))}\n\n"
