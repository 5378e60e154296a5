"""A Lightning strategy that one Trainer after another may take."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch

from lightning_sg._compat import belongs_to
from lightning_sg.arguments import checked, instance, listed, optional
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import Accelerator, CheckpointIO, ClusterEnvironment, ParallelStrategy, Precision

# What Lightning's own arguments may be.
_OPTIONS = {
    "accelerator": optional(instance(Accelerator)),
    "parallel_devices": optional(listed(instance(torch.device), "a list of torch.device")),
    "cluster_environment": optional(instance(ClusterEnvironment)),
    "checkpoint_io": optional(instance(CheckpointIO)),
    "precision_plugin": optional(instance(Precision)),
}
#: What a Trainer puts into its strategy, besides the accelerator.
_PUT_IN = ("_parallel_devices", "cluster_environment", "_checkpoint_io", "_precision_plugin")


class ReusableStrategy(ParallelStrategy, ABC):
    """Forgets what one Trainer put into it when the next Trainer takes it.

    A Trainer puts its accelerator, devices and plugins into its strategy. The next Trainer would take them for
    arguments of the strategy, and refuse its own flags beside them ("accelerator set through both strategy class and
    accelerator flag").

    Args:
        **options: Arguments of Lightning's ``ParallelStrategy``.

    Raises:
        TypeError: If one is of another type.
    """

    def __init__(self, **options: Any) -> None:
        for name in options.keys() & _OPTIONS.keys():
            checked(type(self).__name__, name, options[name], _OPTIONS[name])
        self._given: dict[str, Any] = {}  # by attribute, once a Trainer has taken the strategy
        self._given_accelerator: Accelerator | None = None
        self._used_accelerator: Accelerator | None = None
        super().__init__(**options)

    @property
    def accelerator(self) -> Accelerator | None:
        """The Trainer's accelerator."""
        return self._used_accelerator or self._given_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._used_accelerator = accelerator

    @property
    def _accelerator(self) -> Accelerator | None:
        """That of the constructor. A new Trainer asks for it by this name before anything else."""
        if self._used_accelerator is None:
            self._given = {name: getattr(self, name, None) for name in _PUT_IN}
        else:
            self._used_accelerator = None
            for name, value in self._given.items():
                setattr(self, name, value)
            self.leave_trainer()
        return self._given_accelerator

    @_accelerator.setter
    def _accelerator(self, accelerator: Accelerator | None) -> None:
        self._given_accelerator = accelerator

    def setup_environment(self) -> None:
        """Refuses a Trainer from which another has taken the strategy.

        Raises:
            SyntheticGradientsError: If one has.
        """
        assert self.lightning_module is not None
        if not belongs_to(self, self.lightning_module.trainer):
            name = type(self).__name__
            raise SyntheticGradientsError(
                f"This {name} was given to another Trainer after this one, and has that one's devices and precision. "
                f"Trainers that are used in turns each need a {name} of their own; one that is made when the last is "
                "done may have the same."
            )
        super().setup_environment()

    def leave_trainer(self) -> None:
        """Another Trainer takes the strategy."""


__all__ = ["ReusableStrategy"]
