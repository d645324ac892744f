"""Places of tiny pipelines as they are published: other weights of the same pipeline, a hub's cache with two commits."""

import shutil

import torch
from diffusers import DiffusionPipeline

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def other(folder, name, seed=1):
    """The same pipeline with other weights in every network."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipeline.save_pretrained(name)
    return pipeline


def hub_of(plain, cache, monkeypatch):
    """A hub's cache without a network: two commits of one repository, the second with a pipeline in a sub-folder."""
    repository = cache / "models--someone--model"
    shutil.copytree(plain, repository / "snapshots" / COMMITS["main"])
    other(plain, repository / "snapshots" / COMMITS["v2"])
    shutil.copytree(plain, repository / "snapshots" / COMMITS["v2"] / "deep" / "inside")
    (repository / "refs").mkdir()
    for name, commit in COMMITS.items():
        (repository / "refs" / name).write_text(commit)
    for module in ("huggingface_hub.constants", "diffusers.pipelines.pipeline_utils", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    return repository
