"""Operators, bytes and bounds, counted without running anything."""

import attrs
import pytest
import torch
from test_planner import line
from tiny_pipelines import saved
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import expected as fit
from benchmarks.cost import roofline
from benchmarks.subjects import published_shapes
from diffalign import AlignmentLoop
from diffalign.cli import main
from diffalign.core import Guided, Progress
from diffalign.costs.activations import counted_of
from diffalign.costs.capacity import Cluster, capacity
from diffalign.costs.cards import CARDS, Card, asked, card, recognised
from diffalign.costs.expected import COMPILED, EAGER, Manner, Reached
from diffalign.costs.limits import work_of
from diffalign.costs.operators import Call, Operator, counting
from diffalign.costs.roofline import Work, bounds, expected, pieces
from diffalign.costs.rows import Counted
from diffalign.objectives import SoftmaxTB
from diffalign.policies import CallGraphs, Compilation, FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts
from diffalign.samplers import FixedPlan, TreeSampler
from diffalign.testing import TinyPolicy, channel_reward

SLOW = Card("slow", half=2e6, single=1e6, bandwidth=1e5)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(**settings):
        torch.manual_seed(0)
        given = {"resolution": 32, "lora": LoRA(rank=2), "max_sequence_length": 24, "device": "cpu", "dtype": "bfloat16", **settings}
        return FlowMatchingPolicy.from_pretrained(saved(tmp_path_factory, "sd3"), **given)

    return loaded


@pytest.fixture(scope="module")
def policy(load):
    return load()


@pytest.fixture(scope="module")
def counted(policy):
    return Counted.of(policy, policy.encode(Prompts(["a"]).draw(0, 1)))


def build(policy, rows=None, prompts=2, **options):
    tree = TreeSampler(4, FixedPlan(splits=(1, 2)), rows=rows)
    return AlignmentLoop(SoftmaxTB(policy, rows=rows), tree, channel_reward, Prompts(["a", "b"]), prompts_per_step=prompts, **options)


def test_bytes_and_operations_of_known_operators():
    one, two, bias = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(5)
    with counting() as taken:
        _ = one @ two
        _ = torch.addmm(bias, one, two)
        _ = one.t().expand(2, 4, 3)
        _ = one.bfloat16()
        _ = one + one[:, :1].expand(3, 4)
        torch.zeros(3, 5).addmm_(one, two)
    product, added, cast, total, _, inside = taken().operators
    assert (product.kind, product.operations, product.moved) == ("product", 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert (added.operations, added.moved) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15 + 5))
    assert (cast.kind, cast.dtype, cast.moved) == ("cast", torch.bfloat16, 4 * 12 + 2 * 12)
    assert (total.kind, total.operations, total.moved) == ("elementwise", 0, 4 * (12 + 3 + 12))
    assert (inside.kind, inside.operations) == ("product", 2 * 3 * 4 * 5)
    assert not taken().operators
    assert product.seconds(SLOW) == pytest.approx(max(120 / 1e6, 188 / 1e5))
    assert total.seconds(SLOW, fused=True) == 0.0
    assert product.seconds(SLOW, fused=True) == product.seconds(SLOW)


def test_attention_is_one_operator_that_keeps_no_scores():
    query, key = (torch.zeros(1, 2, tokens, 4, dtype=torch.bfloat16, requires_grad=True) for tokens in (6, 8))
    with counting() as taken:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key, dropout_p=0.0)
        forward = taken()
        torch.autograd.grad(out, [query, key], torch.zeros_like(out))
        backward = [operator for operator in taken().operators if operator.kind == "attention"]
    (attention,) = forward.operators
    assert out.shape == query.shape
    assert attention.operations == 4 * 2 * 6 * 8 * 4
    assert attention.moved == 2 * (2 * 2 * 6 * 4 + 2 * 2 * 8 * 4)
    assert [(one.operations, one.useful) for one in backward] == [(2.5 * attention.operations, 2 * attention.operations)]


