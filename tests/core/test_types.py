"""The values between the parts: what a forest guarantees, and what its constructor refuses."""

import copy
import pickle

import attrs
import pytest
import torch
from hypothesis import given

from diffalign import Prompt
from diffalign.core import ROOT, Condition, Loss, Progress, TrajectoryBatch
from diffalign.testing.strategies import forests


def walk(forest, leaf):
    """The nodes from a leaf up to its root."""
    nodes = [leaf]
    while int(forest.parent[nodes[-1]]) != ROOT:
        nodes.append(int(forest.parent[nodes[-1]]))
    return nodes


@given(forests())
def test_parents_precede_children_and_levels_rise_along_every_edge(forest):
    for node, parent in enumerate(forest.parent.tolist()):
        assert parent < node
        if parent == ROOT:
            assert forest.level[node] == 0
        else:
            assert forest.level[parent] < forest.level[node]
            assert forest.prompt[parent] == forest.prompt[node]


@given(forests())
def test_paths_lead_from_a_root_to_each_leaf(forest):
    childless = sorted(set(range(len(forest.latents))) - set(forest.parent.tolist()))
    assert forest.leaves.tolist() == childless
    for leaf, path, root in zip(forest.leaves.tolist(), forest.paths.tolist(), forest.roots.tolist(), strict=True):
        nodes = walk(forest, leaf)[::-1]
        assert path == [ROOT] * (len(path) - len(nodes)) + nodes
        assert root == nodes[0]


@given(forests())
def test_siblings_are_contiguous_and_leaves_stand_depth_first(forest):
    for parent in set(forest.parent.tolist()) - {ROOT}:
        children = (forest.parent == parent).nonzero().squeeze(1)
        assert children.tolist() == list(range(int(children[0]), int(children[0]) + len(children)))
    # depth first: of two leaves the first branches off at the smaller node at every depth
    ranks = [[node for node in path if node != ROOT] for path in forest.paths.tolist()]
    assert ranks == sorted(ranks)


@given(forests())
def test_path_sum_equals_walking_the_parents(forest):
    values = forest.latents[:, 0].double()
    expected = [sum(float(values[node]) for node in walk(forest, leaf)) for leaf in forest.leaves.tolist()]
    torch.testing.assert_close(forest.path_sum(values), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@given(forests())
def test_node_mean_equals_brute_force(forest):
    values = forest.samples[:, 1].double()
    below = [[] for _ in forest.latents]
    for value, leaf in zip(values.tolist(), forest.leaves.tolist(), strict=True):
        for node in walk(forest, leaf):
            below[node].append(value)
    expected = torch.tensor([sum(members) / len(members) for members in below], dtype=torch.float64)
    torch.testing.assert_close(forest.node_mean(values), expected, rtol=0, atol=1e-12)


@given(forests())
def test_path_sum_and_node_mean_are_adjoint_up_to_the_leaf_count(forest):
    node_values, leaf_values = forest.latents[:, 0].double(), forest.samples[:, 1].double()
    counts = torch.bincount(forest.paths[forest.paths != ROOT], minlength=len(forest.latents))
    left = forest.path_sum(node_values) @ leaf_values
    right = (node_values * counts) @ forest.node_mean(leaf_values)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["leaves", "samples", "group", "roots", "paths", "stochastic"])
def test_help_of_a_forest_says_what_it_computes_and_in_which_shape(name):
    assert f"`{name}` [" in (TrajectoryBatch.__doc__ or "")  # help() shows no text of properties that slots have replaced


@given(forests())
def test_leaf_views_read_the_leaves(forest):
    assert torch.equal(forest.samples, forest.latents[forest.leaves])
    assert torch.equal(forest.group, forest.prompt[forest.leaves])
    assert forest.stochastic.tolist() == [node for node, eta in enumerate(forest.noise_level.tolist()) if eta > 0]
    assert len(forest.mean) == len(forest.stochastic)


def two_leaves(**changes):
    """One root with two stochastic children at level 1, each with a deterministic leaf at level 2."""
    fields = {
        "condition": Condition((Prompt("a"),), torch.tensor([0]), {}),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "latents": torch.zeros(5, 2),
        "level": torch.tensor([0, 1, 1, 2, 2]),
        "parent": torch.tensor([ROOT, 0, 0, 1, 2]),
        "prompt": torch.zeros(5, dtype=torch.long),
        "noise_level": torch.tensor([0.0, 0.7, 0.7, 0.0, 0.0]),
        "log_prob": torch.zeros(5, dtype=torch.float64),
        "mean": torch.zeros(2, 2),
    }
    return TrajectoryBatch(**{**fields, **changes})


