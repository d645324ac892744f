"""Figures of the studies: what is drawn stands where its numbers say, and only what the tables report is drawn."""

import json
import math

import pytest
from PIL import Image, ImageColor

from benchmarks.intervals import interval
from benchmarks.record import RESULTS
from benchmarks.study import fronts
from benchmarks.study.beside import names_beside
from benchmarks.study.chart import LEFT, RADIUS, RIGHT, WIDTH, Axis, Level, Line, Panel, Point, chart, in_few_colors, pale_of, tops_of

RED, BLUE = "#c5221f", "#1558c0"
UNIT = Axis("share", (0.0, 1.0), (0, 1))


def at(sheet, place, right=0.0, down=0.0):
    return sheet.getpixel((round(place[0] + right), round(place[1] + down)))


def panel_of(*points, **more):
    return Panel("", UNIT, UNIT, 600, points, **more)


def drawn(panel):
    """The sheet of one panel, and its first pixel row."""
    return chart("title", ("told",), (), (panel,)), tops_of(("told",), (), (panel,))[0]


def sure(value):
    return value, math.nan


def entry(setting, seed, value, **more):
    """A run of a setting whose measures are all the same."""
    measures = dict.fromkeys(("reward", "modes", "L-GMD of the exact"), value)
    return {**setting.where, "seed": seed, "rows": [{"step": setting.step, **measures}], **more}


def written(folder, name, runs, **more):
    (folder / name).write_text(json.dumps({"runs": runs, **more}))


def test_a_point_and_its_intervals_stand_where_their_numbers_say():
    panel = panel_of(Point("", RED, "circle", (0.25, 0.125), (0.75, math.nan)))
    sheet, top = drawn(panel)
    left, floor = panel.place(0, 0, top)
    right, ceiling = panel.place(1, 1, top)
    assert (left, right, floor - ceiling) == (LEFT, WIDTH - RIGHT, 600)
    middle = left + (right - left) / 4, floor + (ceiling - floor) * 3 / 4
    red, pale = ImageColor.getrgb(RED), pale_of(RED)
    assert at(sheet, middle) == red
    arm = (right - left) / 8
    assert at(sheet, middle, arm) == at(sheet, middle, -arm) == at(sheet, middle, arm, 7) == pale
    assert pale not in (at(sheet, middle, arm + 6), at(sheet, middle, -arm - 6), at(sheet, middle, 0, 40), at(sheet, middle, 0, -40))


def test_an_interval_that_goes_on_beyond_the_panel_has_no_cap_at_its_edge():
    inner, outer = panel_of(Point("", RED, "circle", (0.9, 0.05), (0.5, 0.0))), panel_of(Point("", RED, "circle", (0.9, 0.2), (0.5, 0.0)))
    (short, top), (long, _) = drawn(inner), drawn(outer)
    edge, end = outer.place(1, 0.5, top), inner.place(0.95, 0.5, top)
    assert at(short, end, 0, 7) == at(long, edge) == pale_of(RED)
    assert at(long, edge, 0, 7) == (255, 255, 255)


def test_a_point_beneath_another_shows_its_rim():
    panel = panel_of(Point("", RED, "circle", sure(0.5), sure(0.5)), Point("", BLUE, "circle", sure(0.5), sure(0.5)))
    sheet, top = drawn(panel)
    middle = panel.place(0.5, 0.5, top)
    assert at(sheet, middle) == ImageColor.getrgb(BLUE)
    assert at(sheet, middle, 0, RADIUS + 3) == ImageColor.getrgb(RED)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="must be circle, star or one of diamond, square, triangle, not 'cross'"):
        drawn(panel_of(Point("", RED, "cross", sure(0.5), sure(0.5))))


