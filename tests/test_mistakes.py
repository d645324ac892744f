"""Mistakes that people make, and what each of them sees: one message with the place and what to do, never a traceback.

`check` is asked, so that all of it is known before a run: exit code 2 is a mistake in what was written, 1 one that only doing it can show.
"""

import socket

import pytest
import torch

from diffalign.cli import main
from diffalign.core import AlignmentLoop, hub
from diffalign.objectives import SoftmaxTB
from diffalign.policies import FlowMatchingPolicy, LoRA
from diffalign.rewards import JPEGCompressibility
from diffalign.samplers import ChainSampler, TreeSampler
from diffalign.testing.doubles import TinyPolicy, channel_reward

RUN = """policy: {class_path: DigitsPolicy.from_pretrained, init_args: {device: cpu}}
objective: {class_path: SoftmaxTB, init_args: {beta: 20.0}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {splits: [1], branches: 3}}}
rewards: ClassReward
prompts: {class_path: Prompts, init_args: {prompts: [an even digit, a seven, a digit]}}
prompts_per_step: 1
total: 2
"""
SHAPES = (
    RUN.replace("DigitsPolicy.from_pretrained, init_args: {", "FlowMatchingPolicy.from_pretrained, init_args: {path: shapeworld, LORA, ")
    .replace("LORA", "max_sequence_length: 16, lora: {rank: 4}")
    .replace("ClassReward", "JPEGCompressibility")
    .replace("an even digit, a seven, a digit", "a red circle")
)
REWARDS = """
import torch
def dark(images, prompts): return 1 - images.mean(dim=(1, 2, 3))
def swapped(prompts, images): return 1 - images.mean(dim=(1, 2, 3))
def alone(images): return images.mean(dim=(1, 2, 3))
def one_number(images, prompts): return images.mean()
def words(images, prompts): return ["good"] * len(prompts)
def nothing(images, prompts): pass
def broken(images, prompts): return images.nowhere
def blank(images, prompts): return [float("nan")] * len(prompts)
class Weighted:
    def __init__(self, weight): self.weight = weight
    def __call__(self, images, prompts): return torch.zeros(len(prompts))
number = 3
"""
REST, _, LAST = RUN.partition("prompts: {")
MIXED = "{class_path: Mixture, init_args: {sources: {a: {prompts: [a seven]}, b: {prompts: {path: some.txt}}}}}"
SHORT = REST + "%s" + LAST[LAST.index("\n") :]
FILES = {
    "run.yaml": RUN,
    "short.yaml": SHORT % "prompts: [a seven, a digit]\noptimizers: 1e-4",
    "mixed.yaml": SHORT % f"prompts: {MIXED}\noptimizers: {{default: 1e-4}}",
    "some.txt": "an even digit\n",
    "shapes.yaml": SHAPES,
    "typo.yaml": RUN.replace("objective:", "objectve:"),
    "comma.yaml": RUN.replace("{steps: 4,", "{steps: 4"),
    "twice.yaml": f"{RUN}total: 3\n",
    "tab.yaml": f"{RUN}\tseed: 1\n",
    "lacks.yaml": RUN.replace("prompts: {", "# {"),
    "empty.yaml": "",
    "list.yaml": "- a\n",
    "flat.yaml": RUN.replace("init_args: {beta: 20.0}", "beta: 20.0"),
    "reward.yaml": "class_path: ClassReward\n",
    "mistaken_rewards.py": REWARDS,
    "mistaken_imports.py": "import nothing_at_all\n",
    "mistaken_syntax.py": "def r(images, prompts) return 0\n",
    "none.txt": "",
    "typo.jsonl": '{"prompt": "a seven"}\n{"promt": "a six"}\n',
    "cat.txt": "a cat\n",
    "file": "x",
    "lora.safetensors": "x",
    "begun/metrics.jsonl": '{"step": 0, "reward": 1.0}\n',
    "nothing/here": "",
}

