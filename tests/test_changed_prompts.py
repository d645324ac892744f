"""A prompt file that has changed under its name is noticed when the run goes on."""

import json
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.core import AlignmentLoop, Prompt
from diffalign.objectives import SoftmaxTB
from diffalign.prompts import Mixture, PromptFile, Prompts, Source
from diffalign.runs.identity import listed
from diffalign.samplers import ChainSampler
from diffalign.testing import TinyPolicy, channel_reward

RUN = """
policy: {class_path: diffalign.testing.TinyPolicy}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: diffalign.testing.channel_reward
prompts: {class_path: PromptFile, init_args: {path: own.txt}}
prompts_per_step: 1
total: 1
"""
SAID = "the prompts (3 of them, now 2) changed since the run began; the run continues with the present prompts"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(RUN)
    (tmp_path / "own.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.chdir(tmp_path)


def go_on(total):
    assert main(["train", "toy.yaml", "--folder", "run", "--resume", "--new-total", "--total", str(total)]) == 0


def test_another_content_of_the_file_is_said_once(capsys):
    assert main(["train", "toy.yaml", "--folder", "run"]) == 0
    go_on(2)
    assert "changed since" not in capsys.readouterr().err
    Path("own.txt").write_text("four\nfive\n")
    go_on(3)
    assert SAID in capsys.readouterr().err
    go_on(4)
    assert "changed since" not in capsys.readouterr().err


def test_a_checkpoint_that_does_not_know_its_prompts_says_nothing(capsys):
    assert main(["train", "toy.yaml", "--folder", "run"]) == 0
    manifest = Path("run/step-000001/manifest.json")
    facts = json.loads(manifest.read_text())
    assert facts.pop("prompts")["count"] == 3
    manifest.write_text(json.dumps(facts))
    Path("own.txt").write_text("four\nfive\n")
    go_on(2)
    assert "changed since" not in capsys.readouterr().err


def test_the_same_from_python(capsys):
    def run(total, prompts):
        loop = AlignmentLoop(SoftmaxTB(TinyPolicy()), ChainSampler(4, 3), channel_reward, prompts, prompts_per_step=1)
        loop.run(total, folder="run", resume=True)
        return capsys.readouterr().err

    run(1, PromptFile("own.txt"))
    assert "changed since" not in run(2, PromptFile("own.txt"))
    Path("own.txt").write_text("four\nfive\n")
    assert SAID in run(3, PromptFile("own.txt"))
    assert "changed since" not in run(4, PromptFile("own.txt", seed=1)), "the line of settings has said it"


def test_other_held_out_prompts_are_said_once(capsys):
    Path("held-out.txt").write_text("five\nsix\nseven\n")
    Path("toy.yaml").write_text(f"{RUN}evaluation: {{prompts: held-out.txt, steps: 2, samples: 2}}\n")
    assert main(["train", "toy.yaml", "--folder", "run"]) == 0
    go_on(2)
    assert "changed since" not in capsys.readouterr().err
    Path("held-out.txt").write_text("five\nsix\n")
    go_on(3)
    assert "the held-out prompts (3 of them, now 2) changed since the last evaluation; those from now on" in capsys.readouterr().err
    go_on(4)
    assert "changed since" not in capsys.readouterr().err
    Path("run/evaluation.json").unlink()
    Path("held-out.txt").write_text("five\n")
    go_on(5)
    assert "changed since" not in capsys.readouterr().err, "what is not known is not said"


def test_what_a_digest_sees():
    texts = listed(Prompts(["a", "b"]))
    assert texts == listed(Prompts(["a", "b"], seed=3))
    others = [
        Prompts(["b", "a"]),
        Prompts(["a", "b", "b"]),
        Prompts([Prompt("a", {"target": "x"}), "b"]),
        Prompts([Prompt("a", {"target": "y"}), "b"]),
        Mixture({"one": Source(Prompts(["a", "b"]))}),
    ]
    seen = [texts, *map(listed, others)]
    assert len({each["sha256"] for each in seen}) == len(seen)

    class Endless:
        def draw(self, step, count):
            return ["a"] * count

    assert listed(Endless()) is None


def test_metadata_of_any_kind_are_told_apart():
    def of(**metadata):
        return listed(Prompts([Prompt("one", metadata)]))

    assert of(regions={(0, 0): "cat", 3: "dog"}) == of(regions={3: "dog", (0, 0): "cat"})
    assert of(regions={(0, 0): "cat"}) != of(regions={(0, 1): "cat"})
    assert of(mask=object()) == of(mask=object()), "what is not known is told by its type alone"
