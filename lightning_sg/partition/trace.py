"""Runs one step on tensors without data and notes which stage each parameter is used in."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric, MetricCollection

from lightning_sg._compat import DATA_DEPENDENT_ERRORS, tree_leaves
from lightning_sg.boundary import Crossing, Site
from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.partition.fakes import Ghosts, is_ghost
from lightning_sg.partition.shadow import shadowed
from lightning_sg.predictors.base import LossInfo
from lightning_sg.recurrent.boundary import boundaries_in_time
from lightning_sg.rng import unchanged_randomness


@dataclass(frozen=True)
class Leak:
    """An activation of one stage that a later stage uses without its passing the boundary between them."""

    made_in: int
    made_by: str
    used_in: int
    used_by: str
    operation: str
    shape: tuple[int, ...]
    differentiable: bool


@dataclass
class Trace:
    """What one traced step shows.

    Attributes:
        order: The boundaries in the order in which the data reaches them.
        uses: For each parameter and buffer that was used, the stages that used it.
        shapes: For each boundary, the shapes of what crosses it and can carry a gradient.
        bytes: For each boundary, the size of all that crosses it.
        flops: Floating-point operations of each stage's forward pass, as torch counts them.
        leaks: Activations that go around a boundary.
        times: For each boundary in time, the stages that write to it or read from it.
        loss: The model's own loss, if it is one that predictors know.
        cut_short: Why the step was not run to its end, or ``None``. Code of the last stage may read values, which
            tensors without data do not have; what comes after it belongs to the last stage.
    """

    order: list[str] = field(default_factory=list)
    uses: dict[str, set[int]] = field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    flops: list[int] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    times: dict[str, set[int]] = field(default_factory=dict)
    loss: LossInfo | None = None
    cut_short: str | None = None

    @property
    def stages(self) -> int:
        """The number of stages: one more than boundaries."""
        return len(self.order) + 1


def trace_step(
    module: nn.Module,
    sites: Sequence[Site],
    run: Callable[[], STEP_OUTPUT],
    device: torch.device,
    *,
    without_gradient: bool = True,
) -> Trace:
    """Runs a step with all parameters and buffers replaced by ghosts. Nothing is computed, logged or counted.

    The user's Python code does run one more time than it otherwise would; what it assigns to the module's attributes
    or adds to lists, dicts and sets that are attributes is undone.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        run: Calls the step on a real batch.
        device: The device that the step runs on.
        without_gradient: Whether passes under ``no_grad`` count, see :meth:`Site.open`.

    Raises:
        BoundaryError: If the step ends without reaching a boundary.
        PartitionError: If code before the last boundary cannot run without data.
    """
    tracer = _Tracer(module, sites)
    with ExitStack() as stack:
        stack.enter_context(_unchanged(module))
        stack.enter_context(quiet(module))
        stack.enter_context(_no_backward(module))
        tracer.ghosts = stack.enter_context(Ghosts(module, None, device, trainable=True))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(unchanged_randomness())
        stack.enter_context(tracer.following_modules())
        stack.enter_context(tracer.following_time(module))
        tracer.counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(tracer)
        try:
            for site in sites:
                site.open(tracer.crossing(site), without_gradient=without_gradient)
            run()
        except _StepEnds:
            pass
        except BoundaryError:
            raise
        except Exception as error:  # the user's code: anything may come
            tracer.stopped_by(error)
        finally:
            for site in sites:
                site.close()
    return tracer.result()


def copy_of(arguments: Any) -> Any:
    """The arguments of a step, with tensors that the step may change without its being noticed afterwards."""
    return apply_to_collection(arguments, Tensor, torch.clone)


def call_training_step(module: pl.LightningModule, batch: Any, batch_idx: int) -> STEP_OUTPUT:
    """Calls the user's step as Lightning does, with a copy of the batch."""
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    copied = copy_of(batch)
    return module.training_step(*((copied, batch_idx) if takes_index else (copied,)))


class _StepEnds(BaseException):
    """Leaves the user's step; no ``except Exception`` of theirs stops it."""


