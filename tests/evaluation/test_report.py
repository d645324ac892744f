import json
import re
import shutil

import pytest
import torch
from browser import NEEDS_BROWSER, visit
from PIL import Image
from ring import ring_loop

from diffalign.evaluation import HeldOutEvaluation, comparison_sheet, contact_sheet, write_report
from diffalign.evaluation.report import CURVES
from diffalign.runs.recording import Recorder

CONFIG = """
policy: {class_path: diffalign.policies.flow_matching.FlowMatchingPolicy.from_pretrained, init_args: {path: shapeworld}}
objective: {class_path: diffalign.objectives.softmax_tb.SoftmaxTB}
rewards: {first: {class_path: my.First}, second: my.second}
total: 6
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with everything that a report can show."""
    base = tmp_path_factory.mktemp("report")
    (base / "held-out.txt").write_text("one <&> two\nthree\nfour\n")
    folder = base / "run"
    hooks = [HeldOutEvaluation(str(base / "held-out.txt"), every=2, samples=3, steps=4), Recorder(folder, CONFIG, "ring & co")]
    ring_loop(folder, hooks).run(6)
    message = "step 3 of 6: the trained reward rose <a lot>"
    (folder / "alarms.json").write_text(json.dumps([{"step": 3, "kind": "judge", "message": message, "action": "warn"}]))
    watched = [
        {"step": step, "trained": 0.0, "diversity": 0.0, "held_out": {"judge": 0.1 * step}, "spread": {"judge": 1.0}} for step in range(6)
    ]
    (folder / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in watched))
    return write_report(folder, "ring & co").parent


def test_report_of_a_run_stands_alone(run):
    page = (run / "report.html").read_text()
    assert "<title>ring &amp; co</title>" in page
    assert "<td>policy</td><td>FlowMatchingPolicy.from_pretrained (shapeworld)</td>" in page
    assert "<td>rewards</td><td>first: First, second: second</td>" in page
    assert "<td>objective</td><td>SoftmaxTB</td>" in page
    assert page.count("data:image/png;base64,") == 4  # before and after, small and large
    assert "policy/rollout" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "nothing may be fetched from outside"
    assert page.count("<svg") >= 6
    assert '<div class="warning">step 3 of 6: the trained reward rose &lt;a lot&gt;</div>' in page
    assert "Held-out reward on training samples: judge" in page
    entries = json.loads((run / "evaluation.json").read_text())
    change = entries[-1]["rewards"]["rewarded"] - entries[0]["rewards"]["rewarded"]
    assert f"{change:+.3f} [" in page


def test_the_curves_of_the_reference_say_what_they_are_and_in_which_unit(run):
    page = (run / "report.html").read_text()
    names = ("log_ratio/reference", "log_ratio/spread", "target/spread", "reference/felt")
    for name in names:
        assert f"<figcaption>{CURVES[name]}</figcaption>" in page
        assert f"<figcaption>{name}</figcaption>" not in page


