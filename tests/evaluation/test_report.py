import json
import re

import torch
from PIL import Image
from ring import ring_loop

from diffalign.evaluation import HeldOutEvaluation, contact_sheet, write_report
from diffalign.recording import Recorder


def test_report_of_a_run_stands_alone(tmp_path):
    (tmp_path / "held-out.txt").write_text("one <&> two\nthree\n")
    folder = tmp_path / "run"
    hooks = [HeldOutEvaluation(str(tmp_path / "held-out.txt"), samples=3, steps=4), Recorder(folder, "total: 4\n", "ring & co")]
    ring_loop(folder, hooks).run(4)
    page = (folder / "report.html").read_text()
    assert "<title>ring &amp; co</title>" in page
    assert "total: 4" in page
    assert "data:image/png;base64," in page
    assert "rows/s" not in page  # the ledger counts rows, it does not time them
    assert "policy/rollout" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "nothing may be fetched from outside"
    assert page.count("<svg") >= 4
    entries = json.loads((folder / "evaluation.json").read_text())
    change = entries[-1]["rewards"]["rewarded"] - entries[0]["rewards"]["rewarded"]
    assert f"{change:+.3f} &plusmn;" in page


def test_report_without_evaluation_says_so(tmp_path):
    folder = tmp_path / "run"
    ring_loop(folder, [Recorder(folder, "", "bare")]).run(2)
    assert "Not evaluated before and after." in (folder / "report.html").read_text()


def test_report_of_an_empty_folder(tmp_path):
    assert write_report(tmp_path, "nothing").read_text().startswith("<!doctype html>")


def test_contact_sheet_places_pictures_in_order():
    images = torch.zeros(2, 3, 3, 8, 8)
    images[1, 2, 0] = 1.0  # the last picture is red
    sheet = contact_sheet(images, ["first", "second"])
    assert isinstance(sheet, Image.Image)
    reds = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == (255, 0, 0)]
    assert len(reds) == 96 * 96
    assert min(x for x, _ in reds) > sheet.width / 2
    assert min(y for _, y in reds) > sheet.height / 2
