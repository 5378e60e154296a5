"""Draws what two devices do under backpropagation, under a pipeline and under this package: the README's picture.

    python -m benchmarks.schedules

Runs a network of two stages on two processes in three ways, records every action, and draws the last four batches of
each run on one time axis. The schedules, the messages and the predictor are real. The layers sleep in place of
computing, a third of their time for each of the forward pass, the gradient of the input and that of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contestants import RATE, Clock, Turn, lightning
from benchmarks.schedules_figure import LOOKS, draw
from benchmarks.workers import run_group
from benchmarks.workloads import emulated, loss_of
from lightning_sg import Timeline
from lightning_sg.profiling import BATCH, WAIT_ACTIVATIONS, WAIT_TARGET
from lightning_sg.tools.timeline.chrome import events_of, trace_text
from lightning_sg.tools.timeline.command import read
from lightning_sg.tools.timeline.spans import Span

#: Devices that sleep, so that the picture shows the schedules and not what else the processors are busy with.
WORKLOAD = emulated(2, 0.3)
MICROBATCHES, WARM_UP, SHOWN = 4, 14, 4
FOLDER = Path("docs/pictures")

PLAIN, PIPELINE, OURS = "backpropagation", "pipeline", "synthetic gradients"
#: What is written above each part of the picture.
TITLES = {
    PLAIN: "Backpropagation: each device waits for the other",
    PIPELINE: f"Pipeline (GPipe, {MICROBATCHES} micro-batches): bubbles at both ends of a batch",
    OURS: "Synthetic gradients (lightning-sg): no stage waits for a backward pass",
}


class Recorder:
    """Notes when actions happen, with the names that :class:`~lightning_sg.Timeline` gives them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._epoch = time.time() - time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Notes one action."""
        start = time.perf_counter()
        yield
        self.spans.append(Span(name, self._epoch + start, time.perf_counter() - start))


def by_hand(turn: Turn, parts: int) -> list[Span]:
    """Two stages that hand on activations and gradients in ``parts`` micro-batches: all forward, then all backward.

    Args:
        turn: What to train. The last stage is on rank 0, as under Lightning.
        parts: 1 for plain backpropagation, more for GPipe's schedule.
    """
    first, other, note = turn.rank == 1, 1 - turn.rank, Recorder()
    model = turn.workload.cut()[0 if first else 1]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in turn.batches:
        with note(BATCH):
            crossed: list[tuple[Tensor, Tensor]] = []
            sent: list[tuple[Any, Tensor]] = []
            for inputs, labels in zip(x.chunk(parts), y.chunk(parts)):
                received = inputs
                if not first:
                    received = torch.empty(len(inputs), *turn.workload.inputs)
                    with note(WAIT_ACTIVATIONS):
                        dist.recv(received, other)
                    received.requires_grad_()
                with note(".training_step"):
                    out = model(received)
                    crossed.append((received, out if first else loss_of(out, labels) / parts))
                if first:
                    sent.append((dist.isend(out.detach(), other), out))
            for received, out in crossed:
                gradient = torch.empty_like(out) if first else None
                if gradient is not None:
                    with note(WAIT_TARGET):
                        dist.recv(gradient, other)
                with note(".backward"):
                    out.backward(gradient)
                if received.grad is not None:
                    sent.append((dist.isend(received.grad, other), received))
            with note(".optimizer_step"):
                optimizer.step()
                optimizer.zero_grad()
            for work, _kept in sent:
                work.wait()
    return note.spans


def work(out: Path) -> None:
    """One process: trains in all three ways; rank 0 writes what every process did to ``out``, as traces."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    folders = {name: out.parent / name for name in TITLES}
    dist.init_process_group("gloo")
    for name, folder in folders.items():
        turn = Turn(WORKLOAD, WARM_UP + SHOWN, rank, Clock())
        folder.mkdir(exist_ok=True)
        dist.barrier()
        if name == OURS:
            turn.profiler = Timeline(folder, skip=0, batches=turn.steps)
            lightning(turn, processes=2)
        else:
            spans = by_hand(turn, MICROBATCHES if name == PIPELINE else 1)
            (folder / f"fit-timeline-{rank}.json").write_text(trace_text(events_of(spans, rank)))
    dist.barrier()
    if rank == 0:
        found = {name: list(read(folder).values()) for name, folder in folders.items()}
        out.write_text(json.dumps({name: [events_of(spans, 0) for spans in each] for name, each in found.items()}))


def main() -> None:
    """Runs both processes and draws the picture, for light and for dark pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the pictures")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is not None:
        work(arguments.out)
        return
    traces = run_group("benchmarks.schedules", [], 2, None)
    runs = {
        name: [[Span(e["name"], 1e-6 * e["ts"], 1e-6 * e["dur"]) for e in events] for events in processes]
        for name, processes in traces.items()
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, look in LOOKS.items():
        path = arguments.folder / f"schedules-{name}.svg"
        path.write_bytes(draw(runs, TITLES, SHOWN, look))
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
