"""Every reward with images there, here, and with a device of its own: the scores of the CPU, where the images are."""

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))

import test_geneval
import test_hps
import test_remote
from fake_server import FakeServer, says
from tiny_models import PROMPTS, aesthetic_head, clip_folder, clip_tokenizer, image_reward_folder, noise
from torch.nn.functional import interpolate

from diffalign import Prompt
from diffalign.core import score
from diffalign.rewards import (
    OCR,
    Aesthetic,
    BinaryLiking,
    Cached,
    Clipped,
    CLIPScore,
    Concurrent,
    GenEval,
    HPSv2,
    ImageReward,
    JPEGCompressibility,
    Judge,
    PickScore,
    RemoteReward,
    WeightedSum,
    WorkerReward,
)
from diffalign.rewards.memory import HalvedBatches
from diffalign.rewards.reading import Reader
from diffalign.shapeworld import BindingReward, CompositionalReward, CountReward, ExactMatch, RelationReward, TextReward
from diffalign.shapeworld.grammar import parse
from diffalign.shapeworld.render import draw
from diffalign.testing.pretended_device import FarTensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny networks in the form in which real ones are published."""
    root = tmp_path_factory.mktemp("networks")
    for name in ("clip", "head", "hps", "blip", "detector"):
        (root / name).mkdir()
    _, model, tokenizer = clip_folder(root / "clip")
    with torch.no_grad():
        model.visual_projection.weight.neg_()  # of a negative cosine CLIPScore would see nothing
    model.save_pretrained(root / "turned")
    tokenizer.save_pretrained(root / "turned")
    aesthetic_head(root / "head")
    torch.save(test_hps.checkpoint(), root / "hps" / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(root / "hps")
    image_reward_folder(root / "blip")
    test_geneval.tiny_detector(test_geneval.LABELS).save_pretrained(root / "detector")
    return root


NETWORKS = {
    "PickScore": lambda folder, device: PickScore(str(folder / "clip"), batch=2, device=device),
    "CLIPScore": lambda folder, device: CLIPScore(str(folder / "turned"), device=device),
    "Aesthetic": lambda folder, device: Aesthetic(str(folder / "clip"), str(folder / "head"), device=device),
    "HPSv2": lambda folder, device: HPSv2(str(folder / "hps"), tokenizer=str(folder / "hps"), device=device),
    "ImageReward": lambda folder, device: ImageReward(str(folder / "blip"), tokenizer=str(folder / "blip"), batch=2, device=device),
    "GenEval": lambda folder, device: GenEval(str(folder / "detector"), str(folder / "clip"), side=96, threshold=0.1, device=device),
}
PLACES = {
    "where the images are": ("far", None),
    "on the CPU": ("far", "cpu"),
    "there, the images here": ("cpu", "far"),
}


def asked(name):
    """Images with prompts that the reward understands. One image has the five cubes of GenEval's prompt, so colours are judged."""
    if name != "GenEval":
        return noise(), PROMPTS
    include = [{"class": "cube", "count": 5, "color": "yellow"}, {"class": "cat", "count": 1}, {"class": "ball", "count": 1}]
    images = interpolate(noise(3, 12, 12), size=(96, 96), mode="bicubic").clamp(0, 1)
    return images, [Prompt("p", {"include": include})] * 3


def scores(reward, images, prompts):
    """By way of the loop's own checks, which must leave them where the images are."""
    given = score({"reward": reward}, images, prompts)["reward"]
    assert given.device == images.device
    assert given.dtype == torch.float32
    return given.cpu()


def weights(reward):
    """Where the networks of a reward have ended up."""
    clip, network, detector = (getattr(reward, name, None) for name in ("_clip", "_network", "_detector"))
    networks = [part for part in (clip and clip.model, network, detector and detector.model, getattr(reward, "_layers", None)) if part]
    assert networks
    return {parameter.device.type for part in networks for parameter in part.parameters()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_scores_there_as_here(name, place, folder, traffic):
    images, prompts = asked(name)
    images_on, reward_on = PLACES[place]
    here = scores(NETWORKS[name](folder, None), images, prompts)
    reward = NETWORKS[name](folder, reward_on)
    there = scores(reward, images.to(images_on), prompts)
    assert here.std() > 1e-3
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert weights(reward) == {reward_on or images_on}
    assert traffic.copies


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_follows_the_images_to_and_fro(name, folder):
    """An evaluation on the CPU between steps on a GPU, for instance."""
    images, prompts = asked(name)
    reward = NETWORKS[name](folder, None)
    here, there, again = (scores(reward, images.to(device), prompts) for device in ("cpu", "far", "cpu"))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, here, rtol=1e-5, atol=1e-5)


class Brightest(Reader):
    """Reads a letter off the brightness."""

    def read(self, pixels):
        return "ab"[int(pixels.sum()) % 2]


def bright(images, prompts):
    return images.mean(dim=(1, 2, 3))


def red(images, prompts):
    return images[:, 0].amax(dim=(1, 2)) * images.new_tensor([float(len(prompt)) for prompt in prompts])


class Small:
    """Memory for two images."""

    def __call__(self, images, prompts):
        if len(images) > 2:
            raise MemoryError
        return bright(images, prompts)


