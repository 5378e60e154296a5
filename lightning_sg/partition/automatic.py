"""Chooses where to cut a network into so many stages of about equal cost."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sg._compat import tree_leaves
from lightning_sg.boundary import Boundaries
from lightning_sg.errors import PartitionError
from lightning_sg.partition.balance import balance
from lightning_sg.partition.placement import stage_costs
from lightning_sg.partition.trace import Trace, trace_step

Run = Callable[[], STEP_OUTPUT]
#: Of a trace and some of its boundaries: the floating-point operations of the predictor at each, for a batch. Where
#: there can be none, nothing.
CostOfPredictors = Callable[[Trace, list[str]], dict[str, float]]


def choose_boundaries(
    module: nn.Module, stages: int, run: Run, device: torch.device, cost_of_predictors: CostOfPredictors
) -> list[str]:
    """Names the submodules to cut after, so that the slowest stage, its predictor included, is as fast as can be.

    Looks at the members of every ``nn.Sequential`` and ``nn.ModuleList``, and at the model's own children. A cut is
    possible after one that runs once in a step, if nothing computed before it is used behind it except through its
    output.

    Args:
        module: The LightningModule, without boundaries installed.
        stages: How many to cut it into.
        run: Calls the step on a real batch.
        device: The device that the step runs on.
        cost_of_predictors: What predictors would cost.

    Returns:
        ``stages - 1`` names, in the order of the data.

    Raises:
        PartitionError: If there are too few places for a cut, or the step cannot be followed.
    """
    trace = _trace(module, _candidates(module, run, device), run, device)
    while True:
        around = {name for leak in trace.leaks for name in trace.order[leak.made_in : leak.used_in]}
        around |= {name for used in trace.times.values() for name in trace.order[min(used) : max(used)]}
        if not around:
            break
        trace = _trace(module, [name for name in trace.order if name not in around], run, device)
    costs = stage_costs(module, trace)
    trained = _trained_stages(module, trace)
    # A place with nothing to train behind it up to the next is no better than the next: activation functions go with
    # the layer before them. The last stage reaches to the loss, wherever the step could be followed to.
    kept = [place for place in range(len(trace.order)) if place + 1 in trained]
    if 0 not in trained:
        kept = kept[1:]
    if len(kept) + 1 < stages:
        raise PartitionError(
            f"boundaries='auto' finds {len(kept)} places to cut {type(module).__name__}, too few for {stages} stages"
            f"{f' (after {[trace.order[place] for place in kept]})' if kept else ''}. "
            f"Use Trainer(devices={len(kept) + 1}) or fewer, or put `lightning_sg.Boundary()` where several tensors "
            "can cross together."
        )
    predictors = cost_of_predictors(trace, [trace.order[place] for place in kept])
    ends = [predictors.get(trace.order[place], math.inf) for place in kept]
    bounds = [0, *(place + 1 for place in kept), trace.stages]
    pieces = [sum(costs[start:end]) for start, end in itertools.pairwise(bounds)]
    return [trace.order[kept[start - 1]] for start in balance(pieces, stages, [*ends, 0.0])[1:]]


def _candidates(module: nn.Module, run: Run, device: torch.device) -> list[str]:
    """Submodules that one step runs once, and that return tensors."""
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
        trace_step(module, [], run, device)
    return [name for name in names if calls[name] == 1]


def _trace(module: nn.Module, names: list[str], run: Run, device: torch.device) -> Trace:
    boundaries = Boundaries(module, names)
    try:
        return trace_step(module, boundaries.sites, run, device)
    finally:
        boundaries.remove()


def _trained_stages(module: nn.Module, trace: Trace) -> set[int]:
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    trained = set().union(*(users for name, users in trace.uses.items() if name in trainable))
    return trained | {trace.stages - 1} if trace.cut_short is not None else trained


__all__ = ["choose_boundaries"]