def test_a_row_has_the_operations_that_torch_counts(counted):
    latents = torch.zeros(1, *counted.policy.latent_shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        velocity = counted.policy.velocity(latents, torch.full((1,), 0.5, device="meta"), counted.condition)
    with FlopCounterMode(display=False) as backward:
        velocity.sum().backward()
    assert counted(1).forward.useful == forward.get_total_flops() > 1e6
    assert counted(1).backward.useful == backward.get_total_flops() > 1e6


def test_more_rows_follow_from_two_and_three(policy, counted):
    direct, continued = counted.run(7), counted(7)
    for one, other in ((direct.forward, continued.forward), (direct.backward, continued.backward)):
        assert one.operators == other.operators
    assert counted(7).forward.useful == pytest.approx(7 * counted(1).forward.useful)
    assert counted(7).forward.moved < 7 * counted(1).forward.moved  # weights are read once


def test_a_network_that_takes_rows_one_by_one_is_counted_at_each_number(tmp_path_factory):
    policy = FlowMatchingPolicy.from_pretrained(
        saved(tmp_path_factory, "z-image"), resolution=32, lora=LoRA(rank=2), max_sequence_length=24, device="cpu"
    )
    counted = Counted.of(policy, policy.encode(Prompts(["a"]).draw(0, 1)))
    assert not counted(2).forward.alike(counted(3).forward)
    assert counted(5).forward.operators == counted.run(5).forward.operators


def test_the_policy_is_not_touched(policy, counted):
    rows, calls = policy.counter.rows, policy.counter.calls
    Counted.of(policy, policy.encode(Prompts(["a"]).draw(0, 1)))(1)
    assert (policy.counter.rows, policy.counter.calls) == (rows, calls)
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.device.type == "meta" for parameter in counted.policy.parameters())


def test_adapters_have_no_products_in_float32_and_a_fork_without_delta_has_none(policy, counted):
    base = Counted.of(policy.fork(pristine=True), policy.encode(Prompts(["a"]).draw(0, 1)))(2).forward
    adapted, layers = counted(2).forward, len(policy.adapters)
    assert len(adapted.of("product", torch.float32).operators) == len(base.of("product", torch.float32).operators)
    assert len(adapted.of("product").operators) - len(base.of("product").operators) == 2 * layers


def test_a_bound_adds_up(counted):
    work = Work(rollout=(1, 2), update=(2,), beside=(3,), trained=1000)
    rollout, update = bounds(counted, work, SLOW)
    one, two, three = (counted(rows) for rows in (1, 2, 3))
    assert rollout.seconds == pytest.approx(one.forward.seconds(SLOW) + two.forward.seconds(SLOW))
    expected = two.forward.seconds(SLOW) + two.backward.seconds(SLOW) + three.forward.seconds(SLOW) + 28 * 1000 / SLOW.bandwidth
    assert update.seconds == pytest.approx(expected)
    assert update.useful == two.forward.useful + two.backward.useful
    assert update.operators == sum(len(call.operators) for call in (two.forward, two.backward, three.forward))
    assert update.share(SLOW.half) == pytest.approx(update.useful / update.seconds / SLOW.half)
    assert bounds(counted, work, SLOW, fused=True)[0].seconds < rollout.seconds
    endless = Card("endless", 1e30, 1e30, SLOW.bandwidth)
    assert bounds(counted, work, endless)[0].seconds == pytest.approx((one.forward.moved + two.forward.moved) / SLOW.bandwidth)


@pytest.mark.parametrize(("rows", "budget", "expected"), [(5, None, (5,)), (5, 2, (2, 2, 1)), (4, 2, (2, 2)), (3, 9, (3,)), (0, 2, ())])
def test_pieces(rows, budget, expected):
    assert pieces(rows, budget) == expected


def test_the_work_of_a_run_is_what_it_does():
    loop = build(TinyPolicy(), rows=4)
    tree = loop.sampler.branching()
    work = work_of(loop, tree, loop.objective.update_rows(tree.leaves, tree.replay_rows))
    report = loop.step(loop.prompts.draw(0, 2), Progress(0, 1))
    assert sum(work.rollout) == report.ledger.rows["policy/rollout"]
    assert len(work.rollout) == report.ledger.calls["policy/rollout"]
    assert sum(work.update) == report.ledger.tracked["policy/update"]
    assert sum(work.beside) == report.ledger.rows["reference/update"]


def test_guidance_doubles_the_calls():
    loop = build(Guided(TinyPolicy(), 3.0))
    tree = loop.sampler.branching()
    assert len(work_of(loop, tree, 4).rollout) == 2 * len(work_of(build(TinyPolicy()), tree, 4).rollout)
    assert counted_of(loop, loop.objective.policy)(1).forward.operators


def test_check_says_the_bound_of_a_card(policy):
    text = capacity(build(policy), Cluster(card=card("H100")))
    assert "GFLOP" not in text
    least, fused = (float(line(text, name).split(" s a step")[0].split()[-1]) for name in ("least on h100", "fused"))
    assert 0 < fused < least
    assert "steps per hour" not in text
    assert "a step; where starting one takes 10 microseconds" in line(text, "operators")


