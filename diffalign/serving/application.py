"""Reward server as an ASGI application: authorisation, limits and answers."""

import asyncio
import hmac
import math
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress

import attrs
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..core import ConfigError, RewardError, RewardFunction
from ..core.nesting import require_single
from ..placement import is_there, placed
from ..rewards.wire import (
    ABOUT,
    EXTENDED,
    HEALTH,
    SCORE,
    VERSION,
    Limits,
    ScoreRequest,
    WireError,
    encode_error,
    encode_scores,
    read_request,
)
from .batching import Batcher
from .bodies import announced, bearer, received, require_json
from .room import FullError, Room

_COPIES = 4
"""Bytes of memory per byte of a body while it is read: for the received pieces, the whole body, its text and its parsed parts."""

_BYTES_OF_A_PIXEL = 3

_LONGEST_PAUSE = 600
"""Seconds that `RemoteReward` waits at most."""


@attrs.frozen
class Settings:
    """Settings of a server.

    Args:
        batch: images that the reward sees at once
        queue: requests that are handled at a time; a further request is told to come back later
        memory: bytes for the bodies and pixels of all requests that are handled
        limits: limits of one request
        body_timeout: seconds within which a body must arrive
        patience: seconds that a request waits for memory before it is told to come back later
        device: device of the images; None takes CUDA if there is one
        token: bearer token that every request except those for health must have; None requires none
    """

    batch: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    queue: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    memory: int = attrs.field(default=2**30, validator=attrs.validators.ge(1))
    limits: Limits = attrs.field(factory=Limits)
    body_timeout: float = attrs.field(default=30.0, validator=attrs.validators.gt(0.0))
    patience: float = attrs.field(default=30.0, validator=attrs.validators.ge(0.0))
    device: str | None = attrs.field(default=None, validator=is_there)
    token: str | None = attrs.field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        largest = _COPIES * self.limits.body + _BYTES_OF_A_PIXEL * self.limits.pixels
        if self.memory < largest:
            raise ValueError(f"Settings.memory must hold the largest request that the limits allow, {largest} bytes; got {self.memory}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip() == self.token != ""):
            raise ValueError("Settings.token must be printable ASCII on one line, not empty")


def application(reward: RewardFunction, name: str, settings: Settings) -> Starlette:
    """Build the application.

    Args:
        reward: reward that scores one batch at a time
        name: name of the reward in answers
        settings: settings of the server

    Raises:
        ConfigError: the reward must see whole groups, or be told the step of a run; requests hold neither.
    """
    try:
        require_single("the reward of a server", reward, "Serve what is inside it, and name it among the rewards of the run.")
    except ValueError as error:
        raise ConfigError(f"serve-reward: {error}") from error
    service = _Service(reward, name, settings)
    routes = [
        Route(SCORE, service.score, methods=["POST"]),
        Route(HEALTH, service.health, methods=["GET"]),
        Route(ABOUT, service.about, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=service.lifespan, exception_handlers={HTTPException: _refused, Exception: _broken})


class _Service:
    """End points of the server and their shared state."""

    def __init__(self, reward: RewardFunction, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.room = Room(settings.memory, settings.queue)
        self.scorer = ThreadPoolExecutor(1, "diffalign-scorer")
        self.unpacker = ThreadPoolExecutor(2, "diffalign-unpacker")
        self.batcher = Batcher(name, reward, settings.batch, placed(settings.device or "auto"), self.scorer)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self.scorer.shutdown(wait=False, cancel_futures=True)
            self.unpacker.shutdown(wait=False, cancel_futures=True)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.batcher.waiting})

    async def about(self, request: Request) -> Response:
        self._authorise(request)
        limits = attrs.asdict(self.settings.limits)
        known = {"version": VERSION, "versions": [VERSION, EXTENDED]}
        return JSONResponse({**known, "diffalign": __version__, "reward": self.name, "limits": limits})

    async def score(self, request: Request) -> Response:
        self._authorise(request)
        require_json(request)
        try:
            with self.room.seat(), ExitStack() as held:
                return await self._answer(request, await self._asked(request, held))
        except FullError as error:
            raise HTTPException(503, str(error), {"Retry-After": str(self._pause())}) from error
        except WireError as error:
            raise HTTPException(400, str(error)) from error

    def _pause(self) -> int:
        """Seconds after which a request that found no room may find some: until those that are here are scored."""
        return min(_LONGEST_PAUSE, max(1, math.ceil(self.batcher.seconds)))

    def _authorise(self, request: Request) -> None:
        token = self.settings.token
        if token is None:
            return
        given = bearer(request)
        if given is None or not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "this server requires its bearer token", {"WWW-Authenticate": "Bearer"})

    async def _asked(self, request: Request, held: ExitStack) -> ScoreRequest:
        """Read and decode the request. The memory for its pixels stays reserved in `held`."""
        loop, room, patience = asyncio.get_running_loop(), self.room, self.settings.patience
        size = announced(request, self.settings.limits.body)
        await room.until(_COPIES * size, patience)
        with room.hold(_COPIES * size):
            body = await received(request, self.settings.body_timeout)
            packed = await loop.run_in_executor(self.unpacker, read_request, body, self.settings.limits)
            del body
        with room.hold(size):  # of the body only the pictures in it are left
            await room.until_more(_BYTES_OF_A_PIXEL * packed.pixels, patience)
            held.enter_context(room.hold(_BYTES_OF_A_PIXEL * packed.pixels))
            return await loop.run_in_executor(self.unpacker, packed.unpack)

    async def _answer(self, request: Request, asked: ScoreRequest) -> Response:
        scored = asyncio.ensure_future(self.batcher.scored(asked.images, asked.prompts))
        gone = asyncio.ensure_future(request.receive())  # after the body, the next message says that the client has disconnected
        try:
            await asyncio.wait({scored, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():
                raise HTTPException(408, "the client has gone")
            scores = scored.result()
        except RewardError as error:
            raise HTTPException(500 if _may_pass(error) else 422, str(error)) from error
        finally:
            scored.cancel()
            gone.cancel()
        return Response(encode_scores(asked.id, scores), media_type="application/json")


def _may_pass(error: RewardError) -> bool:
    """True if another try may help: neither the input nor the output of the reward caused the failure."""
    return error.__cause__ is not None and not isinstance(error.__cause__, ValueError | TypeError | LookupError)


async def _refused(request: Request, error: Exception) -> Response:
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    headers: Mapping[str, str] | None = error.headers if isinstance(error, HTTPException) else None
    return Response(encode_error(_KINDS.get(status, "refused"), detail), status, headers, "application/json")


async def _broken(request: Request, error: Exception) -> Response:
    return Response(encode_error("broken", "the server failed; its log says why"), 500, media_type="application/json")


_KINDS = {
    400: "malformed",
    401: "unauthorised",
    404: "not_found",
    405: "not_allowed",
    408: "late",
    411: "length_missing",
    413: "too_large",
    415: "not_json",
    422: "reward_refused",
    500: "reward_failed",
    503: "busy",
}
