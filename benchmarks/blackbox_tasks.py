"""The tasks of :mod:`benchmarks.blackbox`: networks with a part that cannot be differentiated, or is said not to be.

Each task is a function of a method, a seed and a number of steps that returns its metrics. In a task all methods of a
seed begin with the same weights and see the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import blackbox_bare as bare
from benchmarks.quiet import QUIET
from examples import simulator
from examples.mnist import FILES, read_idx
from lightning_sg import (
    Bernoulli,
    BlackBox,
    ControlVariate,
    Critic,
    Evolution,
    GumbelSoftmax,
    ScoreFunction,
    StraightThrough,
    SyntheticGradients,
)
from lightning_sg.blackbox import Estimator, ScoredBoundary

Metrics = dict[str, float]

BACKPROPAGATION, FROZEN = "backpropagation", "first half frozen"
UNQUANTISED, MEANS = "unquantised", "256 means"
PLAIN, TWO = "score function, no baseline", "score function, two draws"

#: The estimators that are compared, by the name in the tables.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "critic": Critic,
    "control variate": ControlVariate,
    "evolution": Evolution,
    "score function": ScoreFunction,
    TWO: ScoreFunction,
    PLAIN: lambda: ScoreFunction(baseline=False),
    "straight-through": StraightThrough,
    "Gumbel-softmax": GumbelSoftmax,
}


def evaluations_of(method: str) -> int:
    """How many values a method tries for each sample."""
    return 2 if method in ("evolution", TWO) else 1


def fit(module: pl.LightningModule, data: TensorDataset, batch_size: int, steps: int, seed: int) -> pl.Trainer:
    """Trains quietly, in an order of the samples that is the same for all methods of a seed."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=order)
    callbacks = [SyntheticGradients()] if any(isinstance(each, ScoredBoundary) for each in module.modules()) else []
    trainer = pl.Trainer(
        **{**QUIET, "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "callbacks": callbacks}
    )
    trainer.fit(module.train(), loader)
    module.eval()
    return trainer


class Task(pl.LightningModule):
    """A module with Adam."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything that trains."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


# ---------------------------------------------------------------------- the toy of the RELAX paper

TARGET = 0.499


class Toy(Task):
    """Minimises E[(b - t)²] over a Bernoulli variable b; t = 0.499 makes b = 0 a little better than b = 1."""

    def __init__(self, gate: Bernoulli) -> None:
        super().__init__(learning_rate=0.02)
        self.logit = nn.Parameter(torch.zeros(1))
        self.gate = gate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Each row of the batch is a draw of the same variable."""
        b = self.gate(self.logit.expand(len(batch[0]), 1))
        return self.gate.loss((b[:, 0] - TARGET) ** 2)


def toy(method: str, seed: int, steps: int, rows: int = 100_000) -> Metrics:
    """Where the probability ends, and how far the estimate is from the true gradient and scatters."""
    torch.manual_seed(seed)
    module = Toy(Bernoulli(ESTIMATORS[method](), evaluations=evaluations_of(method)))
    trainer = fit(module, TensorDataset(torch.zeros(32 * 50, 1)), 32, steps, seed)
    probability = float(module.logit.sigmoid())
    metrics = {"probability": probability, "loss": probability * (1 - TARGET) ** 2 + (1 - probability) * TARGET**2}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    (callback,) = [each for each in callbacks if isinstance(each, SyntheticGradients)]
    estimator = callback.session.boxes.trainers["gate"].learning.estimator
    if estimator.passes:
        return metrics
    # All methods are judged at p = 1/2, where the variance of the score function is largest.
    sampling, generator = module.gate.sampling, torch.Generator().manual_seed(seed)
    logits, times = torch.zeros(rows, 1), evaluations_of(method)
    draw = (
        sampling.draw_pairs(logits, 1, generator, 0)
        if estimator.in_pairs
        else sampling.draw(logits, times, generator, 0)
    )
    found = estimator.gradient(draw, None, (draw.value[:, 0] - TARGET) ** 2, generator)
    each = found.unflatten(0, (times, rows)).mean(0)[:, 0].double()
    true = 0.25 * ((1 - TARGET) ** 2 - TARGET**2)
    error = float(each.std()) / rows**0.5
    # Rounding of float32 counts as no bias where all draws agree.
    metrics["standard_errors"] = (float(each.mean()) - true) / max(error, 1e-8)
    metrics["variance"] = float(each.var())
    return metrics


# ---------------------------------------------------------------------- a simulator


class Copy(simulator.Steering):
    """The same network before a differentiable copy of the simulator, with the true gradient."""

    def costs(self, batch: Any) -> Tensor:
        """Runge-Kutta steps of torch in place of SciPy's."""
        start, goal = batch
        angle, velocity = start.unbind(1)
        seen = torch.stack([angle.sin(), angle.cos(), velocity, goal], dim=1)
        torques = self.policy(seen)
        step = simulator.PIECE / 4
        for torque in (simulator.STRONGEST * torques.clamp(-1, 1)).unbind(1):
            for _ in range(4):
                angle, velocity = _runge_kutta(angle, velocity, torque, step)
        return (angle - goal) ** 2 + 0.1 * velocity**2 + 0.01 * (torques**2).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Plain backpropagation."""
        return self.costs(batch).mean()


def _runge_kutta(angle: Tensor, velocity: Tensor, torque: Tensor, step: float) -> tuple[Tensor, Tensor]:
    def change(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return v, torque - simulator.GRAVITY * a.sin() - simulator.FRICTION * v

    a1, v1 = change(angle, velocity)
    a2, v2 = change(angle + step / 2 * a1, velocity + step / 2 * v1)
    a3, v3 = change(angle + step / 2 * a2, velocity + step / 2 * v2)
    a4, v4 = change(angle + step * a3, velocity + step * v3)
    return angle + step / 6 * (a1 + 2 * a2 + 2 * a3 + a4), velocity + step / 6 * (v1 + 2 * v2 + 2 * v3 + v4)


def pendulum(method: str, seed: int, steps: int) -> Metrics:
    """The mean cost of held-out pendulums in SciPy's simulator, before and after ``steps`` evaluations of a batch."""
    torch.manual_seed(seed)
    plant = BlackBox(noise=0.1, estimator=_estimator(method), evaluations=evaluations_of(method))
    module = (Copy if method == BACKPROPAGATION else simulator.Steering)(plant)
    if method == BACKPROPAGATION:
        module.plant = nn.Identity()  # type: ignore[assignment]
    held_out = simulator.pendulums(256, seed=98)

    def cost() -> float:
        start, goal = held_out.tensors
        angle, velocity = start.unbind(1)
        with torch.no_grad():
            seen = torch.stack([angle.sin(), angle.cos(), velocity, goal], dim=1)
            torques = module.policy(seen).numpy()
        return float(simulator.cost_of(simulator.simulate(start.numpy(), torques), goal.numpy(), torques).mean())

    before = cost()
    fit(module, simulator.pendulums(4096, seed=seed), 64, steps // evaluations_of(method), seed)
    return {"before": before, "cost": cost()}


def _estimator(method: str) -> Estimator | None:
    return ESTIMATORS[method]() if method in ESTIMATORS else None


# ---------------------------------------------------------------------- steps and sines


class Steps(Task):
    """A policy before a simulator with steps, which is told a goal."""

    def __init__(self, plant: BlackBox) -> None:
        super().__init__(learning_rate=1e-3)
        self.policy = bare.make_policy()
        self.plant = plant

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The squared distance from the goal."""
        x, goal = batch
        controls, goal = self.plant(self.policy(x), goal)
        return self.plant.loss(bare.costs(controls, goal))


def steps_and_sines(method: str, seed: int, steps: int) -> Metrics:
    """The mean cost of held-out goals, for the package and for what one would write by hand."""
    torch.manual_seed(seed)
    train, held_out = bare.goals(4096, seed), bare.goals(1024, seed + 1000)
    if method in bare.LOOPS:
        policy = bare.make_policy()
        bare.LOOPS[method](policy, *train, steps, seed)
    else:
        module = Steps(BlackBox(noise=0.1, estimator=_estimator(method), evaluations=evaluations_of(method)))
        policy = module.policy
        fit(module, TensorDataset(*train), 64, steps // evaluations_of(method), seed)
    with torch.no_grad():
        return {"cost": float(bare.costs(policy(held_out[0]), held_out[1]).mean())}


# ---------------------------------------------------------------------- rounding


class Rounding(Task):
    """An autoencoder of the digits through eight hard bits.

    Args:
        code: The boundary; ``None`` for numbers between 0 and 1 that are not rounded.
    """

    def __init__(self, code: Bernoulli | None, bits: int = 8) -> None:
        super().__init__(learning_rate=2e-3)
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, bits))
        self.decoder = nn.Sequential(nn.Linear(bits, 128), nn.ReLU(), nn.Linear(128, 64))
        self.code = code

    def costs(self, x: Tensor) -> Tensor:
        """The squared error of each reconstruction, ``(R,)``."""
        logits = self.encoder(x)
        if self.code is None:
            return (self.decoder(logits.sigmoid()) - x).square().mean(1)
        bits, x = self.code(logits, x)
        return (self.decoder(bits) - x).square().mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The decoder has its true gradient; the bits' is estimated."""
        costs = self.costs(batch[0])
        return costs.mean() if self.code is None else self.code.loss(costs)


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits between 0 and 1: 1437 to train on and 360 to test."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1437]], images[order[1437:]]


def rounding(method: str, seed: int, steps: int) -> Metrics:
    """The error of reconstruction of test digits, with hard bits."""
    torch.manual_seed(seed)
    code = None if method in (UNQUANTISED, MEANS) else Bernoulli(_estimator(method), evaluations=evaluations_of(method))
    train, test = digits()
    if method == MEANS:
        return {"error": _means(train, test, seed)}
    module = Rounding(code)
    fit(module, TensorDataset(train), 128, steps, seed)
    with torch.no_grad():
        return {"error": float(module.costs(test).mean())}


def _means(train: Tensor, test: Tensor, seed: int) -> float:
    """The error of the best codebook of 256 entries that k-means finds: a yardstick for eight bits."""
    from sklearn.cluster import KMeans

    means = KMeans(256, n_init=3, random_state=seed).fit(train.numpy())
    nearest = torch.tensor(means.cluster_centers_[means.predict(test.numpy())])
    return float((nearest - test).square().mean())


# ---------------------------------------------------------------------- a discrete variational autoencoder


class DiscreteVAE(Task):
    """A variational autoencoder of binary images with 200 Bernoulli units, uniform a priori.

    Args:
        code: The boundary.
        means: The mean of each pixel, at which the decoder starts.
    """

    def __init__(self, code: Bernoulli, means: Tensor, units: int = 200) -> None:
        super().__init__(learning_rate=1e-3)
        self.encoder = nn.Sequential(nn.Linear(784, 200), nn.LeakyReLU(0.3), nn.Linear(200, units))
        self.decoder = nn.Sequential(nn.Linear(units, 200), nn.LeakyReLU(0.3), nn.Linear(200, 784))
        self.code = code
        with torch.no_grad():
            self.decoder[-1].bias.copy_(torch.logit(means.clamp(0.01, 0.99)))

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of binary images ``(N, 784)``: the reconstruction's negative log-likelihood ``(R,)`` and the KL ``(N,)``."""
        logits = self.encoder(x)
        bits, x = self.code(logits, x)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(2 * bits - 1), x, reduction="none").sum(1)
        entropy = torch.distributions.Bernoulli(logits=logits).entropy()
        return reconstruction, (math.log(2) - entropy).sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The negative bound; the KL has its own true gradient."""
        reconstruction, divergence = self.terms(torch.bernoulli(batch[0]))
        return self.code.loss(reconstruction) + divergence.mean()


def vae(method: str, seed: int, steps: int, mnist: str) -> Metrics:
    """The negative evidence lower bound of test images, in nats, with hard samples."""
    train, test = (grey_images(Path(mnist), name) for name in (FILES[0], FILES[2]))
    torch.manual_seed(seed)
    code = Bernoulli(_estimator(method), evaluations=evaluations_of(method), in_evaluation="sample")
    module = DiscreteVAE(code, train.mean(0))
    fit(module, TensorDataset(train), 100, steps, seed)
    torch.manual_seed(0)
    with torch.no_grad():
        terms = [module.terms(torch.bernoulli(part)) for part in test.split(1000)]
    return {"bound": float(torch.cat([left + right for left, right in terms]).mean())}


def grey_images(folder: Path, name: str) -> Tensor:
    """Pixels between 0 and 1, ``(N, 784)``, of a file of images in the IDX format, plain or compressed."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), folder / name)
    return read_idx(path, 3).flatten(1) / 255


# ---------------------------------------------------------------------- a random forest


class Forest(Task):
    """A network whose second half is a fitted random forest: it learns to bring its inputs into the forest's form."""

    def __init__(self, forest: Any, entry: BlackBox) -> None:
        super().__init__(learning_rate=2e-3)
        self.first = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 5), nn.Sigmoid())
        self.entry = entry
        self.forest = forest

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The squared error of the forest's answer."""
        x, y = batch
        features, y = self.entry(self.first(x), y)
        answers = torch.as_tensor(self.forest.predict(features.numpy(force=True)), dtype=torch.float32)
        return self.entry.loss((answers - y).square())


