"""Join the forests of parts of the prompts into one forest of all prompts."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .types import ROOT, Condition, TrajectoryBatch


def join(condition: Condition, forests: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """Put the forests of consecutive pieces of a condition together.

    If every forest is stored level by level, so is the result: in the order in which a sampler would store all prompts at once.
    Otherwise the forests stand one after the other.

    Args:
        condition: condition of all prompts; if the sampler encoded them anew, its own is used instead
        forests: one for each piece, in order

    Raises:
        ValueError: the forests have different noise grids, so their levels cannot be compared.
    """
    if len(forests) == 1:
        return forests[0]
    first = forests[0]
    if any(not torch.equal(forest.sigmas, first.sigmas) for forest in forests):
        raise ValueError("the forests of one step must have the same sigmas; the sampler gave some prompts another grid")
    parent = torch.cat(_shifted([forest.parent for forest in forests], [len(forest.latents) for forest in forests]))
    prompt = torch.cat(_shifted([forest.prompt for forest in forests], [len(forest.condition) for forest in forests]))
    level = torch.cat([forest.level for forest in forests])
    by_level = all(bool((forest.level.diff() >= 0).all()) for forest in forests)
    order = level.argsort(stable=True) if by_level else torch.arange(len(level), device=level.device)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))  # of an old node in the new order
    parent = parent[order]
    noise_level = torch.cat([forest.noise_level for forest in forests])
    row = (noise_level > 0).cumsum(0) - 1  # of a stochastic node among the means
    noise_level, row = noise_level[order], row[order]
    calls = [int(forest.call.max()) + 1 if len(forest.call) else 0 for forest in forests]
    call = torch.cat(_shifted([forest.call for forest in forests], calls))
    return TrajectoryBatch(
        condition=_condition(condition, [forest.condition for forest in forests]),
        sigmas=first.sigmas,
        latents=torch.cat([forest.latents for forest in forests])[order],
        level=level[order],
        parent=torch.where(parent == ROOT, parent, place[parent.clamp(min=0)]),
        prompt=prompt[order],
        noise_level=noise_level,
        log_prob=torch.cat([forest.log_prob for forest in forests])[order],
        mean=_rows([forest.mean for forest in forests], row[noise_level > 0]),
        call=call[order],
    )


def _condition(whole: Condition, pieces: Sequence[Condition]) -> Condition:
    """Condition of the joined forests: the whole one, unless a sampler encoded its prompts anew."""
    if all(map(_alike, pieces, _cut(whole, [len(piece) for piece in pieces]))):
        return whole
    names = pieces[0].tensors
    return Condition(
        prompts=tuple(prompt for piece in pieces for prompt in piece.prompts),
        ids=torch.cat([piece.ids for piece in pieces]),
        tensors={name: _stacked([piece.tensors[name] for piece in pieces]) for name in names},
    )


def _cut(whole: Condition, sizes: Sequence[int]) -> Iterator[Condition]:
    yield from (whole.select(index) for index in torch.arange(len(whole)).split(list(sizes)))


def _alike(one: Condition, other: Condition) -> bool:
    same = one.tensors.keys() == other.tensors.keys()
    return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of all pieces. Rows of different length are padded with zeros to the longest, as if all had been encoded at once."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        room = tensor.new_zeros(len(tensor), longest - tensor.shape[1], *tensor.shape[2:])
        padded.append(torch.cat([tensor, room], dim=1))
    return torch.cat(padded)


def _shifted(pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Turn indices within each piece into indices within all pieces. ROOT and UNRECORDED are below 0 and stay as they are."""
    shifted, before = [], 0
    for piece, size in zip(pieces, sizes, strict=True):
        shifted.append(torch.where(piece < 0, piece, piece + before))
        before += size
    return shifted


def _rows(pieces: Sequence[Tensor], index: Tensor) -> Tensor:
    """Select rows of all pieces, with their autograd graph if a sampler has kept one."""
    with torch.set_grad_enabled(any(piece.requires_grad for piece in pieces)):
        return torch.cat(list(pieces))[index]
