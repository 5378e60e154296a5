"""Notices boundaries through which no gradient flows in a later batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from torch import nn

from lightning_sg.boundary import Site
from lightning_sg.gradient_flow import Blocked, never_trains
from lightning_sg.partition.checks import between, trained_stages
from lightning_sg.partition.trace import Trace


class GradientWatch:
    """Tells the user about a boundary that training passes without a gradient, once for each boundary.

    The first batch is checked by its trace, and refused. Later ones may mean it: a step may train all stages on some
    batches and the last on others. So these only warn. A step that could not be traced is checked here from the first.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._flowed: set[str] = set()
        self._warned: set[str] = set()

    def check(self, sites: Iterable[Site], trace: Trace | None, owns: Callable[[str], bool], batch: int) -> None:
        """Looks at the boundaries once a training batch has passed them.

        Args:
            sites: The boundaries between stages.
            trace: The traced step; ``None`` or empty if there is none.
            owns: Whether the stage before the boundary of that name is in this process.
            batch: The number of the batch.

        Raises:
            BoundaryError: If there is no trace, and no gradient has ever flowed through one.
        """
        for site in sites:
            if not owns(site.name) or site.name in self._warned:
                continue
            if site.blocked is not None:
                self._found(site.name, site.blocked, trace, batch)
            elif site.crossed:
                self._flowed.add(site.name)

    def _found(self, boundary: str, why: Blocked, trace: Trace | None, batch: int) -> None:
        stage = "the stage before it"
        if trace is None or boundary not in trace.order:
            trains = any(parameter.requires_grad for parameter in self._module.parameters())
            if trains and boundary not in self._flowed:
                raise never_trains(boundary, why, stage)
        else:
            number = trace.order.index(boundary)
            trains, stage = number in trained_stages(self._module, trace), between(trace.order, number)
        if trains:
            self._warned.add(boundary)
            warnings.warn(
                f"Boundary '{boundary}' {why.seen} in training batch {batch}, so {stage} gets no gradient from it and "
                f"does not train on such batches. {why.advice}, unless you mean it. This is said only once.",
                stacklevel=2,
            )


__all__ = ["GradientWatch"]