def forest(method: str, seed: int, steps: int) -> Metrics:
    """The squared error on held-out samples, in units of the target's variance."""
    from sklearn.datasets import make_friedman1
    from sklearn.ensemble import RandomForestRegressor

    features, targets = make_friedman1(4000, n_features=5, noise=0.0, random_state=0)
    targets = (targets - targets.mean()) / targets.std()
    trees = RandomForestRegressor(20, max_leaf_nodes=200, random_state=0).fit(features[:2000], targets[:2000])
    mix = np.random.default_rng(0).normal(size=(5, 10))
    x = torch.tensor(np.tanh((features - 0.5) @ mix), dtype=torch.float32)
    y = torch.tensor(targets, dtype=torch.float32)
    torch.manual_seed(seed)
    module = Forest(trees, BlackBox(noise=0.1, estimator=_estimator(method), evaluations=evaluations_of(method)))
    if method != FROZEN:
        fit(module, TensorDataset(x[:3000], y[:3000]), 64, steps // evaluations_of(method), seed)
    with torch.no_grad():
        answers = trees.predict(module.first(x[3000:]).numpy())
    return {"error": float(np.square(answers - targets[3000:]).mean())}


__all__ = [
    "BACKPROPAGATION",
    "ESTIMATORS",
    "FROZEN",
    "MEANS",
    "PLAIN",
    "TWO",
    "UNQUANTISED",
    "Metrics",
    "forest",
    "pendulum",
    "rounding",
    "steps_and_sines",
    "toy",
    "vae",
]
