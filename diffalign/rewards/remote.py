"""Reward on another machine or in another process, over HTTP."""

import uuid
from collections.abc import Sequence

import attrs
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardError

from .bearer import authorization
from .connections import Connections
from .servers import Question, Servers
from .wire import SCORE, ScoreRequest, WireError, decode_scores, encode_request, error_text, pixels_of, require_portable, reward_of

_BYTES_OF_A_SCORE = 64


def _listed(url: str | Sequence[str]) -> tuple[str, ...]:
    return (url,) if isinstance(url, str) else tuple(url)


@attrs.define(eq=False)
class RemoteReward(Reward):
    """Reward of a server started by `diffalign serve-reward`, or of any server with the same protocol (docs/reward_server.md).

    Prompts are sent with their metadata and source, images as 8-bit PNG. A missing score is an error, never a zero; only where the server
    says that its reward does not apply to an image is there none (`Partial`). Refused or lost connections, late answers and overload are
    tried again, first on the other servers and then after a pause. A wrong answer is an error at once. Connections are kept between calls.

    Args:
        url: address of the server, or of several that score alike and share the work
        timeout: seconds for one try, from connecting to the last byte
        retries: number of further rounds in which all servers are asked
        backoff: seconds before the first retry; doubles each time, up to 30
        batch: images per request
        concurrency: requests at a time
        token_variable: environment variable with the bearer token, if the server needs one

    Raises:
        ValueError: `url` is not an http address.
        RewardError: (in a call) no score came; the message names the server and the reason.
    """

    url: str | Sequence[str]
    timeout: float = attrs.field(default=60.0, validator=attrs.validators.gt(0.0))
    retries: int = attrs.field(default=4, validator=attrs.validators.ge(0))
    backoff: float = attrs.field(default=0.5, validator=attrs.validators.ge(0.0))
    batch: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    concurrency: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    token_variable: str = "DIFFALIGN_REWARD_TOKEN"
    _servers: Servers = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not _listed(self.url):
            raise ValueError("RemoteReward.url must name at least one server; got none")
        longest = 2**16 + _BYTES_OF_A_SCORE * self.batch
        self._servers = Servers(
            owner="RemoteReward",
            connections=[Connections(url, self.timeout, longest) for url in _listed(self.url)],
            path=SCORE,
            headers=authorization(self.token_variable, "RemoteReward"),
            complaint=error_text,
            rounds=self.retries + 1,
            backoff=self.backoff,
            concurrency=self.concurrency,
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        if len(images) != len(prompts):
            raise RewardError(f"RemoteReward needs one prompt per image; got {len(images)} images and {len(prompts)} prompts")
        try:
            pixels = pixels_of(images)
            starts = range(0, len(pixels), self.batch)
            requests = [ScoreRequest(uuid.uuid4().hex, pixels[i : i + self.batch], tuple(prompts[i : i + self.batch])) for i in starts]
            answers = self._servers.ask([_question(request) for request in requests])
        except WireError as error:
            raise RewardError(f"RemoteReward: {error}") from error
        return reward_of([score for scores in answers for score in scores], images.device)

    def reach(self) -> None:
        """Refuse servers that are not there.

        Raises:
            ConfigError: names them.
        """
        self._servers.reach()

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata cannot be sent. The served reward checks its own needs when it is called.

        Raises:
            ConfigError: the metadata of a prompt cannot be sent; the message names the first such prompt and the reason.
        """
        require_portable(prompts, "RemoteReward")

    def close(self) -> None:
        """Close the connections that are kept; the next call opens new ones."""
        for connections in self._servers.connections:
            connections.close()


def _question(request: ScoreRequest) -> Question[list[float | None]]:
    return Question(
        body=lambda: encode_request(request),
        read=lambda body: decode_scores(body, request.id, len(request.images)),
    )
