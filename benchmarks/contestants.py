"""Ways to train one model on several processes: each a function that every rank calls, with one tick a step.

Ranks are stages here, in the order of the data, except under ``lightning_sg``, which has the last stage on rank 0.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

from benchmarks.quiet import QUIET
from benchmarks.workloads import Workload, loss_of
from lightning_sg import Boundary, DelayedGradient, SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.transport import Compression

RATE = 0.01


@dataclass
class Clock:
    """When each step ended, and how long the main thread had worked by then, in seconds."""

    times: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """A step has ended."""
        self.times.append(time.perf_counter())
        self.worked.append(time.thread_time())


@dataclass
class Turn:
    """One contestant's turn.

    Attributes:
        workload: What to train.
        steps: For how many batches.
        rank: This process's.
        clock: To tick.
        profiler: For Lightning, or ``None``.
    """

    workload: Workload
    steps: int
    rank: int
    clock: Clock
    profiler: Profiler | None = None

    @property
    def batches(self) -> Any:
        """The data."""
        return self.workload.batches(self.steps)


Contestant = Callable[[Turn], None]


# -------------------------------------------------------------------------------------------------- one process


def one_process(turn: Turn) -> None:
    """A plain loop over the whole model."""
    model = nn.Sequential(*turn.workload.chunks())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for inputs, labels in turn.batches:
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()
        turn.clock.tick()


# -------------------------------------------------------------------------------------------------- rivals


def naive(turn: Turn) -> None:
    """Model parallelism without a schedule: one stage works, the others wait."""
    rank, last = turn.rank, turn.workload.stages - 1
    stage = turn.workload.cut()[rank]
    optimizer = torch.optim.SGD(stage.parameters(), lr=RATE)
    shapes = _shapes(turn.workload)
    for inputs, labels in turn.batches:
        optimizer.zero_grad()
        if rank > 0:
            inputs = torch.empty(shapes[rank - 1])
            dist.recv(inputs, rank - 1)
            inputs.requires_grad_()
        outputs = stage(inputs)
        if rank < last:
            dist.send(outputs.detach().contiguous(), rank + 1)
            gradient = torch.empty(shapes[rank])
            dist.recv(gradient, rank + 1)
            outputs.backward(gradient)
        else:
            loss_of(outputs, labels).backward()
        if rank > 0:
            dist.send(inputs.grad.contiguous(), rank - 1)
        optimizer.step()
        turn.clock.tick()


def pipeline(turn: Turn, schedule: str, microbatches: int) -> None:
    """A schedule of ``torch.distributed.pipelining``."""
    rank, ranks = turn.rank, turn.workload.stages
    kind = pipelining.schedules.get_schedule_class(schedule)
    several = issubclass(kind, pipelining.schedules.PipelineScheduleMulti)
    if several:
        parts: list[nn.Module] = turn.workload.chunks()
        own = [rank, 2 * ranks - 1 - rank if schedule == "ZBVZeroBubble" else rank + ranks]
    else:
        parts, own = list(turn.workload.cut()), [rank]
    stages = [pipelining.PipelineStage(parts[place], place, len(parts), torch.device("cpu")) for place in own]
    run: Any = kind(stages if several else stages[0], microbatches, loss_fn=loss_of)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for place in own for p in parts[place].parameters()], lr=RATE)
    for inputs, labels in turn.batches:
        optimizer.zero_grad()
        given = (inputs,) if 0 in own else ()
        known: dict[str, Any] = {"target": labels, "losses": []} if len(parts) - 1 in own else {}
        run.step(*given, **known)
        optimizer.step()
        turn.clock.tick()


def data_parallel(turn: Turn) -> None:
    """DistributedDataParallel: the whole model everywhere, each rank its part of the batch."""
    model = DistributedDataParallel(nn.Sequential(*turn.workload.chunks()))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    ranks = turn.workload.stages
    for inputs, labels in turn.batches:
        optimizer.zero_grad()
        loss_of(model(inputs.chunk(ranks)[turn.rank]), labels.chunk(ranks)[turn.rank]).backward()
        optimizer.step()
        turn.clock.tick()


def delayed(turn: Turn) -> None:
    """True gradients as late as the chain makes them, in a bare loop: no stage waits for its own batch's gradient.

    Stage ``i`` of ``S`` goes backward through the batch of ``S - 1 - i`` steps ago, with the weights of today: keeping
    those of then, which a correct gradient needs, would cost more.
    """
    rank, last = turn.rank, turn.workload.stages - 1
    stage = turn.workload.cut()[rank]
    parameters = list(stage.parameters())
    lag = last - rank
    shapes = _shapes(turn.workload)
    above = _Ahead(shapes[rank - 1], rank - 1, turn.steps) if rank > 0 else None
    below = _Ahead(shapes[rank], rank + 1, turn.steps) if rank < last else None
    kept: deque[tuple[Tensor, Tensor]] = deque()
    sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send(tensor: Tensor, to: int) -> None:
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, to)
        assert work is not None
        sent.append((work, tensor))
        if len(sent) > 4:
            sent.popleft()[0].wait()

    def back() -> None:
        """The oldest batch's gradient, on its way up."""
        assert below is not None
        inputs, outputs = kept.popleft()
        outputs.backward(below.take())
        if rank > 0:
            assert inputs.grad is not None
            send(inputs.grad, rank - 1)

    for inputs, labels in turn.batches:
        if above is not None:
            inputs = above.take().requires_grad_()
        outputs = stage(inputs)
        if rank == last:
            loss_of(outputs, labels).backward()
            if rank > 0:
                send(inputs.grad, rank - 1)
        else:
            send(outputs, rank + 1)
            kept.append((inputs, outputs))
            if len(kept) > lag:
                back()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-RATE)  # `data`: graphs that are kept must not notice
                    parameter.grad = None
        turn.clock.tick()
    while kept:
        back()
    for work, _tensor in sent:
        work.wait()


