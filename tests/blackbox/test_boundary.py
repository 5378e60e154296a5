"""What users see of a scored boundary: what it passes on, what it refuses, and when it does nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    Bernoulli,
    BlackBox,
    Boundary,
    BoundaryError,
    Categorical,
    ControlVariate,
    Critic,
    Evolution,
    GumbelSoftmax,
    NonFiniteLossError,
    ScoreFunction,
    StraightThrough,
    SyntheticGradients,
    SyntheticGradientsError,
)
from tests.blackbox.models import CONTROLS, INPUTS, Controller, loader
from tests.models import make_trainer


class Free(pl.LightningModule):
    """A linear policy before a boundary; what the step does with it is the test's."""

    def __init__(self, plant: nn.Module, step: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.policy = nn.Linear(INPUTS, CONTROLS)
        self.decoder = nn.Linear(CONTROLS, INPUTS)
        self.plant: Any = plant
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(plant: nn.Module, step: Callable[[Any, Tensor], Any], steps: int = 2, **settings: Any) -> Free:
    module = Free(plant, step)
    make_trainer(max_steps=steps, callbacks=[SyntheticGradients(**settings)]).fit(module, loader())
    return module


def cost(x: Tensor) -> Tensor:
    return x.detach().square().flatten(1).mean(1)


# ---------------------------------------------------------------------- what goes on


def test_in_evaluation_the_activation_goes_on_as_it_is() -> None:
    plant, h = BlackBox(noise=9.0).eval(), torch.ones(2, 3)
    assert plant(h) is h
    value, goal = plant(h, torch.zeros(2))
    assert value is h
    assert goal.shape == (2,)
    assert float(plant.loss([1.0, 3.0])) == 2.0


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_explored_in_training_mode_either(guard: Any) -> None:
    with guard():
        assert BlackBox(noise=9.0)(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2


def test_hard_values_are_modes_or_samples_in_evaluation() -> None:
    logits = torch.tensor([[0.1, -0.1]]).expand(200, 2)
    assert Bernoulli().eval()(logits).tolist() == [[1.0, 0.0]] * 200
    assert Categorical().eval()(logits).tolist() == [[1.0, 0.0]] * 200
    sampled = Bernoulli(in_evaluation="sample").eval()(logits)
    assert 50 < int(sampled[:, 1].sum()) < 150


def test_in_training_values_are_explored_repeated_and_detached() -> None:
    seen = []

    def step(module: Any, x: Tensor) -> Tensor:
        h = module.policy(x)
        u, side = module.plant(h, x)
        seen.append((h.detach(), u, side, x))
        return module.plant.loss(cost(u))

    train(BlackBox(noise=[0.0, 0.1, 1.0], estimator=Evolution(), evaluations=4), step)
    h, u, side, x = seen[0]
    assert (u.shape, u.requires_grad) == ((64, CONTROLS), False)
    assert torch.equal(side, x.repeat(4, 1))
    moved = u - h.repeat(4, 1)
    assert torch.equal(moved[:, 0], torch.zeros(64))
    assert 0.05 < float(moved[:, 1].std()) < 0.2 < 0.5 < float(moved[:, 2].std()) < 2
    assert not torch.equal(seen[0][1] - h.repeat(4, 1), seen[1][1] - seen[1][0].repeat(4, 1))


def test_a_copy_of_a_model_in_training_has_nobody_to_score_it() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        module.copied = copy.deepcopy(module.plant)
        return module.plant.loss(cost(module.plant(module.policy(x))))

    module = train(BlackBox(), step, steps=1)
    with pytest.raises(BoundaryError, match="SyntheticGradients"):
        module.copied(torch.ones(2, 3, requires_grad=True))


def test_it_has_no_state_and_no_submodules() -> None:
    plant = BlackBox(estimator=ControlVariate())
    assert not plant.state_dict()
    assert list(plant.modules()) == [plant]
    assert "ControlVariate" in repr(plant)


# ---------------------------------------------------------------------- what is refused in the settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlackBox(noise=0, estimator=ScoreFunction()), "noise above 0"),
        (lambda: BlackBox(noise=0, estimator=ControlVariate()), "noise above 0"),
        (lambda: BlackBox(noise=0, estimator=Evolution(), evaluations=2), "noise above 0"),
        (lambda: BlackBox(estimator=Evolution(), evaluations=3), "even number"),
        (lambda: BlackBox(evaluations=0), "evaluations"),
        (lambda: Bernoulli(in_evaluation="never"), "in_evaluation"),  # type: ignore[arg-type]
        (lambda: GumbelSoftmax(temperature=0), "temperature"),
        (lambda: ControlVariate(objective="luck"), "objective"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_go_together_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_class_in_the_place_of_an_estimator_is_refused() -> None:
    with pytest.raises(TypeError, match="estimator"):
        BlackBox(estimator=Critic)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [torch.ones(3, dtype=torch.long), torch.ones(()), "text"])
def test_only_floating_point_tensors_with_samples_cross(given: Any) -> None:
    with pytest.raises(BoundaryError, match="floating-point tensor with the samples first"):
        BlackBox()(given)


# ---------------------------------------------------------------------- what is refused in training


def test_training_without_the_callback_says_what_is_missing() -> None:
    module = Controller()
    with pytest.raises(BoundaryError, match=r"callbacks=\[SyntheticGradients\(\)\]"):
        make_trainer().fit(module, loader())


def test_a_loss_that_was_never_called_is_an_error() -> None:
    with pytest.raises(BoundaryError, match=r"'plant'.*its `loss` was not called.*plant\.loss\(cost\)"):
        train(BlackBox(), lambda module, x: module.plant(module.policy(x)).sum() + module.policy(x).sum())


def test_a_loss_that_was_never_called_is_an_error_with_a_backward_pass_by_hand() -> None:
    def step(module: Any, x: Tensor) -> None:
        module.plant(module.policy(x))
        module.policy(x).sum().backward()

    module = Free(BlackBox(), step)
    module.automatic_optimization = False
    with pytest.raises(BoundaryError, match="its `loss` was not called"):
        make_trainer(callbacks=[SyntheticGradients()]).fit(module, loader())


def test_a_loss_of_nothing_is_an_error() -> None:
    with pytest.raises(BoundaryError, match="nothing has crossed"):
        train(BlackBox(), lambda module, x: module.plant.loss(cost(module.policy(x))))


@pytest.mark.parametrize(
    ("reduce", "words"),
    [
        (lambda c: c.mean(), "reduction='none'"),
        (lambda c: c[:5], "one cost for each of the 16 rows"),
        (lambda c: c.unsqueeze(1).expand(16, 7), r"Reduce it to shape \(16,\)"),
        (lambda c: c.unsqueeze(0), "one cost for each of the 16 rows"),
        (lambda c: "cheap", "takes a tensor"),
    ],
)
def test_a_score_that_is_not_one_for_each_sample_is_an_error(reduce: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(BoundaryError, match=words):
        train(BlackBox(), lambda module, x: module.plant.loss(reduce(cost(module.plant(module.policy(x))))))


def test_a_score_whose_gradient_goes_around_the_boundary_is_an_error() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        h = module.policy(x)
        return module.plant.loss(cost(module.plant(h)) + h.square().mean(1))

    with pytest.raises(BoundaryError, match=r"would count twice.*plant\.loss\(score\) \+ part\.mean\(\)"):
        train(BlackBox(), step)


def test_a_parameter_that_is_the_activation_is_found_in_a_score_too() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        return module.plant.loss(cost(module.plant(module.policy.weight)) + module.policy.weight.mean(1))

    with pytest.raises(BoundaryError, match="would count twice"):
        train(BlackBox(), step)


def test_automatic_boundaries_are_refused_by_name() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"boundaries='auto'.*'plant' \(BlackBox\)"):
        make_trainer(callbacks=[SyntheticGradients(boundaries="auto")]).fit(Controller(), loader())


def test_scores_that_are_not_finite_are_an_error_or_left_out() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        scores = cost(module.plant(module.policy(x)))
        scores[3] = torch.nan
        return module.plant.loss(scores)

    with pytest.raises(NonFiniteLossError, match=r"1 of 16 scores of 'plant'.*training batch 0.*'skip'"):
        train(BlackBox(), step)
    module = train(BlackBox(), step, on_non_finite="skip")
    assert torch.isfinite(module.policy.weight).all()


def test_a_batch_without_any_finite_score_teaches_nothing() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        scores = cost(module.plant(module.policy(x)))
        loss: Tensor = module.plant.loss(scores / 0 if module.global_step % 2 else scores)
        assert torch.isfinite(loss)
        return loss

    module = train(BlackBox(replay=0), step, steps=4, on_non_finite="skip")
    assert torch.isfinite(module.policy.weight).all()


@pytest.mark.parametrize("estimator", [StraightThrough(), GumbelSoftmax()])
def test_estimators_that_pass_gradients_need_a_differentiable_cost(estimator: Any) -> None:
    with pytest.raises(BoundaryError, match="differentiable by what the boundary returned"):
        train(Bernoulli(estimator), lambda module, x: module.plant.loss(cost(module.plant(module.policy(x)))))


def test_several_evaluations_are_scored_call_by_call() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        u = module.plant(module.policy(x))
        return module.plant.loss(cost(module.plant(module.policy(x))) + cost(u))

    with pytest.raises(BoundaryError, match="evaluations=2"):
        train(BlackBox(evaluations=2), step)
    train(BlackBox(), step)


def test_a_context_without_the_samples_first_is_an_error() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        return module.plant.loss(cost(module.plant(module.policy(x), context=x[:3])))

    with pytest.raises(SyntheticGradientsError, match="has not 16 samples first"):
        train(BlackBox(), step)


def test_a_change_of_shape_says_what_may_change() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        u = module.plant(module.policy(x)[:, : CONTROLS - module.global_step], context=x)
        return module.plant.loss(cost(u))

    with pytest.raises(SyntheticGradientsError, match=r"Critic at 'plant'.*only the number of samples may change"):
        train(BlackBox(replay=0), step)


def test_an_activation_that_is_cut_off_from_its_stage_is_said_once() -> None:
    def step(module: Any, x: Tensor) -> Tensor:
        u = module.plant(module.policy(x).detach())
        return module.plant.loss((module.decoder(u) - x).square().mean(1))

    with pytest.warns(UserWarning, match="'plant' is given an activation that no gradient flows back from") as caught:
        train(BlackBox(), step)
    assert len([each for each in caught if "no gradient flows back" in str(each.message)]) == 1


def test_a_boundary_between_a_black_box_and_its_scores_is_refused() -> None:
    class Longer(Controller):
        def __init__(self) -> None:
            super().__init__()
            self.cut = Boundary()
            self.after = nn.Linear(CONTROLS, CONTROLS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            u = self.after(self.cut(self.plant(self.policy(batch[0]))))
            return self.plant.loss((u.sum(1) - batch[1]) ** 2)

    with pytest.raises(BoundaryError, match="goes around boundary 'cut': 'plant'"):
        make_trainer(callbacks=[SyntheticGradients()], max_steps=2).fit(Longer(), loader())
