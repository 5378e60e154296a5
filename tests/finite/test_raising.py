"""A loss or gradient that is not finite is an error that says which batch, where, and what is at fault."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sg import (
    NonFiniteLossError,
    NonFinitePredictionError,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticInputs,
    TrueGradient,
    ZeroPredictor,
)
from tests.finite.models import BAD, Stages, data, failure
from tests.models import make_trainer

BATCH = rf"training batch {BAD} \(batch_idx\) of epoch 0"


def raised(make: Any, bad: int | None = None, **callback: Any) -> SyntheticGradientsError:
    pl.seed_everything(1, verbose=False)
    with pytest.raises(NonFiniteLossError) as caught:
        make_trainer(callbacks=[SyntheticGradients(**callback)]).fit(make(), data(bad))
    return caught.value


def test_an_unknown_wish_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on_non_finite must be 'raise', 'skip' or 'ignore', not 'stop'"):
        SyntheticGradients(on_non_finite="stop")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_non_finite"):
        SyntheticGradients(on_non_finite=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["third", "constant"])
def test_a_loss_that_is_not_finite_is_an_error_before_the_step(fault: str) -> None:
    error = raised(lambda: Stages(fault))
    assert not isinstance(error, NonFinitePredictionError)
    assert error.args[0].startswith(f"The loss of training batch {BAD} (batch_idx) of epoch 0 is not finite in stage 2")
    assert "the loss itself is at fault" in str(error)


@pytest.mark.parametrize("fault", ["first gradient", "second gradient", "third gradient"])
def test_a_gradient_that_is_not_finite_is_an_error_that_names_it(fault: str) -> None:
    (kind, message, step, state) = failure(lambda: Stages(fault))[0]
    assert kind == "NonFiniteLossError"
    assert step == BAD
    name, stage = {"first": ("first.weight", 0), "second": ("second.weight", 1), "third": ("third.0.weight", 2)}[
        fault.split()[0]
    ]
    assert f"not finite in stage {stage} (rank 0): {name}" in message
    assert "backward pass is at fault" in message
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("predictor", [None, ZeroPredictor(), TrueGradient()], ids=["default", "zero", "true"])
@pytest.mark.parametrize("devices", [1, 3])
def test_nan_in_the_data_is_blamed_on_the_data(predictor: Any, devices: int) -> None:
    callback = {} if predictor is None else {"predictor": predictor}
    results = failure(Stages, devices, bad=BAD, **callback)
    named = [message for kind, message, *_ in results if kind.startswith("NonFinite")]
    assert named
    for message in named:
        assert "The data are at fault: batch[0] (12 of 120 values NaN or infinite)" in message
        assert f"training batch {BAD} (batch_idx) of epoch 0" in message
        assert "diverged" not in message
    for kind, message, *_ in results:
        assert kind in ("NonFiniteLossError", "NonFinitePredictionError", "StageLostError")
        assert "data are at fault" in message


def test_nan_in_the_data_is_no_fault_of_an_input_predictor() -> None:
    error = raised(Stages, bad=BAD, inputs=SyntheticInputs(), on_non_finite="ignore")
    assert isinstance(error, NonFinitePredictionError)
    assert "The data are at fault: batch[0]" in str(error)


class BrokenWeights(Stages):
    """An earlier step has broken a weight of the stage in the middle."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == BAD:
            with torch.no_grad():
                self.second.weight[0, 0] = float("nan")


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("predictor", [None, ZeroPredictor()], ids=["default", "zero"])
def test_weights_that_an_earlier_step_broke_are_named(devices: int, predictor: Any) -> None:
    callback = {} if predictor is None else {"predictor": predictor}
    for kind, message, *_ in failure(BrokenWeights, devices, **callback):
        assert kind.startswith("NonFinite") or kind == "StageLostError"
        # Stage 1 sends before it predicts, so that either may be the first to notice.
        here = "weights of stage 1" in message and "second.weight (1 of 256 values" in message
        next_one = "activations that stage 2 (rank 0) received from stage 1 are not" in message
        assert here or (next_one and devices > 1)


@pytest.mark.parametrize("devices", [2, 3])
def test_every_process_names_the_stage_and_the_batch(devices: int) -> None:
    for kind, message, _step, state in failure(lambda: Stages("third"), devices):
        assert kind in ("NonFiniteLossError", "StageLostError")
        assert "is not finite in stage 2 (rank 0)" in message
        assert f"training batch {BAD} (batch_idx) of epoch 0" in message
        assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


class ByHand(Stages):
    """Manual optimization."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("fault", ["third", "second gradient"])
def test_manual_optimization_is_watched_too(fault: str) -> None:
    error = raised(lambda: ByHand(fault))
    assert f"training batch {BAD} (batch_idx)" in str(error)


class PastTheHooks(ByHand):
    """Goes backward without Lightning."""

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward()


@pytest.mark.parametrize("fault", ["third", "third gradient"])
def test_gradients_that_come_past_the_hooks_are_looked_at_before_the_step(fault: str) -> None:
    ((kind, message, _step, state),) = failure(lambda: PastTheHooks(fault), predictor=ZeroPredictor())
    assert kind == "NonFiniteLossError"
    assert f"Gradients of training batch {BAD} (batch_idx)" in message
    assert all(tensor.isfinite().all() for name, tensor in state.items() if "running" not in name)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_stage_whose_own_computation_is_at_fault_is_named(devices: int) -> None:
    failures = failure(lambda: Stages("second"), devices)
    (message,) = (each[1] for each in failures if each[0] == "NonFinitePredictionError")
    rank = 0 if devices == 1 else 1
    assert f"In training batch {BAD} (batch_idx) of epoch 0, stage 1 (rank {rank}): The data, the act" in message
    assert "what it computes before the boundary is at fault" in message


def test_a_checkpoint_that_the_error_brings_about_is_finite(tmp_path: Any) -> None:
    pl.seed_everything(1, verbose=False)
    checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    trainer = make_trainer(callbacks=[SyntheticGradients(), checkpoint], enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError):
        trainer.fit(Stages(), data(BAD))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) >= 2
    for path in saved:
        state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_ignoring_trains_on_as_before() -> None:
    pl.seed_everything(1, verbose=False)
    module = Stages("third")
    make_trainer(callbacks=[SyntheticGradients(on_non_finite="ignore")]).fit(module, data())
    assert not module.third[1].weight.isfinite().all()


class Nothing(Stages):
    """Returns no loss now and then."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == BAD else loss


@pytest.mark.parametrize("wish", ["raise", "skip", "ignore"])
def test_a_step_may_return_nothing(wish: Any) -> None:
    make_trainer(callbacks=[SyntheticGradients(on_non_finite=wish)]).fit(Nothing(), data())


def test_without_a_boundary_nothing_is_changed() -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).sum() * float("nan")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    make_trainer(callbacks=[SyntheticGradients()]).fit(Plain(), data())
