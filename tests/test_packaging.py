"""What a wheel and an sdist contain, as the build back end lists it; `make package` builds, installs and runs them."""

import re
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def listed(builder):
    return {file.distribution_path.replace("\\", "/") for file in builder(str(ROOT)).recurse_included_files()}


@pytest.fixture(scope="module")
def wheel():
    return listed(WheelBuilder)


def test_the_wheel_contains_every_file_of_the_package(wheel):
    here = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "diffalign").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert wheel == here


def test_the_wheel_contains_what_is_no_code(wheel):
    for folder, ending in (("model", ".safetensors"), ("model", ".json"), ("prompts", ".txt"), ("runs", ".yaml")):
        inside = [name for name in wheel if name.startswith(f"diffalign/shapeworld/{folder}/") and name.endswith(ending)]
        assert inside, f"shapeworld/{folder}/*{ending}"
    assert "diffalign/py.typed" in wheel


def test_the_wheel_contains_nothing_of_the_checkout(wheel):
    assert all(name.startswith("diffalign/") for name in wheel)
    assert not [name for name in wheel if name.endswith((".pyc", ".tmp", ".log"))]


def test_the_sdist_contains_tests_examples_and_the_book():
    names = listed(SdistBuilder)
    for part in ("diffalign", "tests", "examples", "docs", "book", "tools"):
        folder = ROOT / part
        missing = {p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - names
        assert not missing, sorted(missing)[:3]
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml"} <= names
    assert not any(name.startswith((".venv", "runs/", "site/", "dist/")) for name in names)


def test_pre_commit_runs_the_steps_of_make_check():
    steps = re.search(r"^check: install (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [f"make {step}" for step in steps]


def test_citation_names_both_papers_and_files_for_issues_can_be_read():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [reference["identifiers"][0]["value"] for reference in cited["references"]] == ["arXiv:2605.10983", "arXiv:2603.07700"]
    assert all(author["family-names"] for reference in cited["references"] for author in reference["authors"])
    forms = [yaml.safe_load(file.read_text()) for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert len(forms) == 2
    assert all({"name", "description", "body"} <= set(form) for form in forms)
