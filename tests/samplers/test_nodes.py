"""The frontier of a rollout, by hand, and the nodes that it leaves behind."""

import torch

from diffalign.core import ROOT, UNRECORDED, Condition, Prompt
from diffalign.samplers.nodes import Drawn, Frontier, Nodes


def test_children_stand_next_to_their_siblings_and_are_numbered_within_their_prompt():
    roots = Frontier.of_roots(prompts=2, roots=2)
    assert (roots.prompt.tolist(), roots.place.tolist(), roots.node.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1], [ROOT] * 4)
    children, parents = roots.branched(3)
    assert parents.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert children.prompt.tolist() == [0] * 6 + [1] * 6
    assert children.place.tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_a_forest_holds_what_was_stored():
    nodes, condition = Nodes(), Condition((Prompt("a"),), torch.tensor([5]), {})
    roots = nodes.add(0, Frontier.of_roots(1, 1), torch.zeros(1, 2))
    children, parents = roots.branched(2)
    mean, log_prob = torch.ones(2, 2), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    leaves = nodes.add(1, children, torch.full((2, 2), 4.0), Drawn(0.7, mean, log_prob, parents + 6))
    assert leaves.node.tolist() == [1, 2]
    forest = nodes.forest(condition, torch.linspace(1, 0, 4))
    assert forest.level.tolist() == [0, 1, 1]
    assert forest.parent.tolist() == [ROOT, 0, 0]
    assert forest.call.tolist() == [UNRECORDED, 6, 6]
    assert forest.noise_level.tolist() == [0.0, torch.tensor(0.7).item(), torch.tensor(0.7).item()]
    assert forest.log_prob.tolist() == [0.0, -1.0, -2.0]
    assert torch.equal(forest.mean, mean)
    assert forest.latents[:, 0].tolist() == [0.0, 4.0, 4.0]
