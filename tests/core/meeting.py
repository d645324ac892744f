"""Threads that meet like the processes of a run."""

import threading

import torch


class Meeting:
    """`size` threads; each collective is a place where all must come for the same purpose.

    A process that waits for something else than the others would hang in a real run; here all raise.
    """

    def __init__(self, size=2):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.brought = {}

    def run(self, work):
        """Work of each: rank -> what `work(devices)` gave or raised."""
        found = {}

        def one(rank):
            try:
                found[rank] = work(Member(rank, self))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def bring(self, rank, purpose, value):
        self.brought[rank] = (purpose, value)
        self.barrier.wait()
        there = [self.brought[rank] for rank in range(self.size)]
        self.barrier.wait()
        if len({purpose for purpose, _ in there}) > 1:
            raise AssertionError(f"processes met for different purposes: {[purpose for purpose, _ in there]}")
        return [value for _, value in there]


class Member:
    """Devices of one of the threads."""

    def __init__(self, rank, meeting):
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def sum(self, values):
        return torch.stack(self.meeting.bring(self.rank, ("sum", values.shape), values)).sum(dim=0)

    def maximum(self, values):
        return torch.stack(self.meeting.bring(self.rank, ("maximum", values.shape), values)).amax(dim=0)

    def gather(self, values):
        return torch.cat(self.meeting.bring(self.rank, "gather", values))

    def sum_gradients(self, parameters):
        for parameter in parameters:
            parameter.grad = self.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def barrier(self):
        self.meeting.bring(self.rank, "barrier", None)