class _Tracer(TorchFunctionMode):
    """Sees every torch operation of the step with its arguments."""

    def __init__(self, module: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        self.trace = Trace()
        self.ghosts: Ghosts | None = None
        self.counter: FlopCounterMode | None = None
        self._sites = [site.name for site in sites]
        self._module_names = {id(child): name or type(module).__name__ for name, child in module.named_modules()}
        self._tensor_names = {
            id(tensor): name for named in (module.named_buffers(), module.named_parameters()) for name, tensor in named
        }
        self._inside: list[str] = [type(module).__name__]
        self._crossing_now = False

    @property
    def _stage(self) -> int:
        return len(self.trace.order)

    # ------------------------------------------------------------------ during the step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._crossing_now:
            return func(*args, **kwargs)
        touched, buffers = False, set()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                touched = self._note(tensor, func) or touched
                buffers |= self._buffers_of(tensor)
        self._note_loss(func, args, kwargs)
        if func in _READS and self._stage == len(self._sites) and is_ghost(args[0]):
            return _READS[func]  # any value does: it only lets the step go on
        result = func(*args, **kwargs)
        if touched or buffers:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and touched:
                    tensor._sg_origin = (self._stage, self._inside[-1])  # type: ignore[attr-defined]
                elif isinstance(tensor, Tensor):
                    tensor._sg_buffers = buffers  # type: ignore[attr-defined]
        return result

    def _buffers_of(self, tensor: Tensor) -> set[str]:
        """Notes the use of buffers that one argument is made from, by way of nothing but inputs; returns their names.

        Such a tensor belongs to no stage: every process that uses it makes it, from a copy of the buffers.
        """
        assert self.ghosts is not None
        original = self.ghosts.origin.get(id(tensor))
        if original is not None and not isinstance(original, nn.Parameter):
            names = {self._tensor_names[id(original)]}
        else:
            names = getattr(tensor, "_sg_buffers", set())
        for name in names:
            self.trace.uses.setdefault(name, set()).add(self._stage)
        return names

    def _note(self, tensor: Tensor, func: Callable[..., Any]) -> bool:
        """Notes the use of one argument; returns whether it depends on a parameter."""
        assert self.ghosts is not None
        original = self.ghosts.origin.get(id(tensor))
        if isinstance(original, nn.Parameter):
            self.trace.uses.setdefault(self._tensor_names[id(original)], set()).add(self._stage)
            return True
        origin = getattr(tensor, "_sg_origin", None)
        if origin is None:
            return False
        if origin[0] != self._stage:
            operation = getattr(func, "__name__", str(func))
            shape = tuple(tensor.shape) if operation != "__get__" else ()
            flows = tensor.requires_grad and operation != "detach"
            leak = Leak(origin[0], origin[1], self._stage, self._inside[-1], operation, shape, flows)
            if operation not in ("__get__", "size", "dim", "numel"):  # asking for a shape uses no value
                self.trace.leaks.append(leak)
        return True

    def _note_loss(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        kind = _LOSSES.get(func)
        if kind is None or self.trace.loss is not None or self._stage != len(self._sites):
            return
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        output = given["input"]
        if kind == "cross_entropy":
            outputs = output.shape[1 if output.ndim > 1 else -1]
        else:
            outputs = output.shape[-1] if output.ndim > 1 else 1
        self.trace.loss = LossInfo(
            kind,
            int(outputs),
            ignore_index=int(given.get("ignore_index", -100)),
            label_smoothing=float(given.get("label_smoothing", 0.0)),
            beta=float(given.get("beta", given.get("delta", 1.0))),
        )

    def crossing(self, site: Site) -> Crossing:
        """What happens at ``site`` in a traced step: the next stage begins."""

        def cross(tensors: list[Tensor]) -> list[Tensor]:
            for tensor in tensors:
                self._note(tensor, cross)
                self._buffers_of(tensor)
            self._count_flops()
            self.trace.order.append(site.name)
            self._crossing_now = True
            try:
                self.trace.shapes[site.name] = [tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()]
                self.trace.bytes[site.name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                crossed = [tensor.view_as(tensor) for tensor in tensors]
            finally:
                self._crossing_now = False
            for tensor in crossed:
                tensor._sg_origin = (self._stage, f"boundary '{site.name}'")  # type: ignore[attr-defined]
            return crossed

        return cross

    def _count_flops(self) -> None:
        assert self.counter is not None
        self.trace.flops.append(self.counter.get_total_flops() - sum(self.trace.flops))

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Knows, for messages, which submodule is running."""

        def enter(child: nn.Module, _args: Any) -> None:
            self._inside.append(self._module_names.get(id(child), type(child).__name__))

        def leave(_child: nn.Module, _args: Any, _output: Any) -> None:
            self._inside.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def following_time(self, module: nn.Module) -> AbstractContextManager[None]:
        """Notes which stages use the boundaries in time."""

        def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                self.trace.times.setdefault(name, set()).add(self._stage)
                return method(*args, **kwargs)

            return noted

        return shadowed(
            [
                (boundary, method, noting(name, getattr(boundary, method)))
                for name, boundary in boundaries_in_time(module).items()
                for method in boundary.uses
            ]
        )

    # ------------------------------------------------------------------ after the step

    def stopped_by(self, error: Exception) -> None:
        """The user's code raised ``error``: expected in the last stage, a reason to refuse before it."""
        if self._stage == len(self._sites):
            self.trace.cut_short = f"{type(error).__name__}: {error}"
            return
        missing = [name for name in self._sites if name not in self.trace.order]
        reads = " It reads a value (`.item()`, `if tensor:`, `.tolist()`, `.numpy()`)" * isinstance(
            error, DATA_DEPENDENT_ERRORS
        )
        raise PartitionError(
            f"The step cannot be followed to boundary '{missing[0]}': in '{self._inside[-1]}' of stage {self._stage}, "
            f"{type(error).__name__}: {error}.{reads or ' It'} does not run on tensors without data, which stand for "
            "activations of other stages. Move the code behind the last boundary, or move the boundary."
        ) from error

    def result(self) -> Trace:
        """The trace, if the step reached every boundary."""
        self._count_flops()
        missing = [name for name in self._sites if name not in self.trace.order]
        if missing:
            raise BoundaryError(
                f"Boundary '{missing[0]}' was never reached in the step. Is the module called in `forward`? "
                f"Reached, in order: {self.trace.order or 'none'}."
            )
        return self.trace


# Ways to read a value, which the last stage may: what a traced step is told instead.
_READS: dict[Callable[..., Any], Any] = {
    Tensor.item: 1.0,
    Tensor.__float__: 1.0,
    Tensor.__int__: 1,
    Tensor.__bool__: True,
}

_LOSSES: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "cross_entropy",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.huber_loss: "huber",
    F.l1_loss: "l1",
    F.mse_loss: "mse",
    F.smooth_l1_loss: "smooth_l1",
}


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """While entered, the module logs nothing and counts no metric."""
    shadows: list[tuple[nn.Module, str, Any]] = [
        (module, "log", lambda *_args, **_kwargs: None),
        (module, "log_dict", lambda *_args, **_kwargs: None),
    ]
    for child in module.modules():
        if isinstance(child, (Metric, MetricCollection)):
            empty: Any = {} if isinstance(child, MetricCollection) else torch.zeros(())
            shadows.append((child, "forward", lambda *_args, _empty=empty, **_kwargs: _empty))
            shadows.append((child, "update", lambda *_args, **_kwargs: None))
    with shadowed(shadows):
        yield


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Afterwards the module's attributes are as before, lists of outputs and counters of steps too."""
    attributes = [(child.__dict__, dict(child.__dict__)) for child in module.modules()]
    containers = [
        (value, copy.copy(value))
        for _held, values in attributes
        for value in values.values()
        if type(value) in (list, dict, set, deque, defaultdict)
    ]
    try:
        yield
    finally:
        for held, values in attributes:
            held.clear()
            held.update(values)
        for container, before in containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)


def _no_backward(module: nn.Module) -> AbstractContextManager[None]:
    def end_step(*_args: Any, **_kwargs: Any) -> None:
        raise _StepEnds

    return shadowed([(module, "manual_backward", end_step)])


__all__ = ["Leak", "Trace", "call_training_step", "copy_of", "quiet", "trace_step"]