def test_lines_run_between_their_dots_evenly_in_the_axis_and_carry_marks_and_levels():
    steps = Axis("steps", (100, 10000), (100, 10000), math.log)
    line = Line("a", RED, [(100, sure(0.2)), (10000, sure(0.8))], [(1000, "square")])
    assert line.at(1000, math.log) == pytest.approx(0.5)
    assert line.at(5050, float) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="'a' goes from 100 to 10000; it has no height at 50"):
        line.at(50, math.log)
    panel = Panel("", steps, UNIT, 600, lines=[line], levels=[Level("", BLUE, 0.9)])
    sheet, top = drawn(panel)
    halfway = panel.place(1000, 0.5, top)
    assert halfway[0] == pytest.approx(sum(panel.place(end, 0, top)[0] for end in steps.ends) / 2)
    assert at(sheet, halfway) == ImageColor.getrgb("#202124")
    quarter = panel.place(10**2.5, 0.35, top)
    assert at(sheet, quarter) == ImageColor.getrgb(RED)
    assert at(sheet, panel.place(100, 0.9, top), 6) == ImageColor.getrgb(BLUE)


def test_names_keep_off_each_other_and_off_points():
    places = [*((400.0 + 6 * index, 300.0 + 3 * index) for index in range(6)), (880.0, 20.0), (890.0, 40.0), (20.0, 590.0)]
    boxes = names_beside(places, [(200.0, 30.0)] * len(places), [((300.0, 300.0), (500.0, 300.0))], (0, 0, 900, 600), 14)
    points = [(x - 14, y - 14, x + 14, y + 14) for x, y in places]
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= 900 and bottom <= 600  # noqa: PT018
        for other in (*boxes[index + 1 :], *points):
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_few_colors_keep_those_of_the_lines():
    sheet = Image.new("RGB", (2, 1), RED)
    sheet.putpixel((1, 0), pale_of(BLUE))
    few = in_few_colors(sheet, [RED, BLUE]).convert("RGB")
    assert at(few, (0, 0)) == ImageColor.getrgb(RED)
    assert at(few, (1, 0)) == pale_of(BLUE)


def test_a_figure_draws_the_reported_seeds_of_its_settings_alone(tmp_path, monkeypatch):
    runs = [entry(setting, seed, 0.8 + 0.01 * place) for place, setting in enumerate(fronts.SHAPEWORLD) for seed in range(3)]
    crd = next(setting for setting in fronts.SHAPEWORLD if setting.name == "CRD")
    runs = [run for run in runs if run["arm"] != "crd"]
    runs += [entry(crd, seed, value) for seed, value in enumerate((0.79, 0.80, 0.81))]
    runs += [entry(crd, 100, 0.1), entry(crd, 3, 0.1, rate=1e-4), entry(crd, 4, 0.1, steps=120), entry(crd, 5, 0.1, groups=29)]
    for run in runs:
        run["rows"] = [{**run["rows"][0], "step": -1, "reward": 0.0}, {**run["rows"][0], "L-GMD of the exact": 0.2}]
    written(tmp_path, "shapeworld_study.json", runs)
    seen = []
    monkeypatch.setattr(fronts, "chart", lambda *parts: seen.append(parts) or chart(*parts))
    fronts.main(("shapeworld",), tmp_path, tmp_path / "docs")
    _, told, keys, (panel,) = seen[0]
    (found,) = (point for point in panel.points if point.name.startswith("CRD"))
    assert found.name == "CRD (3)"
    assert found.x == interval([0.79, 0.80, 0.81])
    sheet = Image.open(tmp_path / "docs" / "fronts_shapeworld.png").convert("RGB")
    assert sheet.width == WIDTH
    assert at(sheet, panel.place(0.80, 0.2, tops_of(told, keys, (panel,))[0])) == ImageColor.getrgb(fronts.COLORS["CRD"])


def test_the_optimum_counts_even_digits_alone(tmp_path):
    shares = [0.45, 0.05, 0.45, 0.05, *(0.0,) * 6]
    written(tmp_path, "digits_study.json", [], targets={"even": shares})
    best = fronts.optimum(source := fronts.Source(tmp_path / "digits_study.json"), "even")
    assert best.x[0] == pytest.approx(0.9)
    assert best.y[0] == pytest.approx(2.0)
    with pytest.raises(SystemExit, match=r"digits_study.json must have the shares of the exact optimum under targets, 'even, ends'"):
        fronts.optimum(source, "even, ends")


