"""What the loss-model predictor can do beyond what every predictor promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg import LossModelPredictor
from lightning_sg.predictors.base import LossInfo, relative_error
from lightning_sg.predictors.matching import gradient_error
from lightning_sg.predictors.resize import pick, resize
from lightning_sg.predictors.sampled import SampledSoftmax

SAMPLES, CLASSES = 6, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def made(activations: Any, context: Any, traced: LossInfo | None = None, *, awake: bool = True, **options: Any) -> Any:
    """A built predictor; ``awake``: with other last weights than zero."""
    torch.manual_seed(0)
    predictor = LossModelPredictor(**options)
    predictor.build(activations, context, traced)
    if awake:
        for head in predictor.heads:
            nn.init.normal_(head.net[-1].weight, std=0.3)
    return predictor


def own_loss(outputs: Tensor, context: Any) -> Tensor:
    return (outputs.flatten(1).sum(1) - context.flatten(1).float().sum(1)).square()


def own_mean(outputs: Tensor, context: Any) -> Tensor:
    return own_loss(outputs, context).mean()


FAMILIES: dict[str, tuple[tuple[tuple[int, ...], ...], Any, LossInfo | None, dict[str, Any]]] = {
    "convolutions": (((SAMPLES, 4, 9, 8),), labels(SAMPLES), None, {"conv_layers": 2, "conv_width": 8}),
    "convolutions beside a vector": (((SAMPLES, 4, 9, 8), (SAMPLES, 3)), labels(SAMPLES), None, {"conv_layers": 1}),
    "maps of two sizes": (((SAMPLES, 4, 9, 8), (SAMPLES, 2, 4, 4)), labels(SAMPLES), None, {"pooled_side": 2}),
    "volumes": (((SAMPLES, 4, 5, 9, 8),), labels(SAMPLES), None, {"pooled_side": 2}),
    "dense labels": (((SAMPLES, 4, 6, 5),), labels(SAMPLES, 12, 10), None, {}),
    "dense labels with a channel": (((SAMPLES, 4, 6, 5),), labels(SAMPLES, 1, 12, 10), None, {}),
    "dense labels, convolutions": (((SAMPLES, 4, 6, 6),), labels(SAMPLES, 6, 6), None, {"conv_layers": 1}),
    "dense labels, two maps, a vector": (
        ((SAMPLES, 4, 6, 6), (SAMPLES, 2, 3, 3), (SAMPLES, 5)),
        labels(SAMPLES, 6, 6),
        None,
        {"conv_layers": 1},
    ),
    "dense goals": (((SAMPLES, 4, 6, 6),), normal(SAMPLES, 2, 12, 12), None, {}),
    "dense marks": (((SAMPLES, 4, 6, 6),), labels(SAMPLES, 6, 6) > 0, None, {}),
    "a linear head on tokens": (((SAMPLES, 5, 7),), labels(SAMPLES, 5), None, {"layers": 0}),
    "goals of positions": (((SAMPLES, 5, 7),), normal(SAMPLES, 5, 2), None, {}),
    "a low rank": (((SAMPLES, 5, 7),), labels(SAMPLES, 5, classes=40), None, {"layers": 0, "rank": 2}),
    "chances": (((SAMPLES, 7),), normal(SAMPLES, 4).softmax(-1), LossInfo("cross_entropy", 4), {}),
    "marks": (((SAMPLES, 7),), labels(SAMPLES) > 0, None, {}),
    "l1": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("l1", 2), {}),
    "smooth l1": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("smooth_l1", 2, beta=0.3), {}),
    "huber": (((SAMPLES, 7),), normal(SAMPLES, 2), LossInfo("huber", 2, beta=0.3), {}),
    "smoothing": (((SAMPLES, 7),), labels(SAMPLES), LossInfo("cross_entropy", 3, label_smoothing=0.2), {}),
    "a loss by sample": (((SAMPLES, 7),), normal(SAMPLES, 2), None, {"loss": own_loss, "outputs": 2}),
    "a mean loss": (((SAMPLES, 7),), normal(SAMPLES, 2), None, {"loss": own_mean, "outputs": 2}),
    "a mean loss of cells": (((SAMPLES, 4, 6, 6),), labels(SAMPLES, 9, 9), None, {"loss": own_mean, "outputs": 2}),
    "tasks": (((SAMPLES, 7),), {"a": labels(SAMPLES), "b": normal(SAMPLES, 2)}, None, {"weights": {"b": 0.5}}),
}
families = pytest.mark.parametrize(("shapes", "context", "loss", "options"), FAMILIES.values(), ids=FAMILIES.keys())


@families
@pytest.mark.parametrize("objective", ["loss", "both"])
def test_every_family_starts_at_zero_learns_and_has_the_right_shapes(
    shapes: Any, context: Any, loss: Any, options: dict[str, Any], objective: str
) -> None:
    activations = tuple(normal(*shape) for shape in shapes)
    predictor = made(activations, context, loss, awake=False, objective=objective, **options)
    prediction = predictor(activations, context)
    assert [part.shape for part in prediction] == [part.shape for part in activations]
    assert all(torch.count_nonzero(part) == 0 for part in prediction)
    targets = tuple(0.01 * normal(*shape, seed=2) for shape in shapes)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        value = predictor.loss(activations, context, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    if objective == "loss":
        assert losses[-1] < losses[0]
    assert all(part.isfinite().all() and part.abs().sum() > 0 for part in predictor(activations, context))


@families
def test_gradients_are_per_sample_and_survive_saving(
    shapes: Any, context: Any, loss: Any, options: dict[str, Any]
) -> None:
    activations = tuple(normal(*shape) for shape in shapes)
    predictor = made(activations, context, loss, **options)
    once = predictor(activations, context)
    double = tuple(torch.cat([part, part]) for part in activations)
    both = (
        {name: torch.cat([part, part]) for name, part in context.items()}
        if isinstance(context, dict)
        else torch.cat([context, context])
    )
    for part, twice in zip(once, predictor(double, both)):
        torch.testing.assert_close(twice, torch.cat([part, part]), rtol=1e-3, atol=1e-5)
    other = made(activations, context, loss, **options)
    other.load_state_dict(predictor.state_dict())
    for same in (other, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert all(torch.equal(a, b) for a, b in zip(same(activations, context), once))


# ---------------------------------------------------------------------- oracles


def test_a_linear_heads_prediction_is_the_gradient_by_hand() -> None:
    activations, context = (normal(SAMPLES, 5, 7),), labels(SAMPLES, 5)
    predictor = made(activations, context, layers=0, normalize="none")
    layer = predictor.head[-1]
    chances = (activations[0] @ layer.weight.T + layer.bias).softmax(-1)
    expected = (chances - F.one_hot(context, CLASSES)) @ layer.weight / 5
    torch.testing.assert_close(predictor(activations, context)[0], expected.detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_the_mean_loss_is_that_of_torch_with_ignored_labels_and_smoothing(smoothing: float, ignored: int) -> None:
    hidden, context = normal(SAMPLES, 5, 7), labels(SAMPLES, 5)
    context[0, :2] = ignored
    loss = LossInfo("cross_entropy", CLASSES, ignored, smoothing)
    predictor = made((hidden,), context, loss, layers=0, normalize="none")
    hidden.requires_grad_()
    value = F.cross_entropy(
        predictor.head(hidden).flatten(0, 1), context.flatten(), ignore_index=ignored, label_smoothing=smoothing
    )
    torch.testing.assert_close(predictor.loss((hidden,), context, ()), value)
    (expected,) = torch.autograd.grad(value * SAMPLES, hidden)
    torch.testing.assert_close(predictor((hidden,), context)[0], expected)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("l1", F.l1_loss),
        ("smooth_l1", lambda outputs, goal: F.smooth_l1_loss(outputs, goal, beta=0.3)),
        ("huber", lambda outputs, goal: F.huber_loss(outputs, goal, delta=0.3)),
        ("mse", F.mse_loss),
        ("binary_cross_entropy", F.binary_cross_entropy_with_logits),
    ],
)
def test_regression_losses_are_torchs(kind: str, function: Any) -> None:
    activations, goal = (normal(SAMPLES, 7),), normal(SAMPLES, 2).sigmoid()
    predictor = made(activations, goal, LossInfo(kind, 2, beta=0.3), normalize="none")
    assert predictor.kind == kind
    torch.testing.assert_close(predictor.loss(activations, goal, ()), function(predictor.head(activations[0]), goal))


def test_dense_labels_are_compared_with_interpolated_outputs() -> None:
    activations, context = (normal(SAMPLES, 4, 6, 5),), labels(SAMPLES, 12, 10)
    predictor = made(activations, context, layers=0, normalize="none")
    outputs = predictor.head(activations[0].movedim(1, -1)).movedim(-1, 1)
    expected = F.cross_entropy(F.interpolate(outputs, (12, 10), mode="bilinear"), context)
    torch.testing.assert_close(predictor.loss(activations, context, ()), expected)


@pytest.mark.parametrize(("given", "wanted"), [((8, 6), (4, 3)), ((9, 7), (4, 4)), ((5, 5), (5, 2))])
def test_resizing_to_fewer_averages(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    maps = normal(2, 3, *given)
    torch.testing.assert_close(resize(maps, wanted), F.adaptive_avg_pool2d(maps, wanted))


@pytest.mark.parametrize(("given", "wanted"), [((3, 4), (6, 8)), ((3, 4), (7, 5)), ((1, 1), (4, 4))])
def test_resizing_to_more_interpolates(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    maps = normal(2, 3, *given)
    torch.testing.assert_close(resize(maps, wanted), F.interpolate(maps, wanted, mode="bilinear"))


def test_labels_are_picked_at_the_centres() -> None:
    image = torch.arange(36).reshape(1, 6, 6)
    assert pick(image, (2, 2)).tolist() == [[[7, 10], [25, 28]]]
    assert pick(image, (6, 6)) is image


def test_the_cost_of_a_head_hardly_grows_with_the_resolution() -> None:
    def flops(side: int, **options: Any) -> int:
        activations = (normal(2, 8, side, side),)
        predictor = made(activations, labels(2), classes=3, **options)
        with FlopCounterMode(display=False) as counter:
            predictor.loss(activations, labels(2), ())
        return int(counter.get_total_flops())

    # Four times the cells; what grows is the averaging, by some 30 operations a number.
    assert flops(128, conv_layers=2) < 2 * flops(64, conv_layers=2)


# ---------------------------------------------------------------------- many classes


def test_50000_classes_are_cheap() -> None:
    activations, context = (normal(8, 128, 256),), labels(8, 128, classes=50_000)
    predictor = made(activations, context, LossInfo("cross_entropy", 50_000), awake=False, layers=0)
    with FlopCounterMode(display=False) as counter:
        predictor.loss(activations, context, ()).backward()
    full = 3 * 2 * 8 * 128 * 256 * 50_000  # forwards, and backwards to input and weight
    assert counter.get_total_flops() < 0.03 * full
    assert sum(parameter.numel() for parameter in predictor.parameters()) < 0.3 * 256 * 50_000
    assert predictor(activations, context)[0].shape == (8, 128, 256)


def test_the_low_rank_can_be_chosen_or_refused() -> None:
    activations, context = (normal(2, 300),), labels(2)
    loss = LossInfo("cross_entropy", 8000)
    assert [layer.out_features for layer in made(activations, context, loss, layers=0).head] == [64, 8000]
    assert [layer.out_features for layer in made(activations, context, loss, layers=0, rank=16).head] == [16, 8000]
    assert [layer.out_features for layer in made(activations, context, loss, layers=0, rank=0).head] == [8000]


def sampled(**options: Any) -> Any:
    activations, context = (normal(4, 8, 16),), labels(4, 8, classes=200)
    loss = LossInfo("cross_entropy", 200)
    return made(activations, context, loss, layers=0, normalize="none", **options), activations, context


@pytest.mark.parametrize("objective", ["loss", "gradient", "both"])
def test_the_sampled_softmax_leaves_the_users_random_numbers(objective: str) -> None:
    predictor, activations, context = sampled(samples=20, objective=objective)
    before = torch.get_rng_state()
    predictor.loss(activations, context, activations).backward()
    predictor(activations, context)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad.isfinite().all() for parameter in predictor.parameters())


def test_the_sampled_softmax_draws_the_same_wherever_it_runs_and_anew_after_learning() -> None:
    predictor, activations, context = sampled(samples=20)
    other, *_ = sampled(samples=20)
    torch.manual_seed(99)  # the rest of another process
    (first,) = predictor(activations, context)
    assert torch.equal(first, other(activations, context)[0])
    assert torch.equal(first, predictor(activations, context)[0])
    for one in (predictor, other):
        one.loss(activations, context, ())
    (second,) = predictor(activations, context)
    assert not torch.equal(first, second)
    assert torch.equal(second, other(activations, context)[0])
    resumed, *_ = sampled(samples=20)
    resumed.load_state_dict(predictor.state_dict())
    assert torch.equal(second, resumed(activations, context)[0])


def test_the_classes_are_those_of_the_batch_and_others_all_different() -> None:
    softmax = SampledSoftmax(200, 20)
    context = labels(64, classes=200)
    chosen, correction = softmax.draw(context)
    counted = set(context[::4].tolist())
    assert len(set(chosen.tolist())) == 40
    assert counted <= set(chosen.tolist())
    known = torch.tensor([label in counted for label in chosen.tolist()])
    assert torch.all(correction[known] == 0)
    expected = torch.tensor((200 - len(counted)) / (40 - len(counted))).log()
    torch.testing.assert_close(correction[~known], expected.expand(40 - len(counted)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sampled_loss_is_near_the_full_one(smoothing: float) -> None:
    rows, context, last = normal(32, 16), labels(32, classes=200), nn.Linear(16, 200)
    softmax = SampledSoftmax(200, 60)
    full = F.cross_entropy(last(rows), context, label_smoothing=smoothing).item()
    estimates = []
    for _ in range(20):
        estimates.append(softmax(rows, context, last, smoothing).mean().item())
        softmax.advance()
    assert sum(estimates) / 20 == pytest.approx(full, rel=0.01)
    assert len(set(estimates)) == 20


def test_ignored_labels_have_no_gradient_in_the_sampled_softmax() -> None:
    predictor, activations, context = sampled(samples=20)
    context[0, :3] = -100
    (prediction,) = predictor(activations, context)
    assert torch.equal(prediction.abs().sum(-1) == 0, context == -100)


# ---------------------------------------------------------------------- losses of the user's


@pytest.mark.parametrize("function", [own_loss, own_mean])
def test_a_users_loss_has_its_gradient(function: Any) -> None:
    hidden, goal = normal(SAMPLES, 7), normal(SAMPLES, 2)
    predictor = made((hidden,), goal, loss=function, outputs=2, normalize="none")
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(own_loss(predictor.head(hidden), goal).sum(), hidden)
    torch.testing.assert_close(predictor((hidden,), goal)[0], expected)


def test_a_users_loss_has_any_context() -> None:
    def by_length(outputs: Tensor, context: Any) -> Tensor:
        return (outputs[:, 0] - torch.tensor([float(len(text)) for text in context])).square()

    activations, context = (normal(3, 7),), ["a", "bb", "ccc"]
    predictor = made(activations, context, loss=by_length, outputs=1)
    assert predictor(activations, context)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda outputs, context: outputs,
            rf"must return the losses of the {SAMPLES} samples.*returned \({SAMPLES}, 2\)",
        ),
        (lambda outputs, context: 1.0, "it returned float"),
        (lambda outputs, context: outputs.detach().sum(), "without a gradient"),
    ],
)
def test_a_users_loss_that_returns_something_else_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made((normal(SAMPLES, 7),), labels(SAMPLES), loss=function, outputs=2)


# ---------------------------------------------------------------------- several tasks


def test_the_loss_of_tasks_is_the_weighted_sum_of_single_ones() -> None:
    activations = (normal(SAMPLES, 7),)
    context = {"digit": labels(SAMPLES), "size": normal(SAMPLES, 2), "name": ["x"] * SAMPLES}
    predictor = made(
        activations,
        context,
        losses={"digit": "cross_entropy", "size": "l1"},
        weights={"size": 0.5},
        classes={"digit": 5},
    )
    assert [head.net[-1].out_features for head in predictor.heads] == [5, 2]
    value, gradient = torch.zeros(()), torch.zeros(SAMPLES, 7)
    for place, (name, kind, weight) in enumerate([("digit", "cross_entropy", 1.0), ("size", "l1", 0.5)]):
        single = made(activations, context[name], LossInfo(kind, 5))
        single.heads[0].load_state_dict(predictor.heads[place].state_dict())
        value = value + weight * single.loss(activations, context[name], ())
        gradient = gradient + weight * single(activations, context[name])[0]
    torch.testing.assert_close(predictor.loss(activations, context, ()), value)
    torch.testing.assert_close(predictor(activations, context)[0], gradient)


def test_the_models_cross_entropy_is_that_of_the_only_task_with_labels() -> None:
    context = {"a": labels(SAMPLES), "b": normal(SAMPLES)}
    predictor = made((normal(SAMPLES, 7),), context, LossInfo("cross_entropy", 9))
    assert [head.net[-1].out_features for head in predictor.heads] == [9, 1]


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({"losses": {"c": "mse"}}, {"a": labels(SAMPLES)}, "no tensors called .'c'."),
        ({"weights": {"c": 1.0}}, {"a": labels(SAMPLES)}, "given for .'c'."),
        ({"losses": {"a": "mse"}}, labels(SAMPLES), "context is a tensor"),
        ({"classes": {"a": 3}}, labels(SAMPLES), "no dict of tasks"),
        ({"classes": {"a": 1}}, {"a": labels(SAMPLES)}, r"classes=\{'a'"),
        ({}, labels(SAMPLES, 5), "neither one for each sample nor one for each position"),
    ],
)
def test_contexts_and_options_that_do_not_fit_are_refused(options: Any, context: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made((normal(SAMPLES, 7),), context, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "l3"}, "match must be"),
        ({"losses": {"a": "hinge"}}, "losses must be among"),
        ({"loss": own_loss}, "number of outputs"),
        ({"outputs": 3}, "needs both"),
        ({"loss": 3, "outputs": 3}, "must be a function"),
        ({"loss": own_loss, "outputs": 2, "classes": 2}, "leaves nothing"),
        ({"rank": -1}, "rank >= 0"),
        ({"samples": -1}, "samples >= 0"),
        ({"pooled_side": 0}, "pooled_side >= 1"),
        ({"conv_layers": -1}, "conv_layers >= 0"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossModelPredictor(**options)


# ---------------------------------------------------------------------- matching the gradient


def test_the_ways_to_match_measure_what_they_say() -> None:
    predictions, targets = (normal(4, 5), normal(4, 2)), (normal(4, 5, seed=1), normal(4, 2, seed=2))
    rms = torch.tensor([0.5, 2.0])
    error = sum((p - t).square().sum() for p, t in zip(predictions, targets))
    usual = 20 * 0.25 + 8 * 4.0
    assert gradient_error("l2", predictions, targets, rms) == pytest.approx(float(error) / usual)
    assert gradient_error("normalized", predictions, targets, rms) == relative_error(predictions, targets, rms)
    long = tuple(1e3 * part for part in predictions)
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (predictions, targets)]
    expected = 1 - F.cosine_similarity(flat[0], flat[1], dim=0).item()
    assert gradient_error("cosine", long, targets, None).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("match", ["l2", "cosine", "normalized"])
@pytest.mark.parametrize("rms", [None, torch.zeros(1), torch.full((1,), 1e-20), torch.ones(1)])
@pytest.mark.parametrize("size", [0.0, 1e-20])
@pytest.mark.parametrize("start", [0.0, 1e-3, 1.0])
def test_targets_of_zero_do_no_harm(match: Any, rms: Tensor | None, size: float, start: float) -> None:
    prediction = (start * normal(SAMPLES, 7)).requires_grad_()
    error = gradient_error(match, (prediction,), (size * normal(SAMPLES, 7, seed=1),), rms)
    (step,) = torch.autograd.grad(error, prediction)
    assert error.isfinite()
    assert error <= 101
    assert step.isfinite().all()
    # In units of the prediction itself the step is bounded, whatever the target.
    assert (step * prediction).abs().sum() <= 201


@pytest.mark.parametrize("match", ["l2", "cosine", "normalized"])
def test_a_batch_of_zero_targets_hardly_moves_a_trained_predictor(match: Any) -> None:
    activations, context = (normal(SAMPLES, 7),), labels(SAMPLES)
    predictor = made(activations, context, objective="gradient", match=match)
    predictor.target_rms = predictor(activations, context)[0].square().mean().sqrt().reshape(1)

    def slope(targets: Tensor) -> float:
        predictor.zero_grad()
        predictor.loss(activations, context, (targets,)).backward()
        return max(p.grad.abs().max().item() for p in predictor.parameters() if p.grad is not None)

    usual = slope(float(predictor.target_rms) * normal(SAMPLES, 7, seed=3))
    assert slope(torch.zeros(SAMPLES, 7)) < 10 * usual


# ---------------------------------------------------------------------- the command line


def test_a_loss_of_the_users_is_given_by_its_import_path() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LossModelPredictor, "predictor")
    given = parser.parse_object(
        {"predictor": {"loss": "torch.nn.functional.mse_loss", "outputs": 2, "classes": None, "match": "cosine"}}
    )
    predictor = parser.instantiate(given).predictor
    assert predictor.own_loss is F.mse_loss
    given = parser.parse_object({"predictor": {"loss": {"class_path": "torch.nn.L1Loss"}, "outputs": 2}})
    assert isinstance(parser.instantiate(given).predictor.own_loss, nn.L1Loss)
