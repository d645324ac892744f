"""The JSON file of a program: what it holds is not measured again, and it is whole at every moment."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

RESULTS = Path(__file__).parent / "results"


def write(file: Path | None, content: object) -> None:
    """Writes JSON in one move, so that a program that is killed leaves the file before or the file after; nothing without a file."""
    if file is not None:
        aside = file.with_name(f"{file.name}.tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, file)


@attrs.define
class Record:
    """What was found so far.

    Args:
        file: where it stands; None keeps it in memory
        about: settings that all of it shares

    Attributes:
        content: the settings, and what programs put beside them

    Raises:
        SystemExit: the file was made with other settings.
    """

    file: Path | None
    about: Mapping[str, Any] = attrs.field(factory=dict)
    content: dict[str, Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        about = json.loads(json.dumps(dict(self.about)))
        self.content = json.loads(self.file.read_text()) if self.file is not None and self.file.exists() else about
        for name, value in about.items():
            if self.content.get(name) != value:
                raise SystemExit(f"{self.file} must be of {name} {value}; it is of {self.content.get(name)}: give another --json file")

    def save(self) -> None:
        write(self.file, self.content)

    def once(self, container: Any, key: str | int, make: Callable[[], Any]) -> Any:
        """What a part of the content has at a key, or next in a list; if nothing, it is made and the file written."""
        if isinstance(container, list):
            if key == len(container):
                container.append(make())
                self.save()
        elif key not in container:
            container[key] = make()
            self.save()
        return container[key]

    def run(self, kind: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The entry of the list `kind` with these settings; if there is none, it is made of them and of what `make` gives."""
        entries: list[dict[str, Any]] = self.content.setdefault(kind, [])
        for entry in entries:
            if all(entry.get(name) == value for name, value in settings.items()):
                return entry
        self.once(entries, len(entries), lambda: {**settings, **make()})
        return entries[-1]
