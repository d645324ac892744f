"""The shape of the package: who may know whom, and the rules of the house that a reader can check by eye."""

import ast
import importlib
import inspect
import statistics
import sys
from pathlib import Path

import pytest

import diffalign

ROOT = Path(diffalign.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    {"embedded", "placement", "threads", "vocabulary"},
    {"core"},
    {"durable"},
    {"prompts", "policies", "samplers", "objectives", "rewards"},
    {"shapeworld", "digits", "evaluation", "testing"},
]
PARTS = LAYERS[3]  # exchanged freely, so they never know each other
TOP = len(LAYERS)  # checkpoint, config, cli, ...: everything else, and the package itself


def module_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file, packages=True):
    """Modules that a file imports, at any depth of its code, by full name.

    `from package import module` is an import of the module, and, if `packages`, of the package too.
    """
    package = module_of(file).split(".") if file.name == "__init__.py" else module_of(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            folder = ROOT.parent / source.replace(".", "/")
            modules = [alias.name for alias in node.names if (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()]
            yield from (f"{source}.{name}" for name in modules)
            if packages or len(modules) < len(node.names):
                yield source


def unit_of(module):
    """The first name below the package: core, policies, prompts, ..."""
    return module.split(".")[1] if "." in module else ""


def layer_of(unit):
    return next((height for height, units in enumerate(LAYERS) if unit in units), TOP)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_downwards(file):
    here = unit_of(module_of(file))
    for target in imports_of(file):
        if target.split(".")[0] != "diffalign" or (here == "" and file.parent == ROOT):
            continue
        there = unit_of(target)
        if there == here or (there == "" and layer_of(here) == TOP):
            continue
        assert there, f"{module_of(file)} imports the package itself, which knows every part"
        assert layer_of(there) <= layer_of(here), f"{module_of(file)} must not know {target}"
        assert not (here in PARTS and there in PARTS), f"{module_of(file)} and {target} are exchanged freely, so they must not meet"


def circles(graph):
    """The strongly connected parts of a graph that hold more than one node: names whose imports lead back to themselves."""
    below = {}
    for start in graph:
        reached, left = set(), [*graph[start]]
        while left:
            if (name := left.pop()) not in reached:
                reached.add(name)
                left.extend(graph.get(name, ()))
        below[start] = reached
    return sorted(
        {tuple(sorted(name for name in below[start] if start in below.get(name, ()))) for start in graph if start in below[start]}
    )


def test_no_module_imports_itself_by_a_detour():
    """Imports for type checkers and inside functions are counted as well. `from . import x` is an import of x, not of the package."""
    names = {module_of(file) for file in FILES}
    graph = {module_of(file): {target for target in imports_of(file, packages=False) if target in names} for file in FILES}
    assert not circles(graph)


def test_no_room_knows_a_room_that_knows_it():
    graph = {}
    for file in FILES:
        here = unit_of(module_of(file))
        there = {unit_of(target) for target in imports_of(file) if target.split(".")[0] == "diffalign"}
        graph.setdefault(here, set()).update(there - {here, ""})
    assert not circles({room: targets for room, targets in graph.items() if room})


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [("a", "b", "c")]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_few_modules_lie_loose():
    assert len([file for file in FILES if file.parent == ROOT]) <= 10


def test_the_walk_sees_imports_of_every_kind(tmp_path):
    assert "diffalign.core" in set(imports_of(ROOT / "samplers" / "frontier.py"))  # absolute
    assert "diffalign.samplers.plans" in set(imports_of(ROOT / "samplers" / "frontier.py"))  # relative
    assert "diffalign.processes.devices" in set(imports_of(ROOT / "commands" / "train.py"))  # inside a function
    assert "diffalign.core" in set(imports_of(ROOT / "config" / "parts.py"))  # of a folder by name
    assert "diffalign.core" in set(imports_of(ROOT / "__init__.py"))  # for type checkers


def test_core_knows_torch_attrs_and_numpy_alone():
    known = {"torch", "attrs", "numpy", "diffalign", *sys.stdlib_module_names}
    for file in FILES:
        if unit_of(module_of(file)) == "core":
            strangers = {target.split(".")[0] for target in imports_of(file)} - known
            assert not strangers, f"{module_of(file)} imports {strangers}"


def test_files_stay_small():
    sizes = {module_of(file): file.stat().st_size for file in FILES if file.stat().st_size > 200}
    large = {module: size for module, size in sizes.items() if size > 16 * 1024}
    assert not large
    assert statistics.median(sizes.values()) < 6 * 1024


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "common", "misc", "base", "abc", "manager"}
    assert not [module_of(file) for file in FILES if drawers & set(module_of(file).split("."))]


def test_a_nan_is_never_replaced():
    for file in FILES:
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(file.read_text()))}
        assert not names & {"nan_to_num", "nan_to_num_", "nanmean", "nansum", "nanmedian"}, module_of(file)


