"""The gradients of a head's layers in closed form: what autograd finds, in fewer operations.

A head is so small that a step takes as long as its operations are many. Autograd and views double their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_sg.predictors.layers import RowBatchNorm

#: From the outputs of some layers ``(rows, K)`` to a scalar loss and its gradient with respect to them.
LossOfOutputs = Callable[[Tensor], tuple[Tensor, Tensor]]
# Takes the gradient with respect to a layer's output, and whether those of its parameters are wanted.
_Backward = Callable[[Tensor, bool], Tensor]


class ClosedForm:
    """Linear layers with ReLU and BatchNorm between them, forward and backward without a graph.

    Args:
        layers: The layers; see :meth:`fits`.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)

    @staticmethod
    def fits(layers: Iterable[nn.Module], like: Tensor) -> bool:
        """Whether these layers can be run like this on rows made of ``like``, which has at least as many as samples."""
        as_they_are = like.dtype == torch.float32 and not torch.is_autocast_enabled(like.device.type)
        return len(like) > 1 and as_they_are and all(map(_is_plain, layers))

    def run(self, rows: Tensor, loss: LossOfOutputs, *, learns: bool) -> tuple[Tensor, Tensor]:
        """Finds the gradient of the loss with respect to ``rows``.

        Args:
            rows: The input of the first layer, ``(rows, D)``.
            loss: The loss of the last layer's outputs.
            learns: Whether to put the gradients of the parameters into them as well.

        Returns:
            The loss and the gradient, of the shape of ``rows``.
        """
        ways_back: list[_Backward] = []
        with torch.no_grad():
            hidden = rows
            for layer in self._layers:
                hidden, way_back = _FORWARD[type(layer)](layer, hidden)
                ways_back.append(way_back)
            value, gradient = loss(hidden)
            for way_back in reversed(ways_back):
                gradient = way_back(gradient, learns)
        return value, gradient


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is RowBatchNorm:
        return layer.training and layer.counted is None and layer.affine and layer.track_running_stats
    return type(layer) in _FORWARD


def _linear(layer: nn.Module, rows: Tensor) -> tuple[Tensor, _Backward]:
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight, layer.bias

    def backward(gradient: Tensor, learns: bool) -> Tensor:
        if learns:
            weight.grad = gradient.t() @ rows
            if bias is not None:
                bias.grad = gradient.sum(0)
        return gradient @ weight

    return nn.functional.linear(rows, weight, bias), backward


def _relu(_layer: nn.Module, rows: Tensor) -> tuple[Tensor, _Backward]:
    output = rows.relu()

    def backward(gradient: Tensor, _learns: bool) -> Tensor:
        inputs: Tensor = torch.ops.aten.threshold_backward(gradient, output, 0)
        return inputs

    return output, backward


def _batch_norm(layer: nn.Module, rows: Tensor) -> tuple[Tensor, _Backward]:
    assert isinstance(layer, RowBatchNorm)
    momentum, eps, weight, bias = layer.momentum, layer.eps, layer.weight, layer.bias
    assert momentum is not None
    mean, variance = layer.running_mean, layer.running_var
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    output, own_mean, own_scale = torch.native_batch_norm(rows, weight, bias, mean, variance, True, momentum, eps)

    def backward(gradient: Tensor, learns: bool) -> Tensor:
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, rows, weight, mean, variance, own_mean, own_scale, True, eps, [True, learns, learns]
        )
        if learns:
            weight.grad, bias.grad = found[1], found[2]
        inputs: Tensor = found[0]
        return inputs

    return output, backward


# The operations are those that autograd itself calls. Their formulas are fixed by their outputs, which a test compares
# with autograd's.
_FORWARD: dict[type[nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, _Backward]]] = {
    nn.Linear: _linear,
    nn.ReLU: _relu,
    RowBatchNorm: _batch_norm,
}

__all__ = ["ClosedForm", "LossOfOutputs"]
