"""Checkpoints of torch: where their tensors may stand, and that they are mapped and not copied."""

from pathlib import Path

import pytest
import torch

from diffalign.core import ConfigError
from diffalign.rewards.weights import read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}


@pytest.mark.parametrize("content", [TENSORS, {"state_dict": TENSORS}, {"model": TENSORS, "step": 3}], ids=["flat", "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_wherever_they_stand(content, zipped, tmp_path):
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_tensors(tmp_path / "x.pth", "Part.weights")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in TENSORS)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no list of mapped files")
def test_a_checkpoint_is_mapped_and_not_copied(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    read = read_tensors(tmp_path / "x.pth", "Part.weights")
    assert str(tmp_path / "x.pth") in Path("/proc/self/maps").read_text()
    del read


def test_what_is_no_mapping_to_tensors_is_refused(tmp_path):
    torch.save({"model": 3, "a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"Part\.weights: '.*x\.pth' must map names to tensors; got dict"):
        read_tensors(tmp_path / "x.pth", "Part.weights")


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\xff" * 64], ids=["empty", "text", "header"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_damaged_file_is_one_message(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"Part\.weights: '.*{name}' must be a checkpoint of tensors: "):
        read_tensors(tmp_path / name, "Part.weights")
