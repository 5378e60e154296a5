"""Training through black boxes: what is learned, what gets which gradient, and what a resumed run continues."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import (
    Bernoulli,
    BlackBox,
    BoundaryError,
    Categorical,
    ControlVariate,
    Critic,
    Evolution,
    GumbelSoftmax,
    MLPPredictor,
    PredictorTraining,
    ScoreFunction,
    StraightThrough,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    decouple,
)
from lightning_sg.blackbox import Estimator
from tests.blackbox.models import CONTROLS, INPUTS, Controller, loader, simulate
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

ESTIMATORS: dict[str, tuple[Any, int]] = {
    "critic": (Critic, 1),
    "score function": (ScoreFunction, 1),
    "control variate": (ControlVariate, 1),
    "evolution": (Evolution, 2),
}


def mean_cost(module: Controller) -> float:
    module.eval()
    with torch.no_grad():
        costs = [module.costs(batch) for batch in loader(samples=960, batch_size=96)]
    module.train()
    return float(torch.cat(costs).mean())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_learns_from_the_costs_of_a_simulator(estimator: str) -> None:
    make, evaluations = ESTIMATORS[estimator]
    pl.seed_everything(0, verbose=False)
    module = Controller(BlackBox(noise=0.2, estimator=make(), evaluations=evaluations))
    before = mean_cost(module)
    make_trainer(max_steps=400, max_epochs=-1, callbacks=[SyntheticGradients()]).fit(module, loader(32, 960))
    assert mean_cost(module) < 0.35 * before


# ---------------------------------------------------------------------- which gradient


class Known(Estimator):
    """An estimator whose gradient is 1, 2, 3, ... for the elements of each row."""

    def gradient(self, draw: Any, context: Any, score: Any, generator: Any) -> Tensor:
        return torch.arange(1.0, draw.activation.shape[-1] + 1).expand_as(draw.activation)


class Coded(pl.LightningModule):
    """An encoder, a code and a decoder that is differentiable."""

    def __init__(self, code: Any, samples: int = 1) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(INPUTS, CONTROLS, bias=False), nn.Linear(CONTROLS, INPUTS)
        self.code = code
        self.samples = samples
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        value, goal = self.code(self.encoder(x), x)
        costs = (self.decoder(value) - goal).square().mean(1)
        self.seen.append((x, value.detach(), goal))
        loss = self.code.loss(costs)
        assert float(loss) == pytest.approx(float(costs.mean()))
        return loss

    def on_after_backward(self) -> None:
        self.seen.append({name: parameter.grad.clone() for name, parameter in self.named_parameters()})  # type: ignore[union-attr]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("evaluations", [1, 2])
def test_the_stage_before_gets_the_estimate_and_what_follows_its_true_gradient(
    evaluations: int, accumulate: int
) -> None:
    module = Coded(BlackBox(noise=0.3, estimator=Known(), evaluations=evaluations))
    start = state_of(module)
    make_trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[SyntheticGradients()]).fit(
        module, loader()
    )
    (x, value, goal), found = module.seen[:2]
    estimate = torch.arange(1.0, CONTROLS + 1)
    expected = torch.outer(estimate, x.mean(0)) / accumulate
    torch.testing.assert_close(found["encoder.weight"], expected)
    weight, bias = start["decoder.weight"].requires_grad_(), start["decoder.bias"]
    loss = (F.linear(value, weight, bias) - goal).square().mean() / accumulate
    torch.testing.assert_close(found["decoder.weight"], torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize(
    "code",
    [
        Bernoulli(),
        Bernoulli(ControlVariate()),
        Bernoulli(ScoreFunction()),
        Bernoulli(Critic(), replay=500),
        Bernoulli(StraightThrough()),
        Bernoulli(GumbelSoftmax()),
        Categorical(),
        Categorical(ControlVariate()),
        Categorical(StraightThrough()),
        Categorical(GumbelSoftmax(), evaluations=2),
    ],
    ids=lambda code: f"{type(code).__name__}-{type(code.estimator).__name__}",
)
def test_codes_are_hard_and_both_halves_train(code: Any) -> None:
    pl.seed_everything(0, verbose=False)
    module = Coded(code)
    start = state_of(module)
    make_trainer(max_steps=4, callbacks=[SyntheticGradients()]).fit(module, loader())
    for _x, value, _goal in module.seen[::2]:
        assert ((value - value.round()).abs() < 1e-6).all()
        assert value.min() > -0.5
        assert value.max() < 1.5
    for name, tensor in state_of(module).items():
        assert not torch.equal(start[name], tensor), name


def test_a_straight_through_gradient_is_that_of_the_mean() -> None:
    module = Coded(Bernoulli(StraightThrough()))
    start = state_of(module)
    make_trainer(max_steps=1, callbacks=[SyntheticGradients()]).fit(module, loader())
    (x, value, goal), found = module.seen[:2]
    weight = start["encoder.weight"].requires_grad_()
    probabilities = (x @ weight.T).sigmoid()
    through = value + probabilities - probabilities.detach()
    loss = (F.linear(through, start["decoder.weight"], start["decoder.bias"]) - goal).square().mean()
    torch.testing.assert_close(found["encoder.weight"], torch.autograd.grad(loss, weight)[0])


@pytest.mark.slow
def test_alignment_with_the_true_gradient_is_measured_where_it_can_be_known() -> None:
    class Differentiable(Controller):
        def costs(self, batch: Any) -> Tensor:
            controls, goal = self.plant(self.policy(batch[0]), batch[1])
            return (controls[:, 0].sin() * controls[:, 1] + controls[:, 2] - goal) ** 2

    def aligned(estimator: Estimator, evaluations: int, steps: int) -> dict[str, float]:
        pl.seed_everything(0, verbose=False)
        module = Differentiable(BlackBox(noise=0.2, estimator=estimator, evaluations=evaluations, measure=True))
        trainer = make_trainer(
            max_steps=steps, max_epochs=-1, callbacks=[SyntheticGradients(metrics="all")], log_every_n_steps=1
        )
        trainer.fit(module, loader(32, 960))
        return {name.rsplit("/")[-1]: float(value) for name, value in trainer.callback_metrics.items()}

    critic, reinforce = aligned(Critic(), 1, 100), aligned(ScoreFunction(), 1, 100)
    evolution = aligned(Evolution(), 64, 5)
    assert critic["cosine"] > 0.9 > 0.75 > reinforce["cosine"]
    assert evolution["cosine"] > 0.85
    assert critic["variance"] < 0.3 < 1 < reinforce["variance"]
    assert {"noise", "score", "loss", "norm_ratio", "bias"} <= critic.keys()


def test_alignment_that_cannot_be_known_is_an_error() -> None:
    with pytest.raises(BoundaryError, match=r"measure=True at 'plant'.*no differentiable function"):
        make_trainer(callbacks=[SyntheticGradients()]).fit(Controller(BlackBox(measure=True)), loader())


# ---------------------------------------------------------------------- scores that come later


def slow_costs(controls: Any, goals: Any) -> Any:
    """What a worker process computes."""
    return (simulate(controls) - goals) ** 2


class Pooled(Controller):
    """Its simulator runs in a pool."""

    def __init__(self, pool: Any, parts: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._pool = pool
        self._parts = parts

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        controls, goal = self.plant(self.policy(batch[0]), batch[1])
        rows = zip(controls.chunk(self._parts), goal.chunk(self._parts))
        loss = self.plant.loss([self._pool.submit(slow_costs, u.numpy(), g.numpy()) for u, g in rows])
        self.log("cost", loss)
        return loss


@pytest.mark.slow
def test_worker_processes_evaluate_while_the_stages_go_on() -> None:
    pl.seed_everything(0, verbose=False)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        module = Pooled(pool, plant=BlackBox(noise=0.2))
        before = mean_cost(module)
        trainer = make_trainer(max_steps=400, max_epochs=-1, callbacks=[SyntheticGradients(delay=3)])
        trainer.fit(module, loader(32, 960))
    assert mean_cost(module) < 0.5 * before
    assert float(trainer.callback_metrics["cost"]) > 0


class Later:
    """A pool whose scores come when they are asked for, so that it is seen when that is."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.submitted = 0

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        number, future = self.submitted, Future[Any]()
        self.submitted += 1
        future.result = lambda timeout=None: (self.asked.append(number), work(*arguments))[1]  # type: ignore[method-assign]
        return future


