"""On-policy distillation: several frozen teachers, each on its own prompts, into one student on the student's own states.

Legend: N nodes, U of them that are not ends.
"""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from diffalign.core import (
    ROOT,
    Loss,
    NonFiniteError,
    Objective,
    Outline,
    Phase,
    Policy,
    Prompt,
    ScoredBatch,
    TrajectoryBatch,
    UpdateRows,
    require_frozen,
)
from diffalign.core.guided import evaluations

from .noised import mean_square


@attrs.define(eq=False)
class OnPolicyDistillation(Objective):
    """Regresses the student's velocity on that of a prompt's teacher, at the states through which the student itself went.

        loss = mean over prompts and samples of the sum over the steps of its path of mean |v_student(x, sigma) - v_teacher(x, sigma)|^2

    The teacher of a prompt is that of its source (`Mixture`), or of an entry of its metadata. So policies that were aligned with different
    rewards become one. Where prompts have no source, a single teacher teaches all. Rewards are not used; they watch. The paper begins from
    a student that was trained on the teachers' images, and holds it to a further teacher; give that teacher prompts of its own. The squared
    norm as a mean over dimensions is ours.

    The student rolls out, by a sampler that stores every level, because a step whose state is not stored would never be taught:
    `DeterministicSampler` without a solver, or trees and chains in which no two deterministic steps follow each other, such as
    `ChainSampler` with its default window.

    Args:
        policy: the student
        teachers: frozen policies, by the name of a source or by the value of the metadata entry
        by: entry of the metadata that names the teacher; None takes the prompt's source
        rows: states per micro-batch of the update; None takes all at once. The gradient does not depend on it

    Raises:
        ValueError: there is no teacher, one is trainable or has a name with blanks, a prompt has none, or the batch does not store every
            level of its trajectories.

    Reference: Flow-OPD, arXiv:2605.08063.
    """

    policy: Policy
    teachers: Mapping[str, Policy]
    by: str | None = None
    rows: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))

    def __attrs_post_init__(self) -> None:
        if not self.teachers:
            raise ValueError("OnPolicyDistillation.teachers must name at least one teacher; got none")
        for name, teacher in self.teachers.items():
            require_frozen(teacher, f"teachers[{name!r}]")
            if not name or "/" in name or any(letter.isspace() for letter in name):
                raise ValueError(
                    "OnPolicyDistillation.teachers: a name must hold no blanks and no '/', because it ends names of metrics and files; "
                    f"got {name!r}"
                )

    def phases(self) -> tuple[Phase, ...]:
        return (Phase({"policy": self.policy}, self._losses),)

    def policies(self) -> Mapping[str, Policy]:
        return {"policy": self.policy, **{f"teacher_{name}": teacher for name, teacher in self.teachers.items()}}

    def update_rows(self, samples: int, parents: int) -> None:
        """Return None: `step_rows` says more."""

    def step_rows(self, outline: Outline) -> UpdateRows | None:
        """Rows of the student and of one teacher at each state; None where trajectories share states, whose number is not known."""
        if any(outline.noise_levels):
            return None
        rows = outline.samples * outline.stages
        return UpdateRows((rows,), (rows,) * max(map(evaluations, self.teachers.values())))

    def teacher_of(self, prompt: Prompt) -> str:
        """Name of the teacher of a prompt.

        Raises:
            ValueError: the prompt names none, or one that is not there.
        """
        found = prompt.source if self.by is None else prompt.metadata.get(self.by)
        if found is None and self.by is None and len(self.teachers) == 1:
            return next(iter(self.teachers))
        if found not in self.teachers:
            where = "source" if self.by is None else f"metadata entry {self.by!r}"
            raise ValueError(
                f"OnPolicyDistillation: the {where} of prompt {str(prompt)!r} must name a teacher, {', '.join(map(str, self.teachers))}; "
                f"got {found!r}. Take prompts from a Mixture whose sources have the teachers' names, or give `by`."
            )
        return str(found)

    def _losses(self, batch: ScoredBatch, update: int) -> Iterator[Loss]:
        trajectories = batch.trajectories
        names = [self.teacher_of(prompt) for prompt in trajectories.condition.prompts]
        nodes = (trajectories.level < len(trajectories.sigmas) - 1).nonzero().squeeze(1)
        if not len(nodes):
            raise ValueError(
                "OnPolicyDistillation needs the states of a trajectory, but this batch stores finished samples alone. Take "
                "DeterministicSampler without a solver, or a sampler with noise."
            )
        require_every_level(trajectories)
        weight = shares(trajectories)[nodes] / batch.groups
        for piece in torch.arange(len(nodes)).split(self.rows or len(nodes)):
            yield self._piece(trajectories, nodes[piece.to(nodes.device)], weight[piece.to(weight.device)], names)

    def _piece(self, trajectories: TrajectoryBatch, nodes: Tensor, weight: Tensor, names: list[str]) -> Loss:
        latents, sigma, prompt = trajectories.latents[nodes], trajectories.sigmas[trajectories.level[nodes]], trajectories.prompt[nodes]
        condition = trajectories.condition.select(prompt)
        velocity = self.policy.velocity(latents, sigma, condition)
        mine = [names[place] for place in prompt.tolist()]
        target, metrics = torch.empty_like(velocity), {}
        with torch.no_grad():
            for name, teacher in self.teachers.items():
                rows = torch.tensor([row for row, whose in enumerate(mine) if whose == name], device=latents.device, dtype=torch.long)
                if len(rows):
                    taught = teacher.velocity(latents[rows], sigma[rows], condition.select(rows))
                    target = target.index_copy(0, rows, taught.to(target.dtype))
                    metrics[f"distance/{name}"] = (mean_square(velocity[rows] - taught).sum(), torch.tensor(len(rows)))
        distance = mean_square(velocity - target)
        if not bool(distance.isfinite().all()):
            bad = int((~distance.isfinite()).nonzero()[0])
            prompts = trajectories.condition.prompts
            raise NonFiniteError(
                f"the velocity of the student, or of its teacher {mine[bad]!r}, is not finite at sigma {float(sigma[bad]):.4g}, prompt "
                f"{str(prompts[int(prompt[bad])])!r}. Nothing was updated."
            )
        value = (weight * distance).sum()
        return Loss(value, {"distance": (distance.detach().sum(), torch.tensor(len(nodes))), **metrics})


def require_every_level(trajectories: TrajectoryBatch) -> None:
    """Refuse a forest in which an edge spans several levels: the steps between its ends would never be taught.

    Raises:
        ValueError: a path stores fewer nodes than the grid has levels.
    """
    stored, levels = (trajectories.paths != ROOT).sum(dim=1), len(trajectories.sigmas)
    if bool((stored < levels).any()):
        raise ValueError(
            f"OnPolicyDistillation needs every level of a trajectory, or some steps would never be taught; this batch stores "
            f"{int(stored.min())} of {levels} levels of a path. Take DeterministicSampler without a solver, or a window or plan in which "
            "no two steps without noise follow each other."
        )


def shares(trajectories: TrajectoryBatch) -> Tensor:
    """Share of the prompt's samples below each node, by which a sum over nodes is a mean over samples of sums over paths: [N], float64."""
    each = 1 / torch.bincount(trajectories.group)[trajectories.group].double()
    inside = trajectories.paths >= 0
    below = each[:, None].expand_as(trajectories.paths)[inside]
    return each.new_zeros(len(trajectories.latents)).index_add(0, trajectories.paths[inside], below)
