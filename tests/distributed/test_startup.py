"""The start of a split run: the stages are announced, and all processes begin with the same weights."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from tests.blocks import plain
from tests.models import loader, make_trainer
from tests.ranks import run_ranks
from tests.two_stages import Two


def test_the_stages_with_their_parameters_are_told_once() -> None:
    def work() -> list[str]:
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        make_trainer(strategy="synthetic_gradients", devices=2).fit(plain(), loader(), loader(shuffle=False))
        return [text for text in told if text.startswith("The stages")]

    parts = [sum(parameter.numel() for parameter in part.parameters()) for part in plain().parts]
    assert run_ranks(2, work) == [
        [
            "The stages on 2 processes:\n"
            f"stage 0 (rank 1): from the start up to 'cuts.0', {parts[0]:,} parameters\n"
            f"stages 1-2 (rank 0): after 'cuts.0' to the loss, {parts[1] + parts[2]:,} parameters"
        ],
        [],
    ]


class Projected(Two):
    """Both stages use a fixed random projection, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.cut(torch.relu(self.first(x)) @ self.projection) @ self.projection))


def test_a_random_buffer_that_both_stages_use_is_one() -> None:
    def work() -> tuple[Tensor, Tensor]:
        torch.manual_seed(100 + int(os.environ["RANK"]))  # as if the user set no seed
        module = Projected()
        make_trainer(strategy="synthetic_gradients", devices=2).fit(module, loader())
        return module.projection, module.first.weight

    (one, first), (other, same) = run_ranks(2, work)
    assert torch.equal(one, other)
    assert torch.equal(first, same)
