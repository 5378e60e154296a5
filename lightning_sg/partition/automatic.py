"""Chooses where to cut a network into a given number of stages of about equal cost."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sg._compat import tree_leaves
from lightning_sg.boundary import Boundaries
from lightning_sg.errors import PartitionError
from lightning_sg.lightning_api import STEP_OUTPUT
from lightning_sg.partition.balance import balance
from lightning_sg.partition.placement import stage_costs
from lightning_sg.partition.step import trace_step
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import Work

Run = Callable[[], STEP_OUTPUT]
#: Takes a trace and some of its boundaries. Returns the work of the predictor at each boundary for one batch, and
#: leaves out the boundaries where no predictor can be built.
WorkOfPredictors = Callable[[Trace, list[str]], dict[str, Work]]
#: Takes a trace. Returns what each stage that ends at a boundary does besides for late gradients, by that boundary.
LateWork = Callable[[Trace], dict[str, Work]]


@dataclass(frozen=True)
class Choice:
    """Where to cut, and what was left out.

    Attributes:
        names: The submodules to cut after, in the order of the data.
        left_out: Why places behind a certain one were not looked at, for messages; empty if all were.
    """

    names: list[str]
    left_out: str = ""


def choose_boundaries(
    module: nn.Module,
    stages: int,
    run: Run,
    device: torch.device,
    work_of_predictors: WorkOfPredictors,
    batch: Any = None,
    *,
    late_work: LateWork | None = None,
    tied: bool = False,
) -> Choice:
    """Names the submodules to cut after, so that the slowest stage, its predictor included, is as fast as possible.

    Candidates are the model's own children and the members of every ``nn.Sequential``, ``nn.ModuleList`` and
    ``nn.ModuleDict``. A cut is possible after a candidate that runs once in a step, if its output is all that later
    code uses of what was computed before, a gradient flows back through it, and no parameter is used on both sides. The
    step cannot be followed beyond a value that it reads, or a shape that depends on one: places behind that are left
    out.

    Args:
        module: The LightningModule, without boundaries installed.
        stages: The number of stages.
        run: Calls the step on a real batch.
        device: The device that the step runs on.
        work_of_predictors: Estimates the work of predictors.
        batch: The batch that the step is run on.
        late_work: Estimates the work for late gradients, which the last stage has none of.
        tied: Whether stages on several processes may use one parameter.

    Returns:
        ``stages - 1`` names.

    Raises:
        PartitionError: If there are too few places to cut, or the step cannot be followed to any.
    """
    names, ended = _candidates(module, run, device)
    trace, left_out = _follow(module, names, run, device, batch)
    left_out = left_out or ended
    divided: dict[str, list[str]] = {}
    while True:
        around = {name for leak in trace.leaks for name in trace.order[leak.made_in : leak.used_in]}
        around |= _without_gradient(trace)
        around |= {name for used in trace.times.values() for name in trace.order[min(used) : max(used)]}
        if not tied:
            divided.update(_divided(module, trace))
            around.update(*divided.values())
        if not around & {*trace.order}:
            break
        trace, _none = _follow(module, [name for name in trace.order if name not in around], run, device, batch)
    costs = stage_costs(module, trace)
    trained = _trained_stages(module, trace)
    # Skip a place if nothing is trained between it and the next one. So activation functions stay with the layer before
    # them. The last stage always extends to the loss, even if the trace was cut short.
    kept = [place for place in range(len(trace.order)) if place + 1 in trained]
    if 0 not in trained:
        kept = kept[1:]
    if len(kept) + 1 < stages:
        raise PartitionError(
            f"boundaries='auto' finds {len(kept)} places to cut {type(module).__name__}, too few for {stages} stages"
            f"{f' (after {[trace.order[place] for place in kept]})' if kept else ''}.{left_out}{_because(divided)} "
            f"Use Trainer(devices={len(kept) + 1}) or fewer, or put `lightning_sg.Boundary()` where several tensors "
            "can cross together."
        )
    places = [trace.order[place] for place in kept]
    predictors = work_of_predictors(trace, places)
    ends = [predictors[name].on(trace.device) if name in predictors else math.inf for name in places]
    bounds = [0, *(place + 1 for place in kept), trace.stages]
    pieces = [sum(costs[start:end]) for start, end in itertools.pairwise(bounds)]
    late = {} if late_work is None else late_work(trace)
    late_of = [late[name].on(trace.device) if name in late else 0.0 for name in trace.order]
    late_pieces = [sum(late_of[start:end]) for start, end in itertools.pairwise(bounds)]
    starts = balance(pieces, stages, [*ends, 0.0], late_pieces)
    return Choice([trace.order[kept[start - 1]] for start in starts[1:]], left_out)


def _candidates(module: nn.Module, run: Run, device: torch.device) -> tuple[list[str], str]:
    """The submodules that return tensors and that one step runs exactly once.

    Returns:
        Their names, and why there are no more, if the step ends early.
    """
    names = {name: child for name, child in module.named_modules() if name and not isinstance(child, Metric)}
    held = {
        name
        for name in names
        if "." not in name
        or isinstance(module.get_submodule(name.rpartition(".")[0]), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    }
    calls: Counter[str] = Counter()

    def seen(name: str) -> Callable[..., None]:
        def count(_module: nn.Module, _args: Any, output: Any) -> None:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
                calls[name] += 1

        return count

    with ExitStack() as stack:
        for name in held:
            handle = names[name].register_forward_hook(seen(name))
            stack.callback(handle.remove)
        reason = trace_step(module, [], run, device).cut_short
    found = [name for name in names if calls[name] == 1]
    if reason is None or not calls:
        return found, ""
    return found, f" Places behind '{list(calls)[-1]}' are left out: without data the step ends there ({reason})."


def _follow(module: nn.Module, names: list[str], run: Run, device: torch.device, batch: Any) -> tuple[Trace, str]:
    """Traces a step with these boundaries, without those behind the point where the step cannot be followed.

    Returns:
        The trace, and why there are boundaries left out, if there are.
    """
    left_out = ""
    while True:
        boundaries = Boundaries(module, names)
        try:
            return trace_step(module, boundaries.sites, run, device, batch=batch), left_out
        except PartitionError as error:
            if not error.reached:
                raise
            names, left_out = error.reached, f" Places behind '{error.reached[-1]}' are left out: {error.why}."
        finally:
            boundaries.remove()


def _without_gradient(trace: Trace) -> set[str]:
    """The places through which no gradient flows back. In evaluation none does anywhere, which says nothing of one."""
    evaluates = set(trace.blocked) == set(trace.order)
    return {name for name, why in trace.blocked.items() if not (evaluates and why.of_whole_pass)}


def _divided(module: nn.Module, trace: Trace) -> dict[str, list[str]]:
    """The parameters that are used before and after some place, each with these places."""
    uses = {name: trace.uses.get(name, ()) for name, _parameter in module.named_parameters()}
    return {name: trace.order[min(used) : max(used)] for name, used in uses.items() if len(used) > 1}


def _because(divided: dict[str, list[str]]) -> str:
    """Says of one parameter that it kept places from being cut at; empty if none did."""
    if not divided:
        return ""
    name, places = next(iter(divided.items()))
    return (
        f" Parameter '{name}' is used before and after {places}, so there is no cut there: untie it, or use "
        "SyntheticGradientStrategy(tied_weights='synchronize'), which keeps its copies equal, but then stages wait for "
        "each other in every step."
    )


def _trained_stages(module: nn.Module, trace: Trace) -> set[int]:
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    trained = set().union(*(users for name, users in trace.uses.items() if name in trainable))
    return trained | {trace.stages - 1} if trace.cut_short is not None else trained


__all__ = ["Choice", "choose_boundaries"]