def test_what_is_expected_adds_up(counted):
    half, full = torch.bfloat16, torch.float32
    reached = Reached(product=0.5, single=0.8, attention=0.25, half=0.4, full=0.9, kernel=1e-3, host=2e-3)
    for operator, seconds in (
        (Operator("mm", "product", half, 1e6, 1e6, 10), 1.0),
        (Operator("mm", "product", full, 1e6, 1e6, 10), 1e6 / 0.8e6),
        (Operator("attention", "attention", half, 1e6, 1e6, 10), 2.0),
        (Operator("mm", "product", half, 1e3, 1e3, 90_000), 1.0),
        (Operator("mul", "elementwise", half, 0.0, 0.0, 40_000), 1.0),
        (Operator("mul", "elementwise", full, 0.0, 0.0, 90_000), 1.0),
    ):
        assert reached.operator(operator, SLOW) == pytest.approx(seconds + 1e-3), operator
    small = Call((Operator("add", "elementwise", full, 0.0, 0.0, 0),) * 5)
    assert reached.call(small, SLOW) == pytest.approx(5 * 2e-3)  # the host is slower than the device
    work = Work(rollout=(1, 2), update=(2,), beside=(3,))
    rollout, update = expected(counted, work, SLOW, Manner(reached, reached, reached))
    one, two, three = (counted(rows) for rows in (1, 2, 3))
    assert rollout.seconds == pytest.approx(reached.call(one.forward, SLOW) + reached.call(two.forward, SLOW))
    assert update.seconds == pytest.approx(sum(reached.call(call, SLOW) for call in (two.forward, two.backward, three.forward)))
    assert (rollout.useful, update.useful) == tuple(bound.useful for bound in bounds(counted, work, SLOW))


def test_calls_with_and_without_gradient_may_reach_different_shares(counted):
    work = Work(rollout=(1, 2), update=(2,), beside=(3,))
    single, alone, tracked = attrs.evolve(EAGER, kernel=1e-3), attrs.evolve(EAGER, host=0.0), EAGER
    rollout, update = expected(counted, work, SLOW, Manner(single, alone, tracked))
    one, two, three = (counted(rows) for rows in (1, 2, 3))
    assert rollout.seconds == pytest.approx(single.call(one.forward, SLOW) + alone.call(two.forward, SLOW))
    assert update.seconds == pytest.approx(
        tracked.call(two.forward, SLOW) + tracked.call(two.backward, SLOW) + alone.call(three.forward, SLOW)
    )


def test_a_compiler_takes_away_what_is_no_product():
    half = torch.bfloat16
    elementwise = Operator("mul", "elementwise", half, 0.0, 0.0, 40_000)
    for operator in (Operator("mm", "product", half, 1e6, 1e6, 10), Operator("attention", "attention", half, 1e6, 1e6, 10)):
        assert COMPILED.operator(operator, SLOW) == EAGER.operator(operator, SLOW)
    assert COMPILED.operator(elementwise, SLOW) == pytest.approx(0.46 * EAGER.operator(elementwise, SLOW))


def test_what_a_policy_reaches_is_what_it_was_built_with(load):
    some, every = Compilation(backend="eager"), Compilation(backend="eager", dynamic=False)
    for compilation, single, several in ((None, EAGER, EAGER), (some, EAGER, COMPILED), (every, COMPILED, COMPILED)):
        for graphs in (None, CallGraphs(), CallGraphs(gradients=True)):
            found = Manner.of(Guided(load(graphs=graphs, compilation=compilation), 2.0))
            waits = {"host": 0.0} if graphs is not None else {}
            tracked = attrs.evolve(several, host=0.0) if graphs is not None and graphs.gradients else several
            assert found == Manner(attrs.evolve(single, **waits), attrs.evolve(several, **waits), tracked)
    assert Manner.of(TinyPolicy()) == Manner()


def test_check_says_what_is_expected_of_a_compiled_run(load):
    plain, made = (load(**more) for more in ({}, {"compilation": Compilation(backend="eager")}))
    texts = [line(capacity(build(policy), Cluster(card=card("h100"))), "expected on h100") for policy in (plain, made)]
    assert "; not compiled, no decoding, no rewards" in texts[0]
    assert "; compiled, no decoding, no rewards" in texts[1]
    seconds = [float(text.split(" s a step")[0].split()[-1]) for text in texts]
    assert seconds[1] < 0.8 * seconds[0]


def test_check_says_what_one_more_prompt_costs(policy):
    loop = build(policy, prompts=2)
    tree = loop.sampler.branching()
    rows, update = tree.rollout_rows, loop.objective.update_rows(tree.leaves, tree.replay_rows)
    said = line(capacity(loop, Cluster(card=card("h100"))), "one more prompt")
    assert f"{rows} network rows of rollout and {update} of update more" in said
    assert said.endswith("for 50% more samples")
    assert int(said.split("%")[0].split()[-1]) < 10  # tiny calls take the time to start their operators, however many rows they have
    more, now = (work_of(loop, tree, update, more=count) for count in (1, 0))
    assert sum(more.rollout) - sum(now.rollout) == rows
    assert sum(more.update) - sum(now.update) == update


