"""BP(λ) at a boundary in time, against returns that look forward and the true gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import Chunks, LinearPredictor, PredictorTraining, SyntheticGradients, ThroughTime
from tests.recurrent_models import CHUNK, FEATURES, LENGTH, WIDTH, Recurrent, fit, make, sequences


def returns(module: Recurrent, batch: Any, predictor: LinearPredictor, decay: float, scale: float) -> list[Any]:
    """The targets of BP(λ) looking forward, by recursion over one graph of the whole sequence."""
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, LENGTH, CHUNK):
        out, state = module.unroll(x[:, start : start + CHUNK], state)
        losses.append(module.loss(out, y[:, start : start + CHUNK]) * len(x))
        ends.append(state)
    # The last state has nothing after it.
    target, found = None, []
    for number in range(len(ends) - 2, -1, -1):
        outputs, seeds = [losses[number + 1]], [torch.ones(())]
        if target is not None:
            own = predictor((ends[number + 1][0].detach(),), None)[0]
            outputs.append(ends[number + 1])
            seeds.append((scale * ((1 - decay) * own + decay * target)).detach().unsqueeze(0))
        (gradient,) = torch.autograd.grad(outputs, [ends[number]], seeds, retain_graph=True)
        target = gradient[0]
        found.append((ends[number][0].detach(), target))
    return found[::-1]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_trace_learns_what_the_returns_looking_forward_say(decay: float) -> None:
    """The sum over a sequence of all updates is that of the λ-returns, if neither network nor predictor change."""
    batch = sequences(1)[0]
    module = make("rnn", learning_rate=0.0)
    torch.manual_seed(3)
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    updates: list[Tensor] = []

    class Watched(LinearPredictor):
        def build(self, activations: Any, context: Any, loss: Any) -> None:
            super().build(activations, context, loss)
            with torch.no_grad():
                self.net[-1].weight.copy_(weight)
                self.net[-1].bias.copy_(bias)

        def forward(self, activations: Any, context: Any) -> Any:
            return (self.net(activations[0]),)

        def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
            predicted = self(activations, context)[0]
            error = ((predicted - targets[0]) ** 2).sum() / 2
            updates.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(error, self.net.parameters(), retain_graph=True)])
            )
            return ((predicted - targets[0]) ** 2).sum() / 2

    callback = SyntheticGradients(
        predictor=Watched(conditional=False),
        training=PredictorTraining(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), bound=1e9),
        through_time=ThroughTime(scale=0.7, trace_decay=decay),
        guard=None,
    )
    # The bound is zero before the first target: so that the second sequence has all of it.
    fit(module, Chunks([batch, batch], CHUNK), callback)
    updates = updates[len(updates) // 2 :]
    reference = Watched(conditional=False)
    reference.build((torch.zeros(1, WIDTH),), None, None)
    expected = torch.zeros_like(updates[0])
    for state, target in returns(make("rnn"), batch, reference, decay, 0.7):
        error = ((reference((state,), None)[0] - target) ** 2).sum() / 2
        expected += torch.cat([g.flatten() for g in torch.autograd.grad(error, reference.net.parameters())])
    torch.testing.assert_close(torch.stack(updates).sum(0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_with_a_full_trace_predictions_converge_to_the_true_gradient_of_a_linear_network() -> None:
    """No bias of bootstrapping: least squares from states to true gradients is what is learned."""

    class Linear(Recurrent):
        def __init__(self) -> None:
            super().__init__("rnn", lag=1, learning_rate=0.0)
            self.weights = nn.Linear(FEATURES + WIDTH, WIDTH, bias=False)
            nn.init.orthogonal_(self.weights.weight, 0.9)

        def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            state = x.new_zeros(len(x), WIDTH) if state is None else state
            outs = []
            for step in x.unbind(1):
                state = self.weights(torch.cat([step, state], dim=1))
                outs.append(self.out(state))
            return torch.stack(outs, dim=1), state

    torch.manual_seed(0)
    module = Linear()
    batch = sequences(1, lag=1, samples=40)[0]
    callback = SyntheticGradients(
        predictor=LinearPredictor(conditional=False, normalize="none"),
        training=PredictorTraining(
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995),
            bound=10.0,
        ),
        through_time=ThroughTime(scale=1.0, trace_decay=1.0),
    )
    chunk = 4
    fit(module, Chunks([batch] * 250, chunk), callback)
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, LENGTH, chunk):
        out, state = module.unroll(x[:, start : start + chunk], state)
        losses.append(module.loss(out, y[:, start : start + chunk]))
        ends.append(state)
    truths = []
    for number in range(len(ends) - 1):
        later = torch.stack(losses[number + 1 :]).sum()
        truths.append(torch.autograd.grad(later, ends[number], retain_graph=True)[0] * len(x))
    states = torch.cat([end.detach() for end in ends[:-1]])
    truth = torch.cat(truths)
    best = torch.linalg.lstsq(torch.cat([states, torch.ones(len(states), 1)], dim=1), truth).solution
    fitted = torch.cat([states, torch.ones(len(states), 1)], dim=1) @ best
    learned = callback.session.times.trainers["memory"].predictor((states,), None)[0]
    assert float((learned - fitted).norm() / fitted.norm()) < 0.1
