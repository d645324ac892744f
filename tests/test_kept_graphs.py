"""Forecasts of a rollout that keeps its graph for the first update, and words for rows under guidance."""

import attrs
import pytest
from test_forecast import build, line

from diffalign.core import Guided, Progress
from diffalign.costs.activations import Activations
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.cards import card
from diffalign.costs.forecast import forecast
from diffalign.costs.kept import Kept
from diffalign.costs.limits import work_of
from diffalign.costs.sizes import figures, size
from diffalign.objectives import DGPO, FlowGRPO, SoftmaxTB
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy

TREE = TreeSampler(5, FixedPlan((1, 2)))
KEPT = attrs.evolve(TREE, keep_graph=True)
STEP = 3 * 4
"""Rows of a step with a stochastic edge: of three prompts, one root and three nodes each."""


def work(loop):
    tree = loop.sampler.branching()
    return work_of(loop, tree, loop.objective.update_rows(tree.leaves, tree.replay_rows))


def ledger(loop):
    return loop.step(loop.prompts.draw(0, 3), Progress(0, 10)).ledger


def taken(loop):
    """Memory of the update in both tables, as they say it."""
    count = next(row for row in forecast(loop, 10).splitlines() if "activations of" in row).split("  activations of ")
    of_device = line(capacity(loop, Cluster(teraflops=1.0)), "memory of a device").partition("for the rollout, ")[2].split(" for ")
    assert count[0].strip() == of_device[0]
    return count[0].strip(), count[1].split(" (counted")[0], of_device[1]


@pytest.mark.parametrize("updates", [1, 2])
def test_the_rows_of_an_update_are_those_that_the_step_evaluates(updates):
    loop = build(SoftmaxTB(TinyPolicy(), updates=updates), attrs.evolve(KEPT, rows=2), check_rows=0)
    done, found = work(loop), ledger(loop)
    assert sum(done.kept) == found.tracked["policy/rollout"] == STEP
    assert done.kept == (2, 1, 2, 2, 2, 2, 1)  # at most two rows a call, of 3 nodes and of 9
    assert sum(done.update) == found.tracked.get("policy/update", 0) == (updates - 1) * STEP
    assert sum(done.rollout) == found.rows["policy/rollout"]
    reference, own = found.rows["reference/update"], found.rows.get("policy/update", 0) - sum(done.update)
    assert sum(done.beside) == reference + own == updates * STEP


def test_the_table_says_that_the_first_update_evaluates_none():
    text = forecast(build(SoftmaxTB(TinyPolicy()), KEPT), 10)
    assert line(text, "replay").split(maxsplit=1)[1] == (
        "none in the first update: the rollout keeps the graph of 4 network rows a prompt for 12 stochastic edges, 12 a step"
    )
    again = line(forecast(build(SoftmaxTB(TinyPolicy(), updates=2), KEPT), 10), "replay")
    assert again.endswith(", 12 a step; 12 network rows in each further update, per policy")


def test_kept_rows_are_in_memory_whatever_the_budget():
    plain, kept, again = (
        build(SoftmaxTB(TinyPolicy(), rows=2, updates=updates), sampler) for sampler, updates in ((TREE, 1), (KEPT, 1), (KEPT, 2))
    )
    bytes_of = Activations.of(plain).at
    assert taken(plain) == (size(bytes_of(2)), "2 rows in the update", "2 rows in the update")
    assert taken(kept) == (
        size(bytes_of(STEP)),
        "12 rows whose graph the rollout keeps",
        "12 rows whose graph the rollout keeps, and the update",
    )
    assert taken(again)[:2] == (size(bytes_of(STEP)), "12 rows whose graph the rollout keeps, then of 2 in the update")
    assert size(bytes_of(STEP)) != size(bytes_of(2))


