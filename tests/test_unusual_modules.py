"""What users' modules also do: draw random numbers, read values, share buffers, patch forwards, log in the middle."""

from __future__ import annotations

import copy
import os
import pickle
import random
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    BoundaryError,
    LossModelPredictor,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    TrueGradient,
    ZeroPredictor,
)
from tests.models import CLASSES, FEATURES, Classifier, assert_same_state, dataset, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Two(pl.LightningModule):
    """Two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 16), Boundary(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(torch.relu(self.first(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(kind: type[pl.LightningModule], devices: int = 1, data: Any = None, **arguments: Any) -> Any:
    """Fits and returns the state, on each rank; in one process, the state."""
    callback = arguments.pop("callback", {})

    def work() -> Any:
        pl.seed_everything(2, verbose=False)
        module = kind()
        strategy = SyntheticGradientStrategy(timeout=15.0) if devices > 1 else "auto"
        extra = arguments.get("callbacks", [])
        trainer = make_trainer(
            **{**arguments, "callbacks": [SyntheticGradients(**callback), *extra]}, devices=devices, strategy=strategy
        )
        trainer.fit(module, data() if data else loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    return run_ranks(devices, work, may_fail=True) if devices > 1 else work()


# ---------------------------------------------------------------------- random numbers in the step


class Denoiser(Two):
    """The noise that goes into the first stage is what the last one compares with."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, CLASSES)
        self.error = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(len(batch[0]), CLASSES) + random.random() + float(np.random.rand())
        loss = F.mse_loss(self(torch.cat([batch[0][:, : FEATURES - CLASSES], noise], 1)), noise)
        self.error = loss.item()
        return loss


def test_numbers_drawn_before_the_network_are_the_same_in_all_stages() -> None:
    def work() -> float:
        pl.seed_everything(2, verbose=False)
        module = Denoiser()
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            max_epochs=60,
            callbacks=[SyntheticGradients(predictor=TrueGradient())],
        )
        trainer.fit(module, loader(samples=64))
        return module.error

    assert run_ranks(2, work)[0] < 0.1  # with noise of its own, each stage would stay at 1


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from numpy, ``random`` and torch."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> Any:
        shift = np.random.rand() + random.random()
        return torch.ones(FEATURES) * shift + torch.randn(FEATURES), place % CLASSES


class DrawingLate(Two):
    """Draws after the boundary only in the last stage."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits + np.random.rand() + random.random() + torch.rand(()), batch[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentations_agree_under_seed_everything_with_workers(workers: int) -> None:
    def work() -> None:
        pl.seed_everything(2, workers=True, verbose=False)
        data = torch.utils.data.DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
        make_trainer(strategy="synthetic_gradients", devices=2).fit(DrawingLate(), data)

    run_ranks(2, work)


class MixingUp(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] * np.random.beta(1, 1) * random.random()), batch[1])


def test_the_check_of_the_first_step_draws_no_number() -> None:
    def plain() -> dict[str, Tensor]:
        pl.seed_everything(2, verbose=False)
        module = MixingUp()
        make_trainer().fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    assert_same_state(plain(), fit(MixingUp, callback={"predictor": TrueGradient()}), exact=True)


# ---------------------------------------------------------------------- gradients that go elsewhere


class Regularized(Two):
    """Reads the loss, then adds a term over all parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.last_loss = loss.item()
        return loss + 1e-3 * torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()


def test_a_term_over_all_parameters_is_refused_between_processes() -> None:
    for failure in fit(Regularized, devices=2):
        assert failure.kind == "PartitionError"
        assert "Parameter 'first.weight' is used by stage 0" in failure.message


class Remembering(Two):
    """Keeps an activation of the first stage and uses it in the loss, after code that cannot be followed."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        logits = self.second(self.cut(h))
        logits.detach().numpy()
        return F.cross_entropy(logits, batch[1]) + 0.1 * h.square().mean()


def test_an_activation_used_after_unfollowable_code_is_refused_or_warned_about() -> None:
    with pytest.warns(UserWarning, match="The check of the boundaries ended in the last stage"):
        fit(Remembering)
    last, _first = fit(Remembering, devices=2)
    assert last.kind == "PartitionError"
    assert "the loss of training batch 0 depends on a parameter or activation of another stage" in last.message


class Penalized(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().mean()


def test_gradients_of_gradients_across_a_boundary_are_refused() -> None:
    with pytest.raises(BoundaryError, match=r"gradient of a gradient .* across boundary 'cut'"):
        fit(Penalized)


class PartlyUsed(Two):
    """One of two outputs of the boundary is not used; weight decay tells no gradient from a zero one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, _other = self.cut(torch.relu(self.first(x)), self.other(x))
        return self.second(h)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def test_an_unused_output_of_the_boundary_has_no_gradient_rather_than_a_zero_one() -> None:
    pl.seed_everything(2, verbose=False)
    before = PartlyUsed().other.weight.detach()
    assert torch.equal(fit(PartlyUsed, callback={"predictor": TrueGradient()})["other.weight"], before)


