"""The runs of one client, each in processes of its own: without this package, in one process and in two."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tests.clients.client import Client
from tests.ranks import run_ranks


class Entry(NamedTuple):
    """Where a client is.

    Attributes:
        distribution: The package that it needs, by the name under which it is installed.
        file: Its file in this folder.
        kind: Its class.
    """

    distribution: str
    file: str
    kind: str


CLIENTS = {
    "chemprop": Entry("chemprop", "chemprop_mpnn", "Chemprop"),
    "lightning-transformer": Entry("lightning", "lightning_demo", "DemoTransformer"),
    "pytorch-forecasting-nhits": Entry("pytorch-forecasting", "forecasting_nhits", "NHits"),
    "pytorch-forecasting-tft": Entry("pytorch-forecasting", "forecasting_tft", "FusionTransformer"),
    "gluonts-deepar": Entry("gluonts", "gluonts_deepar", "DeepAR"),
    "scvi-vae": Entry("scvi-tools", "scvi_vae", "VariationalAutoencoder"),
    "pina": Entry("pina-mathlab", "pina_supervised", "Supervised"),
    "pina-labels": Entry("pina-mathlab", "pina_supervised", "Labelled"),
    "neuralforecast-mlp": Entry("neuralforecast", "neuralforecast_mlp", "Perceptron"),
    "darts-rnn": Entry("darts", "darts_rnn", "Recurrent"),
}
SEED = 7
#: Seconds for one run; the packages are slow to begin.
PATIENCE = 300.0


@dataclass
class Run:
    """What a training gave, in one process.

    Attributes:
        losses: Of each training step, where the loss is known.
        per_epoch: How many steps an epoch has.
        state: The weights and buffers at the end.
        parameters: How many parameters the model has.
        said: What was logged, and what was warned of.
        warned: What was warned of.
        boundaries: Where the model was cut.
        predictors: How many parameters the predictors have that are in this process.
        context: What the client expects the predictors to predict from.
        loaded: What the package's own loader made of what rank 0 saved; ``None`` on other ranks.
    """

    losses: list[float]
    per_epoch: int
    state: dict[str, Tensor]
    parameters: int
    said: list[str]
    warned: list[str]
    boundaries: list[str] = field(default_factory=list)
    predictors: dict[str, int] = field(default_factory=dict)
    context: str = ""
    loaded: dict[str, Tensor] | None = None

    @property
    def by_epoch(self) -> list[float]:
        """The mean loss of each epoch."""
        count = self.per_epoch
        return [sum(part) / count for part in zip(*(self.losses[start::count] for start in range(count)))]


def make(name: str) -> Client:
    """A new client, and with it the import of its package."""
    entry = CLIENTS[name]
    client: Client = getattr(importlib.import_module(f"tests.clients.{entry.file}"), entry.kind)()
    return client


def train(
    name: str,
    boundaries: Sequence[str] | str | None,
    devices: int = 1,
    seed: int = SEED,
    epochs: int | None = None,
    *,
    late: bool = False,
) -> Run:
    """Trains a new model in this process, one of ``devices``.

    Args:
        name: A key of :data:`CLIENTS`.
        boundaries: Where to cut; ``None`` for a run without this package.
        devices: How many processes there are; the strategy runs if there are several.
        seed: Of the weights and of the data's order.
        epochs: How long; by default as long as the client says.
        late: Whether true gradients are mixed in when they arrive.
    """
    client = make(name)
    with listening() as (said, warned):
        recorded = recorder(client)
        callbacks, strategy = [recorded], "auto"
        if boundaries is not None:
            # After the package's Lightning.
            from lightning_sg import LateGradients, SyntheticGradients, SyntheticGradientStrategy

            given = boundaries if isinstance(boundaries, str) else list(boundaries)
            callbacks.append(SyntheticGradients(boundaries=given, late=LateGradients(share=0.5) if late else None))
            if devices > 1:
                strategy = SyntheticGradientStrategy(timeout=30.0)
        client.seed = seed
        client.lightning.seed_everything(seed, verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            client.fit(
                accelerator="cpu",
                devices=devices,
                strategy=strategy,
                callbacks=callbacks,
                max_epochs=client.epochs if epochs is None else epochs,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
    trainer = recorded.trainer
    state, parameters = state_of(client.network), size(client.network)
    run = Run(recorded.losses, recorded.per_epoch, state, parameters, said, warned, context=client.context)
    if boundaries is not None:
        (callback,) = (each for each in trainer.callbacks if isinstance(each, SyntheticGradients))
        run.boundaries = list(callback.names)
        run.predictors = {name: size(predictor) for name, predictor in predictors_of(callback).items()}
    with tempfile.TemporaryDirectory() as folder:
        client.save(Path(folder) / "saved")
        if trainer.global_rank == 0:
            run.loaded = state_of(make(name).load(Path(folder) / "saved"))
    return run


def predictors_of(callback: Any) -> dict[str, Any]:
    """The predictors that this process has."""
    trainers = callback.trainers.items()
    return {name: trainer.predictor for name, trainer in trainers if hasattr(trainer, "predictor")}


def size(module: Any) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_of(module: Any) -> dict[str, Tensor]:
    """A copy of the tensors of a module's state."""
    return {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def recorder(client: Client) -> Any:
    """A callback, of the client's Lightning, that keeps the loss of every step, and the trainer."""

    class Recorder(client.lightning.Callback):
        # Of the class: some packages copy the callbacks that they are given.
        losses: ClassVar[list[float]] = []
        per_epoch: ClassVar[int] = 0
        trainer: ClassVar[Any] = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            type(self).trainer = trainer

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
            type(self).per_epoch = max(self.per_epoch, batch_idx + 1)

    return Recorder()


@contextmanager
def listening() -> Iterator[tuple[list[str], list[str]]]:
    """Collects all that is said, in the log or in a warning, and the warnings alone."""
    said: list[str] = []
    warned: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            if record.levelno >= logging.WARNING:
                warned.append(record.getMessage())

    def show(message: Any, *_: Any) -> None:
        said.append(str(message))
        warned.append(str(message))

    ear = Ear(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning_sg")]
    for logger in loggers:
        logger.addHandler(ear)
        logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            yield said, warned
        finally:
            for logger in loggers:
                logger.removeHandler(ear)


def alone(work: Callable[[], Any]) -> Any:
    """Calls ``work`` in a process of its own, without a launcher's environment."""

    def unlaunched() -> Any:
        for variable in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(variable, None)
        return work()

    (result,) = run_ranks(1, unlaunched, may_fail=True, patience=PATIENCE)
    return result


def together(name: str, boundaries: Sequence[str] | str) -> Any:
    """Both ranks' runs, or the first failure."""
    results = run_ranks(2, lambda: train(name, boundaries, devices=2), may_fail=True, patience=PATIENCE)
    return next((result for result in results if not isinstance(result, Run)), results)


def all_runs(name: str) -> dict[str, Any]:
    """Plain, the callback, two processes; two processes with automatic boundaries, and the callback with the same."""
    kind = type(make(name))
    runs = {
        "plain": alone(lambda: train(name, None)),
        "callback": alone(lambda: train(name, kind.boundaries)),
        "split": together(name, kind.boundaries),
        "auto": together(name, "auto"),
    }
    if isinstance(runs["auto"], list):
        runs["auto in one"] = alone(lambda: train(name, runs["auto"][0].boundaries))
    return runs


def long_runs(name: str, seed: int) -> tuple[Any, Any, Any]:
    """Plain training until its loss has long halved, and decoupled training of as many steps.

    Returns:
        The plain run, that with default settings, and that with ``late=LateGradients(share=0.5)``.
    """
    kind = type(make(name))
    return (
        alone(lambda: train(name, None, seed=seed, epochs=kind.long)),
        alone(lambda: train(name, kind.boundaries, seed=seed, epochs=kind.long)),
        alone(lambda: train(name, kind.boundaries, seed=seed, epochs=kind.long, late=True)),
    )


__all__ = ["CLIENTS", "Entry", "Run", "all_runs", "alone", "long_runs", "make", "train"]
