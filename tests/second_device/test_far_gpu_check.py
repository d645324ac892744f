"""The GPU check runs here on tiny models and the pretended device, and ends with 1 if something fails."""

import json
import sys
from pathlib import Path

import pytest
from started import start

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_check


def run(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(tmp_path / "found.json"), *words])
    return gpu_check.main(), json.loads((tmp_path / "found.json").read_text())


def test_its_parts_hold(monkeypatch, tmp_path, capsys):
    words = ["--only", "matrix", "contract", "resume", "memory", "demo", "--every", "60", "--steps", "2", "--quick"]
    code, found = run(monkeypatch, tmp_path, *words)
    assert code == 0, capsys.readouterr().out
    assert set(found["parts"]) == {"matrix", "contract", "resume", "memory", "demo"}
    assert all(row["ok"] for part in found["parts"].values() for row in part["rows"])
    assert all(row["deviation"] == 0.0 for row in found["parts"]["contract"]["rows"])


def test_attention_is_probed_in_a_process_of_its_own(monkeypatch, tmp_path):
    def run_forked(words, *, env, timeout, **_):
        return start(*words[1:], environment=env, limit=timeout)

    monkeypatch.setattr(gpu_check.subprocess, "run", run_forked)
    code, found = run(monkeypatch, tmp_path, "--only", "attention", "--large", "tiny-flux", "--settings", "1")
    (row,) = found["parts"]["attention"]["rows"]
    assert code == 0
    assert row["finite"]
    assert row["gap"] < 1e-4
    assert any("attention" in kernel for kernel in row["kernels"])


def test_a_part_that_fails_is_named_and_the_code_is_1(monkeypatch, tmp_path, capsys):
    def broken(options):
        yield {"case": "one", "ok": False, "gap": 1.0}
        raise RuntimeError("the device is gone")

    monkeypatch.setitem(gpu_check.PARTS, "matrix", broken)
    code, found = run(monkeypatch, tmp_path, "--only", "matrix")
    assert code == 1
    assert [row["case"] for row in found["parts"]["matrix"]["rows"]] == ["one", "ended early"]
    assert "RuntimeError: the device is gone" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--large"]])
def test_unknown_parts_are_refused(monkeypatch, tmp_path, words):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, tmp_path, *words)
    assert left.value.code == 2
