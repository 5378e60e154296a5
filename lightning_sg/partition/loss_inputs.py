"""Finds what the loss of a traced step compares the network with, and how to repeat it.

From the loss it goes back along the operations up to the last outputs of the network: results of layers, such as
``linear``, which can have any value. What else enters on this way depends on the batch alone: labels, goals, masks and
weights. It is the context of the predictors. If one function that predictors know does all the work, such as
``mse_loss``, a head for that loss serves; otherwise the operations themselves are the head's loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from lightning_sg.batch.program import Constant, FromModule, Operation, Program, Value, size_of
from lightning_sg.batch.seen import SeenContext
from lightning_sg.partition.affine import is_affine, is_layer, only_reshapes
from lightning_sg.partition.crops import crop_of
from lightning_sg.partition.losses import SeenCall, call_of
from lightning_sg.partition.recorder import Recorder
from lightning_sg.partition.repeatable import NotFoundError, Rows, check_repeatable
from lightning_sg.predictors.base import LossInfo
from lightning_sg.predictors.replayed import ReplayedLoss

# Parameters that a loss uses by themselves, such as a dispersion for each gene, are learned again by the head up to
# this number of elements.
_MOST_PARAMETERS = 2**16


@dataclass(frozen=True)
class LossInputs:
    """What was found.

    Attributes:
        context: Takes the context from a batch; ``None`` if nothing was found.
        loss: The loss of the predictors' heads, or ``None``.
        reason: Why nothing was found, or ``""``.
    """

    context: SeenContext | None = None
    loss: LossInfo | None = None
    reason: str = ""

    @property
    def buffers(self) -> set[str]:
        """The names of the buffers that context and loss are computed from: every predictor needs them."""
        replay = None if self.loss is None else self.loss.replay
        of_loss = [] if replay is None else replay.program.buffers
        return {*of_loss, *(self.context.buffers if self.context is not None else ())}


def inputs_of_loss(recorder: Recorder, seen: LossInfo | None, rows: Rows, cut_short: str | None = None) -> LossInputs:
    """Finds what the loss of a recorded step compares the network with.

    Args:
        recorder: Has seen the step.
        seen: The first loss of the last stage that predictors know, if there was one.
        rows: How many rows its tensors have.
        cut_short: Why the step could not be followed to its end, if so.
    """
    try:
        if recorder.loss is None:
            return _of_calls(recorder, cut_short)
        loss = _without_penalties(recorder.loss)
        way, call = _Way(loss), call_of(loss)
        if call is None or _only_counts(call.goal):
            return _steady(_replayed(way, rows), recorder)
        if set(way.tensors) != {call.goal}:
            with suppress(NotFoundError):  # a mask, or an input of the model that is added to its output
                return _steady(_replayed(way, rows), recorder)
        found = _steady(_of_call(call, rows), recorder)
        replayed = replace(found, loss=_with_replay(found, way, _plainest(call.goal), rows))
        return replayed if not replayed.buffers & recorder.changed else found
    except NotFoundError as error:
        return LossInputs(loss=seen, reason=str(error))


def _steady(found: LossInputs, recorder: Recorder) -> LossInputs:
    changed = sorted(found.buffers & recorder.changed)
    if changed:
        raise NotFoundError(f"the loss uses buffer '{changed[0]}', which a step changes")
    return found


def _of_calls(recorder: Recorder, cut_short: str | None) -> LossInputs:
    """From a step that could not be followed to its end: the last loss in it that predictors know."""
    for operation in reversed(recorder.calls):
        call = call_of(Value(operation))
        if call is not None:
            return _of_call(call, Rows(0))
    because = f", because of {cut_short}" if cut_short else ", or returns none that carries a gradient"
    raise NotFoundError(f"the step could not be followed to its loss{because}")


def _of_call(call: SeenCall, rows: Rows) -> LossInputs:
    goal = _plainest(call.goal)
    if goal.node.obstacle:
        raise NotFoundError(
            f"what {call.words} compares the network with cannot be found in the batch: {goal.node.obstacle}"
        )
    context = SeenContext([goal], f"the model's {call.words}")
    check_repeatable([goal], rows)
    crop = crop_of(call.output, goal.shape[0]) if len(goal.shape) > 1 else None
    return LossInputs(context, replace(call.info, crop=crop))


def _with_replay(found: LossInputs, way: _Way, goal: Value, rows: Rows) -> LossInfo | None:
    """The loss as predictors know it, with the operations for activations that its head does not fit."""
    try:
        replay = _replay(way, [goal], found.context.names if found.context else (), rows)
    except NotFoundError:
        return found.loss
    return replace(found.loss, replay=replay) if found.loss is not None else None


def _replayed(way: _Way, rows: Rows) -> LossInputs:
    if not way.tensors:
        reason = way.obstacle or way.taught or rows.apart
        if reason:
            raise NotFoundError(reason)
    for value in way.entries:
        if value.node.obstacle:
            raise NotFoundError(f"the loss uses something that cannot be found in the batch: {value.node.obstacle}")
    known = _sizes_known(way, way.tensors)
    entries = [entry for entry in way.entries if entry not in known]
    context = SeenContext(entries, f"the model's {way.words}")
    replay = _replay(way, entries, context.names, rows)
    return LossInputs(context, LossInfo("replayed", sum(map(math.prod, replay.shapes)), replay=replay))


def _replay(way: _Way, entries: list[Value], names: tuple[str, ...], rows: Rows) -> ReplayedLoss:
    program = Program([way.loss], [*way.outputs, *entries, *way.parameters], _sizes_known(way, entries))
    if program.paths:
        raise NotFoundError(f"the loss also uses {program.paths[0]}")
    copies = tuple(node.tensor.detach().clone() for node in _modules(way.parameters) if node.tensor is not None)
    shapes = tuple(value.shape for value in way.outputs)
    crops = tuple(crop_of(value, rows.crossing) for value in way.outputs)
    alone = all(entry.is_size for entry in entries)
    replay = ReplayedLoss(program, shapes, names, copies, f"the model's {way.words}", crops, alone)
    check_repeatable(entries, rows, replay)
    return replay


def _sizes_known(way: _Way, entries: list[Value]) -> dict[Value, Value]:
    """For sizes that enter, the same size of an output or of an entry, if there is one.

    What the code asked the network for is found in what it computes from the outputs, if it is there. Otherwise the
    same number decides, which may be that of something else.
    """
    known = {}
    tensors = [value for value in (*way.outputs, *entries) if not value.is_size]
    for size in (*way.entries, *way.constants):
        if not isinstance(size.node, Operation) or size.node.function is not Tensor.size:
            continue
        asked = size.node.asked
        if asked is not None and isinstance(asked.node, Operation) and asked.node.args[0] in way.after:
            known[size] = asked
            continue
        leaf, place = size.node.args
        wanted = leaf.shape[place]
        found = [(tensor, other) for tensor in tensors for other, same in enumerate(tensor.shape) if same == wanted > 1]
        if asked is None:  # of this very tensor of the batch: only its own kind of size will do
            found = [each for each in found if each[0] == leaf or each[1] == place]
        found.sort(key=lambda each: (each[0] != leaf, each[1] != place))
        if found:
            known[size] = size_of(*found[0])
    return known


def _is_constant(value: Value) -> bool:
    """Whether a value is a size that the step asked the network for, and that no tensor of the batch has."""
    node = value.node
    return isinstance(node, Operation) and node.function is Tensor.size and isinstance(node.args[0].node, Constant)


class _Way:
    """The way from the network's last outputs to the loss.

    Attributes:
        loss: The loss.
        outputs: The outputs, in the order in which they are met.
        entries: What depends on the batch alone and enters.
        constants: Sizes that enter and are those of no tensor of the batch.
        parameters: Single parameters that enter.
        obstacle: What was in the way of finding more.
        words: The loss in words.
    """

    def __init__(self, loss: Value) -> None:
        self.loss = loss
        self.outputs: list[Value] = []
        self.entries: list[Value] = []
        self.constants: list[Value] = []
        self.parameters: list[Value] = []
        self.obstacle = ""
        names: list[str] = []
        around: list[str] = []
        late = self._free(loss)
        pending, seen = [loss], set[Value]()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.node
            if not node.network:
                if node.sized and isinstance(node, Operation) and node.function is not Tensor.size:
                    pending.extend(node.inputs)
                elif _is_constant(value):
                    self.constants.append(value)
                elif node.batch:
                    self.entries.append(value)
                elif node.obstacle:
                    self.obstacle = node.obstacle
                continue
            if isinstance(node, FromModule):
                self.parameters.append(value)
            elif value in late or not isinstance(node, Operation) or _ends(node):
                self.outputs.append(value)
            else:
                names.append(node.name)
                around.append(node.within)
                pending.extend(node.inputs)
        if sum(math.prod(value.shape) for value in self.parameters) > _MOST_PARAMETERS:
            raise NotFoundError("the loss uses large parameters by themselves")
        if not self.outputs:
            raise NotFoundError("the loss has no output of the network in it")
        told = list(dict.fromkeys(name for name in around if name))
        told = [name for name in told if name.endswith("log_prob")] or told
        self.words = " and ".join(told) if told else _named(names)

    @property
    def tensors(self) -> list[Value]:
        """The entries that are no sizes."""
        return [entry for entry in self.entries if not entry.is_size]

    @cached_property
    def after(self) -> set[Value]:
        """The outputs, and what is computed from nothing of the network but them."""
        found = set(self.outputs)
        for value in _network_values(self.loss, found):
            if isinstance(value.node, Operation):
                network = [each for each in value.node.inputs if each.node.network]
                if network and all(each in found for each in network):
                    found.add(value)
        return found

    @property
    def taught(self) -> str:
        """Says that the loss takes outputs without a gradient, which do not come of what crosses; empty if not."""
        still = any(isinstance(each.node, Operation) and not each.node.flows for each in self.outputs)
        return (
            "the loss compares outputs with others that have no gradient, such as those of a teacher" if still else ""
        )

    def _free(self, loss: Value) -> set[Value]:
        """Results of affine operations on outputs, where they have fewer elements than all outputs have."""
        order = _network_values(loss)
        ends = [value for value in order if not isinstance(value.node, Operation) or _ends(value.node)]
        ends = [value for value in ends if not isinstance(value.node, FromModule)]
        free = set(ends)
        used_by_other: set[Value] = set()
        for value in order:
            node = value.node
            if value in free or not isinstance(node, Operation):
                continue
            network = [each for each in node.inputs if each.node.network]
            alone = not any(each.node.batch and not each.node.network and not each.is_size for each in node.inputs)
            if network and alone and is_affine(node) and all(each in free for each in network):
                free.add(value)
            else:
                used_by_other.update(each for each in network if each in free)
        late = {value for value in used_by_other if value in free}
        cheaper = sum(math.prod(v.shape) for v in late) < sum(math.prod(v.shape) for v in ends)
        return late if late and cheaper else set()


def _network_values(loss: Value, ends: Collection[Value] = ()) -> list[Value]:
    """The values of the network between its last outputs and the loss: each after those that it is computed from.

    Args:
        loss: The loss.
        ends: Values that it does not go beyond.
    """
    order: list[Value] = []
    state: dict[Value, bool] = {}
    pending = [(loss, False)]
    while pending:
        value, done = pending.pop()
        if done:
            order.append(value)
            continue
        if value in state or not value.node.network:
            continue
        state[value] = True
        pending.append((value, True))
        if isinstance(value.node, Operation) and not _ends(value.node) and value not in ends:
            pending.extend((each, False) for each in value.node.inputs)
    return order


def _ends(node: Operation) -> bool:
    """Whether the network ends with this operation: a layer with weights, or one that cannot be seen into."""
    inputs = node.inputs
    if not inputs:
        return True
    weights = [each for each in inputs if each.node.network and _is_weight(each)]
    return bool(weights) and (is_layer(node) or any(math.prod(each.shape) > _MOST_PARAMETERS for each in weights))


def _is_weight(value: Value) -> bool:
    """Whether a value depends on parameters only: on no activation and no batch."""
    return value.node.network and not value.node.batch


def _modules(values: Iterable[Value]) -> list[FromModule]:
    return [value.node for value in values if isinstance(value.node, FromModule)]


# ------------------------------------------------------------------ the loss


def _without_penalties(loss: Value) -> Value:
    """The loss without terms that depend on parameters alone, such as weight decay by hand."""
    while True:
        node = loss.node
        if not isinstance(node, Operation) or node.name not in ("add", "radd"):
            return loss
        terms = [each for each in node.inputs if not _is_weight(each)]
        if len(terms) != 1 or len(node.inputs) == len(terms) or node.kwargs:
            return loss
        loss = terms[0]


# Operations that are no help in naming a loss.
_UNTOLD_WORDS = """
    mean sum mul rmul add radd sub rsub neg div truediv rtruediv getitem get view reshape squeeze unsqueeze to float
    stack cat clone contiguous view_as expand expand_as where type_as broadcast_tensors clamp split chunk unbind
    transpose permute flatten masked_fill iadd item double isub imul setitem
"""
_UNTOLD = frozenset(_UNTOLD_WORDS.split())


def _named(names: list[str]) -> str:
    told = list(dict.fromkeys(name for name in reversed(names) if name not in _UNTOLD))
    return f"own loss ({', '.join(told[:3])}{', ...' if len(told) > 3 else ''})" if told else "own loss"


# ------------------------------------------------------------------ the goal


def _plainest(goal: Value) -> Value:
    """The goal before it was only reshaped or cast for the loss, with its samples first as the batch has them."""
    while isinstance(goal.node, Operation) and only_reshapes(goal.node):
        tensors = [each for each in goal.node.inputs if not each.is_size]
        if len(tensors) != 1 or math.prod(tensors[0].shape or (1,)) != math.prod(goal.shape or (1,)):
            break
        if isinstance(tensors[0].node, Operation) or tensors[0].node.batch:
            goal = tensors[0]
        else:
            break
    return goal


def _only_counts(goal: Value) -> bool:
    """Whether a goal numbers the samples of the batch, as where they are compared with one another."""
    return goal.node.sized and isinstance(goal.node, Operation) and goal.node.name not in ("full", "ones", "zeros")


__all__ = ["LossInputs", "inputs_of_loss"]
