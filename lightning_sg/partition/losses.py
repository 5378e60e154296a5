"""Recognises the model's own loss in a call of a torch function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from lightning_sg.batch.program import Operation, Value
from lightning_sg.predictors.base import LossInfo

_KINDS: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "cross_entropy",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.huber_loss: "huber",
    F.l1_loss: "l1",
    F.mse_loss: "mse",
    F.smooth_l1_loss: "smooth_l1",
}


def loss_of_call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossInfo | None:
    """Describes the loss that a call computes.

    Args:
        func: The torch function that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The loss, or ``None`` if ``func`` is not a loss that predictors know.
    """
    kind = _KINDS.get(func)
    if kind is None:
        return None
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    return _info(kind, tuple(given["input"].shape), given)


def _info(kind: str, output: tuple[int, ...], given: Mapping[str, Any]) -> LossInfo:
    dimensions = len(output)
    classes = output[1 if dimensions > 1 else -1] if kind == "cross_entropy" else None
    outputs = classes or (output[-1] if dimensions > 1 else 1)
    return LossInfo(
        kind,
        int(outputs),
        ignore_index=int(given.get("ignore_index", -100)),
        label_smoothing=float(given.get("label_smoothing", 0.0)),
        beta=float(given.get("beta", given.get("delta", 1.0))),
    )


@dataclass(frozen=True)
class SeenCall:
    """A loss that predictors know, as a traced step computed it.

    Attributes:
        info: The loss.
        output: The network's output.
        goal: What it compares that with; it depends on the batch alone.
        words: Its name.
    """

    info: LossInfo
    output: Value
    goal: Value
    words: str


# Between the loss of a step and the function that computes it, these leave the direction of the gradient alone.
_SCALING = frozenset(
    ["mul", "rmul", "div", "truediv", "mean", "sum", "clone", "to", "float", "double", "squeeze", "get", "view_as"]
)
_SUMS = frozenset(["add", "radd", "sub"])


def call_of(loss: Value) -> SeenCall | None:
    """The function of torch, or the formula written by hand, that alone makes up a loss.

    Args:
        loss: The loss of a traced step, or a term of it.

    Returns:
        The call; ``None`` if the loss is anything but a known one times a constant: a sum of several, one with masks or
        weights from the batch, or one that is not known.
    """
    value = loss
    while isinstance(value.node, Operation):
        node = value.node
        found = _torch_call(node) or _formula(node)
        if found is not None:
            return found
        inputs = [each for each in node.inputs if not each.is_size]
        network = [each for each in inputs if each.node.network]
        alone = len(network) == 1 and all(each is network[0] or not each.node.batch for each in inputs)
        if not alone or node.name not in _SCALING | _SUMS or (node.name == "sub" and node.args[0] != network[0]):
            return None
        value = network[0]
    return None


def _torch_call(node: Operation) -> SeenCall | None:
    kind = _KINDS.get(node.function)
    if kind is None:
        return None
    given = inspect.signature(node.function).bind(*node.args, **node.kwargs).arguments
    output, goal = given["input"], given["target"]
    if kind in _SYMMETRIC and not output.node.network:
        output, goal = goal, output
    weighted = any(isinstance(given.get(name), Value) and given[name].node.batch for name in ("weight", "pos_weight"))
    if weighted or not output.node.network or goal.node.network or not goal.node.batch:
        return None
    plain = {name: each for name, each in given.items() if not isinstance(each, Value)}
    return SeenCall(_info(kind, output.shape, plain), output, goal, node.name)


def _formula(node: Operation) -> SeenCall | None:
    """A squared or absolute difference."""
    squared = (
        (node.name == "pow" and len(node.args) == 2 and node.args[1] == 2)
        or node.name == "square"
        or (node.name == "mul" and len(node.args) == 2 and node.args[0] == node.args[1])
    )
    if not (squared or node.name == "abs") or not node.args or not isinstance(node.args[0], Value):
        return None
    difference = node.args[0].node
    if not isinstance(difference, Operation) or difference.name not in ("sub", "rsub") or len(difference.args) != 2:
        return None
    values = [each for each in difference.args if isinstance(each, Value)]
    output = [each for each in values if each.node.network]
    goal = [each for each in values if each.node.batch and not each.node.network]
    if len(output) != 1 or len(goal) != 1:
        return None
    kind = "mse" if squared else "l1"
    return SeenCall(
        _info(kind, output[0].shape, {}), output[0], goal[0], "squared error" if squared else "absolute error"
    )


_SYMMETRIC = ("mse", "l1", "smooth_l1", "huber")


__all__ = ["SeenCall", "call_of", "loss_of_call"]
