"""What only a GPU shows; ``make test-gpu`` runs this, and the oracle tests on the GPU too."""

from __future__ import annotations

import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from examples.copying import Copier
from lightning_sg import (
    LinearPredictor,
    LocalLoss,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    ThroughTime,
)
from tests.models import CLASSES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.partition.test_paging import Configured
from tests.ranks import DEVICE, run_ranks
from tests.recurrent_models import TwoStages
from tests.smooth import Smooth
from tests.watched import CALLBACKS, COUPLES, Make, chunks, in_time, train_watched

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU and LIGHTNING_SG_TEST_DEVICE=cuda")

PREDICTORS = {
    "auto": "auto",
    "linear": LinearPredictor(),
    "MLP": MLPPredictor(hidden=8),
    "local loss": LocalLoss(),
}


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_gpu_computes_what_the_host_computes(predictor: str) -> None:
    def train(accelerator: str) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Smooth()
        callback = SyntheticGradients(predictor=PREDICTORS[predictor], training=PredictorTraining(seed=1))
        make_trainer(accelerator=accelerator, callbacks=[callback]).fit(module, loader(shuffle=False))
        return state_of(module)

    begin = state_of(Smooth())
    host, device = train("cpu"), train(DEVICE)
    assert not torch.equal(host["net.0.weight"], begin["net.0.weight"])
    for name, tensor in host.items():
        torch.testing.assert_close(device[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- nothing waits for the device


FIRST, STEPS = 3, 12


class NeverWaits(Callback):
    """Notes where the host waits for the device within a step; comes after the callback that it watches.

    The first steps may: they follow the network and build predictors. So may the last, where metrics are logged, and
    other threads, whose purpose it is.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.waits: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_others: Any) -> None:
        if FIRST <= trainer.global_step < STEPS - 1:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: pl.Trainer, *_others: Any) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() != 0
        torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def watching(self) -> Iterator[None]:
        main = threading.current_thread()

        def note(message: Any, *_others: Any, **_more: Any) -> None:
            if "called a synchronizing" in str(message) and threading.current_thread() is main:
                self.waits.append("".join(traceback.format_stack(limit=12)))

        try:
            with warnings.catch_warnings():  # puts back showwarning too
                warnings.simplefilter("always")
                warnings.showwarning = note
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Blind(Classifier):
    """Reads no value."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


# The guard asks a device now and then, by default first after 50 batches.
WATCHED = [name for name in CALLBACKS if name != COUPLES]


def waits_of(devices: int, make: Make, module: pl.LightningModule | None = None, data: Any = None) -> Any:
    watch = NeverWaits()
    with watch.watching():
        train_watched(watch, devices, make, module or Blind(), data or loader(samples=16 * STEPS), STEPS)
    return watch.steps, watch.waits


def test_a_step_that_waits_is_noticed() -> None:
    steps, waits = waits_of(1, SyntheticGradients, Reads())
    assert steps
    assert any("reads_a_value" in wait for wait in waits)


class Reads(Blind):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)

        def reads_a_value() -> float:
            return loss.item()

        reads_a_value()
        return loss


EXPECTED = STEPS - 1 - FIRST


@pytest.mark.parametrize("name", WATCHED)
def test_the_host_never_waits_for_the_device_in_a_step(name: str) -> None:
    steps, waits = waits_of(1, CALLBACKS[name])
    assert steps == EXPECTED
    assert not waits, waits[0]


@pytest.mark.parametrize("name", WATCHED)
def test_nor_does_it_in_several_processes(name: str) -> None:
    for steps, waits in run_ranks(2, lambda: waits_of(2, CALLBACKS[name])):
        assert steps == EXPECTED
        assert not waits, waits[0]


def with_auxiliary_task() -> SyntheticGradients:
    return in_time(ThroughTime(auxiliary=0.1))


def test_nor_does_it_at_boundaries_in_time() -> None:
    steps, waits = waits_of(1, with_auxiliary_task, TwoStages(), chunks())
    assert steps == EXPECTED
    assert not waits, waits[0]


def test_a_recurrent_network_is_followed_without_data() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The boundaries could not be checked")
        train_watched(Callback(), 1, with_auxiliary_task, TwoStages(), chunks(), 1)


def test_where_samples_end_each_for_itself_it_waits_once_a_chunk() -> None:
    module = Copier(3)
    steps, waits = waits_of(1, with_auxiliary_task, module, module.train_dataloader())
    assert steps == EXPECTED
    waits = [wait for wait in waits if "examples/" not in wait]  # the example's curriculum reads its error
    assert len(waits) <= steps, "\n".join(waits)
    assert all("going_on" in wait for wait in waits)


# ---------------------------------------------------------------------- random numbers


class Draws(nn.Module):
    """Notes a number drawn on the device in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == DEVICE:
            self.seen.append(torch.rand((), device=x.device))
        return x


class Augmenting(Blind):
    """Draws on the device for each batch, as augmentations do, and in its first and last stages."""

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.for_batch, self.before = [], []
        self.net[0].append(Draws())
        self.net[2].append(Draws())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.for_batch.append(torch.rand((), device=self.device))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.before.append(torch.rand((), device=self.device))
        return super().training_step(batch, batch_idx)


def test_stages_draw_alike_on_the_device_outside_them_and_differently_inside() -> None:
    def work() -> Any:
        torch.cuda.manual_seed(int(os.environ["RANK"]))  # without a seed of the user's, each may have its own
        module = Augmenting()
        trainer = make_trainer(strategy="synthetic_gradients", devices=2, max_epochs=1)
        trainer.fit(module, loader(samples=16 * 6))
        own = module.net[2][-1] if trainer.is_global_zero else module.net[0][-1]
        # Before the first batch the step is traced without data.
        return [[float(number) for number in numbers[-6:]] for numbers in (module.for_batch, module.before, own.seen)]

    last, first = run_ranks(2, work)
    assert last[:2] == first[:2]
    assert len({*last[0], *last[1], *last[2], *first[2]}) == 24


# ---------------------------------------------------------------------- precision, memory


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_16_bits_with_a_scaled_loss_learn_as_32_do(devices: int) -> None:
    def work(devices: int, precision: str) -> tuple[float, bool]:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=4)
        trainer = make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            max_epochs=40,
            precision=precision,
            callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        finite = all(tensor.isfinite().all() for tensor in module.state_dict().values())
        return float(trainer.callback_metrics["val_loss"]), bool(finite)

    full, _ = work(1, "32-true")
    results = run_ranks(devices, lambda: work(devices, "16-mixed")) if devices > 1 else [work(1, "16-mixed")]
    for loss, finite in results:
        assert finite
        assert loss < max(1.3 * full, full + 0.1), (loss, full)


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["set up"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, *_arguments: Any) -> None:
        self.seen["trained"] = torch.cuda.memory_allocated()


def test_a_device_holds_only_the_stages_of_its_process() -> None:
    width, layers = 4096, 4  # two stages of 256 MiB; cuBLAS takes 64 besides
    stage = layers * width * width * 4

    def work() -> tuple[int, int, int]:
        watch = Watch()
        train_watched(watch, 2, SyntheticGradients, Configured(width, layers), loader(shuffle=False), 2)
        return watch.seen["set up"], watch.seen["trained"], torch.cuda.max_memory_allocated()

    for set_up, trained, most in run_ranks(2, work):
        assert set_up < stage / 4
        # The weights of its own stage, their gradients and momenta, and a predictor with its own.
        assert stage < trained < 4 * stage
        assert most < 4.5 * stage


# ---------------------------------------------------------------------- what goes with it


def test_a_compiled_stage_trains_as_it_does_uncompiled() -> None:
    def train(compiles: bool) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Smooth()
        if compiles:
            module.net[3].compile()
            module.net[6].compile()
        make_trainer(
            callbacks=[SyntheticGradients(predictor=LinearPredictor(), training=PredictorTraining(seed=1))]
        ).fit(module, loader(shuffle=False))
        return state_of(module)

    plain = train(False)
    for name, tensor in train(True).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("wire", ["full", "bf16", "int8"])
def test_both_backends_carry_the_same(backend: str, wire: Any) -> None:
    def work(devices: int, backend: str | None) -> dict[str, Tensor]:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=2)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(wire=wire, process_group_backend=backend), devices=devices
        )
        trainer.fit(module, loader(shuffle=False))
        return state_of(module)

    results = run_ranks(2, lambda: work(2, backend))
    assert_same_state(results[0], results[1])
    if wire == "full":
        assert_same_state(work(1, None), results[0])
    assert len(results[0]) > CLASSES
