"""Graphs that are kept over optimizer steps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.crossings.kept_graph import keeping_weights


class Mark(torch.autograd.Function):
    """Identity with something in its graph whose end can be seen."""

    @staticmethod
    def forward(ctx: Any, token: Any, x: Tensor) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


def test_kept_graphs_are_let_go() -> None:
    class Token:
        pass

    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    token = Token()
    watched = weakref.ref(token)
    with keeping_weights(module):
        output = module(Mark.apply(token, torch.randn(2, 4, requires_grad=True)))
    del token
    output.sum().backward(retain_graph=True)
    assert watched() is not None
    del output
    gc.collect()
    assert watched() is None
