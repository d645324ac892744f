"""Plans of published models whose weights are nowhere near, and the one message about all that is missing."""

import importlib.util
import inspect
import re
from pathlib import Path

import attrs
import pytest
import torch
from tiny_pipelines import saved

from diffalign import config
from diffalign.cli import main
from diffalign.core import ConfigError, hub
from diffalign.costs import unloaded as costs_unloaded
from diffalign.costs.activations import Activations
from diffalign.costs.beside import beside_bytes
from diffalign.costs.capacity import row_flops
from diffalign.costs.expected import Manner
from diffalign.costs.live import LiveBytes
from diffalign.costs.planned import NOT_PLANNED, planned
from diffalign.costs.rows import Counted
from diffalign.costs.shapes import PUBLISHED
from diffalign.costs.sizes import tensor_bytes
from diffalign.costs.unloaded import PLACES, saved_bytes, shape_of, unloaded
from diffalign.policies import CallGraphs, Compilation, FlowMatchingPolicy, LoRA
from diffalign.prompts import Prompts

GIB = 2**30
SANA = """
policy:
  class_path: FlowMatchingPolicy.from_pretrained
  init_args: {path: Efficient-Large-Model/Sana_1600M_1024px_diffusers, dtype: bfloat16, device: cuda, lora: {rank: 4}, OPTIONS}
objective: {class_path: SoftmaxTB, init_args: {rows: 4}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {splits: [1, 2], branches: 3}}}
rewards: {beauty: PickScore, words: {class_path: CLIPScore, init_args: {model: nowhere/at-all}}}
aggregation: {class_path: StandardizedParts, init_args: {weights: {beauty: 1.0, words: 2.0}}}
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
prompts_per_step: 1
evaluation: {prompts: PROMPTS}
"""


@pytest.fixture
def run(tmp_path):
    """Writes the run file with options of its policy."""

    def write(options="", prompts="generated/preference-held-out"):
        file = tmp_path / "sana.yaml"
        file.write_text(SANA.replace(", OPTIONS", f", {options}" if options else "").replace("PROMPTS", prompts))
        return str(file)

    return write


