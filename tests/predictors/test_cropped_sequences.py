"""Sequences of which a loss leaves positions out, as causal language models do: heads serve positions all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    AutoPredictor,
    FeedbackAlignment,
    HeadOptions,
    LocalLoss,
    LossModelPredictor,
    PredictorTraining,
    SyntheticGradients,
)
from lightning_sg.batch.program import Operation, Value
from lightning_sg.partition import Trace
from lightning_sg.partition.crops import crop_of
from lightning_sg.predictors.base import GradientPredictor
from lightning_sg.predictors.positions import Crop
from tests.models import make_trainer
from tests.traced import traced

SAMPLES, LENGTH, WIDTH, CLASSES = 4, 9, 8, 11

Step = Callable[[Any, Tensor, Tensor], Tensor]


class Language(pl.LightningModule):
    """Embeds tokens, mixes each with those before it, and compares with later ones as ``step`` says."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.second(torch.cumsum(torch.tanh(self.first(self.embedding(tokens))), dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self, batch["tokens"], batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def shifted_logits(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x))[:, :-1], y[:, 1:])


def shifted_in_all_dimensions(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(m.hidden(x))
    return entropy(logits[..., :-1, :].contiguous(), y[..., 1:].contiguous(), ignore_index=-100)


def shifted_before_the_last_layer(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x)[:, :-1]), y[:, 1:], label_smoothing=0.1)


def narrowed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(m.hidden(x)).narrow(1, 0, x.shape[1] - 1)
    return entropy(logits, y[:, 1:])


def transposed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(m.hidden(x)).transpose(1, 2)[:, :, :-1], y[:, 1:])


def up_to_a_size(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x))[:, : x.shape[1] - 1], y[:, 1:])


def from_the_mean(m: Any, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(m.head(m.hidden(x))[:, :-1].transpose(1, 2), y[:, 1:], reduction="none")
    return losses.sum() / losses.numel()


def weighted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(m.head(m.hidden(x))[:, :-1].transpose(1, 2), y[:, 1:], reduction="none")
    counted = (y[:, 1:] > 2).float()
    return (losses * counted).sum() / counted.sum()


#: How a causal language model leaves the last position out: the labels are the tokens after.
SHIFTS: list[Step] = [
    shifted_logits,
    shifted_in_all_dimensions,
    shifted_before_the_last_layer,
    narrowed,
    transposed,
    up_to_a_size,
    from_the_mean,
    weighted,
]


def without_a_prefix(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x))[:, 3:], y[:, 3:])


def without_a_class_token(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x)[:, 1:]), y[:, 1:])


