"""Policies that are loaded frozen: teachers, also of adapters that another run trained, in a run file."""

import pytest
import torch

from diffalign import Prompt, config
from diffalign.policies import FlowMatchingPolicy, LoRA

TEACHER = """
policy:
  class_path: TDMPolicy
  init_args:
    steps: 2
    policy: {class_path: FlowMatchingPolicy.from_pretrained, init_args: {path: shapeworld, max_sequence_length: 16, lora: {rank: 2}}}
objective:
  class_path: TrajectoryDistributionMatching
  init_args:
    teacher:
      class_path: FlowMatchingPolicy.from_pretrained
      init_args: {path: shapeworld, max_sequence_length: 16, lora: {start: ALIGNED}, trainable: false}
sampler: {class_path: DeterministicSampler, init_args: {steps: 2, samples: 2}}
rewards: CountReward
prompts: {path: shapeworld/count}
prompts_per_step: 1
total: 1
"""


@pytest.mark.parametrize("options", [{}, {"lora": None, "dtype": "bfloat16"}, {"lora": None}])
def test_what_is_loaded_frozen_has_nothing_to_train_and_draws_the_same(load, options):
    frozen = load("sd3", trainable=False, **options)
    assert not frozen.trainable_parameters()
    fork = frozen.fork(trainable=True)
    assert bool(fork.trainable_parameters()) == ("lora" not in options)  # its adapters
    assert not frozen.trainable_parameters()
    if "dtype" not in options:
        usual = load("sd3", **options)
        condition = usual.encode([Prompt("a cat")])
        noise, sigma = torch.randn(1, *usual.latent_shape, generator=torch.Generator().manual_seed(0)), torch.ones(1)
        assert torch.equal(usual.velocity(noise, sigma, condition), frozen.velocity(noise, sigma, condition))


def test_half_precision_is_refused_only_where_it_would_be_trained(load):
    with pytest.raises(ValueError, match=r"dtype must be float32 when all weights are trained .*; or give lora, or trainable: false"):
        load("sd3", lora=None, dtype="bfloat16")


def test_adapters_of_another_run_are_a_teacher_in_a_run_file(tmp_path):
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=2), max_sequence_length=16)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.02)
    policy.save_lora(tmp_path / "aligned")
    (tmp_path / "run.yaml").write_text(TEACHER.replace("ALIGNED", str(tmp_path / "aligned")))
    loop = config.parse(tmp_path / "run.yaml").build()
    teacher = loop.objective.teacher
    assert not teacher.trainable_parameters()
    condition, sigma = policy.encode([Prompt("two red circles")]), torch.full((1,), 0.7)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        aligned, found, base = (each.velocity(noise, sigma, condition) for each in (policy, teacher, policy.fork(pristine=True)))
    torch.testing.assert_close(found, aligned)
    assert float((aligned - base).abs().max()) > 0.01
    assert loop.run(1).steps == 1