CHECKED = [  # arguments of check, what is said
    ("rnu.yaml", "RUN 'rnu.yaml': there is no such file"),
    ("digits_tmppo", "Did you mean digits_tmpo?"),
    ("nothing", "this folder has no config.yaml"),
    ("begun", "a Python program has made the run"),
    ("typo.yaml", "Did you mean objective?"),
    ("comma.yaml", "comma.yaml, line 3: expected ',' or '}'"),
    ("twice.yaml", "key 'total' appears a second time (first in line 7)"),
    ("tab.yaml", "tab.yaml, line 8: found character '\\t'"),
    ("lacks.yaml", "prompts is missing: a run needs it"),
    ("empty.yaml", "policy is missing"),
    ("list.yaml", "list.yaml must hold keys"),
    ("flat.yaml", "objective.beta must stand under init_args"),
    ("run.yaml --objectve.beta 2", "Did you mean objective?"),
    ("run.yaml --objective.betta 2", "Did you mean beta?"),
    ("run.yaml --objective.beta two", "objective.beta must be a Scalar, a Budget or a number; got 'two'"),
    ("run.yaml --objective.beta -1", "SoftmaxTB.beta must be positive and finite"),
    ("run.yaml --objective SoftmaxTBB", "Did you mean SoftmaxTB?"),
    ("run.yaml --objective TreeSampler", "objective must be an Objective; the class 'TreeSampler' is none"),
    ("run.yaml --objective DGPO", "DGPO.levels must be at most the number of noise levels"),
    ("run.yaml --objective.rows 0", "objective.rows must be >= 1; got 0"),
    ("run.yaml --sampler.steps 0", "sampler.steps must be >= 2; got 0"),
    ("run.yaml --sampler.steps 4.5", "sampler.steps must be an integer; got '4.5'"),
    ("run.yaml --sampler.plan.splits [9]", "FixedPlan.splits must lie in [0, 2] for 4 steps"),
    ("run.yaml --sampler.plan.branches 1", "sampler.plan.branches must be >= 2; got 1"),
    ("run.yaml --sampler.plan.eta 1.5", "the eta of every step must be at most 1 for CPS; step 1 is planned with 1.5"),
    ("run.yaml --sampler.class_path DeterministicSampler", "SoftmaxTB needs stochastic steps"),
    ("run.yaml --total 0", "total must be >= 1; got 0"),
    ("run.yaml --total many", "total must be an integer; got 'many'"),
    ("run.yaml --prompts_per_step 0", "prompts_per_step must be >= 1; got 0"),
    ("run.yaml --seed x", "seed must be an integer"),
    ("run.yaml --policy.device gpu", "device must be one that torch finds on this machine"),
    ("run.yaml --policy.device cuda:99", "device must be one that torch finds on this machine"),
    ("run.yaml --rewards mistaken_rewards.dak", "'mistaken_rewards' has no 'dak'. Did you mean dark?"),
    ("run.yaml --rewards nowhere.dark", "there is no module 'nowhere'"),
    ("run.yaml --rewards mistaken_rewards.number", "is an object of class int"),
    ("run.yaml --rewards mistaken_imports.r", "cannot be imported: No module named 'nothing_at_all'"),
    ("run.yaml --rewards mistaken_syntax.r", "SyntaxError: expected ':' (mistaken_syntax.py, line 1)"),
    ("run.yaml --rewards mistaken_rewards.Weighted", "rewards.weight is missing: Weighted needs it"),
    ("run.yaml --rewards mistaken_rewards.alone", "must take two arguments, (images, prompts); it takes (images)"),
    ("run.yaml --rewards mistaken_rewards.swapped", "in this order; it takes (prompts, images). Exchange them."),
    ("run.yaml --rewards PickScor", "Did you mean PickScore?"),
    ("run.yaml --rewards PickScore", "it is not in the cache, and HF_HUB_OFFLINE is set"),
    ("run.yaml --rewards.class_path RemoteReward --rewards.url http://127.0.0.1:9", "Start it first, or correct the url."),
    ("run.yaml --rewards RemoteReward", "rewards.url is missing"),
    ("run.yaml --aggregation StandardizedParts --aggregation.weights {a:1}", "aggregation.weights"),
    ("run.yaml --aggregation Raw --aggregation.weights {}", "Raw.weights must name at least one reward, or be None"),
    ("run.yaml --prompts.prompts seven", "prompts.prompts must be a list"),
    ("run.yaml --prompts PromptFile --prompts.path nowhere.txt", "prompts.path must be a readable UTF-8 file; got 'nowhere.txt'"),
    ("run.yaml --prompts PromptFile --prompts.path none.txt", "must hold at least one prompt; it is empty"),
    ("run.yaml --prompts PromptFile --prompts.path typo.jsonl", 'typo.jsonl, line 2: must be text, or an object with a text "prompt"'),
    ("run.yaml --policy.path nowhere", "nowhere must hold a flow of digits (config.json, velocity.safetensors)"),
    ("run.yaml --prompts PromptFile --prompts.path cat.txt", "'a cat' is no prompt of digits"),
    ("run.yaml --prompts PromptFile --prompts.path generated/prefrence", "there is no list generated/prefrence"),
    ("run.yaml --evaluation.prompts nowhere.txt", "evaluation: prompts.path must be a readable UTF-8 file"),
    ("run.yaml --evaluation.prompts cat.txt", "evaluation.prompts: 'a cat' is no prompt of digits"),
    ("run.yaml --evaluation.prompts digits/any-held-out --evaluation.samples 1", "evaluation.samples must be >= 2; got 1"),
    ("run.yaml --evaluation.prompts digits/any-held-out --evaluation.features {dino:DINOv2Features}", "features: the model 'facebook/"),
    ("run.yaml --optimizers.default.lr fast", "optimizers.default.lr must be a number"),
    ("run.yaml --optimizers.default.lr -1", "Invalid learning rate: -1.0"),
    ("run.yaml --optimizers.default.lrr 1e-3", "Did you mean lr?"),
    ("run.yaml --optimizers.default Adamm", "Did you mean Adam?"),
    ("run.yaml --optimizers.defalt.lr 1e-3", "optimizers has an entry 'defalt'; the roles are policy"),
    ("run.yaml --lr_factor fast", "lr_factor must be a Scalar or a number"),
    ("run.yaml --hooks [Trackerz]", "Did you mean Trackers?"),
    ("run.yaml --rollout Overlaped", "Did you mean Overlapped?"),
    ("run.yaml --average.decay 2", "average.decay must be < 1; got 2.0"),
    ("run.yaml --max_grad_norm -1", "max_grad_norm must be > 0.0; got -1.0"),
    ("run.yaml --chunk 0", "chunk must be >= 1; got 0"),
    ("run.yaml --device h1000", "device must be one of h100-pcie"),
    ("run.yaml --bandwidth 3", "--bandwidth goes with --teraflops"),
    ("shapes.yaml --policy.path nowhere/at-all", "it is no folder here, it is not in the cache, and HF_HUB_OFFLINE is set"),
    ("shapes.yaml --policy.path nothing", "must be a diffusers pipeline folder (with model_index.json)"),
    ("shapes.yaml --policy.path file", "must be the folder or hub id of a pipeline; got the file "),
    ("shapes.yaml --policy.lora.rank 0", "policy.lora.rank must be >= 1; got 0"),
    ("shapes.yaml --policy.lora.targets [to_qq]", "'to_qq' names none (nearest: 'to_q')"),
    ("shapes.yaml --policy.lora.start lora.safetensors", "cannot be read as safetensors"),
    ("shapes.yaml --policy.dtype bf16", "policy.dtype must be 'float32', 'bfloat16' or 'float16'"),
    ("shapes.yaml --policy.lora null --policy.dtype bfloat16", "dtype must be float32 when all weights are trained"),
    ("shapes.yaml --policy.resolution 65", "resolution must have sides divisible by 8"),
    ("shapes.yaml --policy.guidance 3.5", "guidance is an input of guidance-distilled networks"),
    ("shapes.yaml --policy.attention falsh", "attention must be null, "),
    ("shapes.yaml --no-weights --policy.path somebody/else", "must be a model whose shape is known"),
]

