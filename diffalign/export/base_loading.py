"""Code on a model card that loads the base as the run did: sub-folder, variant and revision, weights in a single file."""

import json
from os.path import expanduser

from diffalign.policies.diffusers import Family, Source
from diffalign.policies.diffusers.single_file import has_autoencoder, has_text_encoders

EMBEDDED = "shapeworld"
"""Name of the pipeline that ships with the package."""

Imports = dict[str, set[str]]
"""Names that a program imports, by module; a module without names is imported itself."""


def quoted(text: str) -> str:
    """Text as Python writes it."""
    return json.dumps(text, ensure_ascii=False)


def base_loading(family: Family, imports: Imports) -> list[str]:
    """Write lines after which `pipeline` is the base.

    Args:
        family: the run's family
        imports: takes what the lines need
    """
    source = family.loaded_from or Source(family.source)
    imports["torch"] = set()
    dtype, variant, file = f"torch_dtype={family.dtype}", _option("variant", source.variant), source.single_file
    if file is None:
        lines, place, revision = _place(source, imports)
        return [*lines, _pipeline("DiffusionPipeline.from_pretrained", place, *absent(family), *variant, *revision, dtype)]
    lines = _folder(source, imports)
    parts = [family.component, *(["vae"] if has_autoencoder(file) else [])]
    if not has_text_encoders(file):
        for part in parts:
            lines.append(_part(family, part, f"from_single_file({quoted(file)}, config=folder", dtype, imports))
        return [*lines, _pipeline("DiffusionPipeline.from_pretrained", "folder", *_taken(parts), *absent(family), *variant, dtype)]
    if "vae" not in parts:
        lines.append(_part(family, "vae", "from_pretrained(folder", ", ".join([*variant, dtype]), imports))
    name = type(family.pipeline).__name__
    imports["diffusers"].add(name)
    rest = [] if "vae" in parts else _taken(["vae"])
    return [*lines, _pipeline(f"{name}.from_single_file", quoted(file), "config=folder", *rest, *absent(family), dtype)]


def absent(family: Family) -> list[str]:
    """Write the arguments that say which parts the pipeline goes without."""
    return [f"{part}=None" for part in family.optional if getattr(family.pipeline, part, None) is None]


def _pipeline(maker: str, *arguments: str) -> str:
    return f"pipeline = {maker}({', '.join(arguments)})"


def _part(family: Family, part: str, call: str, dtype: str, imports: Imports) -> str:
    """Line that loads one part by its own class."""
    library, kind = family.pipeline.config[part]
    imports.setdefault(library, set()).add(kind)
    return f"{part} = {kind}.{call}, subfolder={quoted(part)}, {dtype})"


def _taken(parts: list[str]) -> list[str]:
    return [f"{part}={part}" for part in parts]


def _option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"{name}={quoted(value)}"]


def _place(source: Source, imports: Imports) -> tuple[list[str], str, list[str]]:
    """Lines before, the place that `from_pretrained` is given, and the arguments with a revision that it still needs."""
    revision = _option("revision", source.revision)
    if source.path == EMBEDDED:
        imports["diffalign.embedded"] = {"SHAPEWORLD"}
        return [], 'SHAPEWORLD / "model"' + (f" / {quoted(source.subfolder)}" if source.subfolder else ""), []
    if source.local is not None:
        return [], quoted(expanduser(source.path) + (f"/{source.subfolder}" if source.subfolder else "")), []
    if source.subfolder is None:
        return [], quoted(source.path), revision
    imports["huggingface_hub"] = {"snapshot_download"}  # diffusers knows no pipelines in sub-folders
    call = ", ".join([quoted(source.path), f"allow_patterns={quoted(f'{source.subfolder}/*')}", *revision])
    return [f"folder = snapshot_download({call}) + {quoted(f'/{source.subfolder}')}"], "folder", []


def _folder(source: Source, imports: Imports) -> list[str]:
    """Lines after which `folder` is a folder on this machine: a file is read with the sizes of a whole pipeline."""
    lines, place, revision = _place(source, imports)
    if lines:
        return lines
    if source.path == EMBEDDED:
        return [f"folder = str({place})"]
    if source.local is not None:
        return [f"folder = {place}"]
    return [f"folder = DiffusionPipeline.download({', '.join([place, *_option('variant', source.variant), *revision])})"]
