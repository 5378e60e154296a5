"""Synthetic inputs in several processes: no stage waits for the activation of its batch."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    ExactGradients,
    LateGradients,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
)
from tests.input_models import Masked, as_dict
from tests.models import Classifier, assert_same_state, dataset, fit_and_save, loader, make_trainer, state_of
from tests.ranks import Failure, run_ranks


def train(devices: int, epochs: int = 4, stages: int = 4, extra: Any = (), **callback: Any) -> Any:
    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=stages)
        trainer = make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(**{"inputs": SyntheticInputs(), **callback}), *extra],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        return state_of(module), metrics, trainer.global_step

    return run_ranks(devices, work) if devices > 1 else [work()]


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ({"delay": 0}, [2]),
        ({"delay": 1}, [2, 4]),
        ({"delay": 2, "inputs": SyntheticInputs(warm_up=7)}, [4]),
        ({"exact": ExactGradients(every=1, correction=1.0)}, [4]),
        ({"late": LateGradients(0.2)}, [2, 4]),
        ({"exact": ExactGradients(every=2, bootstrap=True)}, [2]),
        ({"training": PredictorTraining(every=3)}, [2]),
    ],
)
def test_one_two_and_four_processes_end_with_the_same_weights(options: dict[str, Any], processes: list[int]) -> None:
    ((expected, metrics, _),) = train(1, **options)
    for devices in processes:
        ranks = train(devices, **options)
        for state, seen, _ in ranks:
            assert_same_state(expected, state)
            assert seen["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)
    for name in ("net.1", "net.3", "net.5"):  # on rank 0, where the loggers are
        assert {f"sg/{name}/input_error", f"sg/{name}/cosine"} <= ranks[0][1].keys()


def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    def run(devices: int, epochs: int, folder: Path, checkpoint: Path | None = None) -> Any:
        def work() -> Any:
            pl.seed_everything(7, verbose=False)
            module = Classifier(stages=4)
            callback = SyntheticGradients(inputs=SyntheticInputs(), training=PredictorTraining(seed=1))
            fit_and_save(module, callback, devices, folder, None if checkpoint is None else str(checkpoint), epochs)
            return state_of(module)

        return run_ranks(devices, work) if devices > 1 else [work()]

    (expected,) = run(1, 4, tmp_path / "whole")
    for before, after in ((1, 2), (2, 1), (4, 2)):
        folder = tmp_path / f"{before}-{after}"
        run(before, 2, folder)
        for state in run(after, 4, folder, folder / "last.ckpt"):
            assert_same_state(expected, state)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_checkpoint_from_before_the_first_prediction_goes_on(steps: int, tmp_path: Path) -> None:
    def run(devices: int, checkpoint: Path | None, **length: Any) -> Any:
        def work() -> Any:
            pl.seed_everything(7, verbose=False)
            module = Classifier(stages=2)
            trainer = make_trainer(
                strategy="synthetic_gradients" if devices > 1 else "auto",
                devices=devices,
                callbacks=[SyntheticGradients(inputs=SyntheticInputs(), training=PredictorTraining(seed=1))],
                **length,
            )
            trainer.fit(module, loader(shuffle=False), ckpt_path=None if checkpoint is None else str(checkpoint))
            trainer.save_checkpoint(tmp_path / f"{devices}.ckpt")
            return state_of(module)

        return run_ranks(devices, work) if devices > 1 else [work()]

    for devices in (1, 2):
        run(devices, None, max_steps=steps)
    saved = [tmp_path / f"{devices}.ckpt" for devices in (2, 1)]
    for path in saved:
        path.rename(path.with_suffix(".saved"))
    (expected,) = run(1, saved[1].with_suffix(".saved"), max_epochs=3)
    for path in saved:
        for state in run(2, path.with_suffix(".saved"), max_epochs=3):
            assert_same_state(expected, state)


class SlowFirstStage(Classifier):
    """Its first stage sleeps in one batch; the module notes when each batch was done."""

    slow, seconds = 6, 1.0

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.ends: list[float] = []
        self.net[0].register_forward_hook(self._sleep)

    def _sleep(self, child: nn.Module, args: Any, output: Tensor) -> None:
        if type(output) is Tensor and self.training and self.trainer.fit_loop.total_batch_idx == self.slow:
            time.sleep(self.seconds)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(time.monotonic())


def test_a_stage_does_not_wait_for_the_activation_of_its_batch() -> None:
    """While the first stage sleeps in batch 6, the last goes on through batches 6 and 6 + delay."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = SlowFirstStage()
        callback = SyntheticGradients(inputs=SyntheticInputs(), delay=1)
        make_trainer(strategy="synthetic_gradients", devices=2, max_epochs=3, callbacks=[callback]).fit(
            module, loader()
        )
        return module.ends

    last, first = run_ranks(2, work)
    gaps = [after - before for before, after in itertools.pairwise(last)]
    assert gaps[7] > 0.5 * SlowFirstStage.seconds  # batch 8 needs the activation of batch 6 to learn from
    assert max(gaps[5], gaps[6]) < 0.5 * SlowFirstStage.seconds
    assert first[6] > last[7]


class StopsAt(Callback):
    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch, self.seen = rank, batch, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen += 1
        if trainer.global_rank == self.rank and self.seen == self.batch:
            trainer.should_stop = True


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stop_that_one_stage_wants_stops_all_after_the_same_batch(rank: int) -> None:
    def work() -> int:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=3)
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=3,
            max_epochs=1,
            callbacks=[SyntheticGradients(inputs=SyntheticInputs()), StopsAt(rank, 9)],
        )
        trainer.fit(module, loader(batch_size=4, samples=400))
        return trainer.global_step

    steps = run_ranks(3, work)
    assert len(set(steps)) == 1
    assert 9 <= steps[0] < 30


def test_replicas_learn_together() -> None:
    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=2)
        callback = SyntheticGradients(inputs=SyntheticInputs())
        make_trainer(strategy=SyntheticGradientStrategy(replicas=2), devices=4, callbacks=[callback], max_epochs=3).fit(
            module, loader(batch_size=8)
        )
        trained = callback.session.inputs.trainers["net.1"]
        # Running statistics of the hidden layer's BatchNorm, also taken in predictions, are each replica's own.
        state = state_of(trained.predictor) if trained.ready else {}
        return {name: tensor for name, tensor in state.items() if "running" not in name}

    last, _, other, _ = run_ranks(4, work)
    assert {"net.0.weight", "mean", "square"} <= last.keys()
    assert_same_state(last, other, exact=True)


def test_a_mask_between_processes_is_refused_by_name() -> None:
    def work() -> None:
        pl.seed_everything(3, verbose=False)
        data = DataLoader(dataset(), batch_size=16, collate_fn=as_dict)
        callback = SyntheticGradients(inputs=SyntheticInputs())
        make_trainer(strategy="synthetic_gradients", devices=2, callbacks=[callback]).fit(Masked(), data)

    failures = run_ranks(2, work, may_fail=True)
    assert all(isinstance(failure, Failure) for failure in failures)
    assert "carries no gradient crosses boundary 'cut'" in failures[0].message
    assert "Make it from the batch" in failures[0].message
