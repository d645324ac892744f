"""Plug-in of pytest: `pytest --diffalign mypackage:MyObjective` runs the contract of a part, with one test per property."""

import os
import sys
from collections.abc import Iterable
from typing import Any

import pytest

OPTION = "--diffalign"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("diffalign").addoption(
        OPTION, action="append", default=[], metavar="PACKAGE:NAME", help="check the contract of a policy, sampler, objective or reward"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(OPTION):
        from .testing.elsewhere import prepare_second_device

        prepare_second_device()  # must come before any backward pass
        if os.getcwd() not in sys.path and "" not in sys.path:  # as `diffalign check-part` does, to find a part in this folder
            sys.path.append(os.getcwd())


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for path in config.getoption(OPTION):
        items.extend(_items(session, path))


def _items(session: pytest.Session, path: str) -> Iterable[pytest.Item]:
    from .testing.parts import examination

    try:
        known = examination(_loaded(path))
    except ValueError as error:
        raise pytest.UsageError(f"{OPTION} {path}: {error}") from error
    for known_property in known.properties:
        name = f"{path}[{known_property.name}]"
        yield PropertyItem.from_parent(session, name=name, subject=known.subject, known=known_property)


def _loaded(path: str) -> Any:
    from .config.parts import find, suggestion

    try:
        return find(path)
    except LookupError as error:
        said = str(error) or suggestion(path, ())
        raise pytest.UsageError(f"{OPTION} {path}: must be PACKAGE.MODULE:NAME of something that can be imported. {said}") from error


class PropertyItem(pytest.Item):
    """Test of one property of one part."""

    def __init__(self, subject: Any, known: Any, **options: Any) -> None:
        super().__init__(**options)
        self.subject, self.known = subject, known

    def runtest(self) -> None:
        from .testing.properties import NotApplicableError

        try:
            self.known.check(self.subject)
        except NotApplicableError as reason:
            pytest.skip(str(reason))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        notes = "".join(f"\n{note}" for note in getattr(excinfo.value, "__notes__", ()))
        return f"{self.known.name}: {self.known.reason}\n{type(excinfo.value).__name__}: {excinfo.value}{notes}"

    def reportinfo(self) -> tuple[str, None, str]:
        return "diffalign", None, self.name
