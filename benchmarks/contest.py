"""One process of a contest: the contestants take turns in the same processes, round after round.

Not a command for people; :mod:`benchmarks.throughput` starts it once for each rank, with torchrun's variables set.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contestants import COPIES, DELAYED, OURS, SINGLE, Clock, Contestant, Turn, contestants
from benchmarks.workloads import WORKLOADS, Workload, emulated
from lightning_sg.tools.timeline import Timeline
from lightning_sg.tools.timeline.spans import shares_of

FEWEST_STEPS = 4


@dataclass(frozen=True)
class Pace:
    """What one rank saw of one turn.

    Attributes:
        steps: How many it measured.
        seconds: How long they took.
        worked: For how long of that the main thread was at work, in seconds.
    """

    steps: int
    seconds: float
    worked: float


def workload_of(name: str) -> Workload:
    """By its name; ``emulated-4x150`` is four stages that sleep 150 ms a step."""
    found = re.fullmatch(r"emulated-(\d+)x([\d.]+)", name)
    return emulated(int(found[1]), float(found[2]) / 1000) if found else WORKLOADS[name]


def skipped(name: str, workload: Workload) -> int:
    """Batches that do not count: of those who work ahead of each other, until the chain is full and runs evenly."""
    decoupled = name == DELAYED or name.startswith(OURS)
    return workload.stages + 8 if decoupled else 2


def take_turn(name: str, contestant: Contestant, workload: Workload, rank: int, steps: int) -> list[Pace | None]:
    """Lets a contestant train ``steps`` batches that count, after some that do not.

    Returns:
        The pace of every rank, in every rank; ``None`` for those that had nothing to do.
    """
    skip = skipped(name, workload)
    clock = Clock()
    pace = None
    gc.collect()
    dist.barrier()
    if name not in SINGLE or rank == 0:
        contestant(Turn(workload, skip + steps, rank, clock))
        pace = Pace(steps, clock.times[-1] - clock.times[skip - 1], clock.worked[-1] - clock.worked[skip - 1])
    paces: list[Pace | None] = [None] * workload.stages
    dist.all_gather_object(paces, pace)
    return paces


def speed_of(name: str, workload: Workload, paces: Sequence[Pace | None]) -> float:
    """Samples a second: of independent copies all together, else of the slowest rank."""
    speeds = [workload.batch * pace.steps / pace.seconds for pace in paces if pace is not None]
    return sum(speeds) if name == COPIES else min(speeds)


def contest(names: Sequence[str], workload: Workload, microbatches: list[int], rounds: int, seconds: float) -> Any:
    """Lets the contestants take turns, each about ``seconds`` long, in an order that rotates with the rounds."""
    rank = dist.get_rank()
    ways = contestants(workload, microbatches)
    steps = {}
    for name in names:  # not counted: it finds out how many steps fit, and warms up
        paces = take_turn(name, ways[name], workload, rank, FEWEST_STEPS)
        each = max(pace.seconds / pace.steps for pace in paces if pace is not None)
        steps[name] = max(FEWEST_STEPS, round(seconds / each))
    records = []
    for round_ in range(rounds):
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            paces = take_turn(name, ways[name], workload, rank, steps[name])
            speed = speed_of(name, workload, paces)
            records.append(
                {"contestant": name, "round": round_, "speed": speed, "paces": [p and asdict(p) for p in paces]}
            )
            if rank == 0:
                print(f"round {round_ + 1}, {name}: {speed:.1f} samples/s", flush=True)
    return records


class SavedTensors(AbstractContextManager["SavedTensors"]):
    """While entered, counts the bytes that are kept for backward passes, each storage once.

    Attributes:
        peak: The most at a time, in bytes.
        kept: The bytes that are kept now.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.kept = 0
        self._users: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor
        )

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def take(self, tensor: Tensor) -> int | None:
        """A tensor is saved; returns what :meth:`give` wants, unless it does not count."""
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return None
        if torch._is_functional_tensor(tensor) or type(tensor) is not Tensor:
            return None  # without data
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        self._users[key] = self._users.get(key, 0) + 1
        if self._users[key] == 1:
            self.kept += storage.nbytes()
            self.peak = max(self.peak, self.kept)
        return key

    def give(self, key: int, size: int) -> None:
        """It is not saved any more."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.kept -= size


class _Kept:
    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.tensor = tensor
        self._counter = counter
        self._key = counter.take(tensor)

    def __del__(self) -> None:
        if self._key is not None:
            self._counter.give(self._key, self.tensor.untyped_storage().nbytes())


def inspect(name: str, workload: Workload, microbatches: list[int]) -> Any:
    """Looks at one contestant without measuring its speed: memory by rank, and what a step's time goes into."""
    rank = dist.get_rank()
    way = contestants(workload, microbatches)[name]
    found: dict[str, Any] | None = None
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if name not in SINGLE or rank == 0:
        lightning = name in SINGLE[1:] or name.startswith(OURS)
        with tempfile.TemporaryDirectory() as folder:
            timeline = Timeline(folder, skip=skipped(name, workload), batches=30) if lightning else None
            with SavedTensors() as saved:
                way(Turn(workload, skipped(name, workload) + 6, rank, Clock(), timeline))
        shares = shares_of(timeline.spans) if timeline is not None else {}
        found = {"activations": saved.peak, "resident": _resident("VmHWM") - before, "shares": shares}
    every: list[Any] = [None] * workload.stages
    dist.all_gather_object(every, found)
    return [{"contestant": name, "ranks": every}]


def _resident(field: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"The kernel does not tell {field}.")


def main() -> None:
    """Takes part as the rank that the environment says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--contestants", nargs="+", required=True)
    parser.add_argument("--microbatches", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--inspect", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    workload = workload_of(options.workload)
    if options.inspect:
        (name,) = options.contestants
        records = inspect(name, workload, options.microbatches)
    else:
        records = contest(options.contestants, workload, options.microbatches, options.rounds, options.seconds)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(records))
    dist.barrier()
    os._exit(0)  # c10d's own threads would take their time


if __name__ == "__main__":
    main()
