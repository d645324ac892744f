"""What `make wheels-gpu` collects for a machine without a network; nothing is downloaded here."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("wheels")


def names(pinned):
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+]+", entry) for entry in pinned)
    return {entry.partition("==")[0] for entry in pinned}


def declared():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*about["dependencies"], *about["optional-dependencies"]["testing"]]


def test_the_list_covers_the_dependencies_except_torch_and_what_comes_with_it(wheels):
    listed = names(wheels.lacking())
    wanted = {canonicalize_name(Requirement(requirement).name) for requirement in declared()}
    assert wanted - listed == {"torch", "numpy"}
    assert {"docstring-parser", "typeshed-client", "sortedcontainers"} <= listed  # of jsonargparse's extra, of hypothesis
    assert not listed & {
        "torch",
        "numpy",
        "sympy",
        "networkx",
        "jinja2",
        "filelock",
        "fsspec",
        "typing-extensions",
        "setuptools",
        "diffalign",
    }
    assert not {name for name in listed if name.startswith(("nvidia", "cuda", "triton"))}


def test_the_list_is_closed(wheels):
    listed, there = names(wheels.lacking()), wheels.needed(wheels.THERE)
    for name in listed:
        assert not set(wheels.needed([name])) - listed - set(there), name


def test_the_versions_are_those_that_are_installed_and_allowed(wheels):
    versions = dict(entry.split("==") for entry in wheels.lacking())
    for requirement in map(Requirement, declared()):
        if requirement.name in versions:
            assert requirement.specifier.contains(versions[requirement.name], prereleases=True), requirement


def test_the_target_is_admitted():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.specifiers import SpecifierSet

    assert SpecifierSet(about["requires-python"]).contains("3.12.0")
    (torch,) = [Requirement(one) for one in about["dependencies"] if Requirement(one).name == "torch"]
    assert torch.specifier.contains("2.11.0")


def test_wheels_are_asked_for_the_target_and_are_not_too_many(wheels, monkeypatch, tmp_path):
    commands = []
    built = tmp_path / "diffalign-0-py3-none-any.whl"
    built.write_bytes(b"1234")
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(wheels, "build", lambda: built)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "old-1-py3-none-any.whl").write_bytes(b"123456")
    assert wheels.collect(folder) == 4
    assert [file.name for file in folder.iterdir()] == [built.name]
    (command,) = commands
    assert {"download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"} <= set(command)
    assert set(wheels.lacking()) <= set(command)
    monkeypatch.setattr(wheels, "LIMIT", 3)
    with pytest.raises(SystemExit, match="must have 3 bytes at most; they have 4"):
        wheels.collect(folder)