def test_texts_are_utf_8_wherever_the_machine_stands():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{module_of(file)}, line {node.lineno}"


def test_no_hook_looks_for_another():
    """The loop alone knows its hooks; what one of them has for others goes through the loop, as `evaluations` do."""
    for file in FILES:
        readers = [
            node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute) and node.attr == "hooks"
        ]
        assert not readers or module_of(file) == "diffalign.core.loop", f"{module_of(file)} reads the hooks of a loop in line {readers}"


FOREIGN = {
    ("core.forking", "'_compiled_call_impl'"): "of torch, private",
    ("core.scoring", "'__name__'"): "functions have one, other rewards do not",
    ("core.spread", "'full_tensor'"): "of torch's spread tensors alone",
    ("costs.capacity", "'to_q'"): "of an attention in diffusers",
    ("costs.capacity", "'inner_dim'"): "of an attention in diffusers",
    ("costs.sizes", "'config'"): "of a network in diffusers",
    ("costs.sizes", "'patch_size'"): "of a configuration in diffusers",
}
"""Where a part is asked for what it may not have without a protocol: module below the package, attribute -> why."""


def guesses(source):
    """Attributes that a source asks for without knowing that they are there, as it writes them: getattr with a default, and hasattr."""
    for node in ast.walk(ast.parse(source)):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if called == "hasattr" or (called == "getattr" and len(node.args) == 3):
            yield ast.unparse(node.args[1])


def test_what_a_part_can_do_is_declared():
    """Small protocols (`Budgeted`, `Listed`, `Branches`, ...) say it, so that a renamed attribute is an error and not a silent None."""
    for folder in ("core", "costs", "runs"):
        for file in (ROOT / folder).rglob("*.py"):
            name = module_of(file).removeprefix("diffalign.")
            strange = [guess for guess in guesses(file.read_text()) if (name, guess) not in FOREIGN]
            assert not strange, f"{name} guesses {strange}; declare a protocol in core/interfaces.py and ask with isinstance"


def test_the_list_of_guesses_is_not_older_than_the_code():
    found = {(module_of(file).removeprefix("diffalign."), guess) for file in FILES for guess in guesses(file.read_text())}
    assert FOREIGN.keys() <= found


def test_guesses_are_seen():
    assert list(guesses("getattr(part, 'rows', None) or hasattr(part, name) or getattr(part, 'rows')")) == ["'rows'", "name"]


MODULES = [module_of(file) for file in FILES if file.name != "__main__.py"]


@pytest.mark.parametrize("name", MODULES)
def test_concrete_classes_are_final(name):
    module = importlib.import_module(name)
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ != name:
            continue
        for base in kind.__mro__[1:]:
            if base.__module__.startswith("diffalign") and base.__name__ != "Hook":  # its methods are defaults that do nothing
                assert inspect.isabstract(base) or issubclass(kind, BaseException), f"{kind} extends {base}, which can be built itself"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for public in names:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("name", diffalign.__all__)
def test_the_package_gives_out_what_a_room_has(name):
    rooms = [importlib.import_module(f"diffalign.{room}") for room in ("core", "objectives", "policies", "prompts", "samplers")]
    assert next(getattr(room, name) for room in rooms if hasattr(room, name)) is getattr(diffalign, name)


@pytest.mark.parametrize("name", ["Objective", "Policy", "Progress", "Streams"])
def test_a_name_that_went_to_core_says_so_and_is_found(name):
    with pytest.warns(DeprecationWarning, match=f"diffalign.{name} will go: write `from diffalign.core import {name}`") as said:
        assert getattr(diffalign, name) is getattr(importlib.import_module("diffalign.core"), name)
    assert [warning.filename for warning in said] == [__file__]


def test_the_package_has_no_other_names():
    assert diffalign._ROOMS.keys() == set(diffalign.__all__)
    with pytest.raises(AttributeError, match="module 'diffalign' has no attribute 'Trainer'"):
        diffalign.Trainer  # noqa: B018
