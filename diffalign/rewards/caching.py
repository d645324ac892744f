"""Cache of scores."""

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from diffalign.core import Partial, Prompt, Reward, RewardFunction, score
from diffalign.core.demands import reach, require


@attrs.define(eq=False)
class Cached(Reward):
    """Reward that remembers the scores of (image, prompt), by a hash of all pixels, the text, the metadata and the source.

    It saves time if images come again: duplicates within a batch, evaluation on fixed images, a slow judge that is asked twice. Use it
    for rewards that score each image on its own and always alike; a noisy reward keeps its first answer.

    Args:
        reward: reward whose scores are remembered; also that it does not apply to a picture
        size: number of scores that are kept; those that were not used for the longest time are removed first
    """

    reward: RewardFunction
    size: int = attrs.field(default=100_000, validator=attrs.validators.ge(1))
    hits: int = attrs.field(default=0, init=False)
    misses: int = attrs.field(default=0, init=False)
    _scores: OrderedDict[bytes, float | None] = attrs.field(factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def reach(self) -> None:
        """Check the server of the inner reward."""
        reach([self.reward])

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Require what the reward inside requires."""
        require([self.reward], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | Partial:
        keys = [_key(image, prompt) for image, prompt in zip(images.detach().cpu(), prompts, strict=True)]
        with self._lock:
            known = {key: self._scores[key] for key in keys if key in self._scores}
        places: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                places.setdefault(key, place)
        if places:
            chosen = list(places.values())
            fresh = score({"Cached.reward": self.reward}, images[chosen], [prompts[place] for place in chosen]).partial("Cached.reward")
            told = zip(places, fresh.values.tolist(), fresh.applies.tolist(), strict=True)
            known |= {key: value if applies else None for key, value, applies in told}
        with self._lock:
            self.hits, self.misses = self.hits + len(keys) - len(places), self.misses + len(places)
            for key in keys:
                self._scores[key] = known[key]
                self._scores.move_to_end(key)
            while len(self._scores) > self.size:
                self._scores.popitem(last=False)
        values = torch.tensor([known[key] or 0.0 for key in keys], dtype=torch.float32, device=images.device)
        return Partial(values, torch.tensor([known[key] is not None for key in keys], dtype=torch.bool, device=images.device)).plain()


def _key(image: Tensor, prompt: str) -> bytes:
    known, digest = Prompt.of(prompt), hashlib.sha256()
    source = () if known.source is None else (known.source.encode(errors="surrogatepass"),)
    for part in (*_content(image), str(known).encode(errors="surrogatepass"), *_content(known.metadata), *source):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


def _content(value: object) -> Iterator[bytes]:
    """All that a value holds, each part of it told apart: `repr` leaves out the middle of long arrays."""
    if isinstance(value, Mapping):
        yield f"mapping of {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _content(value[key])
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} of {len(value)}".encode()
        for inner in value:
            yield from _content(inner)
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield repr((tuple(plain.shape), plain.dtype)).encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield repr((value.shape, value.dtype)).encode()
        yield value.tobytes()
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield repr(value).encode()
    else:
        yield _pickled(value)


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # a function, an open file: told apart by what it says of itself
        return repr(value).encode()
