"""What the processes with the same stages do together: averages, votes, and batches for a checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.replicas import Replicas
from tests.ranks import run_ranks


def replicas() -> Replicas:
    """Two, on the host."""
    dist.init_process_group("gloo")
    return Replicas(2, int(os.environ["RANK"]), dist.group.WORLD, dist.group.WORLD)


def samples(batch: dict[str, Any]) -> int:
    return len(batch["activations"][0])


def batch(count: int, length: int) -> dict[str, Any]:
    labels = torch.arange(count)
    return {"activations": (torch.ones(count, length),), "context": {"y": labels, "w": torch.ones(9)}, "step": 3}


def test_samples_are_joined_and_shared_batch_by_batch() -> None:
    def work() -> Any:
        own = replicas()
        joined = own.join([batch(4 - own.index, 5)], samples)
        alone = own.join([batch(4, 5 + own.index)], samples)  # padded to other lengths
        return joined, alone, own.share(joined, samples)

    for rank, ((joined,), (alone,), (part,)) in enumerate(run_ranks(2, work)):
        assert joined["activations"][0].shape == (7, 5)
        assert joined["context"]["y"].tolist() == [0, 1, 2, 3, 0, 1, 2]
        assert joined["context"]["w"].shape == (9,)
        assert (alone["activations"][0].shape, alone["context"]["y"].shape) == ((4, 5), (4,))
        assert part["context"]["y"].tolist() == [[0, 1, 2, 3], [0, 1, 2]][rank]
        assert part["context"]["w"].shape == (9,)
        too_few_for_all = Replicas(8, 7).share([joined], samples)
        assert too_few_for_all[0]["activations"][0].shape == (7, 5)


def test_tensors_of_any_type_are_averaged_and_one_vote_is_enough() -> None:
    def work() -> tuple[list[Tensor], list[Tensor], list[bool]]:
        own = replicas()
        tensors = [torch.full((2, 3), 1.0 + own.index), torch.full((), 4.0 * own.index, dtype=torch.float64)]
        averaged = own.average(tensors)
        in_place = [tensor.clone() for tensor in tensors]
        own.average_(in_place)
        return averaged, in_place, [own.any(own.index == 1), own.any(False)]

    for averaged, in_place, votes in run_ranks(2, work):
        for tensors in (averaged, in_place):
            assert torch.equal(tensors[0], torch.full((2, 3), 1.5))
            assert torch.equal(tensors[1], torch.tensor(2.0, dtype=torch.float64))
        assert votes == [True, False]


def test_one_replica_keeps_what_it_has() -> None:
    alone, tensors, batches = Replicas(), [torch.ones(2)], [batch(4, 5)]
    assert alone.average(tensors)[0] is tensors[0]
    assert alone.join(batches, samples) is batches
    assert alone.share(batches, samples) is batches
    assert (alone.any(True), alone.any(False)) == (True, False)