def the_answer_alone(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(m.head(m.hidden(x))[:, -4:-1], y[:, -3:])


def the_second_part(m: Any, x: Tensor, y: Tensor) -> Tensor:
    _prompt, answer = m.head(m.hidden(x)).split([4, x.shape[1] - 4], dim=1)
    return entropy(answer, y[:, 4:])


#: Other parts, with the positions that they keep of nine.
PARTS: list[tuple[Step, range]] = [
    (without_a_prefix, range(3, 9)),
    (without_a_class_token, range(1, 9)),
    (the_answer_alone, range(5, 8)),
    (the_second_part, range(4, 9)),
]
ALL = [*[(step, range(8)) for step in SHIFTS], *PARTS]


def batch_of(samples: int = SAMPLES, length: int = LENGTH) -> dict[str, Tensor]:
    tokens = torch.randint(0, CLASSES, (samples, length))
    return {"tokens": tokens, "labels": tokens.clone()}


def built(step: Step, predictor: GradientPredictor) -> tuple[GradientPredictor, Trace, dict[str, Tensor]]:
    """A predictor for activations ``(N, T, D)``, whose head says something."""
    batch = batch_of()
    trace = traced(Language(step), batch, ["first"])
    assert trace.inputs.context is not None
    predictor.build((torch.randn(SAMPLES, LENGTH, WIDTH),), trace.inputs.context.of(batch), trace.inputs.loss)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    return predictor, trace, batch


@pytest.mark.parametrize(("step", "kept"), ALL, ids=[step.__name__ for step, _ in ALL])
def test_the_head_is_for_positions(step: Step, kept: range) -> None:
    predictor, _trace, _batch = built(step, AutoPredictor())
    assert isinstance(predictor, AutoPredictor)
    assert "for a sequence with a label for each position" in predictor.choice
    assert f", {CLASSES} classes" in predictor.choice or f", {CLASSES} outputs" in predictor.choice


@pytest.mark.parametrize(("step", "kept"), ALL, ids=[step.__name__ for step, _ in ALL])
@pytest.mark.parametrize(("samples", "length"), [(SAMPLES, LENGTH), (3, LENGTH), (SAMPLES, 12)])
def test_the_prediction_is_the_gradient_of_the_loss_at_the_positions_that_count(
    step: Step, kept: range, samples: int, length: int
) -> None:
    plain = LossModelPredictor(16, objective="loss", head=HeadOptions(hidden_norm="none"))
    predictor, trace, _batch = built(step, plain)
    assert isinstance(predictor, LossModelPredictor)
    batch = batch_of(samples, length)
    activation = torch.randn(samples, length, WIDTH)
    assert trace.inputs.context is not None
    (found,) = predictor((activation,), trace.inputs.context.of(batch))

    class AsHead:
        """The model with the head in the place of all its layers."""

        @staticmethod
        def hidden(tokens: Tensor) -> Tensor:
            return leaf

        @staticmethod
        def head(rows: Tensor) -> Tensor:
            head = predictor.heads[0]
            return head.net(head.view.scale(rows))

    leaf = activation.clone().requires_grad_()
    expected = torch.autograd.grad(step(AsHead, batch["tokens"], batch["labels"]), leaf)[0]
    cut = length != LENGTH and step in (without_a_prefix, without_a_class_token, the_second_part, the_answer_alone)
    assert cut or expected[:, [*kept]].abs().sum() > 0
    torch.testing.assert_close(found, expected * samples)


@pytest.mark.parametrize("step", SHIFTS, ids=[step.__name__ for step in SHIFTS])
def test_a_local_loss_takes_them_too(step: Step) -> None:
    predictor, trace, batch = built(step, LocalLoss(16))
    assert trace.inputs.context is not None
    (found,) = predictor((torch.randn(SAMPLES, LENGTH, WIDTH),), trace.inputs.context.of(batch))
    assert found[:, :-1].abs().sum() > 0
    assert found[:, -1].abs().sum() == 0


@pytest.mark.parametrize("step", SHIFTS, ids=[step.__name__ for step in SHIFTS])
def test_feedback_alignment_takes_them_too(step: Step) -> None:
    predictor, trace, batch = built(step, FeedbackAlignment(normalize="none"))
    assert trace.inputs.context is not None
    (found,) = predictor((torch.randn(SAMPLES, LENGTH, WIDTH),), trace.inputs.context.of(batch))
    assert found[:, :-1].abs().sum() > 0
    assert found[:, -1].abs().sum() == 0


def test_a_model_with_shifted_labels_trains_as_one_whose_data_are_shifted() -> None:
    """Except for what the last position would have learned, which no loss sees."""

    def shifted_by_the_data(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return entropy(m.head(m.hidden(x[:, :-1])), y[:, 1:])

    batches = [batch_of() for _ in range(12)]
    ends = []
    for step in (shifted_logits, shifted_by_the_data):
        pl.seed_everything(3, verbose=False)
        model = Language(step)
        # The bound is on all positions together, so what is left out lowers it.
        unbound, small = PredictorTraining(bound=1e9), AutoPredictor(options={"hidden": 16})
        callback = SyntheticGradients(boundaries=["first"], predictor=small, training=unbound)
        make_trainer(callbacks=[callback], max_epochs=1).fit(model, DataLoader(batches, batch_size=None))
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_what_keeps_no_range_of_positions_is_no_crop() -> None:
    def every_second(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return entropy(m.head(m.hidden(x))[:, ::2], y[:, ::2])

    def chosen(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return entropy(m.head(m.hidden(x))[:, [1, 3]], y[:, [1, 3]])

    def whole(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return entropy(m.head(m.hidden(x)), y)

    for step in (every_second, chosen, whole):
        trace = traced(Language(step), batch_of(), ["first"])
        assert trace.inputs.loss is not None
        assert trace.inputs.loss.crop is None


def part_of(whole: Value, index: Any, shape: tuple[int, ...]) -> Value:
    return Value(Operation(network=True, function=Tensor.__getitem__, args=(whole, index), shapes=(shape,)))


def test_a_crop_is_that_of_the_last_operation_that_made_the_sequence_as_short() -> None:
    whole = Value(Operation(network=True, shapes=((2, 9, 5),)))
    shorter = part_of(whole, (slice(None), slice(2, None)), (2, 7, 5))
    shortest = part_of(shorter, (..., slice(-1), slice(None)), (2, 6, 5))
    assert crop_of(shortest, 2) == Crop(7, 6, None, -1)
    assert crop_of(shorter, 2) == Crop(9, 7, 2, None)
    assert crop_of(whole, 2) is None
    assert crop_of(shortest, 0) is None
