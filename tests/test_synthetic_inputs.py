"""Synthetic inputs: the next stage goes on with a predicted activation, in one process and in several."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    Boundary,
    InputPredictor,
    MLPInputPredictor,
    NonFinitePredictionError,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    SyntheticInputs,
    TrueGradient,
)
from lightning_sg.batch.features import features_of
from lightning_sg.inputs import InputTrainer
from tests.models import (
    CLASSES,
    FEATURES,
    Classifier,
    assert_same_state,
    dataset,
    fit_and_save,
    loader,
    make_trainer,
    state_of,
)
from tests.ranks import Failure, run_ranks


class Told(InputPredictor):
    """Says what a function of the batch says; learns nothing."""

    def __init__(self, say: Callable[[Tensor, list[tuple[int, ...]]], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.say = say

    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.say(features, self.shapes)

    def loss(self, features: Tensor, activations: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros(())


def fit(module: pl.LightningModule, callback: SyntheticGradients, data: Any = None, **arguments: Any) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(callbacks=[callback], **arguments)
    trainer.fit(module, data or loader(), loader(shuffle=False))
    return trainer


def classifier(stages: int = 4) -> Classifier:
    pl.seed_everything(3, verbose=False)
    return Classifier(stages)


# ---------------------------------------------------------------------- oracles in one process


@pytest.mark.parametrize("options", [{}, {"exact_every": 1, "correction": 1.0}, {"mix": 0.5}, {"delay": 0}])
def test_the_true_activation_as_a_prediction_changes_nothing_bit_for_bit(options: dict[str, Any]) -> None:
    plain, told = classifier(4), classifier(4)
    fit(plain, SyntheticGradients(**options))
    before = itertools.cycle([1, 3, 5])  # in each step the boundaries ask in their order

    def true(features: Tensor, _shapes: Any) -> tuple[Tensor]:
        with torch.no_grad():  # a copy, whose running statistics may move
            return (copy.deepcopy(told.net[: next(before)])(features),)

    fit(told, SyntheticGradients(inputs=SyntheticInputs(Told(true)), **options))
    assert_same_state(state_of(plain), state_of(told), exact=True)


class Replacing(Classifier):
    """The next stage goes on with a value of its own; its gradient counts as the activation's."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, Boundary) and self.training and self.global_step >= 2:
                x = x - x.detach() + _constant(x)
        return x


def _constant(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel()).view_as(like)


def test_targets_are_the_gradients_at_the_predicted_activation() -> None:
    """With the true gradient passed on, the stage before is given the gradient found at the prediction."""
    replaced, predicted = Replacing(2), Classifier(2)
    predicted.load_state_dict(replaced.state_dict())
    pl.seed_everything(3, verbose=False)
    make_trainer().fit(replaced, loader())
    pl.seed_everything(3, verbose=False)
    inputs = SyntheticInputs(
        Told(lambda features, shapes: (_constant(torch.empty(len(features), *shapes[0])),)), warm_up=2
    )
    make_trainer(callbacks=[SyntheticGradients(predictor=TrueGradient(), inputs=inputs)]).fit(predicted, loader())
    assert_same_state(state_of(replaced), state_of(predicted))


def test_evaluation_uses_the_true_path() -> None:
    module = classifier()
    trainer = fit(module, SyntheticGradients(inputs=SyntheticInputs()))
    x, y = dataset().tensors
    module.eval()
    with torch.no_grad():
        logits = module.net(x)
    (seen,) = trainer.validate(module, DataLoader(dataset(), batch_size=len(y)), verbose=False)
    assert seen["val_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-6)
    predicted = torch.cat(trainer.predict(module, DataLoader(dataset(), batch_size=32)))  # type: ignore[arg-type]
    torch.testing.assert_close(predicted, logits)


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None) -> dict[str, Tensor]:
        module = classifier()
        callback = SyntheticGradients(inputs=SyntheticInputs(warm_up=3), delay=2)
        fit_and_save(module, callback, 1, tmp_path, None if checkpoint is None else str(checkpoint), epochs)
        return state_of(module)

    whole = run(4, None)
    run(2, None)
    assert_same_state(whole, run(4, tmp_path / "last.ckpt"), exact=True)


def test_inputs_leave_the_users_random_numbers_alone() -> None:
    drawn = []
    for inputs in (None, SyntheticInputs()):
        fit(classifier(), SyntheticGradients(inputs=inputs))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_seeds_of_boundaries_differ_and_are_repeated() -> None:
    def first_layers() -> list[Tensor]:
        callback = SyntheticGradients(inputs=SyntheticInputs(), seed=1)
        fit(classifier(), callback, max_steps=1)
        built = [trained.predictor for trained in callback.inputs.trainers.values()]
        return [next(predictor.parameters()).detach().clone() for predictor in built]

    one, again = first_layers(), first_layers()
    assert all(torch.equal(left, right) for left, right in zip(one, again))
    assert not torch.equal(one[0], one[1])


