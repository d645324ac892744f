"""What others rely on does not change by accident."""

import difflib
import importlib
import importlib.util
import inspect
from pathlib import Path

import attrs

import diffalign
from diffalign import core

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(f"book_{name}", ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = script("public_names")


def test_public_names_and_parameters_are_those_of_the_list():
    stored, now = NAMES.FILE.read_text(), NAMES.listing()
    changed = [line for line in difflib.ndiff(stored.splitlines(), now.splitlines()) if line[:2] in ("- ", "+ ")]
    advice = "If this is meant, say so in CHANGELOG.md and run `make reference`."
    assert not changed, "\n".join(["The public API has changed:", *changed, advice])


def test_the_list_sees_what_breaks_others(monkeypatch):
    before = NAMES.listing()

    @attrs.define
    class Renamed:
        objectives: int
        hidden: int = attrs.field(init=False)

        def go(self, total):
            """Another name."""

    monkeypatch.setattr(core, "AlignmentLoop", Renamed)
    after = NAMES.listing()
    assert "diffalign.core.AlignmentLoop(objectives)\n" in after
    assert "diffalign.core.AlignmentLoop.go(total)\n" in after
    assert "diffalign.core.AlignmentLoop.hidden\n" in after
    assert "diffalign.core.AlignmentLoop.run(total, start)\n" in before
    assert "diffalign.core.AlignmentLoop.run(total, start)\n" not in after
    monkeypatch.setattr(core, "__all__", [name for name in core.__all__ if name != "Ledger"])
    assert "diffalign.core.Ledger" not in NAMES.listing()


def test_names_for_users_and_for_authors_are_two_lists():
    users, authors = NAMES.kinds(core)[NAMES.USERS], NAMES.kinds(core)[NAMES.AUTHORS]
    assert {"AlignmentLoop", "Hook", "ConfigError"} <= set(users)
    assert {"Objective", "Policy", "TrajectoryBatch"} <= set(authors)
    assert users + authors == core.__all__
    assert list(NAMES.kinds(diffalign)) == [NAMES.USERS]
    lines = NAMES.listing().splitlines()
    parts = lines.index("# diffalign.core: for authors of parts")
    assert lines.index("diffalign.core.Hook()") < parts < lines.index("diffalign.core.Objective()")


def test_every_public_name_says_what_it_is():
    for name in NAMES.MODULES:
        module = importlib.import_module(name)
        assert inspect.getdoc(module), name
        for public in getattr(module, "__all__", []):
            target = getattr(module, public)
            if inspect.isclass(target) or inspect.isfunction(target):
                assert (inspect.getdoc(target) or "").strip(), f"{name}.{public} has no docstring"


def test_the_version_is_semantic_and_in_the_change_log():
    major, minor, patch = diffalign.__version__.split(".")
    assert all(part.isdigit() for part in (major, minor, patch))
    assert f"## {diffalign.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {diffalign.__version__}\n" in (ROOT / "CITATION.cff").read_text()