TWO = {"bright": bright, "red": red}
PLAIN = {
    "JPEGCompressibility": JPEGCompressibility,
    "OCR": lambda: OCR(reader=Brightest(), key="letter"),
    "Cached": lambda: Cached(bright),
    "Clipped": lambda: Clipped(red, low=9.0, high=15.0),
    "BinaryLiking": lambda: BinaryLiking(bright, 0.5),
    "WeightedSum": lambda: WeightedSum(TWO, {"bright": 2.0, "red": -1.0}),
    "Concurrent": lambda: Concurrent(TWO, {"bright": 2.0, "red": -1.0}),
    "HalvedBatches": lambda: HalvedBatches(Small()),
    "Concurrent over several kinds": lambda: Concurrent({"size": JPEGCompressibility(), "known": Cached(bright), "red": red}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_reward_without_a_network_scores_there_as_here(name):
    images, prompts = noise(), [Prompt(prompt, {"letter": "a"}) for prompt in PROMPTS]
    here, there = (scores(PLAIN[name](), images.to(device), prompts) for device in ("cpu", "far"))
    assert here.unique().numel() > 1
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


def test_what_is_remembered_of_the_cpu_serves_there_too():
    cached, images = Cached(bright), noise()
    here = scores(cached, images, PROMPTS)
    assert torch.equal(scores(cached, images.to("far"), PROMPTS), here)
    assert (cached.hits, cached.misses) == (3, 3)


def test_ocr_with_its_engine():
    pytest.importorskip("rapidocr")
    import numpy as np

    caption = 'the text "K7" in blue'
    image = torch.from_numpy(draw(parse(caption), np.random.default_rng(0)))[None].float()
    assert scores(OCR("exact"), image.to("far"), [Prompt(caption)]).tolist() == [1.0]


SHAPES = {
    CountReward: ["three red circles", "one blue square"],
    BindingReward: ["a red circle and a blue square", "a green triangle and a red cross"],
    RelationReward: ["a red circle left of a blue square", "a green triangle above a red cross"],
    TextReward: ['the text "K7" in blue', 'the text "AC" in red'],
}
MIXED = [caption for captions in SHAPES.values() for caption in captions]


@pytest.mark.parametrize(
    ("kind", "captions"),
    [*SHAPES.items(), (CompositionalReward, MIXED), (ExactMatch, MIXED)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shapeworld_is_read_there_as_here(kind, captions):
    import numpy as np

    random = np.random.default_rng(0)
    drawn = torch.from_numpy(np.stack([draw(parse(caption), random) for caption in captions])).float()
    images, prompts = torch.cat([drawn, drawn.flip(0)]), [Prompt(caption) for caption in captions] * 2
    here, there = (scores(kind(), images.to(device), prompts) for device in ("cpu", "far"))
    assert here.unique().numel() > 1
    assert torch.equal(there, here)


def test_a_reward_in_another_process_and_one_on_another_machine(tmp_path, monkeypatch):
    (tmp_path / "far_worker.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    images = (noise(3, 8, 6) * 255).round() / 255  # they travel in 8 bits
    worker = WorkerReward("far_worker:bright", timeout=60.0)
    with FakeServer(test_remote.brightness) as server:
        for reward in (worker, RemoteReward(server.url, batch=2)):
            here, there = (scores(reward, images.to(device), PROMPTS) for device in ("cpu", "far"))
            assert torch.equal(there, here)
            torch.testing.assert_close(here, images.mean(dim=(1, 2, 3)))
    worker.close()


def test_a_judge_sees_the_picture():
    answer = b'{"choices": [{"message": {"content": "{\\"score\\": 4}"}}]}'
    images = noise(2, 8, 6)
    with FakeServer(says(200, answer)) as server:
        judge = Judge(f"{server.url}/v1", "m", concurrency=1)
        assert scores(judge, images.to("far"), PROMPTS[:2]).tolist() == pytest.approx([0.4, 0.4])
        scores(judge, images, PROMPTS[:2])
        assert server.bodies[:2] == server.bodies[2:]
        assert b"data:image/png" in server.bodies[0]


@pytest.mark.parametrize(
    "given",
    [
        lambda values: values.tolist(),
        lambda values: values.cpu(),
        lambda values: values.cpu().double().numpy(),
        lambda values: values,
        lambda values: list(values),
        lambda values: [value.item() for value in values],
    ],
    ids=["list", "CPU tensor", "array", "tensor", "list of tensors", "list of numbers"],
)
@pytest.mark.parametrize("device", ["far", "cpu"])
def test_whatever_a_function_gives(given, device):
    images = noise()
    there = score({"reward": lambda images, prompts: given(bright(images, prompts))}, images.to(device), PROMPTS)["reward"]
    assert isinstance(there, FarTensor) == (device == "far")
    torch.testing.assert_close(there.cpu(), bright(images, PROMPTS))


def test_a_thread_begins_on_the_current_device(monkeypatch):
    """Which each thread has its own of: without this, every reward of several GPUs' processes would mean the first one by "cuda"."""
    begun = {}
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: begun.update({threading.current_thread().name: index}))
    asking = set()

    def noting(images, prompts):
        asking.add(threading.current_thread().name)
        return bright(images, prompts)

    Concurrent({"one": noting, "other": noting})(noise().to("far"), PROMPTS)
    assert asking <= begun.keys()
    assert set(begun.values()) == {3}
    begun.clear()
    Concurrent({"one": noting})(noise(), PROMPTS)
    assert not begun


@pytest.mark.parametrize("name", NETWORKS)
def test_a_device_that_is_not_there_is_known_before_the_weights_are_read(name):
    nowhere = Path("/nowhere")
    with pytest.raises(ValueError, match=r"device must be one that torch finds on this machine \(cpu, far:0\) or auto; got 'gpu'"):
        NETWORKS[name](nowhere, "gpu")
