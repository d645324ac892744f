"""Sharded weights under what a run may ask of them: a base in float16, a rollout's graph, a policy that reads few prompts."""

from pathlib import Path

import pytest
import torch
from started import start_two


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept")
    done = start_two(Path(__file__).parent / "kept_processes.py", path)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path / f"facts-{rank}.pt", weights_only=True) for rank in range(2)]


def test_losses_above_a_sharded_base_in_float16_are_scaled_alike_in_all_processes(facts):
    for rank in range(2):
        whole, sharded = facts[rank]["whole"], facts[rank]["sharded"]
        assert sharded["spread"] == {torch.float16}
        assert whole["spread"] == set()
        assert sharded["overflows"] == whole["overflows"] == 0
        for name, value in sharded["weights"].items():
            assert torch.equal(value, facts[0]["sharded"]["weights"][name])
            torch.testing.assert_close(value, whole["weights"][name], rtol=1e-5, atol=1e-7)


def test_a_rollout_that_keeps_its_graph_is_refused_where_weights_are_sharded(facts):
    for each in facts:
        assert each["kept"].startswith("TreeSampler.keep_graph must be false where the weights are sharded")
        assert each["kept"].endswith("Set --sampler.keep_graph false, or leave sharding out.")


def test_calls_for_others_are_made_with_a_prompt_that_the_policy_can_read(facts):
    assert sum(each["padded"] for each in facts) > 0
