"""The automatic choice for each form of task."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import AutoPredictor, HeadOptions, LossModelPredictor, Matching, MLPPredictor, Tasks
from lightning_sg.predictors.auto import FITTING, form_of
from lightning_sg.predictors.base import LossInfo


def labels(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(1))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


CASES: dict[str, tuple[tuple[int, ...], Any, str]] = {
    "labels": ((8, 6), labels(8), "vectors"),
    "goals": ((8, 6), numbers(8, 2), "vectors"),
    "a label for each position": ((8, 5, 6), labels(8, 5), "a sequence with a label for each position"),
    "goals for each position": ((8, 5, 6), numbers(8, 5, 2), "a sequence with a label for each position"),
    "a label for a sequence": ((8, 5, 6), labels(8), "a sequence with one label"),
    "maps": ((8, 4, 6, 6), labels(8), "feature maps"),
    "segmentation": ((8, 4, 6, 6), labels(8, 12, 12), "feature maps with dense labels"),
    "tasks": ((8, 6), {"a": labels(8), "b": numbers(8)}, "vectors"),
    "boxes are no image": ((8, 4, 6, 6), numbers(8, 10, 4), "feature maps"),
}


@pytest.mark.parametrize(("shape", "context", "form"), CASES.values(), ids=CASES.keys())
def test_goals_have_a_loss_model_of_the_fitting_form(shape: tuple[int, ...], context: Any, form: str) -> None:
    activations = (numbers(*shape),)
    assert form_of(activations, context) == form
    predictor = AutoPredictor()
    assert "not chosen yet" in predictor.choice
    predictor.build(activations, context, None)
    chosen = predictor.chosen
    assert isinstance(chosen, LossModelPredictor)
    assert all(getattr(chosen, name, value) == value for name, value in FITTING[form].items())
    matches = chosen.target_use.learns_from_targets
    assert predictor.choice.startswith("LossModelPredictor: " if matches else "local loss (LossModelPredictor): ")
    assert predictor.describe(matches=False).startswith("local loss (LossModelPredictor): ")
    assert "trained on its own loss;" in predictor.describe(matches=False)
    assert predictor.choice.endswith(f"; for {form}")
    prediction = predictor(activations, context)
    assert prediction is not None
    assert prediction[0].shape == shape
    assert torch.count_nonzero(prediction[0]) == 0


@pytest.mark.parametrize(
    ("context", "reason"),
    [(None, "empty"), (["a"] * 8, "list"), ({"text": ["a"]}, "dict"), (labels(8, 7), "does not fit the activations")],
)
def test_without_usable_goals_the_gradient_is_predicted_from_the_activations(context: Any, reason: str) -> None:
    predictor = AutoPredictor()
    predictor.build((numbers(8, 6),), context, None)
    assert isinstance(predictor.chosen, MLPPredictor)
    assert not predictor.chosen.conditional
    assert predictor.choice.startswith("MLPPredictor: ")
    assert reason in predictor.choice


def test_the_choice_says_what_was_made() -> None:
    predictor = AutoPredictor()
    predictor.build((numbers(8, 5, 6),), labels(8, 5), LossInfo("cross_entropy", 65))
    assert predictor.choice == (
        "local loss (LossModelPredictor): head with 1 hidden layer of 256 for each position, 65 classes from the "
        "model's cross-entropy; trained on its own loss; for a sequence with a label for each position"
    )


def test_a_large_vocabulary_has_a_thin_head_and_a_sampled_softmax() -> None:
    predictor = AutoPredictor()
    predictor.build((numbers(2, 4, 64),), labels(2, 4), LossInfo("cross_entropy", 50_000))
    assert "of rank 64" in predictor.choice
    assert "softmax over 2048 of them" in predictor.choice
    predictor.build((numbers(2, 4, 64),), labels(2, 4), LossInfo("cross_entropy", 1000))
    assert "of rank" not in predictor.choice
    assert "softmax over" not in predictor.choice


@pytest.mark.parametrize(
    ("shapes", "context", "expected"),
    [
        ([(8, 6)], labels(8), False),
        ([(8, 3, 4, 4)], labels(8), True),
        ([(8, 6), (8, 3, 4, 4)], labels(8), True),
        ([(8, 5, 6)], labels(8), False),
        ([(8, 5, 6)], labels(8, 5), False),
        ([(8, 6)], numbers(8, 3), False),
        ([(8, 6)], None, True),
        ([], labels(8), True),  # nothing is known
    ],
)
def test_exact_targets_are_sent_for_where_what_is_chosen_gains_by_them(
    shapes: Any, context: Any, expected: bool
) -> None:
    assert AutoPredictor().wants_exact(shapes, context) is expected


def test_its_optimizer_is_that_of_what_it_chose() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    for context, kind in ((labels(8), torch.optim.AdamW), (None, torch.optim.Adam)):
        predictor = AutoPredictor()
        predictor.build((numbers(8, 6),), context, None)
        assert type(predictor.default_optimizer([weight])) is kind


def test_too_few_classes_given_are_an_error_and_no_reason_for_another_predictor() -> None:
    with pytest.raises(ValueError, match="beyond the 2 classes"):
        AutoPredictor(classes=2).build((numbers(8, 6),), torch.arange(8), None)


def test_options_take_the_place_of_those_that_would_be_chosen() -> None:
    predictor = AutoPredictor(options={"hidden": 9, "objective": "loss"})
    predictor.build((numbers(8, 3, 4, 4),), labels(8), None)
    chosen = predictor.chosen
    assert isinstance(chosen, LossModelPredictor)
    assert (chosen.hidden, chosen.objective) == (9, "loss")
    assert not predictor.wants_exact([(8, 3, 4, 4)], labels(8))  # such a head has no use for them


@pytest.mark.parametrize("objective", ["loss", "gradient", "both"])
@pytest.mark.parametrize("shape", [(8, 6), (8, 5, 6), (8, 3, 4, 4)])
def test_an_objective_of_the_users_has_the_exact_targets_that_it_uses(objective: Any, shape: tuple[int, ...]) -> None:
    expected = LossModelPredictor(objective=objective).wants_exact([shape], labels(8))
    assert AutoPredictor(options={"objective": objective}).wants_exact([shape], labels(8)) is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": 9}, "options are those of LossModelPredictor"),
        ({"hidden": 0}, "hidden must be a whole number from 1"),
    ],
)
def test_options_that_there_are_not_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoPredictor(options=options)


def test_options_that_do_not_fit_are_an_error_and_no_reason_for_another_predictor() -> None:
    with pytest.raises(ValueError, match="weights or classes are given for"):
        AutoPredictor(options={"tasks": Tasks(weights={"b": 2.0})}).build((numbers(8, 6),), labels(8), None)


def test_it_learns_is_saved_copied_and_pickled_as_what_it_chose() -> None:
    activations, context = (numbers(8, 5, 6),), labels(8, 5)
    targets = (0.1 * torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(3)),)
    predictor = AutoPredictor()
    predictor.build(activations, context, None)
    predictor.target_rms = torch.tensor([0.1])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = predictor.loss(activations, context, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = AutoPredictor()
    other.build(activations, context, None)
    other.load_state_dict(predictor.state_dict())
    expected = predictor(activations, context)
    assert expected is not None
    assert expected[0].abs().sum() > 0
    for same in (other, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(same(activations, context)[0], expected[0])


def test_it_does_not_predict_before_it_is_built() -> None:
    with pytest.raises(RuntimeError, match="before build"):
        AutoPredictor()((numbers(8, 6),), None)


def test_options_in_groups_are_given_in_a_config() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AutoPredictor, "predictor")
    options = {"hidden": 9, "head": {"hidden_norm": "layer"}, "matching": {"weight": 2.0}}
    predictor = parser.instantiate(parser.parse_object({"predictor": {"options": options}})).predictor
    expected = {"hidden": 9, "head": HeadOptions(hidden_norm="layer"), "matching": Matching(weight=2.0)}
    assert predictor.options == expected
    with pytest.raises(jsonargparse.ArgumentError, match="hiden"):
        parser.parse_object({"predictor": {"options": {"hiden": 9}}})
