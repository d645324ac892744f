"""Page on which people vote, in their own browsers."""

import socket
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from ..core import ConfigError
from ..core.unessential import say, unessential
from .desk import Desk, StaleError, tokens_of
from .record import VoteRecord
from .stopping import stop_at_once
from .voters import Round, VoteError, Voters

if TYPE_CHECKING:
    import uvicorn

PAGE = Path(__file__).with_name("page.html")


@attrs.define(eq=False)
class Page(Voters):
    """Page that a run serves on this machine while it trains. It needs the extra `server`.

    Each person has a link of their own with a secret token; the terminal shows the links. A click is saved before the page shows it, so
    that closed tabs, reloads and killed processes lose none. The run waits without using a core.

    Args:
        port: port to listen on; 0 takes any free port, and then old links lead nowhere after a resume
        host: address to listen on; the default is reached from this machine alone. "0.0.0.0" lets phones in the same network vote
        people: names of those who vote; the run waits for all of them
        strip: pictures of each prompt in the strip of the same noise at the start and now; 0 leaves it out
        remind: seconds after which the terminal says again that the run waits
        open: open the first link in the browser
    """

    port: int = attrs.field(default=8717, validator=[attrs.validators.ge(0), attrs.validators.lt(2**16)])
    host: str = "127.0.0.1"
    people: Sequence[str] = attrs.field(default=("you",), converter=tuple)
    strip: int = attrs.field(default=4, validator=attrs.validators.ge(0))
    remind: float = attrs.field(default=600.0, validator=attrs.validators.gt(0.0))
    open: bool = attrs.field(default=False)
    links: dict[str, str] = attrs.field(factory=dict, init=False)
    _desk: Desk | None = attrs.field(default=None, init=False, repr=False)
    _server: "uvicorn.Server | None" = attrs.field(default=None, init=False, repr=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.people or len(set(self.people)) < len(self.people) or not all(self.people):
            raise ValueError(f"Page.people must be names that differ, at least one; got {list(self.people)}")

    def start(self, record: VoteRecord, file: Path | None, step: int, total: int) -> None:
        try:
            from ..serving.launch import address_of, listen
        except ModuleNotFoundError as error:
            raise ConfigError(f"a page of votes: {error}") from error
        tokens = tokens_of(tuple(self.people), None if file is None else file.with_suffix(".links.json"))
        try:
            listening = listen(self.host, self.port)
        except ConfigError as error:
            raise ConfigError(f"the page of votes {error}. End what listens there, or give another Page.port.") from error
        self._desk = Desk(tokens, record, total)
        self._desk.begin(step)
        address = address_of(listening, self.host)
        self.links = {person: f"{address}/?token={token}" for person, token in self._desk.tokens.items()}
        self._serve(self._desk, listening)
        for person, link in self.links.items():
            say(f"votes of {person}: {link}")
        if self.open:
            with unessential("the browser"):
                webbrowser.open(next(iter(self.links.values())))

    def _serve(self, desk: Desk, listening: socket.socket) -> None:
        import uvicorn

        from ..serving.launch import configured
        from ..serving.votes import Refusals, votes_application

        app = votes_application(desk, PAGE.read_text(encoding="utf-8"), self.host, Refusals(StaleError, VoteError))
        self._server = uvicorn.Server(configured(app))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, name="votes", daemon=True)
        self._thread.start()

    def show(self, before: bytes, now: bytes, step: int) -> None:
        if self._desk is not None:
            self._desk.show(before, now, step)

    def absent(self) -> str:
        return "" if self._desk is not None else "the page is served by loop.run and loop.advance alone"

    def ask(self, asked: Round) -> None:
        assert self._desk is not None
        with stop_at_once():
            self._desk.wait(asked, lambda: self._say(asked), self.remind)

    def _say(self, asked: Round) -> None:
        sent = asked.done()
        for person in (name for name in self.people if name not in sent):
            say(f"step {asked.step + 1} of {asked.total}: waiting for votes at {self.links[person]}")

    def ended(self) -> bool:
        return self._desk is not None and self._desk.ending

    def paused(self) -> bool:
        return self._desk is not None and self._desk.pausing

    def stop(self) -> None:
        if self._desk is None or self._server is None or self._thread is None:
            return
        self._desk.close()
        if self._desk.watched(_FAREWELL):
            time.sleep(_FAREWELL)  # a page that is open sees the end of the run
        self._server.should_exit = True
        self._thread.join(_LONGEST)
        self._desk = self._server = self._thread = None


_FAREWELL, _LONGEST = 1.5, 15.0
"""Seconds that a page has to ask once more, and that the server has to end."""