def test_node_mean_is_zero_above_no_leaf():
    forest = two_leaves(
        latents=torch.zeros(4, 2),
        level=torch.tensor([0, 1, 1, 2]),
        parent=torch.tensor([ROOT, 0, 0, 1]),
        prompt=torch.zeros(4, dtype=torch.long),
        noise_level=torch.tensor([0.0, 0.7, 0.7, 0.0]),
        log_prob=torch.zeros(4, dtype=torch.float64),
    )
    assert forest.node_mean(torch.tensor([3.0])).tolist() == [3.0, 3.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_prob": torch.zeros(3, dtype=torch.float64)}, r"log_prob must have shape \(5,\), one entry per node; got \(3,\)"),
        ({"level": torch.zeros(5, 1)}, r"level must have shape \(5,\), one entry per node; got \(5, 1\)"),
        ({"log_prob": torch.zeros(5)}, r"log_prob must be float64; got torch.float32"),
        ({"sigmas": torch.tensor([1.0, 1.0, 0.0])}, r"sigmas must decrease strictly, at least 2 of them; got \[1.0, 1.0, 0.0\]"),
        ({"sigmas": torch.tensor([1.0])}, r"sigmas must decrease strictly, at least 2 of them; got \[1.0\]"),
        ({"sigmas": torch.ones(3, 1)}, "sigmas must decrease strictly"),
        ({"parent": torch.tensor([ROOT, 2, 0, 1, 2])}, r"parent must point to an earlier node, or be ROOT \(-1\)"),
        ({"parent": torch.tensor([-2, 0, 0, 1, 2])}, r"parent must point to an earlier node, or be ROOT \(-1\)"),
        ({"level": torch.tensor([0, 1, 0, 2, 2])}, "level must rise along every edge"),
        ({"prompt": torch.tensor([0, 0, 1, 0, 1])}, "prompt must stay the same along every edge"),
        ({"noise_level": torch.tensor([0.7, 0.7, 0.0, 0.0, 0.0])}, "noise_level may be above 0 only for an edge that spans one level"),
        ({"level": torch.tensor([0, 2, 2, 3, 3]), "sigmas": torch.linspace(1, 0, 4)}, "noise_level may be above 0 only for an edge"),
        ({"noise_level": torch.tensor([0.0, 0.7, 0.5, 0.0, 0.0])}, "noise_level must be equal for stochastic siblings"),
        ({"mean": torch.zeros(3, 2)}, r"mean must have shape \(2, 2\), one row per stochastic edge; got \(3, 2\)"),
        ({"mean": torch.zeros(2, 1)}, r"mean must have shape \(2, 2\), one row per stochastic edge; got \(2, 1\)"),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=rf"^TrajectoryBatch\.{message}"):
        two_leaves(**changes)


def test_a_forest_cannot_be_changed():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        two_leaves().latents = torch.ones(5, 2)


def test_a_prompt_is_text_with_metadata_that_nobody_can_change():
    prompt = Prompt("a red cube", {"count": 3})
    assert prompt == "a red cube"
    assert prompt.upper() == "A RED CUBE"
    assert prompt.metadata == {"count": 3}
    with pytest.raises(TypeError):
        prompt.metadata["count"] = 4
    assert Prompt("bare").metadata == {}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_copies_of_a_prompt_keep_its_metadata(copied):
    twin = copied(Prompt("a red cube", {"count": 3}))
    assert isinstance(twin, Prompt)
    assert (twin, dict(twin.metadata)) == ("a red cube", {"count": 3})


def test_plain_texts_become_prompts_of_a_condition():
    """A policy may pass on the texts that it was given; what samples them asks each for its size."""
    known = Prompt("b", {"height": 64, "width": 32})
    condition = Condition(["a", known], torch.tensor([4, 5]), {})
    assert condition.prompts == ("a", "b")
    assert [type(prompt) for prompt in condition.prompts] == [Prompt, Prompt]
    assert condition.prompts[1] is known
    assert condition.select(torch.tensor([0])).size is None


def test_select_repeats_and_reorders_every_part_of_a_condition():
    condition = Condition((Prompt("a"), Prompt("b"), Prompt("c")), torch.tensor([4, 5, 6]), {"embeds": torch.arange(6.0).reshape(3, 2)})
    picked = condition.select(torch.tensor([2, 0, 2]))
    assert len(picked) == 3
    assert picked.prompts == ("c", "a", "c")
    assert picked.ids.tolist() == [6, 4, 6]
    assert picked.tensors["embeds"].tolist() == [[4, 5], [0, 1], [4, 5]]


def test_a_condition_refuses_rows_that_do_not_match_its_prompts():
    with pytest.raises(ValueError, match=r"Condition.ids must have 1 rows, one per prompt; got shape \(2,\)"):
        Condition((Prompt("a"),), torch.tensor([0, 1]), {})
    with pytest.raises(ValueError, match=r"Condition.tensors\['embeds'\] must have 1 rows, one per prompt; got shape \(\)"):
        Condition((Prompt("a"),), torch.tensor([0]), {"embeds": torch.tensor(1.0)})


def test_progress_runs_from_zero_to_one_and_stays_there():
    assert [Progress(step, 5).fraction for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert Progress(0, 1).fraction == 0.0
    assert Progress(0, 1).reward is None


def test_a_loss_has_no_metrics_by_default():
    assert Loss(torch.tensor(1.0)).metrics == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2),), r"Loss.value must be a tensor without dimensions, as sum\(\) gives; got a tensor of shape \(2,\)"),
        ((0.5,), r"Loss.value must be a tensor without dimensions.* got float 0.5"),
        ((torch.tensor(0.0), [torch.tensor(1.0)]), "Loss.metrics must be a dict of name"),
        (
            (torch.tensor(0.0), {"gap": torch.tensor(1.0)}),
            r"Loss.metrics\['gap'\] must be a pair \(sum, count\).* got a tensor of shape \(\)",
        ),
        ((torch.tensor(0.0), {"gap": (1.0, 2)}), r"Loss.metrics\['gap'\] must be a pair \(sum, count\).* got float 1.0, int 2"),
        ((torch.tensor(0.0), {"gap": (torch.ones(2), 2)}), r"got a tensor of shape \(2,\), int 2"),
    ],
)
def test_a_loss_that_is_no_number_with_pairs_is_refused_where_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loss(*arguments)
