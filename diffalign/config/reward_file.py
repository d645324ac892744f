"""Reward in a YAML file of its own, written as under `rewards` in a run file."""

from collections.abc import Sequence
from pathlib import Path

from ..core import ConfigError, RewardFunction
from ..core.scoring import reward_name
from .blueprint import build
from .files import read_yaml
from .overrides import override
from .resolution import resolve
from .signature import Parameter

_PLACE = "reward"


def read_reward(file: Path, overrides: Sequence[str] = ()) -> tuple[RewardFunction, str]:
    """Build the reward of a file.

    Args:
        file: file with the name of a reward, or with class_path and init_args
        overrides: arguments as on the command line, ["--quality", "50"]

    Returns:
        The reward, and its name.

    Raises:
        ConfigError: there is no such file, or the reward cannot be built.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} must be a readable UTF-8 file: {error}") from error
    content = read_yaml(text, str(file))
    if isinstance(content, str):
        content = {"class_path": content}
    if not isinstance(content, dict) or "class_path" not in content:
        shape = "keys " + ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{file} must hold one reward: its name, or class_path and init_args; got {shape}")
    reward = build(resolve(override(content, overrides), Parameter(_PLACE, RewardFunction), _PLACE), {})
    return reward, reward_name(reward)
