"""Hears where a step passes from stage to stage: at boundaries, and where it begins and ends to run the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_sg.boundary import Site


class _Passing:
    """A hook of a submodule. A copy that is made meanwhile, such as a teacher, has one that does nothing."""

    def __init__(self, passed: Callable[[], None] | None = None) -> None:
        self._passed = passed

    def __call__(self, module: nn.Module, *_call: Any) -> None:
        if self._passed is None:
            return
        # Lightning runs a whole step as the `forward` of the module where a wrapper, such as DDP, is to see it.
        forward = vars(module).get("forward")
        if forward is None or getattr(forward, "__func__", None) is type(module).forward:
            self._passed()

    def __reduce__(self) -> tuple[type[_Passing], tuple[()]]:
        return _Passing, ()


@contextmanager
def hearing_passes(module: nn.Module, sites: Sequence[Site], passed: Callable[[], None]) -> Iterator[None]:
    """Has ``passed`` called in a step whenever it comes to another stage, in the same places in every process.

    These are the boundaries, and the calls of each module that holds all of them. Where a step runs the network again,
    the last stage ends and the first begins there.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        passed: Is called.
    """
    hook, handles = _Passing(passed), []
    for each in _around_all(module, sites):
        handles += [each.register_forward_pre_hook(hook), each.register_forward_hook(hook)]
    for site in sites:
        site.whenever_passed(passed)
    try:
        yield
    finally:
        for site in sites:
            site.whenever_passed(None)
        for handle in handles:
            handle.remove()


def _around_all(module: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The modules that hold all boundaries: the whole one, and perhaps one in it, and so on."""
    parents = [site.name.split(".")[:-1] for site in sites]
    if not parents:
        return []
    found = [module]
    for names in zip(*parents):
        if len(set(names)) > 1:
            break
        found.append(getattr(found[-1], names[0]))
    return found


__all__ = ["hearing_passes"]
