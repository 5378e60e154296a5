"""What boundaries draw: hard samples, their mirror images, and the relaxed samples behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sg.blackbox.discrete import BernoulliSampling, CategoricalSampling
from lightning_sg.blackbox.noise import Gaussian, Noise
from lightning_sg.blackbox.sampling import Draw, Sampling

KINDS = {"gaussian": Gaussian(Noise(0.5)), "bernoulli": BernoulliSampling(), "categorical": CategoricalSampling()}
LOGITS = torch.tensor([0.3, -1.0, 2.0])
ROWS = 40_000


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(sampling: Sampling, evaluations: int = 1) -> Draw:
    return sampling.draw(LOGITS.expand(ROWS, 3), evaluations, numbers(), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_values_have_the_mean_that_the_activation_says(kind: str) -> None:
    sampling = KINDS[kind]
    mean = drawn(sampling).value.mean(0)
    torch.testing.assert_close(mean, sampling.mean(LOGITS), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_function_has_mean_zero_and_is_the_gradient_of_the_log_probability(kind: str) -> None:
    draw = drawn(KINDS[kind])
    found = KINDS[kind].log_gradient(draw)
    assert float(found.mean(0).abs().max()) < 0.03
    h = LOGITS.clone().requires_grad_()
    if kind == "gaussian":
        log_p = torch.distributions.Normal(h, 0.5).log_prob(draw.value[:5])
    elif kind == "bernoulli":
        log_p = torch.distributions.Bernoulli(logits=h).log_prob(draw.value[:5])
    else:
        log_p = torch.distributions.OneHotCategorical(logits=h).log_prob(draw.value[:5])
    (expected,) = torch.autograd.grad(log_p.sum(), h)
    torch.testing.assert_close(found[:5].sum(0), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_relaxed_samples_have_the_drawn_value_as_their_hard_form(kind: str) -> None:
    sampling = KINDS[kind]
    draw = drawn(sampling)
    for z in sampling.relaxed(draw.activation.clone().requires_grad_(), draw, numbers(1)):
        hard = (z > 0).float() if kind == "bernoulli" else torch.nn.functional.one_hot(z.argmax(-1), 3).float()
        assert torch.equal(hard, draw.value)
        assert torch.isfinite(z).all()


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_relaxed_samples_are_distributed_as_if_drawn_freely(kind: str) -> None:
    sampling = KINDS[kind]
    draw = drawn(sampling)
    u = torch.rand(ROWS, 3, generator=numbers(2)).clamp(1e-6, 1 - 1e-6)
    free = LOGITS + torch.logit(u) if kind == "bernoulli" else LOGITS.log_softmax(-1) - torch.log(-torch.log(u))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for z in sampling.relaxed(draw.activation.clone().requires_grad_(), draw, numbers(1)):
        for column in range(3):
            found, expected = z[:, column].detach().quantile(levels), free[:, column].quantile(levels)
            torch.testing.assert_close(found, expected, atol=0.08, rtol=0)


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_pairs_mirror_each_other(kind: str) -> None:
    draw = KINDS[kind].draw_pairs(torch.zeros(7, 3), 2, numbers(), 0)
    assert (draw.value.shape, draw.evaluations) == ((28, 3), 4)
    middle = 0.0 if kind == "gaussian" else 0.5
    torch.testing.assert_close(draw.value[:14] + draw.value[14:], torch.full((14, 3), 2 * middle))


def test_evaluations_follow_each_other_sample_by_sample() -> None:
    h = torch.arange(3.0).unsqueeze(1) * 100
    draw = Gaussian(Noise(0.1)).draw(h, 2, numbers(), 0)
    assert draw.activation.flatten().tolist() == [0, 100, 200, 0, 100, 200]


def mode(h: Tensor, kind: str) -> Tensor:
    return KINDS[kind].settled(h)


def test_in_evaluation_nothing_is_drawn() -> None:
    h = LOGITS.expand(2, 3)
    assert mode(h, "gaussian") is h
    assert mode(h, "bernoulli").tolist() == [[1, 0, 1]] * 2
    assert mode(h, "categorical").tolist() == [[0, 0, 1]] * 2