def test_one_more_prompt_under_guidance_has_the_rows_of_a_step(policy):
    loop = build(Guided(policy, 3.0), check_rows=0)
    said = line(capacity(loop, Cluster(card=card("h100"))), "one more prompt")
    rows = loop.step(loop.prompts.draw(0, 2), Progress(0, 1)).ledger
    rolled, updated = rows.rows["policy/rollout"] // 2, rows.tracked["policy/update"] // 2
    assert f"{rolled} network rows of rollout and {updated} of update more" in said


def test_unknown_cards_are_refused(capsys):
    with pytest.raises(ValueError, match=r"device must be one of h100-pcie, .*; got 'h1000'. Give --teraflops and --bandwidth of another"):
        card("h1000")
    assert main(["check", "shapeworld_tmpo", "--device", "h1000"]) == 2
    assert "device must be one of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--bandwidth goes with --teraflops, or with --device NAME"):
        asked(None, None, 3.0)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "fast"])
def test_a_speed_is_a_number_above_0(command, number, capsys):
    options = ("--teraflops", "--bandwidth", "--memory") if command == "check" else ("--teraflops",)
    for option in options:
        with pytest.raises(SystemExit) as end:
            main([command, "digits_tmpo", f"{option}={number}"])
        assert end.value.code == 2
        assert f"error: argument {option}: must be a number above 0; got '{number}'" in capsys.readouterr().err


def test_a_card_may_be_given_by_its_numbers():
    assert asked(None) is None
    assert asked(None, 400.0) is None
    given = asked(None, 400.0, 3.0)
    assert (given.peak(torch.bfloat16), given.peak(torch.float32), given.bandwidth) == (4e14, 4e14, 3e12)
    measured = asked("h100", 798.0, 3.0)
    assert measured.single / measured.half == pytest.approx(CARDS["h100"].single / CARDS["h100"].half)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("Tesla V100", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_torchs_names_of_cards(name, expected):
    found = recognised(name)
    assert (None if found is None else found.name) == expected


def test_what_is_expected_is_within_a_fifth_of_what_was_measured(capsys):
    model = "SD3.5-M 512", "none"
    roofline.compare({model: roofline.counted(published_shapes.MODELS[model[0]], model[1])}, CARDS["h100"])
    row = capsys.readouterr().out.splitlines()[2]
    milliseconds, bound, expected_milliseconds = (float(row.split()[place]) for place in (4, 5, 7))
    assert milliseconds == 255
    assert bound < 0.6 * milliseconds  # the bound is no forecast
    assert 0.8 * milliseconds < expected_milliseconds < 1.2 * milliseconds


def test_the_fit_finds_the_constants_of_made_up_times(monkeypatch):
    half = torch.bfloat16
    products = Call((Operator("mm", "product", half, 1e12, 1e12, 1000),) * 3)
    multiplications = Call((Operator("mul", "elementwise", half, 0.0, 0.0, 10**9),) * 4)
    additions = Call((Operator("add", "elementwise", torch.float32, 0.0, 0.0, 10**9),) * 5)
    attention = Call((Operator("attention", "attention", half, 1e11, 1e11, 10), Operator("mm", "product", half, 1e12, 1e12, 10)))
    singles = Call((Operator("mm", "product", torch.float32, 1e11, 1e11, 10),) * 2)
    small = Call((Operator("add", "elementwise", torch.float32, 0.0, 0.0, 4),) * 1000)
    truth = Reached(product=0.6, single=0.5, attention=0.3, half=0.4, full=0.8, kernel=1e-6, host=1e-5)
    calls = (products, attention, multiplications, additions, singles, small)
    times = [1e3 * truth.call(call, CARDS["h100"]) for call in calls]
    rows = [[fit.Counted.of(call)] for call in calls]
    assert [fit.milliseconds(truth, row) for row in rows] == pytest.approx(times)
    monkeypatch.setattr(fit, "MEASURED", [("", "", 1, False, time, 0.0) for time in times])
    monkeypatch.setattr(fit, "ATTENTIONS", 1e3 * truth.operator(attention.operators[0], CARDS["h100"]))
    monkeypatch.setattr(fit, "PRODUCTS", 1e3 * truth.operator(attention.operators[1], CARDS["h100"]))
    found = fit.fitted(rows, range(len(rows)), 2000)
    assert attrs.astuple(found)[:5] == pytest.approx(attrs.astuple(truth)[:5], rel=0.05)
    assert found.host == pytest.approx(truth.host, rel=0.02)
