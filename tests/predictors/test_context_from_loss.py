"""Predictors predict from what the model's loss compares the network with, by that loss."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    AutoPredictor,
    Boundary,
    FeedbackAlignment,
    LossModelPredictor,
    MLPPredictor,
    SyntheticGradients,
)
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks
from tests.seen_models import (
    OUTPUTS,
    WIDTH,
    Molecules,
    Seen,
    batches,
    contrast,
    negative_binomial,
    pinball,
    tensors,
    variances,
)
from tests.traced import traced

X, GOAL, COUNTS, WEIGHT = tensors(8)
CPU = torch.device("cpu")
#: Losses of each kind: a batch, how it is computed, what is found of the batch, the loss in words.
KINDS: dict[str, tuple[Any, Any, Any, str, str]] = {
    "a function of torch": (
        lambda x, y, c, w: (x, y),
        lambda m, out, b: F.mse_loss(out, b[1]),
        lambda b: b[0],
        "batch[1]",
        "mse_loss",
    ),
    "a module of torch": (
        lambda x, y, c, w: {"x": x, "labels": w, "goal": y},
        lambda m, out, b: nn.SmoothL1Loss()(out, b["goal"]),
        lambda b: b["x"],
        'batch["goal"]',
        "smooth_l1_loss",
    ),
    "written by hand": (
        lambda x, y, c, w: {"x": x, "future": y},
        lambda m, out, b: ((out - b["future"]) ** 2).mean(),
        lambda b: b["x"],
        'batch["future"]',
        "squared error",
    ),
    "a metric with masks and weights": (
        lambda x, y, c, w: Molecules(x, y.where(y > -0.5, torch.nan), w),
        lambda m, out, b: m.metric(out, b.Y, b.w),
        lambda b: b.X,
        "batch.Y, batch.w",
        "MaskedError",
    ),
    "target and weight": (
        lambda x, y, c, w: ({"x": x}, (y, w)),
        lambda m, out, b: ((out - b[1][0]).abs() * b[1][1].unsqueeze(-1)).sum() / b[1][1].sum(),
        lambda b: b[0]["x"],
        "batch[1][0], batch[1][1]",
        "own loss",
    ),
    "quantiles": (
        lambda x, y, c, w: ({"x": x}, (y, None)),
        lambda m, out, b: pinball(out, b[1][0]),
        lambda b: b[0]["x"],
        "batch[1][0]",
        "own loss",
    ),
    "a likelihood, beside labels that are none": (
        lambda x, y, c, w: {"x": x, "X": c, "labels": (w > 1).long().unsqueeze(1)},
        lambda m, out, b: negative_binomial(m, out, b["X"]),
        lambda b: b["x"],
        'batch["X"]',
        "NegativeBinomial.log_prob",
    ),
    "some of the outputs": (
        lambda x, y, c, w: (x, y),
        lambda m, out, b: F.mse_loss(out[b[1] > 0], b[1][b[1] > 0]),
        lambda b: b[0],
        "batch[1]",
        "own loss",
    ),
    "goals that a buffer scales": (
        lambda x, y, c, w: (x, y),
        lambda m, out, b: F.mse_loss(out, b[1] / m.scale),
        lambda b: b[0],
        "batch[1]",
        "mse_loss",
    ),
    "parts that are copied to lie in one piece": (
        lambda x, y, c, w: (x, y, w),
        lambda m, out, b: (
            F.mse_loss(out[:, 1:].contiguous().view(-1), b[1][:, 1:].contiguous().view(-1))
            + (out[:, 0] * b[2]).square().mean()
        ),
        lambda b: b[0],
        "batch[1], batch[2]",
        "own loss",
    ),
    "two terms": (
        lambda x, y, c, w: (x, y, c[:, 0].clamp(max=1)),
        lambda m, out, b: (
            F.mse_loss(out[:, :2], b[1][:, :2]) + 0.5 * F.binary_cross_entropy_with_logits(out[:, 2], b[2])
        ),
        lambda b: b[0],
        "batch[1], batch[2]",
        "own loss",
    ),
    "samples that are compared with one another": (
        lambda x, y, c, w: (x, x.abs()),
        lambda m, out, b: contrast(out),
        torch.cat,
        "the activations alone",
        "own loss",
    ),
    "two halves of a batch": (
        lambda x, y, c, w: (x, x * w[:, None]),
        lambda m, out, b: variances(*out.chunk(2)),
        torch.cat,
        "the activations alone",
        "own loss",
    ),
}


def seen(kind: str) -> tuple[Seen, Any]:
    """The module and a function that makes a batch."""
    make, loss, inputs, _paths, _words = KINDS[kind]
    pl.seed_everything(3, verbose=False)
    return Seen(loss, inputs), make


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_says_what_to_predict_from(kind: str) -> None:
    module, make = seen(kind)
    found = traced(module, make(X, GOAL, COUNTS, WEIGHT)).inputs
    assert found.context is not None, found.reason
    paths, _, words = found.context.words.partition(", by the model's ")
    assert sorted(paths.split(", ")) == sorted(KINDS[kind][3].split(", "))
    assert KINDS[kind][4] in words


@pytest.mark.parametrize("samples", [8, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_repeated_is_the_loss(kind: str, samples: int) -> None:
    """On another batch, of another size: the model's own outputs give the model's own loss."""
    module, make = seen(kind)
    found = traced(module, make(X, GOAL, COUNTS, WEIGHT)).inputs
    assert found.context is not None
    assert found.loss is not None
    replay = found.loss.replay
    assert replay is not None
    other = make(*(each[:samples] for each in tensors(8, seed=1)))
    outputs: list[Tensor] = []
    module.last.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    loss = module.training_step(other, 0)
    if len(replay.shapes) > 1:  # parts of it
        parts = [outputs[0][:, :2], outputs[0][:, 2]]
        given = [next(part for part in parts if part.ndim == len(shape)) for shape in replay.shapes]
    else:
        given = outputs
    torch.testing.assert_close(replay(given, found.context.of(other), list(replay.parameters)), loss)


def fit(module: pl.LightningModule, data: Any, epochs: int = 2, devices: int = 1, **arguments: Any) -> Any:
    callback = SyntheticGradients(**arguments)
    strategy = "synthetic_gradients" if devices > 1 else "auto"
    trainer = make_trainer(max_epochs=epochs, callbacks=[callback], devices=devices, strategy=strategy)
    trainer.fit(module, data)
    return trainer, callback


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(kind: str) -> None:
    def work(devices: int) -> Any:
        module, make = seen(kind)
        fit(module, batches(make), devices=devices)
        return state_of(module)

    for state in run_ranks(2, lambda: work(2)):
        assert_same_state(work(1), state)


@pytest.mark.parametrize("kind", ["a metric with masks and weights", "a likelihood, beside labels that are none"])
def test_a_resumed_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    module, make = seen(kind)
    trainer, _callback = fit(module, batches(make), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, _make = seen(kind)
    fit(whole, batches(make), epochs=3)
    resumed, _make = seen(kind)
    trainer = make_trainer(max_epochs=3, callbacks=[SyntheticGradients()])
    trainer.fit(resumed, batches(make), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_same_state(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_gradient_is_of_use(kind: str) -> None:
    """Its predictions come to point where the targets do."""
    cosines: list[float] = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any) -> None:
            cosines.extend(float(each) for name, each in trainer.callback_metrics.items() if name == "sg/cut/cosine")

    module, make = seen(kind)
    callback = SyntheticGradients()
    trainer = make_trainer(max_epochs=20, callbacks=[callback, Notes()], log_every_n_steps=1)
    trainer.fit(module, batches(make))
    predictor = callback.trainers["cut"].predictor
    assert isinstance(predictor, AutoPredictor)
    assert isinstance(predictor.chosen, LossModelPredictor)
    late = cosines[len(cosines) // 2 :]
    assert sum(late) / len(late) > 0.05  # of single batches; by chance it would be within 0.02


# What is said


def test_it_is_said_in_one_line_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    module, make = seen("a metric with masks and weights")
    with caplog.at_level(logging.INFO):
        fit(module, batches(make), epochs=1)
    said = [record.message for record in caplog.records if "predicts from" in record.message]
    assert len(said) == 1
    assert "batch.Y" in said[0]
    assert "MaskedError" in said[0]


NOTHING: dict[str, Callable[..., Tensor]] = {
    "what crosses at two times": lambda m, out, b: F.mse_loss(out, m.last(m.cut(m.first(2 * b[0])))),
    "what a generator draws": lambda m, out, b: F.mse_loss(out, torch.randn(b[1].shape, generator=torch.Generator())),
    "what numpy has computed": lambda m, out, b: F.mse_loss(out, torch.from_numpy(b[1].numpy() * 2)),
    "what Python has computed, beside a mask": lambda m, out, b: F.mse_loss(
        out * (b[1] > 0), torch.tensor([[2 * each for each in row] for row in b[1].tolist()])
    ),
    "a buffer that changes": lambda m, out, b: F.mse_loss(out, b[1] / m.scale.mul_(1.01)),
}


@pytest.mark.parametrize("loss", NOTHING.values(), ids=NOTHING)
def test_where_nothing_is_found_a_cheap_predictor_serves_and_it_is_said_how_to_do_better(
    loss: Callable[..., Tensor],
) -> None:
    with pytest.warns(UserWarning, match=r"context='auto' finds nothing .*SyntheticGradients\(context="):
        _trainer, callback = fit(Seen(loss), batches(lambda x, y, c, w: (x, y)), epochs=1)
    trainer = callback.trainers["cut"]
    stage = trainer.stage
    own = sum(parameter.numel() for parameter in trainer.predictor.parameters())
    assert own <= 0.1 * stage.parameters
    assert trainer.operations <= 0.1 * stage.operations


@pytest.mark.parametrize("width", [2, 4, 16, 200])
def test_a_cheap_predictor_is_cheap_for_stages_of_any_size(width: int) -> None:
    _trainer, callback = fit(
        Seen(NOTHING["what numpy has computed"], width=width), batches(lambda x, y, c, w: (x, y)), epochs=1
    )
    trainer = callback.trainers["cut"]
    own = sum(parameter.numel() for parameter in trainer.predictor.parameters())
    assert 0 < own <= max(2, 0.1 * trainer.stage.parameters)


def test_a_user_may_ask_for_a_larger_one() -> None:
    predictor = AutoPredictor(options={"hidden": 128})
    loss = NOTHING["what crosses at two times"]
    _trainer, callback = fit(Seen(loss), batches(lambda x, y, c, w: (x, y)), epochs=1, predictor=predictor)
    assert callback.trainers["cut"].predictor.chosen.hidden == 128


def large(**arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, make = seen("a function of torch")
        fit(module, batches(make), epochs=1, **arguments)
    return [str(each.message) for each in caught if "operations" in str(each.message)]


def test_a_large_predictor_is_warned_of() -> None:
    (message,) = large(predictor=MLPPredictor(hidden=256))
    assert "predictor at boundary 'cut'" in message
    assert "fewer boundaries" in message
    assert not large(predictor=LossModelPredictor(hidden=2))


# The user's choice


def test_the_users_context_wins() -> None:
    module, make = seen("a likelihood, beside labels that are none")
    _trainer, callback = fit(module, batches(make), epochs=1, context="labels")
    chosen = callback.trainers["cut"].predictor.chosen
    assert chosen.head[-1].out_features == 2


def test_no_context_is_no_fault() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Seen(NOTHING["what crosses at two times"]), batches(lambda x, y, c, w: (x, y)), epochs=1, context=None)
    assert not [each for each in caught if "context=" in str(each.message)]


@pytest.mark.parametrize("predictor", [LossModelPredictor(), FeedbackAlignment(), MLPPredictor()])
@pytest.mark.parametrize("kind", ["target and weight", "quantiles"])
def test_other_predictors_use_what_was_found(kind: str, predictor: Any) -> None:
    module, make = seen(kind)
    _trainer, callback = fit(module, batches(make), epochs=1, predictor=predictor)
    assert callback.trainers["cut"].ready


# Other batches and steps


class Positions(pl.LightningModule):
    """A network on positions as rows, however many samples they are of; the loss sees samples again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.last = nn.Linear(WIDTH, 16), Boundary(), nn.Linear(16, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, goal = batch
        rows = self.last(self.cut(self.first(x.reshape(-1, WIDTH)).relu()))
        return F.mse_loss(rows.view(len(x), x.shape[1]) * goal.std(1, keepdim=True), goal)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_rows_that_are_no_samples_are_no_hindrance() -> None:
    x = torch.randn(8, 5, WIDTH)
    batch = x, x[..., 0] * 2
    found = traced(Positions(), batch).inputs
    assert found.context is not None, found.reason
    assert found.context.words.startswith("batch[1], by the model's")
    _trainer, callback = fit(Positions(), DataLoader([(x[:7], batch[1][:7]), batch], batch_size=None))
    assert isinstance(callback.trainers["cut"].predictor.chosen, LossModelPredictor)


class Sequences(pl.LightningModule):
    """A recurrent network whose layer returns its last states too, and a loss at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.last = nn.LSTM(WIDTH, 8, batch_first=True), Boundary(), nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output, _states = self.cut(*self.first(batch["past"]))
        mean, scale = self.last(output).unbind(-1)
        likelihood = torch.distributions.Normal(mean, F.softplus(scale) + 1e-3).log_prob(batch["future_target"])
        return -(likelihood * batch["observed"]).sum() / batch["observed"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def sequences(length: int) -> dict[str, Tensor]:
    past = torch.randn(8, length, WIDTH)
    return {"past": past, "future_target": past[..., 0].cumsum(1), "observed": torch.ones(8, length)}


def test_sequences_have_a_head_for_each_position_whatever_their_length() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*repeated on a head.*")
        _trainer, callback = fit(Sequences(), DataLoader([sequences(size) for size in (7, 7, 4, 9)], batch_size=None))
    predictor = callback.trainers["cut"].predictor
    assert "for each position" in predictor.choice
    assert "Normal.log_prob" in predictor.choice


class Reads(Seen):
    """Reads values in its first stage, which tensors without data do not have, and checks its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.first(self.inputs(batch))
        h = self.cut(h / max(1.0, h.abs().max().item()))
        loss = self.loss(self, self.last(h), batch)
        if not torch.isfinite(loss):
            raise AssertionError
        return loss


def test_a_step_that_reads_values_before_a_boundary_is_followed_on_values() -> None:
    make, loss, inputs, *_rest = KINDS["a likelihood, beside labels that are none"]
    module = Reads(loss, inputs)
    before = state_of(module)
    with pytest.warns(UserWarning, match="could not be checked"):
        _trainer, callback = fit(module, batches(make), epochs=1)
    assert "NegativeBinomial" in callback.session.told.words
    assert not torch.equal(before["last.weight"], module.last.weight)


def test_a_check_for_numbers_that_are_not_finite_is_passed_in_a_trace() -> None:
    def loss(module: Seen, output: Tensor, batch: Any) -> Tensor:
        losses = pinball(output, batch[1])
        assert not torch.isnan(losses).any()
        assert torch.isfinite(losses).all()
        if (losses != losses).any() or not bool(torch.logical_not(torch.isinf(losses))):
            raise AssertionError
        return losses

    found = traced(Seen(loss), (X, GOAL)).inputs
    assert found.context is not None, found.reason


def test_sizes_that_are_written_into_operations_are_those_of_the_next_batch() -> None:
    def loss(module: Seen, output: Tensor, batch: Any) -> Tensor:
        samples, size = output.shape
        rows = batch[1].size(0) * 2
        difference = output.view(rows, size // 2) - batch[1].reshape(samples * 2, -1)
        return (difference.abs() * torch.ones(rows, 1)).sum() / output.numel()

    found = traced(Seen(loss), (X, GOAL)).inputs
    assert found.loss is not None
    assert found.loss.replay is not None
    output = torch.randn(3, OUTPUTS)
    expected = (output - GOAL[:3]).abs().mean()
    assert found.context is not None
    context = found.context.of((X[:3], GOAL[:3]))
    torch.testing.assert_close(found.loss.replay([output], context, []), expected)


def test_a_batch_that_the_loss_cannot_be_repeated_on_predicts_zero_and_says_so() -> None:
    class Other(Seen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                return self.last(self.cut(self.first(batch[0]))).mean()
            return super().training_step(batch, batch_idx)

    data = [(X, (GOAL, WEIGHT)), (X, (GOAL, WEIGHT)), (X, (GOAL[:, :3], WEIGHT)), (X, (GOAL, WEIGHT))]
    module = Other(KINDS["target and weight"][1])
    with pytest.warns(UserWarning, match="does not work with this batch"):
        fit(module, DataLoader(data, batch_size=None), epochs=2)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_manual_optimization_shows_its_loss_too() -> None:
    class ByHand(Seen):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    make, loss, *_rest = KINDS["a function of torch"]
    _trainer, callback = fit(ByHand(loss), batches(make), epochs=1)
    assert callback.session.told.words == "batch[1], by the model's mse_loss"
    make, loss, inputs, *_rest = KINDS["samples that are compared with one another"]
    with pytest.warns(UserWarning, match="the step may go backward from others"):  # as that of a GAN does
        fit(ByHand(loss, inputs), batches(make), epochs=1)


def test_samples_that_are_compared_are_to_cross_at_once() -> None:
    def compared(module: Seen, output: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(output, module.last(module.cut(module.first(2 * batch[0]))))

    with pytest.warns(UserWarning, match=r"network on all of it at once, `network\(torch.cat"):
        fit(Seen(compared), batches(lambda x, y, c, w: (x, y)), epochs=1)


def test_what_a_teacher_says_is_not_guessed() -> None:
    """A head would make both what is taught and what it is compared with."""

    class Taught(Seen):
        def __init__(self, loss: Any) -> None:
            super().__init__(loss)
            self.teacher = nn.Sequential(nn.Linear(WIDTH, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, OUTPUTS))

    def compared(module: Any, output: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            taught = module.teacher(batch[0])
        return F.mse_loss(output, taught)

    with pytest.warns(UserWarning, match="others that have no gradient, such as those of a teacher"):
        fit(Taught(compared), batches(lambda x, y, c, w: (x, y)), epochs=1)


def test_what_the_batch_hook_returns_is_the_batch() -> None:
    class Hooked(Seen):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"in": batch[0], "out": batch[1] * 2}

    module = Hooked(lambda m, out, b: F.mse_loss(out, b["out"]), lambda batch: batch["in"])
    _trainer, callback = fit(module, batches(lambda x, y, c, w: (x, y)), epochs=1)
    assert callback.session.told.words == 'batch["out"], by the model\'s mse_loss'
