"""`diffalign compare` takes rewards of one name for the same one if their configurations are, and for no other reason."""

import json
import sys
from pathlib import Path

import pytest

from diffalign.cli import main

RUN = """
policy: {class_path: diffalign.testing.TinyPolicy}
objective: SoftmaxTB
sampler: {class_path: ChainSampler, init_args: {steps: 3, samples: 2}}
rewards: REWARDS
prompts: {path: words.txt}
evaluation: {prompts: words.txt, steps: 2, samples: 2}
total: 1
"""
PARTS = """
class Bright:
    def __init__(self, power=1.0, weights="", device="cpu"):
        self.power = power
    def __call__(self, images, prompts):
        return self.power * images.mean(dim=(1, 2, 3))

def bright(images, prompts, power: float = 1.0):
    return power * images.mean(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("one_module", "two_module"):
        (tmp_path / f"{name}.py").write_text(PARTS)
        monkeypatch.delitem(sys.modules, name, raising=False)
    for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        (folder / "words.txt").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def compared(first: str, second: str, folders: tuple[str, str] = (".", ".")) -> int:
    files = [Path(folder, f"{name}.yaml") for folder, name in zip(folders, ("first", "second"), strict=True)]
    for file, rewards in zip(files, (first, second), strict=True):
        file.write_text(RUN.replace("REWARDS", rewards))
    return main(["compare", *map(str, files), "--out", "compared"])


def made(target: str, **arguments: object) -> str:
    return json.dumps({"class_path": target, "init_args": arguments})


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (made("one_module.Bright", power=1.0), made("one_module.Bright", power=100.0), "power is 1.0 in first and 100.0 in second"),
        (made("one_module.bright", power=1.0), made("one_module.bright", power=100.0), "power is 1.0 in first and 100.0 in second"),
        ("one_module.bright", "two_module.bright", "it is one_module.bright in first and two_module.bright in second"),
        (
            made("Cached", reward={"class_path": "one_module.Bright"}),
            made("Cached", reward={"class_path": "two_module.Bright"}),
            "reward is one_module.Bright in first and two_module.Bright in second",
        ),
    ],
)
def test_other_rewards_of_one_name_are_refused(first: str, second: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(f"{{mine: {first}}}", f"{{mine: {second}}}") == 2
    assert f"the reward 'mine' must be the same in all runs; {said}. Give one of them another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reward",
    [
        made("one_module.Bright", power=2.0),
        made("one_module.bright", power=2.0),
        made("Cached", reward={"class_path": "one_module.Bright"}),
    ],
)
def test_equal_rewards_are_compared(reward: str) -> None:
    assert compared(f"{{mine: {reward}}}", f"{{mine: {reward}}}") == 0
    assert set(json.loads(Path("compared/compare.json").read_text())["win_rates"]) == {"mine"}


def test_a_reward_on_another_device_is_the_same_one() -> None:
    near, far = (made("one_module.Bright", device=device) for device in ("cpu", "cuda:1"))
    assert compared(f"{{mine: {near}}}", f"{{mine: {far}}}") == 0


def test_a_reward_without_a_name_and_one_of_an_evaluation_have_configurations_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared("one_module.bright", "one_module.bright") == 0
    assert compared("one_module.bright", "{other: one_module.Bright}") == 0
    second = Path("second.yaml")
    second.write_text(second.read_text().replace("samples: 2}\ntotal", "samples: 2, rewards: {bright: two_module.bright}}\ntotal"))
    assert main(["compare", "first.yaml", "second.yaml"]) == 2
    said = capsys.readouterr().err
    assert "the reward 'bright' must be the same in all runs; it is one_module.bright in first and two_module.bright in second" in said


def test_one_file_is_one_file_however_it_is_named_and_another_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("common.pt", "a/own.pt", "b/own.pt"):
        Path(name).write_text(name)
    above, whole = (made("one_module.Bright", weights=str(path)) for path in ("../common.pt", Path("common.pt").absolute()))
    assert compared(f"{{mine: {above}}}", f"{{mine: {whole}}}", ("a", "b")) == 0
    beside = f"{{mine: {made('one_module.Bright', weights='own.pt')}}}"
    assert compared(beside, beside, ("a", "b")) == 2
    a, b = (Path(folder, "own.pt").absolute() for folder in "ab")
    assert f"weights is {a} in first and {b} in second" in capsys.readouterr().err
