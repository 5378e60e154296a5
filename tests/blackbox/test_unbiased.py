"""Estimators against gradients that can be computed: their means, and how much they scatter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import ControlVariate, Critic, Evolution, Noise, ScoreFunction
from lightning_sg.blackbox.discrete import BernoulliSampling, CategoricalSampling
from lightning_sg.blackbox.estimator import Estimator, Example
from lightning_sg.blackbox.noise import Gaussian
from lightning_sg.blackbox.sampling import Draw, Sampling

ROWS = 60_000
LOGITS = torch.tensor([0.4, -0.8, 0.1])


def cost(x: Tensor) -> Tensor:
    """Of ``(R, 3)``: the elements count together, and differently."""
    return (x[:, 0] + 2 * x[:, 1] * x[:, 2] - 0.3) ** 2 + 0.5 * x[:, 2]


def true_gradient(sampling: Sampling) -> Tensor:
    """The gradient of the expected cost, exactly for discrete values, by quadrature for Gaussian ones."""
    h = LOGITS.clone().requires_grad_()
    if isinstance(sampling, Gaussian):
        nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5])  # exact up to the fifth power of each element
        weights = torch.tensor([1 / 6, 2 / 3, 1 / 6])
        places = torch.tensor(list(itertools.product(range(3), repeat=3)))
        expected = (weights[places].prod(1) * cost(h + 0.5 * nodes[places])).sum()
    elif isinstance(sampling, BernoulliSampling):
        values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
        expected = (torch.distributions.Bernoulli(logits=h).log_prob(values).sum(1).exp() * cost(values)).sum()
    else:
        expected = (h.softmax(-1) * cost(torch.eye(3))).sum()
    return torch.autograd.grad(expected, h)[0]


def built(estimator: Estimator, sampling: Sampling, evaluations: int = 1) -> tuple[Estimator, Draw, Tensor, Tensor]:
    """The estimator with random weights, and its gradient for each row of a draw from one activation."""
    torch.manual_seed(0)
    estimator.sampling = sampling
    generator = torch.Generator().manual_seed(1)
    h = LOGITS.expand(ROWS, 3)
    draw = (
        sampling.draw_pairs(h, evaluations // 2, generator, 0)
        if estimator.in_pairs
        else sampling.draw(h, evaluations, generator, 0)
    )
    score = cost(draw.value)
    estimator.build(Example(draw.activation[:8], draw.value[:8], draw.spread, None, score[:8]))
    for parameter in estimator.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.5)  # any critic and any baseline will do
    rows = estimator.gradient(draw, None, score, generator)
    return estimator, draw, score, rows.unflatten(0, (evaluations, ROWS)).mean(0)


SAMPLINGS = {"gaussian": Gaussian(Noise(0.5)), "bernoulli": BernoulliSampling(), "categorical": CategoricalSampling()}
UNBIASED: dict[str, tuple[Callable[[], Estimator], int]] = {
    "score function": (lambda: ScoreFunction(hidden=8), 1),
    "score function, no baseline": (lambda: ScoreFunction(baseline=False), 1),
    "score function, leave one out": (lambda: ScoreFunction(hidden=8), 3),
    "control variate": (lambda: ControlVariate(hidden=8), 1),
    "evolution": (Evolution, 2),
    "evolution, two pairs": (Evolution, 4),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("estimator", UNBIASED)
def test_the_mean_is_the_gradient_of_the_expected_cost(estimator: str, sampling: str) -> None:
    make, evaluations = UNBIASED[estimator]
    *_, rows = built(make(), SAMPLINGS[sampling], evaluations)
    expected = true_gradient(SAMPLINGS[sampling])
    error = (rows.mean(0) - expected).abs()
    # Three standard errors, for each of three elements.
    assert (error <= 3.3 * rows.std(0) / ROWS**0.5 + 1e-6).all(), (rows.mean(0), expected)
    assert (rows.std(0) / ROWS**0.5 < 0.05 * expected.norm()).all()  # close enough to mean something


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_score_for_each_element_counts_for_that_element_alone(sampling: str) -> None:
    kind, estimator = SAMPLINGS[sampling], ScoreFunction(baseline=False)
    if sampling == "categorical":
        pytest.skip("the elements of a one-hot vector are not independent")
    estimator.sampling = kind
    generator = torch.Generator().manual_seed(1)
    draw = kind.draw(LOGITS.expand(ROWS, 3), 1, generator, 0)
    score = draw.value * torch.tensor([1.0, 2.0, -3.0])
    estimator.build(Example(draw.activation[:8], draw.value[:8], draw.spread, None, score[:8]))
    found = estimator.gradient(draw, None, score, generator)
    h = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad((kind.mean(h) * torch.tensor([1.0, 2.0, -3.0])).mean(), h)
    assert ((found.mean(0) - expected).abs() <= 3.5 * found.std(0) / ROWS**0.5 + 1e-6).all()
    together = estimator.gradient(draw, None, score.mean(1), generator)
    assert found.var(0).sum() < together.var(0).sum()


def trained(estimator: Estimator, sampling: Sampling, steps: int = 400) -> Estimator:
    estimator.sampling = sampling
    torch.manual_seed(0)
    generator, optimizer = torch.Generator().manual_seed(2), None
    for _ in range(steps):
        h = LOGITS.expand(256, 3)
        draw = sampling.draw(h, 1, generator, 0)
        example = Example(draw.activation, draw.value, draw.spread, None, cost(draw.value))
        if optimizer is None:
            estimator.build(example)
            optimizer = torch.optim.Adam(estimator.parameters(), lr=3e-3)
        optimizer.zero_grad()
        estimator.loss(example, generator).backward()
        optimizer.step()
    return estimator


def scatter(estimator: Estimator, sampling: Sampling) -> tuple[float, Tensor]:
    """The variance of a gradient, all elements together, and the mean."""
    generator = torch.Generator().manual_seed(5)
    draw = sampling.draw(LOGITS.expand(ROWS, 3), 1, generator, 0)
    rows = estimator.gradient(draw, None, cost(draw.value), generator)
    return float(rows.var(0).sum()), rows.mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "objective"), [(kind, "auto") for kind in SAMPLINGS] + [("gaussian", "variance")])
def test_a_trained_control_variate_scatters_less_than_a_baseline(sampling: str, objective: Any) -> None:
    kind = SAMPLINGS[sampling]
    relaxed, mean = scatter(trained(ControlVariate(objective, hidden=32), kind), kind)
    baseline, _mean = scatter(trained(ScoreFunction(hidden=32), kind), kind)
    plain = ScoreFunction(baseline=False)
    plain.sampling = kind
    without, _mean = scatter(plain, kind)
    assert relaxed < 0.75 * baseline < baseline < without
    torch.testing.assert_close(mean, true_gradient(kind), atol=5 * (relaxed / ROWS) ** 0.5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_trained_critic_points_the_right_way(sampling: str) -> None:
    kind = SAMPLINGS[sampling]
    _variance, mean = scatter(trained(Critic(hidden=64), kind), kind)
    assert float(torch.cosine_similarity(mean, true_gradient(kind), dim=0)) > 0.9
