"""Vision-language model as a judge, behind any OpenAI-compatible end point."""

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from diffalign.core import ConfigError, Prompt, Reward, RewardError
from diffalign.core.words import allowed_word

from .bearer import authorization
from .connections import Connections
from .png import encode_png
from .servers import PoorAnswerError, Question, Servers
from .wire import WireError, pixels_of

_FENCE = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_LONGEST_ANSWER = 2**20


@attrs.define(eq=False)
class Judge(Reward):
    """Score of a vision-language model, scaled to [0, 1]: reward = (score - low) / (high - low).

    For each image it sends one `POST URL/chat/completions` to an OpenAI-compatible end point (vLLM, SGLang, llama.cpp, a hosted one),
    with the image as a PNG data URI and the text of a template file. The answer must be JSON with a number `score`. If it is not, or if the
    score is out of range, the judge is asked again; after the last try this is an error, never a zero. Scores of a served model may
    differ between calls even at temperature 0.

    Args:
        url: address including the version, "http://127.0.0.1:8000/v1"
        model: name of the model at the end point
        template: text file with $prompt and optionally $low, $high and names of metadata ($target). "$$" is a dollar sign. Two ship with
            the package: "judge" (one short sentence, then the score; None is the same) and "reasoned", which has the judge go through the
            request point by point, and say what it sees, before it gives the score; give that one a `max_tokens` of 1,024
        low: the worst score
        high: the best score
        answer_format: way to request JSON: "json_schema", "json_object", or "none" if the end point supports neither
        max_tokens: largest number of tokens of an answer
        temperature: sampling temperature of the judge
        timeout: seconds for one try
        retries: number of further tries
        backoff: seconds before the first retry; doubles each time, up to 30
        concurrency: images that are judged at a time
        token_variable: environment variable with the key, if the end point needs one

    Raises:
        ConfigError: the template cannot be read or used.
        ValueError: `url` is not an http address, or `high` is not above `low`.
        RewardError: (in a call) no score came, or a prompt lacks the metadata that the template names.

    Reference: Zheng et al., Judging LLM-as-a-Judge, arXiv:2306.05685.
    """

    url: str
    model: str
    template: str | None = None
    low: float = 0.0
    high: float = 10.0
    answer_format: Literal["json_schema", "json_object", "none"] = attrs.field(default="json_schema", validator=allowed_word)
    max_tokens: int = attrs.field(default=512, validator=attrs.validators.ge(1))
    temperature: float = attrs.field(default=0.0, validator=attrs.validators.ge(0.0))
    timeout: float = attrs.field(default=120.0, validator=attrs.validators.gt(0.0))
    retries: int = attrs.field(default=4, validator=attrs.validators.ge(0))
    backoff: float = attrs.field(default=1.0, validator=attrs.validators.ge(0.0))
    concurrency: int = attrs.field(default=8, validator=attrs.validators.ge(1))
    token_variable: str = "OPENAI_API_KEY"
    _text: string.Template = attrs.field(init=False, repr=False)
    _servers: Servers = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Judge.high must be above low; got low {self.low} and high {self.high}")
        self._text = string.Template(_template(self.template))
        if not self._text.is_valid() or "prompt" not in self._text.get_identifiers():
            raise ConfigError(f"Judge.template {self.template} must hold $prompt, and '$$' for each plain dollar sign")
        self._servers = Servers(
            owner="Judge",
            connections=[Connections(self.url, self.timeout, _LONGEST_ANSWER)],
            path="/chat/completions",
            headers=authorization(self.token_variable, "Judge"),
            complaint=lambda body: repr(body[:300].decode("utf-8", "replace")),
            rounds=self.retries + 1,
            backoff=self.backoff,
            concurrency=self.concurrency,
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) != len(prompts):
            raise RewardError(f"Judge needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")
        texts = [self._asked(prompt) for prompt in prompts]
        try:
            pixels = pixels_of(images)
        except WireError as error:
            raise RewardError(f"Judge: {error}") from error
        marks = self._servers.ask([self._question(pixels[place], text) for place, text in enumerate(texts)])
        return torch.tensor(marks, dtype=torch.float32, device=images.device)

    def reach(self) -> None:
        """Refuse servers that are not there.

        Raises:
            ConfigError: names them.
        """
        self._servers.reach()

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without the metadata that the template names.

        Raises:
            ConfigError: a prompt lacks metadata; the message names the first such prompt and what it lacks.
        """
        for prompt in prompts:
            try:
                self._asked(prompt)
            except RewardError as error:
                raise ConfigError(str(error)) from error

    def _asked(self, prompt: Prompt) -> str:
        """Fill in the template for one prompt."""
        known = {**getattr(prompt, "metadata", {}), "prompt": str(prompt), "low": f"{self.low:g}", "high": f"{self.high:g}"}
        missing = [name for name in self._text.get_identifiers() if name not in known]
        if missing:
            raise RewardError(f"Judge.template names ${missing[0]}, but prompt {str(prompt)!r} has no metadata {missing[0]!r}")
        return self._text.substitute(known)

    def _question(self, image: Tensor, text: str) -> Question[float]:
        return Question(body=lambda: self._body(image, text), read=self._mark)

    def _body(self, image: Tensor, text: str) -> bytes:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(image)}"}}
        message = {"role": "user", "content": [{"type": "text", "text": text}, picture]}
        body: dict[str, Any] = {"model": self.model, "messages": [message], "max_tokens": self.max_tokens, "temperature": self.temperature}
        return json.dumps({**body, **_FORMATS[self.answer_format]}).encode()

    def _mark(self, body: bytes) -> float:
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise PoorAnswerError(f"not a chat completion: {body[:200]!r}") from error
        score = _score(content)
        if score is None or not self.low <= score <= self.high:
            what = f"JSON with a number score from {self.low:g} to {self.high:g}"
            raise PoorAnswerError(f"the judge must answer with {what}; got {str(content)[:200]!r}")
        return (score - self.low) / (self.high - self.low)


_SHIPPED = ("judge", "reasoned")


def _template(path: str | None) -> str:
    name = "judge" if path is None else path
    if name in _SHIPPED:
        return files("diffalign.rewards").joinpath(f"templates/{name}.txt").read_text(encoding="utf-8")
    path = name
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Judge.template must be {', '.join(_SHIPPED)} or a readable UTF-8 file; got {path!r}: {error}") from error


def _score(content: Any) -> float | None:
    """Find the score in an answer; None if there is none. Without a schema, models often write text first and put JSON in a code fence."""
    if not isinstance(content, str):
        return None
    text = _THOUGHT.sub("", content).strip()
    if fenced := _FENCE.search(text):
        text = fenced.group(1)
    try:
        score = json.loads(text)["score"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > 1e9 or not math.isfinite(score):
        return None
    return float(score)


_SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}
_FORMATS: Mapping[str, Mapping[str, Any]] = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "mark", "strict": True, "schema": _SCHEMA}}},
    "json_object": {"response_format": {"type": "json_object"}},
    "none": {},
}
