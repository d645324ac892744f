"""Page of votes as an ASGI application: authorisation, limits and answers."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

import attrs
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .bodies import announced, bearer, received, require_json
from .launch import is_address
from .room import FullError, Room

_BODY = 4096
"""Bytes of a body: a vote has some fifty."""

_BODY_TIMEOUT = 10.0

_REQUESTS = 64


class Desk(Protocol):
    """State that the page shows and changes; see `diffalign.voting`."""

    def person(self, token: str) -> str | None: ...

    def state(self, person: str) -> dict[str, Any]: ...

    def pictures(self) -> dict[str, Any]: ...

    def answer(self, person: str, step: int, question: int, answer: int | None) -> None: ...

    def send(self, person: str, step: int) -> None: ...

    def stop(self, how: str) -> None: ...


@attrs.frozen
class Refusals:
    """Errors of a desk, by what they mean to a client.

    Args:
        stale: votes on a step that is over
        wrong: an answer that cannot be counted
    """

    stale: type[Exception]
    wrong: type[Exception]


def votes_application(desk: Desk, page: str, host: str, refusals: Refusals) -> Starlette:
    """Build the application.

    Args:
        desk: takes the votes
        page: HTML of the page, with its own style and script
        host: address or name that the server listens on
        refusals: errors of the desk
    """
    service = _Service(desk, page, host, refusals)
    routes = [
        Route("/", service.page, methods=["GET"]),
        Route("/state", service.state, methods=["GET"]),
        Route("/pictures", service.pictures, methods=["GET"]),
        Route("/vote", service.vote, methods=["POST"]),
        Route("/send", service.send, methods=["POST"]),
        Route("/stop", service.stop, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refused, Exception: _broken})


@attrs.define(eq=False)
class _Service:
    """End points of the page."""

    desk: Desk
    html: str
    host: str
    refusals: Refusals
    room: Room = attrs.field(factory=lambda: Room(_REQUESTS * _BODY, _REQUESTS))

    async def page(self, request: Request) -> Response:
        self._require_name(request)  # a link in another page may lead here: nothing is changed, and nothing is in the page itself
        if self.desk.person(request.query_params.get("token", "")) is None:
            raise HTTPException(401, "this page needs the link that the terminal shows, with its token")
        return HTMLResponse(self.html, headers={"Content-Security-Policy": policy_of(self.html), **_HEADERS})

    async def state(self, request: Request) -> Response:
        return JSONResponse(self.desk.state(self._voter(request)), headers=_HEADERS)

    async def pictures(self, request: Request) -> Response:
        self._voter(request)
        shown = await asyncio.to_thread(self.desk.pictures)
        return JSONResponse(shown, headers=_HEADERS)

    async def vote(self, request: Request) -> Response:
        person = self._voter(request)
        body = await self._body(request, "step", "question", "answer")
        step, question = (_whole(body, name) for name in ("step", "question"))
        answer = None if body["answer"] is None else _whole(body, "answer")
        return await self._done(person, lambda: self.desk.answer(person, step, question, answer))

    async def send(self, request: Request) -> Response:
        person = self._voter(request)
        step = _whole(await self._body(request, "step"), "step")
        return await self._done(person, lambda: self.desk.send(person, step))

    async def stop(self, request: Request) -> Response:
        person = self._voter(request)
        how = (await self._body(request, "how"))["how"]
        return await self._done(person, lambda: self.desk.stop(how))

    async def _done(self, person: str, act: Callable[[], None]) -> Response:
        """Act in a thread, because votes are written to a disk, and answer with the new state."""
        try:
            await asyncio.to_thread(act)
        except self.refusals.stale as error:
            raise HTTPException(409, str(error)) from error
        except self.refusals.wrong as error:
            raise HTTPException(422, str(error)) from error
        return JSONResponse(self.desk.state(person), headers=_HEADERS)

    def _voter(self, request: Request) -> str:
        self._require_own(request)
        token = bearer(request)
        person = None if token is None else self.desk.person(token)
        if person is None:
            raise HTTPException(401, "this server requires the token of a link that the terminal shows", {"WWW-Authenticate": "Bearer"})
        return person

    def _require_name(self, request: Request) -> None:
        """Refuse a name that leads here, but is not this server's: it may be anybody's."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] or host
        if name not in (self.host, "localhost") and not is_address(name):
            raise HTTPException(403, f"this server does not answer for the name {name[:100]!r}; take the link that the terminal shows")

    def _require_own(self, request: Request) -> None:
        """Refuse what another web page has caused.

        A browser says so in Sec-Fetch-Site, which no page can set. Only one that does not is judged by its origin, which a proxy with TLS
        makes another than the address of this server.
        """
        self._require_name(request)
        host, site, origin = (request.headers.get(name) for name in ("host", "sec-fetch-site", "origin"))
        if site not in (None, "none", "same-origin"):
            raise HTTPException(403, "requests of other pages are refused")
        if site != "same-origin" and origin not in (None, f"http://{host}", f"https://{host}"):
            raise HTTPException(403, f"requests of other pages are refused; this one comes from {origin[:100]!r}")

    async def _body(self, request: Request, *names: str) -> dict[str, Any]:
        require_json(request)
        length = announced(request, _BODY)
        try:
            with self.room.seat(), self.room.hold(length):
                content = json.loads(await received(request, _BODY_TIMEOUT))
        except FullError as error:
            raise HTTPException(503, str(error)) from error
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body must be JSON: {str(error)[:200]}") from error
        if not isinstance(content, dict) or set(content) != set(names):
            raise HTTPException(400, f"the body must be an object of {', '.join(names)}")
        return content


def policy_of(html: str) -> str:
    """Content security policy of a page: its own style and script, pictures inside it, requests to this server, and nothing else."""
    allowed = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        )
        for kind in ("style", "script")
    }
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _whole(body: dict[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 <= value < 2**31:
        raise HTTPException(400, f"{name} must be a whole number from 0")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse({"error": detail}, status, {**_HEADERS, **(headers or {})})


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; the terminal says why"}, 500, _HEADERS)
