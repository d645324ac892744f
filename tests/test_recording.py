import json
from types import SimpleNamespace

import torch
from ring import ring_loop

from diffalign.runs.recording import Recorder, environment


def test_metrics_have_one_whole_line_a_step(tmp_path):
    ring_loop(tmp_path, [Recorder(tmp_path, "seed: 0\n", "ring")]).run(3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    # 6 steps, splits at 1 and 2: 1 + 1 + 3 + 9 + 9 + 9 rows for each of 2 prompts; the update replays 1 + 3
    assert {line["rows/policy/rollout"] for line in lines} == {64}
    assert {line["rows/policy/update"] for line in lines} == {8}
    assert {line["rows/reference/update"] for line in lines} == {8}
    assert {line["calls/policy/rollout"] for line in lines} == {6}
    assert {"reward", "reward/rewarded", "diversity/l_gmd", "contract/deviation", "grad_norm/policy", "seconds/update"} <= lines[0].keys()
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"] == environment()["packages"]["torch"]


def test_the_environment_says_how_it_computes(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.threads.os.sched_getaffinity", lambda process: {3, 5, 7})
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        loop = ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")])
        loop.run(1)
        said = json.loads((tmp_path / "environment.json").read_text())
        assert (said["threads"], said["usable_cpus"]) == (torch.get_num_threads(), 3)
        assert said["attention_kernels"] == ["flash", "efficient", "math"]
        assert said["tf32"] == {"products": False, "convolutions": True}
        assert said["attention"] is None  # no pipeline
        monkeypatch.setattr("diffalign.runs.recording.pipeline_policy", lambda policy: SimpleNamespace(attention="native"))
        loop.hooks[0].start(loop, 0, 1)
        assert json.loads((tmp_path / "environment.json").read_text())["attention"] == "native"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_resumed_run_drops_the_lines_that_it_repeats(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")]).run(4, start=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "reward" in lines[2]


def test_no_report_after_an_error(tmp_path):
    loop = ring_loop(tmp_path, [Recorder(tmp_path, "", "ring")])
    for hook in loop.hooks:
        hook.start(loop, 0, 1)
        hook.stop(loop, 0, RuntimeError("broken"))
    assert not (tmp_path / "report.html").exists()