def test_the_error_is_logged_for_each_boundary_and_falls(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit(
        classifier(), SyntheticGradients(inputs=SyntheticInputs()), logger=logger, log_every_n_steps=1, max_epochs=40
    )
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    heads = rows[0].split(",")
    assert trainer.callback_metrics["sg/net.1/input_error"] < 0.3
    for name in ("net.1", "net.3", "net.5"):
        place = heads.index(f"sg/{name}/input_error")
        values = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
        assert len(values) >= 190
        assert sum(values[-20:]) < 0.7 * sum(values[2:22])


# ---------------------------------------------------------------------- the predictor


def test_it_learns_what_it_has_not_seen() -> None:
    """The relative error on held-out batches falls far below that of the mean."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU()).requires_grad_(False)
    trainer = InputTrainer("cut", SyntheticInputs(), delay=1, seed=1)
    held_out = torch.randn(200, FEATURES)
    errors = []
    for _ in range(300):
        x = torch.randn(64, FEATURES)
        trainer.cross(x, [network(x)])
        if trainer.learned:
            with torch.no_grad():
                (guess,) = trainer.predictor(held_out)
            true = network(held_out)
            errors.append(float((guess - true).square().sum() / true.square().sum()))
    of_mean = float((network(held_out).mean(0) - network(held_out)).square().sum() / network(held_out).square().sum())
    assert errors[0] == pytest.approx(of_mean, rel=0.2)  # it begins with the mean
    assert errors[-1] < 0.2 * of_mean


def test_an_untrained_predictor_says_the_running_mean() -> None:
    predictor = MLPInputPredictor(hidden=4)
    features, activations = torch.randn(8, 3), (torch.randn(8, 2, 5), torch.randn(8))
    predictor.build(features, [(2, 5), ()])
    predictor.loss(features, activations)
    first, second = predictor(features)
    torch.testing.assert_close(first, activations[0].mean(0, keepdim=True).expand(8, 2, 5))
    torch.testing.assert_close(second, activations[1].mean().expand(8))


class Linear(InputPredictor):
    """A predictor of one's own, as docs/unlocked.md shows it."""

    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        (shape,) = shapes
        self.net = nn.Linear(features.flatten(1).shape[1], shape[0])

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return (self.net(features.flatten(1)),)


def test_a_predictor_of_ones_own_learns_with_an_optimizer_of_ones_own() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.05))
        return made[-1]

    settings = SyntheticInputs(Linear(), optimizer=optimizer)
    trainer = fit(classifier(), SyntheticGradients(inputs=settings), max_epochs=40)
    assert len(made) == 3
    assert trainer.callback_metrics["sg/net.1/input_error"] < 0.7


def test_batches_are_learned_from_delay_and_one_later_in_order() -> None:
    trainer = InputTrainer("cut", SyntheticInputs(), delay=2, seed=1)
    seen: list[tuple[int, int]] = []
    learn = trainer._learn
    trainer._learn = lambda record: (seen.append((record.step, trainer.step)), learn(record))  # type: ignore[method-assign]
    for step in range(6):
        x = torch.randn(4, 3)
        given = trainer.cross(x, [torch.randn(4, 2)])
        assert (given is None) == (step < 3)  # until it has learned once, the true activation is used
    assert seen == [(0, 3), (1, 4), (2, 5)]


def test_warm_up_uses_the_true_activation_while_it_learns() -> None:
    trainer = InputTrainer("cut", SyntheticInputs(warm_up=5), delay=0, seed=1)
    used = [trainer.cross(torch.randn(4, 3), [torch.randn(4, 2)]) is not None for _ in range(8)]
    assert used == [False] * 5 + [True] * 3
    assert trainer.learned == 7