def test_an_objective_that_replays_no_edge_has_its_rows_beside_them():
    loop = build(DGPO(TinyPolicy(), levels=2, sigma_min=0.0, rows=3), KEPT)
    bytes_of = Activations.of(loop).at
    assert taken(loop)[:2] == (size(bytes_of(STEP) + bytes_of(3)), "12 rows whose graph the rollout keeps, and of 3 in the update")
    assert line(forecast(loop, 10), "update").split(maxsplit=1)[1].startswith("18 network rows a prompt for 9 samples")
    assert not work(loop).kept
    assert sum(work(loop).update) == ledger(loop).tracked["policy/update"]


def test_the_row_budget_says_what_the_graph_leaves():
    kept, again = (build(SoftmaxTB(TinyPolicy(), updates=updates), KEPT) for updates in (1, 2))
    activations = Activations.of(kept)

    def said(loop, memory):
        return line(capacity(loop, Cluster(memory=memory, teraflops=1.0), activations), "row budget").split(maxsplit=2)[2]

    assert said(kept, 1.0).startswith("all 12 rows whose graph the rollout keeps fit 1 GiB (")
    assert said(kept, 1.0).endswith(" would); the update evaluates none")
    assert said(again, 1.0).startswith("all 12 rows of an update fit 1 GiB at once (")
    little = said(kept, 0.5 * activations.at(STEP) / 2**30)
    assert little.startswith("nothing fits: the rollout keeps the graph of 12 rows, whatever the budget, and 0 fit ")
    assert little.endswith("Set --sampler.keep_graph false, or draw fewer --prompts_per_step.")
    beside = build(DGPO(TinyPolicy(), levels=2, sigma_min=0.0), KEPT)
    count, whole = (int(said(loop, 1.0).split("(")[-1].split()[0]) for loop in (beside, again))
    assert 0 <= whole - count - STEP <= 1


def test_a_sampler_without_the_choice_keeps_none():
    tree = TREE.branching()
    assert Kept.of(build(FlowGRPO(TinyPolicy()), TREE), tree, 4) == Kept(rows=0, spares=0, updates=1)
    assert Kept.of(build(SoftmaxTB(TinyPolicy()), KEPT), tree, 4) == Kept(rows=4, spares=4, updates=1)
    assert Kept.of(build(SoftmaxTB(TinyPolicy()), KEPT), tree, None) == Kept(rows=4, spares=0, updates=1)


def test_a_kept_graph_takes_the_time_of_its_backward_pass():
    plain, kept = (build(SoftmaxTB(TinyPolicy(), reference=None), sampler, check_rows=0) for sampler in (TREE, KEPT))
    seconds = [
        float(line(capacity(loop, Cluster(card=card("h100"))), "least on h100").split(" s a step")[0].split()[-1]) for loop in (plain, kept)
    ]
    assert seconds[1] < seconds[0]


def test_rows_under_guidance_say_how_many_network_rows_they_are():
    loop = build(SoftmaxTB(Guided(TinyPolicy(), 3.0), rows=5), TREE)
    text, planned = forecast(loop, 10), capacity(loop, Cluster(memory=1.0, teraflops=1.0))
    assert f", {2 * STEP} a step, per policy and update" in line(text, "replay")
    assert "activations of 5 rows (each two network rows) in the update" in text
    assert "for 5 rows (each two network rows) in the update" in line(planned, "memory of a device")
    assert f"all {STEP} rows (each two network rows) of an update fit 1 GiB at once" in line(planned, "row budget")
    bare = forecast(build(SoftmaxTB(TinyPolicy(), rows=5), TREE), 10)
    assert "activations of 5 rows in the update" in bare
    four = Guided(Guided(TinyPolicy(), 3.0), 2.0)
    assert "5 rows (each four network rows) in the update" in forecast(build(SoftmaxTB(four, rows=5), TREE), 10)


@pytest.mark.parametrize(
    ("number", "text"), [(0.012345, "0.0123"), (9.876, "9.88"), (999.4, "999"), (999.6, "1000"), (1098.4, "1098"), (64800.2, "64800")]
)
def test_numbers_have_three_figures_and_no_power_of_ten(number, text):
    assert figures(number) == text