def test_half_a_picture_costs_no_report(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink()
    before = folder / "images" / "step-000000.png"
    before.write_bytes(before.read_bytes()[:300])
    page = write_report(folder, "cut").read_text()
    assert "Before: step 2" in page
    assert "After: step 6" in page
    assert f"{before} in the report: OSError: image file is truncated" in capsys.readouterr().err


@NEEDS_BROWSER
def test_report_in_a_browser(run, tmp_path):
    seen = visit(run / "report.html", tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert seen.probe["title"] == "ring & co"
    assert seen.probe["needed"] <= seen.probe["width"], "wider than a phone"
    small = [image for image in seen.probe["images"] if image[2]]
    assert len(small) == 2
    assert all(complete and width > 0 for complete, width, _ in seen.probe["images"])
    assert len(seen.probe["enlarged"]) == 2
    for opened, large, before, still_open in seen.probe["enlarged"]:
        assert opened
        assert large > before
        assert not still_open


@NEEDS_BROWSER
def test_the_browser_would_see_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    script = '<script>console.error("oh no"); undefinedName()</script>'
    body = f'<img src="http://pictures.invalid/a.png"><div style="width: 3000px">wide</div>{script}'
    page.write_text(f"<!doctype html><html><head><title>bad</title></head><body>{body}</body></html>")
    seen = visit(page, tmp_path)
    assert any("oh no" in line for line in seen.console)
    assert any("undefinedName" in line for line in seen.console)
    assert seen.requests == ["http://pictures.invalid/a.png"]
    assert seen.probe["needed"] > seen.probe["width"]
    assert seen.probe["images"][0][1] == 0


def test_report_without_evaluation_says_so(tmp_path):
    folder = tmp_path / "run"
    ring_loop(folder, [Recorder(folder, "", "bare")]).run(2)
    assert "Not evaluated before and after." in (folder / "report.html").read_text()


def test_report_of_an_empty_folder(tmp_path):
    assert write_report(tmp_path, "nothing").read_text().startswith("<!doctype html>")


def test_report_passes_over_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n{"step": 1, "reward": 2.0}\n{"step": 2, "rew')
    assert "2 steps" in write_report(tmp_path, "cut").read_text()


def entry(step, prompts, votes, **settings):
    """An evaluation as it is recorded, with a reward that applies to all prompts and one that applies to some: place -> value."""
    rows = [
        {
            "prompt": prompt,
            "rewards": {"all": 0.1 * step, **({"votes": votes[place]} if place in votes else {})},
            "diversity": {"l_gmd": 0.0},
        }
        for place, prompt in enumerate(prompts)
    ]
    means = {"all": 0.1 * step, **({"votes": sum(votes.values()) / len(votes)} if votes else {})}
    fixed = {"samples": 2, "steps": 4, "seed": 0, "diversity": {"l_gmd": 0.0}, **settings}
    return {"step": step, "rewards": means, "by_prompt": rows, **fixed}


def reported(folder, *entries):
    (folder / "evaluation.json").write_text(json.dumps(entries))
    return write_report(folder, "run").read_text()


def row(*cells):
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def test_a_reward_of_some_prompts_is_paired_on_those_that_it_scored_in_both(tmp_path):
    page = reported(tmp_path, entry(0, "abc", {0: 1.0, 2: 5.0}), entry(4, "abc", {1: 9.0, 2: 4.0}))
    assert row("reward votes (over 1 prompt)", "5.000", "4.000", "-1.000") in page
    assert row("reward all", "0.000", "0.400", "+0.400 [+0.400, +0.400]") in page
    page = reported(tmp_path, entry(0, "abc", {0: 1.0, 1: 3.0, 2: 5.0}), entry(4, "abc", {2: 4.0}))
    assert row("reward votes (over 1 prompt)", "5.000", "4.000", "-1.000") in page


@pytest.mark.parametrize("before", [{}, {0: 1.0, 1: 3.0}])
def test_a_reward_that_scored_no_prompt_before_has_no_change(tmp_path, before):
    page = reported(tmp_path, entry(0, "abc", before), entry(2, "abc", before), entry(4, "abc", {2: 4.0}))
    assert row("reward votes", "-", "4.000", "no prompt was scored in both") in page
    assert "Held-out votes against diversity" in page


@pytest.mark.parametrize(("prompts", "settings"), [("xyz", {}), ("ab", {}), ("abc", {"seed": 1}), ("abc", {"samples": 3})])
def test_only_evaluations_on_equal_prompts_and_settings_are_compared(tmp_path, prompts, settings):
    """A resume may change the evaluation."""
    (tmp_path / "images").mkdir()
    for step in (0, 4):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"step-{step:06d}.png")
    before = [entry(step, prompts, {}, **settings) for step in (0, 2)]
    page = reported(tmp_path, *before, entry(4, "abc", {}))
    assert "<h2>Held-out prompts: step 4</h2>" in page
    assert row("reward all", "0.400 [0.400, 0.400]") in page
    assert "Not compared, because the prompts or the settings were others: step 0, 2." in page
    for claim in ("the same noise before and after", "<h2>Before and after", "Held-out all against", "Held-out reward all"):
        assert claim not in page
    page = reported(tmp_path, *before, entry(4, "abc", {}), entry(6, "abc", {}))
    assert "<h2>Held-out prompts: step 4 against step 6</h2>" in page
    assert row("reward all", "0.400", "0.600", "+0.200 [+0.200, +0.200]") in page
    assert "step 0, 2." in page
    assert "Not compared" not in reported(tmp_path, entry(0, "abc", {}), entry(4, "abc", {}))


def reds(sheet):
    return [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == (255, 0, 0)]


def test_contact_sheet_places_pictures_in_order():
    images = torch.zeros(2, 3, 3, 8, 8)
    images[1, 2, 0] = 1.0  # the last picture is red
    sheet = contact_sheet(images, ["first", "second"])
    assert isinstance(sheet, Image.Image)
    assert len(reds(sheet)) == 96 * 96
    assert min(x for x, _ in reds(sheet)) > sheet.width / 2
    assert min(y for _, y in reds(sheet)) > sheet.height / 2


def test_many_samples_of_a_prompt_stand_in_several_lines():
    images = torch.zeros(2, 48, 3, 8, 8)
    images[0, 12, 0] = 1.0  # the first of the second line
    sheet = contact_sheet(images, ["first", "second"])
    assert sheet.size == (4 + 12 * 100, 4 + 2 * (18 + 4 * 100))
    assert reds(sheet) == [(x, y) for x in range(4, 100) for y in range(4 + 18 + 100, 4 + 18 + 196)]
    assert contact_sheet(images[:, :13], ["first", "second"]).width == 4 + 7 * 100  # lines of 7 and 6


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_comparison_sheet_has_a_column_for_each_run(samples):
    left, right = torch.zeros(2, samples, 3, 8, 8), torch.zeros(2, samples, 3, 16, 16)
    right[0, 0, 0] = 1.0  # the first picture of the second run is red
    sheet = comparison_sheet({"one": left, "another with a long name": right}, ["first", "second"])
    places = reds(sheet)
    assert len(places) == 96 * 96
    assert min(x for x, _ in places) > sheet.width / 2 - 20
    assert max(y for _, y in places) <= (sheet.height + 22) / 2