class Complex(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(self.cut(torch.complex(h, h)).real)


def test_complex_activations_are_refused() -> None:
    with pytest.raises(BoundaryError, match="complex activation"):
        fit(Complex)


class Peeking(Two):
    """Runs the network once without gradients first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return super().training_step(batch, batch_idx)


def test_a_pass_without_gradients_does_not_count_in_one_process() -> None:
    assert_same_state(fit(Two), fit(Peeking), exact=True)


# ---------------------------------------------------------------------- modules


class SharedNorm(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.middle = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(self.norm(self.first(x)))
        return self.second(self.norm(self.middle(h)))


def test_a_buffer_that_two_processes_change_is_refused() -> None:
    messages = [failure.message for failure in fit(SharedNorm, 2)]
    assert any("buffer 'norm." in message and "was changed in" in message for message in messages), messages


class Patched(Two):
    """A forward set on the instance, as compiled modules have; an attribute that keeps an output; a transposed cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh())
        original = self.first.forward
        self.first.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(len(x), 4, 4).transpose(1, 2)
        self.kept = h
        h = self.cut(h)
        return self.second(h.transpose(1, 2).view(len(x), 16))


def test_patched_forwards_kept_outputs_and_layouts_survive_the_split() -> None:
    def work() -> Any:
        pl.seed_everything(2, verbose=False)
        module = Patched()
        make_trainer(strategy="synthetic_gradients", devices=2).fit(
            module, loader(shuffle=False), loader(shuffle=False)
        )
        ghost = type(module.kept).__name__ == "FakeTensor"
        return state_of(module), "forward" in module.first.__dict__, ghost

    expected = fit(Patched)
    for state, patched, ghost in run_ranks(2, work):
        assert_same_state(expected, state)
        assert patched
        assert not ghost


