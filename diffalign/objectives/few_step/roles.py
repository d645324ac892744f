"""The policies beside the student: the frozen teacher, and what starts from it."""

from diffalign.core import Policy, require_frozen


def frozen_teacher(policy: Policy, teacher: Policy | None) -> Policy:
    """The given teacher, which must be frozen, or the policy without its LoRA delta.

    Raises:
        ValueError: a teacher that could move; or none, and a policy that trains all its weights.
    """
    if teacher is None:
        return policy.fork(pristine=True)
    require_frozen(teacher, "teacher")
    return teacher


def moving_fork(start: Policy, given: Policy | None, role: str, policy: Policy) -> Policy:
    """The given policy, or a trainable fork of `start`.

    Raises:
        ValueError: the given one is the student itself, or has nothing to train.
    """
    if given is None:
        return start.fork(trainable=True)
    if given is policy or not given.trainable_parameters():
        raise ValueError(f"{role} must be a policy of its own that can be trained; leave it out, or give teacher.fork(trainable=True)")
    return given
