"""The GPU check runs here on tiny models and the pretended device, and ends with 1 if something fails."""

import json

import pytest
from started import start

from benchmarks.__main__ import main
from benchmarks.breaking import gpu
from benchmarks.breaking.gpu_subjects import PARTS


def run(tmp_path, *words):
    code = main(["break", "gpu", "--json", str(tmp_path / "found.json"), *words])
    return code, json.loads((tmp_path / "found.json").read_text())


def test_every_part_can_be_asked_for():
    assert set(PARTS) == gpu.PARTS.keys()


def test_its_parts_hold(tmp_path, capsys):
    words = ["--only", "matrix", "contract", "resume", "memory", "demo", "--every", "60", "--steps", "2", "--quick"]
    code, found = run(tmp_path, *words)
    assert code == 0, capsys.readouterr().out
    assert set(found["parts"]) == {"matrix", "contract", "resume", "memory", "demo"}
    assert all(row["ok"] for part in found["parts"].values() for row in part["rows"])
    assert all(row["deviation"] == 0.0 for row in found["parts"]["contract"]["rows"])


def test_attention_is_probed_in_a_process_of_its_own(monkeypatch, tmp_path):
    def run_forked(words, *, cwd, env, timeout, **_):
        return start(*words[1:], folder=cwd, environment=env, limit=timeout)

    monkeypatch.setattr(gpu.subprocess, "run", run_forked)
    code, found = run(tmp_path, "--only", "attention", "--large", "tiny-flux", "--settings", "1")
    (row,) = found["parts"]["attention"]["rows"]
    assert code == 0
    assert row["finite"]
    assert row["gap"] < 1e-4
    assert any("attention" in kernel for kernel in row["kernels"])


def test_a_part_that_fails_is_named_and_the_code_is_1(monkeypatch, tmp_path, capsys):
    def broken(options):
        yield {"case": "one", "ok": False, "gap": 1.0}
        raise RuntimeError("the device is gone")

    monkeypatch.setitem(gpu.PARTS, "matrix", broken)
    code, found = run(tmp_path, "--only", "matrix")
    assert code == 1
    assert [row["case"] for row in found["parts"]["matrix"]["rows"]] == ["one", "ended early"]
    assert "RuntimeError: the device is gone" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--large"]])
def test_unknown_parts_are_refused(tmp_path, words):
    with pytest.raises(SystemExit) as left:
        run(tmp_path, *words)
    assert left.value.code == 2
