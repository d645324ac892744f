"""The book: its snippets run, its commands exist, its links lead somewhere, and what is generated is up to date."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.options import parser_of
from benchmarks.programs import programs_of
from diffalign import cli, config
from diffalign.config import parts, run
from diffalign.core import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
RUN_KEYS = list(run.keys())
named = {"ids": lambda path: path.name}


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(), flags=re.DOTALL)


def code(file):
    """Everything that is set as code outside of Python and YAML."""
    text = re.sub(r"```(?:python|yaml|json)\n.*?```", "", file.read_text(), flags=re.DOTALL)
    fenced = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)
    return [line for block in fenced for line in block.splitlines()] + indented + re.findall(r"`([^`]+)`", text)


def anchors(file):
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", TEXTS, **named)
def test_links_lead_to_files_and_sections(file):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", file.read_text()):
        there = file.parent / target if target else file
        assert there.exists(), f"{file.name} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{file.name} links to {target}#{anchor}"


def test_every_page_is_in_the_table_of_contents_and_on_the_first_page():
    listed = re.findall(r"- (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]
    first = (ROOT / "docs" / "index.md").read_text()
    assert not [page.name for page in PAGES if page.name != "index.md" and f"({page.name})" not in first]


@pytest.mark.parametrize("file", TEXTS, **named)
def test_python_snippets_parse_and_their_imports_exist(file):
    for snippet in blocks(file, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{file.name}: {node.module} has no {alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def test_the_loop_by_hand_is_a_step_of_the_loop():
    names: dict = {}
    (snippet,) = blocks(ROOT / "docs" / "concepts.md", "python")
    exec(compile(snippet, "docs/concepts.md", "exec"), names)
    assert names["policy"].means.detach().sub(torch.tensor([[-1.0, 0.0], [1.0, 0.0]])).abs().max() > 1e-3


def test_the_quick_start_trains_and_plain_diffusers_draws_with_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, comparing, drawing = blocks(ROOT / "docs" / "quickstart.md", "python")
    assert "result = loop.run(20," in training
    names: dict = {}
    exec(
        compile(training.replace("result = loop.run(20,", "loop.prompts_per_step = 1; result = loop.run(1,"), "docs/quickstart.md", "exec"),
        names,
    )
    short = comparing.replace('PromptFile("shapeworld/count-held-out")', '["three red circles", "two blue squares"]').replace(
        "steps=8", "steps=2"
    )
    assert short.count("steps=2") == 2
    exec(compile(short, "docs/quickstart.md", "exec"), names)
    assert names["comparison"].differences()["reward darkness"]["trained"].mean != 0.0
    assert (tmp_path / "runs/dark/merged/model_index.json").exists()
    exec(compile(drawing.replace("guidance_scale=1,", "guidance_scale=1, num_inference_steps=2,"), "docs/quickstart.md", "exec"), names)
    assert names["picture"].size == (64, 64)
    lines = [line for line in drawing.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) == 3


def runs(file):
    """YAML snippets that are mappings of run keys."""
    for text in blocks(file, "yaml"):
        content = yaml.safe_load(text)
        if isinstance(content, dict) and set(content) <= set(RUN_KEYS):
            yield text, content


@pytest.mark.parametrize("file", PAGES, **named)
def test_yaml_snippets_name_keys_and_parts_that_exist(file, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def darkness(images, prompts):\n    return 1 - images.mean(dim=(1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text in blocks(file, "yaml"):
        assert yaml.safe_load(text) is not None
    for text, content in runs(file):
        if "policy" in content:
            config.parse_text(text, file.stem)
        for part in re.findall(r"class_path: ([\w.]+)", text):
            target = parts.own().get(part)
            assert target is not None or "." in part or hasattr(torch.optim, part), f"{file.name}: no part {part}"


def reached(tree, path):
    for key in path.split("."):
        tree = tree.arguments if isinstance(tree, config.blueprint.Part) else tree
        tree = tree[key]
    return tree


def test_the_keys_that_others_are_told_to_use_exist():
    page = (ROOT / "docs" / "migration.md").read_text()
    release, grpo = page.split("## flow_grpo")
    trees = [
        (release, config.parse(ROOT / "examples" / "flux1_tmpo_pickscore.yaml").tree),
        (grpo, config.parse_text(blocks(ROOT / "docs" / "migration.md", "yaml")[0], "grpo").tree),
    ]
    seen = 0
    for text, tree in trees:
        if tree["evaluation"] is None:
            tree = {**tree, "evaluation": trees[0][1]["evaluation"]}
        for row in re.findall(r"^\|.*\| (.*) \|$", text, flags=re.MULTILINE):
            for path in re.findall(r"`([a-z_.]+)`", row):
                if path.split(".")[0] in RUN_KEYS:
                    reached(tree, path)
                    seen += 1
    assert seen > 50


def commands(file):
    return [entry.strip() for entry in code(file) if re.match(r"(\S+=\S+ )?(diffalign|python|make) \S", entry.strip())]


def parsed(arguments):
    try:
        return cli._parser().parse_known_args(arguments)
    except SystemExit:
        return pytest.fail(f"not a command: diffalign {' '.join(arguments)}")


@pytest.mark.parametrize("file", TEXTS, **named)
def test_commands_and_their_options_exist(file, capsys):
    makefile = (ROOT / "Makefile").read_text()
    for entry in commands(file):
        words = re.sub(r"\s+#.*|,.*$", "", entry).replace('"', "").split()
        words = words[1:] if "=" in words[0] else words
        program, *rest = words
        rest = [word for word in rest if word != "..."]
        if program == "make":
            targets = [word for word in rest if "=" not in word]
            assert all(f"\n{target}:" in makefile for target in targets), f"{file.name}: {entry}"
        elif rest[:2] == ["-m", "benchmarks"]:
            for room, name, *options in [rest[2:]] if len(rest) > 3 else []:
                found = programs_of(room)[name]
                told = parser_of(found.main(), name, found.told).format_help()
                assert all(option in told for option in options if option.startswith("--")), f"{file.name}: {entry}"
        elif program == "python" and rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), f"{file.name}: {entry}"
        elif program == "python":
            script = ROOT / rest[0]
            assert script.exists(), f"{file.name}: {entry}"
            assert all(option in script.read_text() for option in rest if option.startswith("--")), f"{file.name}: {entry}"
        elif len(rest) > 1 and rest[0] in (
            "train",
            "check",
            "sample",
            "evaluate",
            "compare",
            "export",
            "parts",
            "check-part",
            "prompts",
            "bundle",
        ):
            _, overrides = parsed(rest)
            unknown = [option for option in overrides if option.startswith("--") and option[2:].split(".")[0].split("=")[0] not in RUN_KEYS]
            assert not unknown, f"{file.name}: {entry} has {unknown}"


def test_the_walk_sees_commands_that_do_not_exist(tmp_path, capsys):
    page = tmp_path / "page.md"
    for wrong in (
        "`diffalign train RUN --resumed`",
        "    diffalign evaluat RUN",
        "```\nmake everything\n```",
        "`python examples/none.py`",
        "`python -m benchmarks cost overhead --none`",
    ):
        page.write_text(f"Text.\n\n{wrong}\n")
        if "evaluat " in wrong:
            with pytest.raises(pytest.fail.Exception):
                parsed(commands(page)[0].split()[1:])
        else:
            with pytest.raises(AssertionError):
                test_commands_and_their_options_exist(page, capsys)


def generator(name):
    spec = importlib.util.spec_from_file_location(f"book_{name}", ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_that_of_the_constructors():
    known = generator("configuration")
    assert known.FILE.read_text() == known.page(), "constructors or docstrings have changed: run `make reference`"


def test_the_configuration_reference_has_every_part_and_every_argument():
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name, part in parts.own().items():
        if any(parts.accepts(slot, part.target) for slot in parts.SLOTS.values() if part.target is not None):
            assert f"### {name}\n" in text, name
    for section in text.split("\n### ")[1:]:
        summary = section.partition("\n|")[0]
        for argument in re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\|  \|$", section, flags=re.MULTILINE):
            assert f"`{argument}`" in summary, f"nothing says what {argument} of {section.partition(chr(10))[0]} is"


def test_objectives_have_a_section_each():
    text = (ROOT / "docs" / "objectives.md").read_text()
    from diffalign import objectives
    from diffalign.core import Objective

    for name in objectives.__all__:
        if issubclass(getattr(objectives, name), Objective) and not inspect.isabstract(getattr(objectives, name)):
            assert f"\n## {name}\n" in text, name


def test_a_wrong_snippet_would_be_seen():
    with pytest.raises(ConfigError):
        config.parse_text("policy: GaussianMixturePolicy\nobjectiv: SoftmaxTB\n", "wrong")
    assert isinstance(cli._parser(), argparse.ArgumentParser)