TRIED = [  # what only a step can show, and `check --try` does
    ("one_number", "a reward must return one number per image, shape (3,)"),
    ("words", "reward 'words' must return numbers, shape (3,); got list"),
    ("nothing", "reward 'nothing' must return numbers, shape (3,); got NoneType"),
    ("broken", "'Tensor' object has no attribute 'nowhere' ("),
]

OTHERS = [  # commands, exit code, what is said
    ("train run.yaml --folder file", 2, "folder file must be a folder; it is a file"),
    ("train run.yaml --folder begun", 2, "Give --resume to continue from its last checkpoint, --overwrite to replace it"),
    ("train begun --resume", 2, "a Python program has made the run"),
    ("train run.yaml --shard --folder f", 2, "sharding needs several processes"),
    ("train run.yaml --folder g --optimizers.default.lr 1e9 --total 3", 1, "most probably the learning rate is too large"),
    ("train run.yaml --folder h --rewards mistaken_rewards.blank", 1, "safetensors; there is no checkpoint in h yet"),
    ("sample run.yaml --prompt cat --out x.png", 2, "--prompt: 'cat' is no prompt of digits"),
    ("sample run.yaml --prompt a --out x.pgn", 2, "--out must end in an image format such as .png"),
    ("export run.yaml", 2, "'run.yaml' is a run file, whose weights are not trained yet"),
    ("evaluate run.yaml", 2, "--prompts must name a prompt file"),
    ("evaluate run.yaml --prompts digits/any-held-out --samples 1", 2, "--samples must be at least 2"),
    ("evaluate run.yaml --prompts digits/any-held-out --reward PickScor", 2, "Did you mean PickScore?"),
    ("compare run.yaml", 2, "compare needs two or more runs with different names"),
    ("check-part mistaken_rewards:nothing_here", 2, "'mistaken_rewards' has no 'nothing_here'"),
    ("parts Nothing", 2, "part 'Nothing': there is none"),
    ("prompts compositon x.jsonl", 2, "there is no list generated/compositon"),
    ("bundle nothing", 2, "RUN must be a run folder"),
    ("serve-reward nowhere.yaml", 2, "nowhere.yaml must be a readable UTF-8 file"),
    ("serve-reward reward.yaml --port 99999", 2, "a port must be a number from 0 to 65535"),
    ("serve-reward reward.yaml --port TAKEN", 2, "Address already in use"),
    ("check run.yaml --try --no-weights", 2, "leave out --no-weights"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Folder of somebody who makes mistakes, on a machine without a network."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(folder)
        changed.syspath_prepend(folder)
        changed.setenv("HF_HUB_OFFLINE", "1")
        hub.is_within_reach.cache_clear()
        yield folder
    hub.is_within_reach.cache_clear()


def seen(capsys, line):
    """What is said, and the exit code. Only one of argparse's usage errors may end the process."""
    code = main([word.replace(":", ": ") if word.startswith("{") else word for word in line.split()])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3  # the message, and warnings before it
    return code, said


@pytest.mark.parametrize(("line", "expected"), CHECKED, ids=[line for line, _ in CHECKED])
def test_check_finds_it(workplace, capsys, line, expected):
    code, said = seen(capsys, f"check {line}")
    assert code == 2
    assert expected in said.splitlines()[-1]


@pytest.mark.parametrize("run", ["short.yaml", "mixed.yaml"])
def test_short_forms_are_no_mistake(workplace, capsys, run):
    assert seen(capsys, f"check {run}")[0] == 0


@pytest.mark.parametrize(("reward", "expected"), TRIED, ids=[reward for reward, _ in TRIED])
def test_one_step_finds_it(workplace, capsys, reward, expected):
    code, said = seen(capsys, f"check run.yaml --try --rewards mistaken_rewards.{reward}")
    assert code == 1
    assert expected in said


@pytest.mark.parametrize(("line", "code", "expected"), OTHERS, ids=[line for line, *_ in OTHERS])
def test_every_command_says_it(workplace, capsys, line, code, expected):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = seen(capsys, line.replace("TAKEN", str(taken.getsockname()[1])))
    assert found[0] == code
    assert expected in found[1]


def test_there_are_sixty():
    assert len(CHECKED) + len(TRIED) + len(OTHERS) > 100


GIVEN = {"objective": SoftmaxTB(TinyPolicy()), "sampler": ChainSampler(4, 3), "rewards": channel_reward, "prompts": ["one", "two"]}
IN_PYTHON = [
    ({"objective": SoftmaxTB}, "objective must be an Objective; got the class SoftmaxTB itself; call it"),
    ({"sampler": TreeSampler}, "sampler must be a TrajectorySampler; got the class TreeSampler itself; call it"),
    ({"rewards": JPEGCompressibility}, "got the class JPEGCompressibility itself; call it"),
    ({"rewards": 3}, "must be callable with (images, prompts); got int"),
    ({"rewards": {}}, "rewards must name at least one reward; got none"),
    ({"prompts": "a text"}, "prompts must be a source of prompts"),
    ({"prompts": []}, "must hold at least one prompt"),
    ({"optimizers": "adam"}, "must be a learning rate, an optimizer class, or a function"),
    ({"optimizers": {"polcy": 1e-4}}, "optimizers has an entry 'polcy'; the roles are policy"),
    ({"hooks": 3}, "hooks must be a list of hooks; got int"),
    ({"prompts_per_step": 0}, "'prompts_per_step' must be >= 1"),
]


@pytest.mark.parametrize(("changed", "expected"), IN_PYTHON, ids=[expected for _, expected in IN_PYTHON])
def test_a_loop_says_what_was_given_wrongly(changed, expected):
    with pytest.raises((ValueError, TypeError)) as raised:
        AlignmentLoop(**{**GIVEN, **changed})
    assert expected in str(raised.value.args[0])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lora": 16}, "lora must be a LoRA, a dict of its arguments, or None; got int"),
        ({"dtype": torch.int8}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"device": "gpu"}, "device must be one that torch finds on this machine"),
        ({"resolution": [64]}, "resolution must be one side or [height, width] in pixels"),
        ({"lora": LoRA(rank=2, targets="to_qq")}, "'to_qq' names none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pipeline_says_what_was_given_wrongly(changed, expected):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the text is asked for below
        FlowMatchingPolicy.from_pretrained("shapeworld", **{"device": "cpu", **changed})
    assert expected in str(raised.value)