class _Ahead:
    """Receives ``count`` tensors from a rank; the next is always on its way before it is asked for."""

    def __init__(self, shape: torch.Size, source: int, count: int) -> None:
        self._shape = shape
        self._source = source
        self._left = count
        self._begin()

    def _begin(self) -> None:
        if self._left:
            self._left -= 1
            self._tensor = torch.empty(self._shape)
            self._work = dist.irecv(self._tensor, self._source)

    def take(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        tensor = self._tensor
        self._begin()
        return tensor


def _shapes(workload: Workload) -> list[torch.Size]:
    """What each stage hands on."""
    shapes = []
    with torch.device("meta"):
        tensor = torch.empty(workload.batch, *workload.inputs)
        for stage in workload.cut():
            tensor = stage(tensor)
            shapes.append(tensor.shape)
    return shapes


# -------------------------------------------------------------------------------------------------- Lightning


class Split(pl.LightningModule):
    """The same model as a user of Lightning writes it, with a boundary between the stages."""

    def __init__(self, workload: Workload, *, boundaries: bool = True) -> None:
        super().__init__()
        stages = workload.cut()
        cuts = [Boundary() for _ in stages[1:]] if boundaries else []
        parts = [part for place, stage in enumerate(stages) for part in (stage, *cuts[place : place + 1])]
        self.net = nn.Sequential(*parts)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return loss_of(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


class _Tick(Callback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_end(self, *_arguments: Any) -> None:
        self._clock.tick()


def lightning(
    turn: Turn,
    *,
    boundaries: bool = True,
    processes: int = 1,
    callback: SyntheticGradients | None = None,
    wire: Compression = "full",
) -> None:
    """Lightning's own Trainer, with a callback of this package's, its strategy, or neither."""
    with _alone() if processes == 1 else nullcontext():
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=SyntheticGradientStrategy(wire=wire) if processes > 1 else "auto",
            devices=processes,
            max_steps=turn.steps,
            max_epochs=-1,
            **QUIET,
            profiler=turn.profiler,
            callbacks=[_Tick(turn.clock), *([callback] if callback is not None else [])],
        )
        trainer.fit(Split(turn.workload, boundaries=boundaries), turn.batches)


@contextmanager
def _alone() -> Iterator[None]:
    """Hides from Lightning that this process is one of several."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name in _LAUNCHED}
    try:
        yield
    finally:
        os.environ.update(hidden)


_LAUNCHED = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}

# -------------------------------------------------------------------------------------------------- all of them

ONE, COPIES = "one process", "independent copies"
LIGHTNING, CALLBACK = "one process, Lightning", "one process, Lightning, synthetic gradients"
UNDIVIDED = "one process, Lightning, the callback without a boundary"
DELAYED = "delayed gradient, bare loop"
OURS = "lightning_sg"
#: Those that rank 0 runs alone.
SINGLE = (ONE, LIGHTNING, CALLBACK, UNDIVIDED)
SCHEDULES = {
    "GPipe": "GPipe",
    "1F1B": "1F1B",
    "interleaved 1F1B": "Interleaved1F1B",
    "interleaved zero bubble": "InterleavedZeroBubble",
    "ZBV zero bubble": "ZBVZeroBubble",
}


def contestants(workload: Workload, microbatches: list[int]) -> dict[str, Contestant]:
    """All that can train a workload, by name.

    Args:
        workload: Has the number of stages, and so of processes.
        microbatches: For the schedules; those that a schedule refuses are left out.
    """
    stages = workload.stages
    ways: dict[str, Contestant] = {
        ONE: one_process,
        LIGHTNING: partial(lightning, boundaries=False),
        CALLBACK: lambda turn: lightning(turn, callback=SyntheticGradients()),
        UNDIVIDED: lambda turn: lightning(turn, boundaries=False, callback=SyntheticGradients()),
        COPIES: one_process,
        "naive": naive,
    }
    for title, schedule in SCHEDULES.items():
        for count in microbatches:
            # A schedule with fewer microbatches than stages does not fill the pipe; all but GPipe refuse it.
            if count >= stages or schedule == "GPipe":
                ways[f"{title}, M={count}"] = partial(pipeline, schedule=schedule, microbatches=count)
    if not workload.emulated:
        ways["DDP"] = data_parallel  # emulated stages have no gradients worth the name to send
    ways[DELAYED] = delayed
    ways[OURS] = partial(lightning, processes=stages)
    for delay in (0, 2, 4):
        ways[f"{OURS}, delay={delay}"] = lambda turn, delay=delay: lightning(  # type: ignore[misc]
            turn, processes=stages, callback=SyntheticGradients(delay=delay)
        )
    for wire in ("bf16", "int8"):
        ways[f"{OURS}, wire={wire}"] = partial(lightning, processes=stages, wire=wire)
    ways[f"{OURS}, delayed gradient"] = lambda turn: lightning(
        turn, processes=stages, callback=SyntheticGradients(predictor=DelayedGradient())
    )
    return ways


__all__ = [
    "CALLBACK",
    "COPIES",
    "DELAYED",
    "LIGHTNING",
    "ONE",
    "OURS",
    "SINGLE",
    "UNDIVIDED",
    "Clock",
    "Contestant",
    "Turn",
    "contestants",
]
