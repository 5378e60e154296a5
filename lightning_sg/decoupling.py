"""Decoupled training in a loop of your own, without a Trainer: ``with decouple(module, boundaries) as sg``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_sg.arguments import checked, function, instance, number
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.finite.diagnosis import BatchOrigin
from lightning_sg.lightning_api import pl
from lightning_sg.partition.shadow import shadowed
from lightning_sg.runtime import OneProcess
from lightning_sg.session import Session
from lightning_sg.settings import Settings
from lightning_sg.stage_randomness import StageRandomness

Batch = TypeVar("Batch")


class _Place:
    """Where the steps run: what a session knows as Lightning's strategy."""

    def __init__(self, device: torch.device) -> None:
        self.root_device = device

    def training_step(self, step: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return step(batch)

    validation_step = test_step = predict_step = training_step


class _Precision:
    """No precision plugin: ``sg.backward(scale=...)`` says what the loss was multiplied by."""

    scaler: Any = None

    def train_step_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Scaler:
    """A fixed factor on the loss, as a session asks a gradient scaler for it."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def scale(self, tensor: Tensor) -> Tensor:
        return tensor * self._factor


class _Loop:
    """The user's loop: what a session knows as Lightning's Trainer."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.lightning_module = module
        self.strategy = _Place(device)
        self.precision_plugin = _Precision()
        self.accumulate_grad_batches = 1
        self.global_rank = self.global_step = self.current_epoch = 0
        self.optimizers: list[torch.optim.Optimizer] = []


class Decoupled:
    """The decoupled training of a module in a loop of your own; :func:`decouple` makes it.

    Args:
        module: The module.
        settings: The options of :class:`~lightning_sg.SyntheticGradients`.
        loop: Stands for the trainer.
    """

    def __init__(self, module: nn.Module, settings: Settings, loop: _Loop) -> None:
        self._loop = loop
        self._step: Callable[[Any], Tensor] | None = None
        seed = settings.training.seed
        seed = torch.initial_seed() if seed is None else seed
        self._session = Session(settings, module, settings.names, seed & (2**63 - 1))  # type: ignore[arg-type]
        self._runtime = OneProcess()
        self._runtime.follow(self._session)
        self._randomness = StageRandomness(self._session, loop)  # type: ignore[arg-type]

    def backward(
        self,
        step: Callable[[Batch], Tensor],
        batch: Batch,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        scale: float = 1.0,
    ) -> Tensor:
        """Runs one step and goes backward, every stage but the last from the synthetic gradient at its end.

        Gradients are added to ``.grad``, as ever; the optimizer is yours. At the first call the step also runs once on
        tensors without data, which shows whether the boundaries cut the module and what the loss compares it with.

        Args:
            step: Computes the loss of a batch, the mean over its samples times ``scale``. It runs the module.
            batch: A batch.
            backward: Goes backward from a loss, such as ``fabric.backward``.
            scale: What the step has multiplied the mean loss by, such as ``1 / 4`` where four batches are accumulated.

        Returns:
            The loss, detached.

        Raises:
            TypeError: If an argument is of another type.
            BoundaryError: At the first call, if a boundary is not reached or gone around, or no gradient reaches the
                stage before it.
            NonFiniteLossError: If the loss, activations or gradients are not finite, unless ``on_non_finite`` says
                otherwise.
        """
        checked("Decoupled.backward", "step", step, function("a function of a batch"))
        checked("Decoupled.backward", "backward", backward, function("a function of a loss"))
        session, loop, self._step = self._session, self._loop, step
        factor = checked("Decoupled.backward", "scale", scale, number(above=0))
        loop.precision_plugin.scaler = None if factor == 1 else _Scaler(factor)
        session.begin_batch(loop, batch, BatchOrigin(0, session.batches, batch))  # type: ignore[arg-type]
        try:
            self._runtime.open_batch(loop, batch, session.batches)  # type: ignore[arg-type]
            loss = loop.strategy.training_step(step, batch)
            session.before_backward(loss, self._runtime.leaves)
            backward(loss)
            session.after_backward()
            session.before_optimizer_step()
        except BaseException:
            session.finite.undo()
            session.remove()
            raise
        session.end_batch()
        loop.global_step += 1
        return loss.detach()

    def traced_step(self, batch: Any) -> Tensor:
        """Runs the current step, for whoever traces it."""
        assert self._step is not None
        return self._step(batch)

    def metrics(self) -> dict[str, float]:
        """How good the last predictions were that have met their targets, by names such as ``"net.2/cosine"``."""
        found = {name: each.take_metrics() for name, each in self._session.all_trainers.items()}
        found |= {name: each.take_metrics() for name, each in self._session.boxes.trainers.items()}
        return {f"{name}/{key}": float(value) for name, values in found.items() for key, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """The predictors with their optimizers, and the targets under way, by boundary."""
        self._runtime.flush()
        return self._session.state_dict(lambda states: states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._session.load_state_dict(state)

    def close(self) -> None:
        """Leaves the module as it was: without hooks, an ordinary module."""
        self._session.check_finite()
        self.release()

    def release(self) -> None:
        """Lets go of the module, whatever state the training is in."""
        self._session.remove()
        self._randomness.close()


@contextmanager
def decouple(module: nn.Module, boundaries: Sequence[str] | None = None, **options: Any) -> Iterator[Decoupled]:
    """Trains a module decoupled in a loop of your own, in one process; computes what the callback computes.

    Args:
        module: The module; it is on its device. Not a LightningModule, which has a Trainer.
        boundaries: Names of submodules, as in ``module.named_modules()``, to cut after. By default every
            :class:`~lightning_sg.Boundary` in the module.
        **options: Further options of :class:`~lightning_sg.SyntheticGradients`, such as ``predictor`` and ``delay``.

    Yields:
        What goes backward. Outside :meth:`Decoupled.backward` the module is its ordinary self.

    Raises:
        TypeError: If an argument is of another type, or there is no such option.
        ValueError: If an option is out of range.
        BoundaryError: If a name is unknown or given twice.
        SyntheticGradientsError: If the module has no boundary.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sg import decouple
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> with decouple(net, ["1"]) as sg:
        ...     for batch in batches:
        ...         optimizer.zero_grad()
        ...         loss = sg.backward(lambda xy: nn.functional.cross_entropy(net(xy[0]), xy[1]), batch)
        ...         optimizer.step()
    """
    module = checked("decouple", "module", module, instance(nn.Module))
    if isinstance(module, pl.LightningModule):
        raise TypeError(
            "decouple(module=...) takes a plain module: a LightningModule trains with Trainer(callbacks=["
            "SyntheticGradients(...)]). Give the network in it, such as model.net, for a loop of your own."
        )
    settings = Settings(boundaries, **options)
    if settings.automatic:
        raise ValueError("decouple(boundaries='auto') does not go: the automatic choice is for several processes.")
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    loop = _Loop(module, device)
    sg: Decoupled | None = None

    def training_step(batch: Any) -> Tensor:
        assert sg is not None
        return sg.traced_step(batch)

    lent = {"trainer": loop, "automatic_optimization": True, "training_step": training_step}
    with shadowed([(module, name, value) for name, value in lent.items()]):
        sg = Decoupled(module, settings, loop)
        try:
            if not sg._session.decouples:
                raise SyntheticGradientsError(
                    f"decouple: {type(module).__name__} has no boundary. Put lightning_sg.Boundary() into it, or name "
                    "submodules to cut after: decouple(module, boundaries=[...])."
                )
            yield sg
            sg.close()
        finally:
            sg.release()


__all__ = ["Decoupled", "decouple"]