@pytest.mark.parametrize("delay", [0, 2])
def test_scores_are_waited_for_when_they_are_due_and_not_before(delay: int) -> None:
    pool = Later()
    seen: list[list[int]] = []

    class Watched(Pooled):
        def on_train_batch_end(self, *arguments: Any) -> None:
            seen.append(list(pool.asked))

    module = Watched(pool, parts=1)
    make_trainer(max_steps=5, callbacks=[SyntheticGradients(delay=delay)]).fit(module, loader())
    assert seen == [list(range(max(0, batch - delay))) for batch in range(5)]


def test_a_worker_that_fails_is_reported_with_the_batch() -> None:
    class Broken(Controller):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows = self.costs(batch)
            step = self.global_step  # the pool may come to it in a later one
            future = pool.submit(lambda: rows if step != 1 else [][1])
            return self.plant.loss(future)

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(SyntheticGradientsError, match=r"'plant' failed for training batch 1: IndexError"),
    ):
        make_trainer(callbacks=[SyntheticGradients()]).fit(Broken(), loader())


@pytest.mark.parametrize("estimator", [ScoreFunction(), ControlVariate()])
def test_estimators_that_need_the_batch_s_own_scores_refuse_later_ones(estimator: Estimator) -> None:
    with pytest.raises(BoundaryError, match=r"scores that come later.*or use Critic\(\)"):
        make_trainer(callbacks=[SyntheticGradients()]).fit(
            Pooled(Later(), plant=BlackBox(estimator=estimator)), loader()
        )