@pytest.fixture
def shallow(monkeypatch):
    """Models of one block of each kind: they are planned in the same way, and counted in a second."""
    one = {"num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1, "transformer_layers_per_block": 1}

    def cut(shape):
        config = {name: one.get(name, value) for name, value in shape.config.items()}
        return attrs.evolve(shape, config={**config, **({"dual_attention_layers": (0,)} if "dual_attention_layers" in config else {})})

    monkeypatch.setattr(costs_unloaded, "PUBLISHED", {name: cut(shape) for name, shape in PUBLISHED.items()})


@pytest.fixture
def alone(monkeypatch):
    """No network, which nobody tries to reach."""
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.is_within_reach.cache_clear()
    yield
    hub.is_within_reach.cache_clear()


def test_a_run_is_planned_with_nothing_but_its_file(run, shallow, capsys):
    assert main(["check", run("checkpointing: true"), "--no-weights", "--device", "h100", "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "all 4 rows of an update fit 80 GiB at once" in said
    seconds = float(re.search(r"least on h100 +(\S+) s a step", said)[1])
    assert 1e-4 < seconds < 2.0
    assert "rewards (beauty, words) and evaluation: their memory and time come on top" in said
    assert f"{(PUBLISHED['Sana-1.6B'].autoencoder + sum(PUBLISHED['Sana-1.6B'].encoders.values())) * 2 / GIB:.1f} GiB for text" in said
    assert main(["check", run(), "--no-weights", "--memory", "5"]) == 0
    said = capsys.readouterr().out
    assert "nothing fits" in said
    assert "not known: give the card, by --device NAME, or by --teraflops and --bandwidth" in said


def test_a_model_of_unknown_shape_and_a_step_without_weights_are_refused(run, capsys):
    assert main(["check", run(), "--no-weights", "--policy.path", "somebody/else"]) == 2
    assert "policy.path must be a model whose shape is known" in capsys.readouterr().err
    assert main(["check", run(), "--no-weights", "--try"]) == 2
    assert "leave out --no-weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_makes_a_policy(name, shallow):
    policy = unloaded(name, lora=LoRA(rank=1), dtype="bfloat16", checkpointing=True)
    assert policy.latent_shape == PUBLISHED[name].latent()
    assert len(policy.sigmas(4)) == 5
    condition = policy.encode(Prompts(["a"]).draw(0, 1))
    assert {key: tuple(tensor.shape) for key, tensor in condition.tensors.items()} == {
        key: (1, *shape) for key, shape in PUBLISHED[name].texts.items()
    }
    if PUBLISHED[name].network != "UNet2DConditionModel":  # UNets have no blocks to leave out, and take seconds
        counted = Counted.of(policy, condition)(1)
        assert counted.peak > 0
        again = [one for one in counted.backward.operators if one.kind == "product" and not one.useful]
        assert sum(one.operations for one in again) > 0.4 * counted.forward.useful  # checkpointing computes blocks again


@pytest.mark.parametrize("name", [name for name, shape in PUBLISHED.items() if shape.network != "UNet2DConditionModel"])
def test_the_estimate_of_operations_is_near_their_count(name, shallow):
    policy = unloaded(name, lora=LoRA(rank=1), dtype="bfloat16")
    counted = Counted.of(policy, policy.encode(Prompts(["a"]).draw(0, 1)))(1)
    assert 0.5 < row_flops(policy) / counted.forward.useful < 1.5


def test_every_hub_id_has_a_shape():
    assert {PLACES[place] for place in PLACES} == set(PUBLISHED)
    assert shape_of("SDXL") is shape_of("stabilityai/stable-diffusion-xl-base-1.0")


def test_weights_in_four_bits_take_less(run, shallow):
    policy = unloaded("SD3.5-M", lora=LoRA(rank=4), dtype="bfloat16", resolution=512)
    blocks = sum(map(tensor_bytes, policy.network.transformer_blocks.parameters()))
    assert blocks - saved_bytes(policy, "nf4") == pytest.approx(blocks * 4.13 / 16, rel=0.05)  # and its adapters stay float32
    assert blocks - saved_bytes(policy, "int8") == pytest.approx(blocks / 2, rel=0.05)
    assert saved_bytes(policy, None) == 0
    teacher = unloaded("SD3.5-M", lora=LoRA(rank=4), dtype="bfloat16", resolution=512, trainable=False)
    assert saved_bytes(teacher, "nf4") == saved_bytes(policy, "nf4")  # its adapters stay float32 too
    assert planned(config.parse(run("quantization: nf4"))).saved > 1e7


def test_adapters_that_start_from_a_file_are_planned_without_it(run, shallow):
    given = ["--policy.lora.start", "nowhere/student", "--policy.lora.start_scale", "0.125"]
    plans = [planned(config.parse(run(), overrides)) for overrides in (given, [])]
    assert len({plan.loop.objective.policy.own for plan in plans}) == 1


def test_a_compiled_and_recorded_run_is_planned_as_one(run, shallow, capsys):
    file = run("compilation: {backend: eager}, graphs: {}")
    policy = planned(config.parse(file)).loop.objective.policy
    assert (policy.compilation, policy.graphs) == (Compilation(backend="eager"), CallGraphs())
    plain = planned(config.parse(run())).loop.objective.policy
    assert Manner.of(policy).several.rest < Manner.of(plain).several.rest
    assert Manner.of(policy).single.host == 0.0 < Manner.of(plain).single.host
    assert main(["check", run("compilation: {backend: eager}, graphs: {}"), "--no-weights", "--device", "h100"]) == 0
    assert "; compiled, no decoding, no rewards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": None, "dtype": "bfloat16"}, "dtype must be float32 when all weights are trained"),
        ({"lora": None, "dtype": "float32", "quantization": "nf4"}, "quantization must be left out when all weights are trained"),
        ({"lora": {"rank": 4}, "dtype": "bfloat16", "compute": "bfloat16"}, "compute must be left out if dtype is bfloat16"),
    ],
)
def test_a_plan_refuses_what_training_refuses(settings, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        unloaded("Sana-1.6B", **settings)
    with pytest.raises(ValueError, match=message):
        FlowMatchingPolicy.from_pretrained(str(tmp_path), device="cpu", **settings)
    given = [word for name, value in settings.items() for word in (f"--policy.{name}", "null" if value is None else str(value))]
    with pytest.raises(ConfigError, match=f"policy.*{message}"):
        planned(config.parse(run(), given))


def test_no_argument_of_a_policy_is_forgotten_in_its_plan():
    asked = inspect.signature(FlowMatchingPolicy.from_pretrained).parameters
    assert asked.keys() == inspect.signature(unloaded).parameters.keys() | NOT_PLANNED
    assert not inspect.signature(unloaded).parameters.keys() & NOT_PLANNED


def test_texts_of_a_plan_are_as_long_as_those_of_the_run(shallow):
    for name, asked, expected in (("SD3.5-M", 128, 77 + 128), ("FLUX.1-dev", 256, 256), ("Sana-1.6B", None, 300)):
        policy = unloaded(name, lora=LoRA(rank=1), dtype="bfloat16", max_sequence_length=asked)
        assert policy.encode(Prompts(["a"]).draw(0, 1)).tensors["embeds"].shape[1] == expected


def test_the_memory_of_an_update_is_that_of_its_live_tensors(tmp_path_factory):
    """Against what lives on the CPU: the same storages, with numbers."""
    policy = FlowMatchingPolicy.from_pretrained(
        saved(tmp_path_factory, "flux-dev"), resolution=32, lora=LoRA(rank=2), max_sequence_length=24, device="cpu"
    )
    condition, rows, peaks = policy.encode(Prompts(["a"]).draw(0, 1)), 3, []
    for checkpointing in (False, True):
        if checkpointing:
            policy.network.enable_gradient_checkpointing()
        counted = Counted.of(policy, condition)
        with LiveBytes() as live:
            x = torch.zeros(rows, *policy.latent_shape)
            velocity = policy.velocity(x, torch.full((rows,), 0.5), condition.select(torch.zeros(rows, dtype=torch.long)))
            torch.autograd.grad(velocity.sum(), list(policy.trainable_parameters().values()), allow_unused=True)
        peaks.append(counted.peak(rows))
        assert peaks[-1] == pytest.approx(live.peak, rel=0.25)  # plain attention keeps its scores on a CPU
    assert peaks[1] < peaks[0]


def test_text_encoders_and_autoencoder_are_counted_beside_the_policy():
    policy = FlowMatchingPolicy.from_pretrained("shapeworld", lora=LoRA(rank=1), max_sequence_length=16, device="cpu")
    beside = beside_bytes(policy)
    parts = policy.family.pipeline.components
    assert beside.texts == sum(map(tensor_bytes, parts["text_encoder"].parameters())) + sum(
        sum(map(tensor_bytes, parts[name].parameters())) for name in ("text_encoder_2", "text_encoder_3") if parts.get(name) is not None
    )
    assert beside.total == beside.texts + sum(map(tensor_bytes, parts["vae"].parameters()))
    assert not beside.offloaded


def test_rows_that_fit_are_counted_down_from_the_room():
    activations = Activations(per_row=4, size=None, counted=None)
    assert [activations.fitting(room) for room in (-5, 3.9, 4, 11.9, 12)] == [0, 0, 1, 2, 3]
    assert (activations.at(0), activations.at(2)) == (0, 8)


def test_all_that_is_missing_is_one_message(run, alone, capsys):
    """Local things first: the prompt file, then weights of rewards, then those of the model."""
    file = run(prompts="./held-out.txt").replace(".yaml", ".yaml")
    assert main(["check", file, "--policy.device", "cpu"]) == 2
    said = capsys.readouterr().err
    places = [
        said.index(text)
        for text in (
            "4 parts of the run cannot be built",
            "held-out.txt",
            "rewards.beauty: PickScore.model",
            "rewards.words: CLIPScore.model",
            "policy.path",
        )
    ]
    assert places == sorted(places)
    assert said.count("it is no folder here, it is not in the cache, and there is no network") == 3
    assert "Retrying" not in said


def test_a_run_in_which_one_thing_is_missing_says_it_alone(run, alone, capsys):
    assert (
        main(["check", run(), "--policy.device", "cpu", "--rewards", "diffalign.testing.doubles.channel_reward", "--aggregation", "Raw"])
        == 2
    )
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: policy.path must be a diffusers pipeline folder")
    assert "cannot be built" not in said


def test_the_hub_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        hub.socket, "create_connection", lambda place, patience: asked.append(place) or type("S", (), {"close": lambda self: None})()
    )
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    hub.is_within_reach.cache_clear()
    assert hub.is_within_reach()
    assert hub.is_within_reach()
    assert asked == [("huggingface.co", 443)]
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    hub.is_within_reach.cache_clear()
    assert hub.is_within_reach()
    assert asked[-1] == ("proxy.example", 3128)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.is_within_reach.cache_clear()
    assert not hub.is_within_reach()
    assert hub.unreached("a/b", OSError()).endswith("and HF_HUB_OFFLINE is set")
    hub.is_within_reach.cache_clear()


def test_the_table_of_cards_is_what_its_program_counts():
    """The text and one row; `python book/planning.py` writes all of them."""
    file = Path(__file__).parents[1] / "book" / "planning.py"
    spec = importlib.util.spec_from_file_location("book_planning", file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    page = program.FILE.read_text()
    assert page.startswith(program.header())
    rows = page.removeprefix(program.header()).splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in program.MODELS]
    assert rows[list(program.MODELS).index("Sana-1.6B")] == program.line("Sana-1.6B", program.row("Sana-1.6B"))
