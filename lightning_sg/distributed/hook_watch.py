"""Warns of hooks in mid-epoch that depend on weights or gradients which a process does not have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from lightning_sg.distributed.averages import kept_averages
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.lightning_api import pl
from lightning_sg.partition.dependence import Dependence, Found, Weights, address_of
from lightning_sg.partition.placement import Placement
from lightning_sg.partition.replaced import named_tensors

#: The hooks that run in mid-epoch, between steps.
BETWEEN_STEPS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "configure_gradient_clipping",
)
# Calls of each hook that are looked at: the first ones, then two of ten, later two of fifty. To look takes longer than
# a small network's step has.
_ALWAYS, _OFTEN = 20, 500


class HookWatch:
    """Watches hooks of the user's, and steps with manual optimization, for what they see of other stages.

    Args:
        runtime: This process's part of the run.
        module: The module.
    """

    def __init__(self, runtime: StageRuntime, module: pl.LightningModule) -> None:
        self._runtime = runtime
        self._module = module
        self._calls: dict[str, int] = {}
        self._warned: set[str] = set()

    def watched(self, hook: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A hook that is watched.

        Args:
            hook: The hook.
            name: Its name, for the warning.
        """

        @wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.watching(name):
                return hook(*args, **kwargs)

        return run

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """While entered, code of the user's is watched.

        Args:
            name: What runs, for the warning.
        """
        placement, calls = self._runtime.ownership.placement, self._calls.get(name, 0)
        self._calls[name] = calls + 1
        every = 10 if calls < _OFTEN else 50  # as hooks do something at every so many steps
        looks = calls < _ALWAYS or calls % every in (0, every - 1)
        if placement is None or not looks or name in self._warned:
            yield
            return
        meetings = self._runtime.chain.meetings
        watch = Dependence(self._weights(placement))
        with watch:
            yield
        if not watch.touched or self._runtime.chain.meetings != meetings:  # such as for a checkpoint: all is current
            return
        found = watch.found(self._is_average(placement))
        if found.weights or found.gradients:
            self._warned.add(name)
            self._warn(name, found, placement)

    def _weights(self, placement: Placement) -> Weights:
        here, last = self._runtime.grid.position, placement.processes - 1
        elsewhere: dict[int, str] = {}
        foreign: set[int] = set()
        own: dict[int, str] = {}
        trained: set[int] = set()
        for name, tensor in named_tensors(self._module).items():
            owner, address = placement.owner.get(name, last), address_of(tensor)
            if name in placement.shared or (owner == here or placement.trains(here, name)):
                own[address] = name
                continue
            foreign.add(address)
            changes = name not in placement.unused and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
            if changes or name in placement.averages:
                elsewhere[address] = name
            if tensor.requires_grad and name not in placement.unused:
                trained.add(id(tensor))
        for name, (tensor, owner) in kept_averages(self._module, placement.owner).items():
            address = address_of(tensor)
            if owner == here:
                own.setdefault(address, name)
            else:
                foreign.add(address)
                elsewhere.setdefault(address, name)
        return Weights(elsewhere, frozenset(foreign), own, frozenset(trained))

    def _is_average(self, placement: Placement) -> Callable[[Tensor, set[str]], bool]:
        """Tells whether a tensor that is kept belongs where the weights are that it was computed from."""
        owners = {id(tensor): owner for tensor, owner in kept_averages(self._module, placement.owner).values()}

        def belongs(tensor: Tensor, weights: set[str]) -> bool:
            owner = owners.get(id(tensor))
            return owner is not None and all(placement.owner.get(name, owner) == owner for name in weights)

        return belongs

    def _warn(self, name: str, found: Found, placement: Placement) -> None:
        status, ranks = self._runtime.status.name, self._runtime.grid.ranks
        if found.weights:
            weight = found.weights[0]
            owner = placement.owner.get(weight)
            whose = "another stage" if owner is None else placement.name(owner, ranks[owner])
            warnings.warn(
                f"{name} uses '{weight}' of {whose} in {status}, where it has the value of the last time that the "
                "processes met. In the middle of an epoch a process has the current weights of its own stages only. "
                "Hooks at the end of an epoch and around validation see the whole current model. An average that is "
                "kept by hand is right if each of its tensors comes from one weight, and no step uses it.",
                stacklevel=3,
            )
        else:
            warnings.warn(
                f"{name} computes something from gradients in {status}, which has those of its own stages only: a norm "
                "over them is not that of the whole model. To clip by the whole model's norm use "
                "Trainer(gradient_clip_val=...) or self.clip_gradients(...) with "
                "SyntheticGradientStrategy(clip_over='model').",
                stacklevel=3,
            )


__all__ = ["BETWEEN_STEPS", "HookWatch"]
