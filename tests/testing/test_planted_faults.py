"""The list of planted faults fits the package as it is now; `python -m benchmarks break mutation` runs the tests on each of them."""

import ast
import importlib
import json
from pathlib import Path

import pytest

from benchmarks.breaking.planted import LISTS, Fault, faults, with_fault

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mutation_study.json"
FAULTS = faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_its_file(fault):
    source = (ROOT / fault.file).read_text()
    planted = fault.planted(source)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    assert fault.tests
    assert all((ROOT / test).is_file() for test in fault.tests)


def test_the_list_is_long_and_says_each_thing_once():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
    assert all(path.stat().st_size < 16 * 1024 for path in LISTS.iterdir())


def test_contracts_can_be_imported():
    for part in {part for fault in FAULTS for part in fault.contracts}:
        module, _, name = part.partition(":")
        assert hasattr(importlib.import_module(module), name)


def test_a_list_that_is_older_than_its_file_is_refused(tmp_path):
    (tmp_path / "part.py").write_text("one = 1\ntwo = one\n")
    fault = Fault("name", "kind", "part.py", old="two = one", new="two = -one", tests=("test.py",))
    with with_fault(tmp_path, fault):
        assert (tmp_path / "part.py").read_text() == "one = 1\ntwo = -one\n"
    assert (tmp_path / "part.py").read_text() == "one = 1\ntwo = one\n"
    stale = Fault("name", "kind", "part.py", old="one", new="two", tests=("test.py",))
    with pytest.raises(ValueError, match="must hold the text of the fault 'name' once; it has it 2 times"), with_fault(tmp_path, stale):
        pass
    assert (tmp_path / "part.py").read_text() == "one = 1\ntwo = one\n"


def test_the_recorded_study_is_of_these_faults_and_its_survivors_have_a_reason():
    recorded = json.loads(RESULTS.read_text())
    rows = {row["name"]: row for row in recorded["faults"]}
    assert rows.keys() == {fault.name for fault in FAULTS}
    assert {row["state"] for row in rows.values()} <= {"caught", "equivalent"}
    assert {name for name, row in rows.items() if row["state"] == "equivalent"} == {fault.name for fault in FAULTS if fault.equivalent}
    assert sum(row["state"] == "caught" for row in rows.values()) >= 0.95 * len(rows)