class Masked(pl.LightningModule):
    """A mask crosses beside the activation; a model of another dtype, and batches that are dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.second = nn.Linear(FEATURES, 8), Boundary(), nn.Linear(8, CLASSES)
        self.masks: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask = batch["x"] > 0
        hidden, crossed = self.cut(torch.relu(self.first(batch["x"])), mask)
        assert torch.equal(mask, crossed)
        return F.cross_entropy(self.second(hidden), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def as_dict(samples: Any) -> dict[str, Tensor]:
    return {"labels": torch.stack([y for _x, y in samples]), "x": torch.stack([x for x, _y in samples])}


def test_masks_cross_unchanged_and_labels_are_not_seen() -> None:
    callback = SyntheticGradients(inputs=SyntheticInputs())
    fit_data = DataLoader(dataset(), batch_size=16, collate_fn=as_dict)
    pl.seed_everything(3, verbose=False)
    make_trainer(callbacks=[callback]).fit(Masked(), fit_data)
    trained = callback.inputs.trainers["cut"]
    assert trained.learned > 0
    assert trained.predictor.shapes == [(8,)]  # type: ignore[union-attr]
    assert trained._pending[-1].features.shape[1] == FEATURES


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_predictions_have_the_activations_dtype(precision: Any) -> None:
    callback = SyntheticGradients(inputs=SyntheticInputs())
    fit(classifier(), callback, precision=precision)
    assert all(p.dtype == torch.float32 for p in callback.inputs.trainers["net.1"].predictor.parameters())


# ---------------------------------------------------------------------- what it is told of the batch


def test_the_input_is_found_in_a_batch() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    assert torch.equal(features_of((x, y), "auto"), x)
    assert torch.equal(features_of(x, "auto"), x)
    assert torch.equal(features_of({"labels": y, "image": x}, "auto"), x)
    assert torch.equal(features_of({"a": y, "b": x}, "b"), x)
    assert torch.equal(features_of((y, x), 1), x)
    assert torch.equal(features_of((x, y), lambda batch: F.one_hot(batch[1], 4).float()), torch.eye(4))
    assert features_of((torch.ones(2, 3, dtype=torch.uint8), y), "auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "source", "message"),
    [
        ((torch.arange(4), torch.arange(4)), "auto", "say little as they are"),
        ({"labels": torch.ones(3)}, "auto", "finds a NoneType"),
        ((torch.tensor(1.0),), "auto", "finds a scalar"),
        ({"x": torch.ones(3)}, "image", "has no such entry"),
    ],
)
def test_what_cannot_be_an_input_is_refused(batch: Any, source: Any, message: str) -> None:
    with pytest.raises(SyntheticGradientsError, match=message):
        features_of(batch, source)


# ---------------------------------------------------------------------- errors


def test_errors_name_the_boundary_and_say_what_to_do() -> None:
    wrong = Told(lambda features, shapes: (torch.zeros(len(features), 3),))
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'net.1' predicts activations of shapes \[\(16, 3\)\]"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(wrong)))
    raising = Told(lambda features, shapes: (features @ torch.ones(3, 3),))
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'net.1' cannot predict .* another"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(raising)))
    nan = Told(lambda features, shapes: (torch.full((len(features), *shapes[0]), torch.nan),))
    with pytest.raises(NonFinitePredictionError, match=r"synthetic input at boundary 'net.1' is not finite"):
        fit(classifier(), SyntheticGradients(inputs=SyntheticInputs(nan)))
    halved = SyntheticInputs(source=lambda batch: batch[0][::2])
    with pytest.raises(SyntheticGradientsError, match=r"Boundary 'net.1' is crossed .* samples first"):
        fit(classifier(), SyntheticGradients(inputs=halved))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="warm_up >= 0"):
        SyntheticInputs(warm_up=-1)
    with pytest.raises(ValueError, match="nothing to predict from"):
        SyntheticInputs(source=None)
    with pytest.raises(ValueError, match="hidden >= 1"):
        MLPInputPredictor(hidden=0)


def test_another_predictor_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    fit_and_save(classifier(), SyntheticGradients(inputs=SyntheticInputs()), 1, tmp_path, None, 1)
    other = SyntheticInputs(MLPInputPredictor(hidden=8))
    with pytest.raises(SyntheticGradientsError, match=r"input predictor saved for boundary 'net.1' does not fit"):
        fit_and_save(classifier(), SyntheticGradients(inputs=other), 1, tmp_path, str(tmp_path / "last.ckpt"), 2)


def test_a_checkpoint_with_inputs_goes_on_without(tmp_path: Path) -> None:
    fit_and_save(classifier(), SyntheticGradients(inputs=SyntheticInputs()), 1, tmp_path, None, 1)
    with pytest.warns(UserWarning, match="leaves aside"):
        fit_and_save(classifier(), SyntheticGradients(), 1, tmp_path, str(tmp_path / "last.ckpt"), 2)


# ---------------------------------------------------------------------- several processes


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
    "options",
    [
        {"delay": 0},
        {"delay": 1},
        {"delay": 2, "inputs": SyntheticInputs(warm_up=7)},
        {"exact_every": 1, "correction": 1.0},
        {"exact_every": 2, "bootstrap": True},
        {"mix": 0.5, "train_every": 3},
    ],
)
def test_one_two_and_four_processes_end_with_the_same_weights(options: dict[str, Any]) -> None:
    ((expected, metrics, _),) = train(1, **options)
    for devices in (2, 4):
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
            callback = SyntheticGradients(inputs=SyntheticInputs(), seed=1)
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
                callbacks=[SyntheticGradients(inputs=SyntheticInputs(), seed=1)],
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
        trained = callback.inputs.trainers["net.1"]
        # Running statistics of the hidden layer's BatchNorm, also taken in predictions, are each replica's own.
        state = state_of(trained.predictor) if trained.built else {}
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