class CopyAndPickle(Callback):
    """Copies and pickles the model in mid-run."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        twin = copy.deepcopy(pl_module.first)
        pickle.loads(pickle.dumps(pl_module.first))
        twin(batch[0])
        twin(batch[0])


def test_copies_of_a_cut_module_are_ordinary_modules() -> None:
    fit(Two, callback={"boundaries": ["first"]}, callbacks=[CopyAndPickle()])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("devices", [1, 2])
def test_true_precisions(precision: str, devices: int) -> None:
    results = fit(Two, devices, precision=precision)
    for state in results if devices > 1 else [results]:
        assert state["first.weight"].dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)


class Focal(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logs = self(batch[0]).log_softmax(-1).gather(1, batch[1].unsqueeze(1))
        return (-(1 - logs.exp()) * logs).mean()


def late_label() -> Any:
    x, y = dataset(32).tensors
    y = y.clamp_max(2)
    y[16:] = 4
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def test_a_label_beyond_those_of_the_first_batch_says_what_to_do() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'cut' .*LossModelPredictor\(classes=\.\.\.\)"):
        fit(Focal, data=late_label)
    fit(Focal, data=late_label, callback={"predictor": LossModelPredictor(classes=CLASSES)})


# ---------------------------------------------------------------------- logging, stopping, errors


class LoggingInside(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        self.log("activation", h.norm())
        loss = F.cross_entropy(self.second(self.cut(h)), batch[1])
        self.log_dict({"loss": loss})
        return loss


def test_a_value_of_another_stage_is_not_logged_and_it_is_said(tmp_path: Path) -> None:
    def work() -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logger = CSVLogger(tmp_path)
            make_trainer(strategy="synthetic_gradients", devices=2, logger=logger, log_every_n_steps=1).fit(
                LoggingInside(), loader()
            )
        return [str(warning.message) for warning in caught]

    last, _first = run_ranks(2, work)
    assert any("'activation' is computed in another stage than stage 1 (rank 0)" in message for message in last)
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "loss" in header
    assert "activation" not in header


class Stopping(Two):
    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            self.trainer.should_stop = True


def test_a_stop_at_the_end_of_an_epoch_is_every_stages() -> None:
    def work() -> int:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2, max_epochs=5)
        trainer.fit(Stopping(), loader())
        return trainer.current_epoch

    assert run_ranks(2, work) == [1, 1]


class Raising(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss.item() > 0 and self.trainer.global_step == 3:
            raise ValueError("odd")
        return loss


def test_after_an_error_the_module_is_whole_and_saving_does_not_wait(tmp_path: Path) -> None:
    def work() -> Any:
        module = Raising()
        checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=40.0),
            devices=2,
            enable_checkpointing=True,
            callbacks=[SyntheticGradients(boundaries=["first"]), checkpoint],
        )
        try:
            trainer.fit(module, loader())
        except Exception as error:
            chain = [error, error.__context__, error.__cause__]
            kinds = {type(link).__name__ for link in chain}
            module(torch.randn(2, FEATURES))
            module(torch.randn(2, FEATURES))
            return kinds, module.first._forward_hooks, "on_train_epoch_end" in module.__dict__
        return None

    (last, first) = run_ranks(2, work)
    assert "ValueError" in last[0]
    assert "StageLostError" in first[0]
    assert not last[1]
    assert not last[2]


def test_the_learning_rate_finder_is_refused_by_name() -> None:
    assert all("LearningRateFinder needs the loss" in r.message for r in fit(Two, 2, callbacks=[LearningRateFinder()]))


def test_a_callback_from_a_split_run_serves_in_one_process_again() -> None:
    def work() -> Any:
        callback = SyntheticGradients(predictor=ZeroPredictor())
        make_trainer(strategy="synthetic_gradients", devices=2, callbacks=[callback]).fit(Two(), loader())
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(variable)
        module = Two()
        before = state_of(module)
        make_trainer(callbacks=[callback]).fit(module, loader())
        return torch.equal(before["first.weight"], module.first.weight), module.second.weight.equal(
            before["second.weight"]
        )

    assert run_ranks(2, work) == [(True, False), (True, False)]


class Batch(UserDict[str, Tensor]):
    """A batch of a class of its own, as tokenizers return."""


class Named(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


def named_by_rank() -> Any:
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return torch.utils.data.DataLoader(
        dataset(),
        batch_size=16,
        shuffle=True,
        generator=generator,
        collate_fn=lambda rows: Batch(x=torch.stack([r[0] for r in rows]), y=torch.stack([r[1] for r in rows])),
    )


def test_different_batches_are_noticed_in_containers_of_any_class() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(timeout=15.0)
        make_trainer(strategy=strategy, devices=2, callbacks=[SyntheticGradients(context="y")]).fit(
            Named(), named_by_rank()
        )

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"


def test_the_callback_can_be_pickled_for_spawn() -> None:
    assert pickle.loads(pickle.dumps(SyntheticGradients(delay=3))).delay == 3


class Classic(Classifier):
    """Collects outputs of batches and epochs in hooks, as many modules do."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", outputs["loss"])


def test_hooks_that_use_outputs_run_where_there_are_some() -> None:
    results = fit(Classic, devices=2)
    assert all(isinstance(result, dict) for result in results), results


class InPlace(Two):
    """Changes the batch in place, and uses a detached activation behind the boundary."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].mul_(2)
        h = torch.relu(self.first(x))
        self.seen = x.clone()
        return F.cross_entropy(self.second(self.cut(h) + h.detach()), batch[1])


def test_a_step_may_change_its_batch_and_use_detached_activations() -> None:
    pl.seed_everything(2, verbose=False)
    module = InPlace()
    make_trainer(callbacks=[SyntheticGradients()], limit_train_batches=1, max_epochs=1).fit(
        module, loader(shuffle=False)
    )
    assert torch.equal(module.seen, 2 * next(iter(loader(shuffle=False)))[0])


class Projected(Two):
    """A fixed random projection in a buffer, which both stages use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.cut(torch.relu(self.first(x)) @ self.projection) @ self.projection))


def test_a_random_buffer_that_both_stages_use_is_one() -> None:
    def work() -> tuple[Tensor, Tensor]:
        torch.manual_seed(100 + int(os.environ["RANK"]))  # as without a seed
        module = Projected()
        make_trainer(strategy="synthetic_gradients", devices=2).fit(module, loader())
        return module.projection, module.first.weight

    (one, first), (other, same) = run_ranks(2, work)
    assert torch.equal(one, other)
    assert torch.equal(first, same)