def test_places_that_not_all_runs_have_are_left_out():
    rows = [(0, 0.1), (5, 0.3), (0, 0.3), (5, 0.5), (9, 0.9)]
    assert fronts.over(rows) == [(0, interval([0.1, 0.3])), (5, interval([0.3, 0.5]))]


def test_the_curve_of_few_steps_is_of_pictures_and_begins_at_the_student(tmp_path, monkeypatch):
    student, base = (
        [{**fronts.on_few(arm, size=(0, 0, 0)), "seed": seed, "row": {"even": even}} for seed in (0, 1, 7)]
        for arm, even in (("TDM, 4 evaluations", 0.42), ("base, 100 evaluations", 0.45))
    )
    base[2]["row"] = {"even": 0.0}  # no run has that seed
    curve = [{"step": 40, "even": 0.6}]
    runs = [{**setting.where, "seed": seed, "curve": curve, "row": {"even": 0.7}} for setting in fronts.FEW for seed in (0, 1)]
    written(tmp_path, "few_study.json", [*student, *base, *runs, {**runs[0], "seed": 100}, {**runs[0], "set": ["a=1"]}])
    seen = []
    monkeypatch.setattr(fronts, "chart", lambda *parts: seen.append(parts))
    fronts.few(tmp_path)
    (panel,) = seen[0][-1]
    assert {line.name.rpartition(" ")[2] for line in panel.lines} == {"(2)"}
    assert [(x, mean) for x, (mean, _) in panel.lines[0].dots] == [(0, 0.42), (46.08, 0.6), (552.96, 0.7)]
    assert panel.levels[0].height == 0.45


def test_an_alarm_is_marked_on_its_line(tmp_path, monkeypatch):
    def run(setting, steps, seed, **more):
        rows = [{"step": step, "modes": 4.0, "reward": 0.95} for step in (150, steps)]
        return {**setting.where, "seed": seed, "rows": rows, **more}

    long = [run(setting, setting.where["steps"], 0) for setting in fronts.LONG]
    free = run(fronts.FREE, 300, 6, alarms=[{"kind": "diversity", "step": 200}])
    written(tmp_path, "digits_study.json", long, targets={"even": [0.1] * 10})
    written(tmp_path, "digits_alarm.json", [free])
    seen = []
    monkeypatch.setattr(fronts, "chart", lambda *parts: seen.append(parts) or chart(*parts))
    fronts.digits_long(tmp_path)
    for panel in seen[0][-1]:
        assert [line.marks for line in panel.lines] == [[], [], [], [], [(200, "square")]]


@pytest.mark.parametrize("figure", sorted(fronts.FIGURES))
def test_a_record_without_runs_or_without_a_file_says_what_is_needed(figure, tmp_path):
    with pytest.raises(SystemExit, match=r"fronts needs .*_study.json, which is not there: .* --results"):
        fronts.main((figure,), tmp_path, tmp_path)
    for name in ("digits_study.json", "digits_alarm.json", "shapeworld_study.json", "few_study.json"):
        written(tmp_path, name, [{"seed": 0, "arm": "another"}])
    with pytest.raises(SystemExit, match=r"_study.json must have a run of \{.*\} with a seed below 100; it has 1 runs .*--figures"):
        fronts.main((figure,), tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_runs_that_were_not_measured_after_the_step_are_named(tmp_path):
    setting = fronts.SHAPEWORLD[0]
    written(tmp_path, "shapeworld_study.json", [entry(setting, 0, 0.5, rows=[{"step": 30}])])
    with pytest.raises(SystemExit, match="has runs of Softmax-TB, but none was measured after step 90"):
        fronts.shapeworld(tmp_path)


@pytest.mark.parametrize("figure", sorted(fronts.FIGURES))
def test_the_files_of_results_give_small_pictures_twice_the_same(figure, tmp_path):
    for place in ("one", "two"):
        fronts.main((figure,), RESULTS, tmp_path / place)
    first, second = ((tmp_path / place / f"fronts_{figure}.png").read_bytes() for place in ("one", "two"))
    assert first == second
    assert len(first) < 60_000