# ---------------------------------------------------------------------- options and checkpoints


def test_a_black_box_without_noise_leaves_the_users_random_numbers_alone() -> None:
    def numbers(plant: BlackBox) -> list[Tensor]:
        drawn: list[Tensor] = []

        class Drawing(Controller):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                drawn.append(torch.rand(2))
                return loss

        pl.seed_everything(1, verbose=False)
        make_trainer(max_steps=3, callbacks=[SyntheticGradients()]).fit(Drawing(plant), loader())
        return drawn

    left, right = numbers(BlackBox(noise=0.5)), numbers(BlackBox(noise=0.1, estimator=ControlVariate()))
    assert all(torch.equal(a, b) for a, b in zip(left, right))


def test_predictor_training_is_that_of_estimators_too() -> None:
    made: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(list(parameters), lr=0.0))
        return made[-1]

    training = PredictorTraining(optimizer=optimizer, every=2, updates=3, ema=0.9)
    callback = SyntheticGradients(training=training)
    make_trainer(max_steps=4, callbacks=[callback]).fit(Controller(), loader())
    assert len(made) == 1
    assert callback.session.boxes.trainers["plant"].learning.ready


@pytest.mark.parametrize(
    "make",
    [
        lambda: Controller(BlackBox(noise=0.2, replay=40)),
        lambda: Controller(BlackBox(noise=0.2, estimator=ControlVariate())),
        lambda: Controller(BlackBox(noise=0.2, estimator=Evolution(), evaluations=2)),
        lambda: Pooled(Later(), plant=BlackBox(noise=0.2)),
    ],
    ids=["critic", "control variate", "evolution", "later"],
)
def test_a_resumed_run_continues_exactly(make: Any, tmp_path: Path) -> None:
    def trained(epochs: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Controller]:
        pl.seed_everything(2, verbose=False)
        module = make()
        trainer = make_trainer(max_epochs=epochs, callbacks=[SyntheticGradients(delay=2)])
        trainer.fit(module, loader(samples=64), ckpt_path=checkpoint)
        return trainer, module

    half, _module = trained(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _trainer, whole = trained(4)
    _trainer, resumed = trained(4, tmp_path / "half.ckpt")
    assert_same_state(state_of(whole), state_of(resumed), exact=True)
    pl.seed_everything(2, verbose=False)
    plain = make()
    plain.load_state_dict(torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"])


def test_another_estimator_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    def fit(hidden: int, steps: int, checkpoint: Path | None = None) -> pl.Trainer:
        module = Controller(BlackBox(estimator=Critic(hidden=hidden)))
        trainer = make_trainer(max_steps=steps, callbacks=[SyntheticGradients()])
        trainer.fit(module, loader(), ckpt_path=checkpoint)
        return trainer

    fit(8, 2).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(SyntheticGradientsError, match="The estimator saved for 'plant' does not fit"):
        fit(16, 4, tmp_path / "last.ckpt")


# ---------------------------------------------------------------------- replicas


def _replicated(devices: int, tmp_path: Path | None = None, samples: int = 96, **arguments: Any) -> Any:
    pl.seed_everything(4, verbose=False)
    module = Controller(BlackBox(noise=0.2, **arguments))
    strategy = SyntheticGradientStrategy(replicas=devices) if devices > 1 else "auto"
    trainer = make_trainer(devices=devices, strategy=strategy, max_epochs=3, callbacks=[SyntheticGradients()])
    trainer.fit(module, loader(16 // devices, samples))
    if tmp_path is not None:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    return state_of(module)


@pytest.mark.parametrize("options", [{}, {"estimator": ControlVariate()}], ids=["critic", "control variate"])
def test_replicas_have_one_policy_and_one_estimator_and_explore_on_their_own(options: Any, tmp_path: Path) -> None:
    first, second = run_ranks(2, lambda: _replicated(2, tmp_path, **options))
    assert_same_state(first, second)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SyntheticGradients"]["boxes"]["plant"]
    if not options:
        (replay,) = saved["learning"]["replay"]
        activation, value = replay["rows"][:2]
        assert len(activation) == 3 * 96  # of both
        noise = value - activation
        assert not torch.equal(noise[:144], noise[144:])


def test_replicas_are_one_batch_where_nothing_is_drawn() -> None:
    def work(devices: int) -> Any:
        return _replicated(devices, samples=16, estimator=Known())  # one batch, whatever its order

    expected = work(1)
    for state in run_ranks(2, lambda: work(2)):
        assert_same_state(expected, state)


def test_replicas_of_two_stages_are_one_batch_too() -> None:
    """One batch an epoch, whatever its order."""

    def work(devices: int) -> Any:
        pl.seed_everything(4, verbose=False)
        module = Controller(BlackBox(noise=0.2, estimator=Known()), cut=True)
        strategy = SyntheticGradientStrategy(replicas=2) if devices > 1 else "auto"
        callback = SyntheticGradients(context=1, predictor=MLPPredictor(hidden=8))
        trainer = make_trainer(devices=devices, strategy=strategy, max_epochs=4, callbacks=[callback])
        trainer.fit(module, loader(16 if devices == 1 else 8, 16))
        return state_of(module)

    expected = work(1)
    for state in run_ranks(4, lambda: work(4)):
        assert_same_state(expected, state)


# ---------------------------------------------------------------------- without a Trainer


def test_a_loop_of_ones_own_computes_what_the_callback_does() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = nn.Linear(INPUTS, CONTROLS)
            self.plant = BlackBox(noise=0.2)

        def loss(self, batch: Any) -> Tensor:
            controls, goal = self.plant(self.policy(batch[0]), batch[1])
            return self.plant.loss((simulate(controls.numpy()) - goal.numpy()) ** 2)

    class InTrainer(pl.LightningModule):
        def __init__(self, net: Plain) -> None:
            super().__init__()
            self.policy, self.plant, self.net = net.policy, net.plant, [net]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net[0].loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    pl.seed_everything(6, verbose=False)
    left, training = Plain(), PredictorTraining(seed=3)
    right = Plain()
    right.load_state_dict(left.state_dict())
    make_trainer(max_epochs=1, callbacks=[SyntheticGradients(training=training)]).fit(InTrainer(left), loader())
    optimizer = torch.optim.Adam(right.parameters(), lr=1e-2)
    with decouple(right, training=training) as sg:
        for batch in loader():
            optimizer.zero_grad()
            sg.backward(right.loss, batch)
            optimizer.step()
        assert {"plant/score", "plant/loss", "plant/noise"} <= sg.metrics().keys()
    assert_same_state(state_of(left), state_of(right), exact=True)
