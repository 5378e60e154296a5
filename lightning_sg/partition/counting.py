"""Counts how often steps cross the boundaries, without running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_sg._compat import progressed
from lightning_sg.boundary import Site
from lightning_sg.lightning_api import STEP_OUTPUT
from lightning_sg.partition.fakes import FakeOutputs, FakeTensors, remote_blocks
from lightning_sg.partition.noticed import Noticed
from lightning_sg.partition.step import StepEnds, ending_at_backward
from lightning_sg.partition.undo import undone
from lightning_sg.partition.without_values import WithoutValues

#: The steps that are looked at: how many batches, optimizer steps and epochs later than this one.
_LATER = (
    *((ahead, ahead, 0) for ahead in range(1, 8)),
    *(
        (ahead, steps + ahead, epochs)
        for steps, epochs in ((100, 1), (10_000, 30), (1_000_000, 1000))
        for ahead in (0, 1)
    ),
)
#: What else a number in the batch could be; a step that goes by it may cross more or less often then.
_OTHERS = (True, False, 2, 1000.0, -1000.0)
# No more crossings of one boundary in one step are counted than these.
_ENOUGH = 64


@dataclass(frozen=True)
class Counts:
    """How often steps cross the boundaries.

    Attributes:
        most: For each boundary, how often at most, of the steps that were looked at.
        same: Whether all these steps cross each boundary equally often.
    """

    most: Mapping[str, int]
    same: bool

    def joined(self, other: Counts) -> Counts:
        """Of the steps of both."""
        most = {name: max(count, other.most[name]) for name, count in self.most.items()}
        return Counts(most, self.same and other.same and self.most == other.most)


def count_crossings(
    module: nn.Module, sites: Sequence[Site], run: Callable[[int], STEP_OUTPUT], device: torch.device
) -> Counts:
    """Runs the code of a step on tensors without data.

    It is run as at this batch and at the next. If it goes by the number of the batch, the optimizer step or the epoch,
    by what it counts itself, by chance or by a value of the batch, it is run as at more of the later batches, and with
    other values. Submodules without a boundary in them run once; what they return is taken from memory after that.
    What the code changes is undone, see
    :func:`undone`.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        run: Calls the step as the one that comes so many batches later.
        device: The device that the step runs on.
    """
    names = {name for name, _tensor in (*module.named_parameters(), *module.named_buffers())}
    outputs = FakeOutputs(remote_blocks(module, names, {site.name for site in sites}))
    with ExitStack() as stack:
        stack.enter_context(undone(module, device))
        stack.enter_context(ending_at_backward(module))
        stack.enter_context(FakeTensors(module, None, device, trainable=False))
        inside = stack.enter_context(_inside_submodules(module))
        outputs.install()
        stack.callback(outputs.remove)
        noticed, reads = Noticed(module), WithoutValues(inside=inside)
        with progressed(module, noticed.number(), noticed.number()):
            found = [_count(sites, lambda: run(noticed.number()), reads)]
        noticed.look()
        if reads.read:
            found += [_count(sites, lambda: run(0), WithoutValues(inside=inside, other=other)) for other in _OTHERS]
        # C code that uses a number, such as `range`, is not noticed: the next step shows it.
        for batches, steps, epochs in _LATER:
            if len(found) > 1 and not (reads.read or noticed.anything) and found[1].times == found[0].times:
                break
            with progressed(module, steps, epochs):
                found.append(_count(sites, partial(run, batches), WithoutValues(inside=inside)))
    first = found[0].times
    # A step that does not run on tensors without data, or not at another number, shows only how far it has come.
    whole = [first, *(each.times for each in found if not each.failed or each.exceeds(first))]
    most = {name: max(times[name] for times in whole) for name in first}
    return Counts(most, all(times == first for times in whole))


@dataclass(frozen=True)
class _Counted:
    """What one step has shown.

    Attributes:
        times: How often it has crossed each boundary.
        failed: Whether it ended with an error.
    """

    times: dict[str, int]
    failed: bool

    def exceeds(self, other: Mapping[str, int]) -> bool:
        """Whether a boundary was crossed more often."""
        return any(count > other[name] for name, count in self.times.items())


def _count(sites: Sequence[Site], run: Callable[[], Any], reads: WithoutValues) -> _Counted:
    """Runs one step, as far as it goes."""

    def cross(site: Site) -> Callable[[list[Tensor]], list[Tensor]]:
        def crossing(tensors: list[Tensor]) -> list[Tensor]:
            if site.crossings > _ENOUGH:
                raise StepEnds
            return [tensor.view_as(tensor) for tensor in tensors]

        return crossing

    failed = False
    try:
        for site in sites:
            site.open(cross(site))
        with reads:
            run()
    except StepEnds:
        pass
    except Exception:  # the user's code may raise anything on tensors without data
        failed = True
    finally:
        for site in sites:
            site.close()
    return _Counted({site.name: site.crossings for site in sites}, failed)


@contextmanager
def _inside_submodules(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Says whether a submodule runs, rather than the step itself."""
    depth = [0]

    def enter(child: nn.Module, _args: Any) -> None:
        depth[0] += child is not module

    def leave(child: nn.Module, _args: Any, _output: Any) -> None:
        depth[0] -= child is not module

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield lambda: depth[0] > 0
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Counts", "count_crossings"]
