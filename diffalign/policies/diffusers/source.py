"""Places of a pipeline: a folder, a repository of the hub, a part of one; and a file with weights in place of its own."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from diffalign.core.hub import is_within_reach, unreached
from diffalign.embedded import SHAPEWORLD

from .single_file import origin, require_file


@attrs.frozen
class Source:
    """Files that a policy is loaded from.

    Args:
        path: folder, hub id, or "shapeworld"
        variant: variant of the weights' files, such as "fp16"; parts that have no files of it are loaded from their plain ones
        revision: branch, tag or commit, of a hub id
        subfolder: in which the pipeline lies
        single_file: a safetensors file whose weights take the place of the pipeline's
    """

    path: str
    variant: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    single_file: str | None = None

    def __attrs_post_init__(self) -> None:
        file = Path(self.path).expanduser()
        if file.is_file():
            belongs = origin(str(file)) if file.suffix == ".safetensors" else None
            of = "" if belongs is None else f" By the names in it that is {belongs!r}, or a folder of the same kind."
            raise ValueError(
                f"policy.path must be the folder or hub id of a pipeline; got the file {self.path!r}. Give the pipeline that it belongs to "
                f"as path, which says what the file does not (sizes, tokenizers, scheduler), and the file as single_file.{of}"
            )
        if self.revision is not None and self.local is not None:
            raise ValueError(f"revision is of a hub id; policy.path {self.path!r} is a folder, which has one alone")
        if self.single_file is not None:
            require_file(self.single_file)

    @property
    def local(self) -> Path | None:
        """The folder, where it is on this machine already."""
        folder = SHAPEWORLD / "model" if self.path == "shapeworld" else Path(self.path).expanduser()
        return folder / (self.subfolder or "") if folder.is_dir() else None

    def index(self) -> dict[str, Any]:
        """The pipeline's model_index.json.

        Raises:
            ValueError: there is none.
        """
        from diffusers import DiffusionPipeline

        try:
            if self.local is not None:
                config: dict[str, Any] = DiffusionPipeline.load_config(self.local)
            else:
                with warnings.catch_warnings():  # diffusers gives the hub an argument that it has given up
                    warnings.simplefilter("ignore", UserWarning)
                    config = DiffusionPipeline.load_config(
                        self.path, subfolder=self.subfolder, revision=self.revision, local_files_only=not is_within_reach()
                    )
            if "_class_name" not in config:
                raise KeyError("_class_name")
        except (OSError, KeyError) as error:
            raise ValueError(
                f"policy.path must be a diffusers pipeline folder (with model_index.json), a hub id, or 'shapeworld'; got "
                f"{self.path!r}{f' with subfolder {self.subfolder!r}' if self.subfolder else ''}: {self._reason(error)}"
            ) from error
        return config

    def fetched(self) -> Path:
        """The folder, downloaded where it was not here yet.

        Raises:
            ValueError: some of its files are neither here nor within reach.
        """
        from diffusers import DiffusionPipeline
        from huggingface_hub import snapshot_download

        if self.local is not None:
            return self.local
        options: dict[str, Any] = {"revision": self.revision, "local_files_only": not is_within_reach()}
        try:
            if self.subfolder is None:
                return Path(DiffusionPipeline.download(self.path, variant=self.variant, **options))
            return Path(snapshot_download(self.path, allow_patterns=[f"{self.subfolder}/*"], **options)) / self.subfolder
        except OSError as error:
            raise ValueError(f"policy.path: the files of {self.path!r} cannot be loaded: {unreached(self.path, error)}") from error

    def _reason(self, error: BaseException) -> str:
        if self.path == "digits" and self.local is None:
            return "the embedded flow of digits is no pipeline; DigitsPolicy.from_pretrained loads it"
        return str(error) if self.local is not None else unreached(self.path, error)


def require_pipeline(path: str, revision: str | None = None, subfolder: str | None = None, single_file: str | None = None) -> None:
    """Refuse a pipeline that is not within reach, before weights are loaded.

    Raises:
        ValueError: there is none.
    """
    Source(path, None, revision, subfolder, single_file).index()


def require_weights(folder: Path, components: Iterable[str], variant: str | None) -> None:
    """Refuse a folder in which a part has weights of other variants alone, naming them.

    Args:
        folder: folder of a pipeline
        components: its parts with weights
        variant: variant that is wanted

    Raises:
        ValueError: no file fits.
    """
    for part in components:
        names = {file.name for file in (folder / part).glob("*.safetensors")} | {file.name for file in (folder / part).glob("*.bin")}
        there = {variant_of(name) for name in names}
        if there and not there & {None, variant}:
            others = ", ".join(sorted(filter(None, there)))
            wanted = "no variant" if variant is None else f"the variant {variant!r}"
            raise ValueError(
                f"policy.path: {folder / part} has weights of the variant {others} alone, and {wanted} was asked for. Give variant."
            )


def variant_of(name: str) -> str | None:
    """The variant in a weights' file name: fp16 of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors; None of plain ones."""
    stem = name.rsplit(".", 1)[0]
    words = stem.split(".")[1:]
    return words[0].split("-")[0] if words and words[0] else None


def stored_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a denoiser, as diffusers names them: one, or as many as its index says; none where there are others."""
    from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    for mark in dict.fromkeys((variant, None)):
        index = folder / (SAFE_WEIGHTS_INDEX_NAME if mark is None else SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{mark}.json"))
        whole = folder / (
            SAFETENSORS_WEIGHTS_NAME if mark is None else SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f".{mark}.safetensors")
        )
        files = (
            [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
            if index.exists()
            else [whole]
        )
        if all(file.exists() for file in files):
            return files
    return []
