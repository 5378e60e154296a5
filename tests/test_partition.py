"""What a traced step shows, that it changes nothing, and which process gets which stage."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import Boundary, BoundaryError, PartitionError
from lightning_sg._compat import FakeTensorMode
from lightning_sg.boundary import Boundaries, Site
from lightning_sg.distributed.runtime import _remote_blocks
from lightning_sg.partition import Trace, trace_step
from lightning_sg.partition.balance import balance
from lightning_sg.partition.fakes import GhostMemory, Ghosts, is_ghost
from lightning_sg.partition.placement import Placement, place
from lightning_sg.predictors.base import LossInfo
from tests.models import assert_same_state, state_of

CPU = torch.device("cpu")
WIDTH, CLASSES, SAMPLES = 6, 3, 5
Loss = Callable[[Tensor, Tensor], Tensor]


class Cut(pl.LightningModule):
    """Parts with a boundary after each but the last, and a loss on what comes out."""

    def __init__(self, *parts: nn.Module, loss: Loss = F.cross_entropy) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.cuts = nn.ModuleList(Boundary() for _ in parts[1:])
        self.loss = loss

    def forward(self, x: Any) -> Any:
        for number, part in enumerate(self.parts):
            x = part(x)
            if number < len(self.cuts):
                x = self.cuts[number](x)
        return x

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return self.loss(self(batch[0]), batch[1])


def linears(count: int = 3, loss: Loss = F.cross_entropy) -> Cut:
    sizes = [WIDTH] * count + [CLASSES]
    return Cut(*(nn.Linear(left, right) for left, right in itertools.pairwise(sizes)), loss=loss)


def labelled(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, *shape, generator=generator), torch.arange(SAMPLES) % CLASSES


def trace(module: pl.LightningModule, batch: Any = None, step: Callable[[], Any] | None = None) -> Trace:
    batch = labelled(WIDTH) if batch is None else batch
    boundaries = Boundaries(module, None)
    try:
        return trace_step(module, boundaries.sites, step or (lambda: module.training_step(batch)), CPU)
    finally:
        boundaries.remove()


# ---------------------------------------------------------------------- what a trace shows


def test_a_trace_shows_order_uses_and_operations() -> None:
    traced = trace(linears())
    assert traced.order == ["cuts.0", "cuts.1"]
    assert traced.stages == 3
    assert traced.uses == {f"parts.{n}.{kind}": {n} for n in range(3) for kind in ("weight", "bias")}
    assert traced.flops == [2 * SAMPLES * WIDTH * WIDTH] * 2 + [2 * SAMPLES * WIDTH * CLASSES]
    assert traced.leaks == []
    assert traced.cut_short is None


def test_the_order_is_that_of_the_data_not_of_the_declaration() -> None:
    class Backwards(Cut):
        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](self.cuts[0](self.parts[1](self.cuts[1](self.parts[2](x)))))

    traced = trace(Backwards(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    assert traced.order == ["cuts.1", "cuts.0"]
    assert [traced.uses[f"parts.{n}.weight"] for n in range(3)] == [{2}, {1}, {0}]


def mse(output: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(output, torch.zeros_like(output))


def marks(output: Tensor, labels: Tensor) -> Tensor:
    return nn.BCEWithLogitsLoss()(output, torch.ones_like(output))


def chances(output: Tensor, labels: Tensor) -> Tensor:
    return nn.BCELoss()(output.sigmoid(), torch.ones_like(output))


nn_losses: dict[str, Loss] = {
    "smooth_l1": lambda output, labels: nn.SmoothL1Loss(beta=0.5)(output, torch.zeros_like(output)),
    "huber": lambda output, labels: nn.HuberLoss(delta=2.0)(output, torch.zeros_like(output)),
}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (F.cross_entropy, LossInfo("cross_entropy", CLASSES)),
        (nn.CrossEntropyLoss(ignore_index=7), LossInfo("cross_entropy", CLASSES, 7)),
        (lambda output, labels: F.nll_loss(output.log_softmax(-1), labels), LossInfo("cross_entropy", CLASSES)),
        (mse, LossInfo("mse", CLASSES)),
        (marks, LossInfo("binary_cross_entropy", CLASSES)),
        (chances, LossInfo("binary_cross_entropy", CLASSES)),
        (lambda output, labels: mse(output.mean(1), labels), LossInfo("mse", 1)),
        (lambda output, labels: F.l1_loss(output, output.detach()), LossInfo("l1", CLASSES)),
        (nn_losses["smooth_l1"], LossInfo("smooth_l1", CLASSES, beta=0.5)),
        (nn_losses["huber"], LossInfo("huber", CLASSES, beta=2.0)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), LossInfo("cross_entropy", CLASSES, label_smoothing=0.1)),
        (
            lambda output, labels: F.cross_entropy(output, labels, None, None, 5),
            LossInfo("cross_entropy", CLASSES, 5),
        ),
        (lambda output, labels: output.square().mean(), None),
        (lambda output, labels: F.cross_entropy(output, labels) + mse(output, labels), LossInfo("cross_entropy", 3)),
    ],
    ids=[
        "cross_entropy",
        "ignore_index",
        "nll",
        "mse",
        "bce",
        "bce of chances",
        "one number a sample",
        "l1",
        "smooth_l1",
        "huber",
        "smoothing",
        "positional",
        "unknown",
        "the first of two",
    ],
)
def test_the_models_own_loss_is_found(loss: Loss, expected: LossInfo | None) -> None:
    assert trace(linears(loss=loss)).loss == expected


def test_the_classes_of_a_loss_over_positions_are_its_second_dimension() -> None:
    module = Cut(nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES), loss=lambda h, y: F.cross_entropy(h.mT, y))
    batch = torch.randn(SAMPLES, 7, 4), torch.zeros(SAMPLES, 7, dtype=torch.int64)
    assert trace(module, batch).loss == LossInfo("cross_entropy", CLASSES)


def test_a_loss_before_the_last_boundary_is_not_the_models_own() -> None:
    class Auxiliary(Cut):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            hidden = self.parts[0](batch[0])
            mse(hidden, batch[1])
            return self.loss(self.parts[1](self.cuts[0](hidden)), batch[1])

    traced = trace(Auxiliary(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)))
    assert traced.loss == LossInfo("cross_entropy", CLASSES)


def test_a_shape_that_depends_on_values_cuts_the_trace_short_in_the_last_stage() -> None:
    def reads(output: Tensor, labels: Tensor) -> Tensor:
        F.cross_entropy(output, labels)
        output[output > 0]
        raise AssertionError("not reached without data")

    traced = trace(linears(loss=reads))
    assert traced.cut_short is not None
    assert "not reached" not in traced.cut_short
    assert traced.loss == LossInfo("cross_entropy", CLASSES)
    assert traced.uses["parts.2.weight"] == {2}


@pytest.mark.parametrize("read", [Tensor.item, float, int, bool], ids=["item", "float", "int", "bool"])
def test_reading_one_number_in_the_last_stage_lets_the_trace_go_on(read: Callable[[Tensor], Any]) -> None:
    def reads(output: Tensor, labels: Tensor) -> Tensor:
        read(output.sum())
        return F.cross_entropy(output, labels)

    traced = trace(linears(loss=reads))
    assert traced.cut_short is None
    assert traced.loss == LossInfo("cross_entropy", CLASSES)


def test_reading_a_value_before_a_boundary_says_where() -> None:
    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / super().forward(x).max().item()

    module = Cut(nn.Linear(WIDTH, WIDTH), Reading(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(PartitionError, match=r"to boundary 'cuts\.1': in 'parts\.1' of stage 1, .* It reads a value"):
        trace(module)


def test_a_boundary_that_the_step_does_not_reach_is_named() -> None:
    module = linears()
    with pytest.raises(BoundaryError, match=r"Boundary 'cuts\.1' was never reached.*\['cuts\.0'\]"):
        trace(module, step=lambda: module.cuts[0](module.parts[0](labelled(WIDTH)[0])))


class Leaking(Cut):
    detach = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.parts[0](x)
        around = hidden.detach() if self.detach else hidden
        return self.parts[2](self.parts[1](self.cuts[0](hidden)) + around)


@pytest.mark.parametrize("detach", [False, True])
def test_an_activation_that_goes_around_a_boundary_is_a_leak(detach: bool) -> None:
    module = Leaking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    del module.cuts[1]
    module.detach = detach
    (leak,) = trace(module).leaks
    assert (leak.made_in, leak.used_in, leak.shape) == (0, 1, (SAMPLES, WIDTH))
    assert (leak.operation, leak.differentiable) == ("add", not detach)
    assert leak.used_by == "Leaking"


def test_asking_for_a_shape_and_using_the_batch_are_no_leaks() -> None:
    class Asking(Cut):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.parts[0](x)
            crossed = self.cuts[0](hidden)
            return self.parts[1](crossed.reshape(hidden.size(0), hidden.shape[1]) + x)

    assert trace(Asking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))).leaks == []


# ---------------------------------------------------------------------- modules of many kinds


class First(nn.Module):
    """A recurrent or attention layer's first result."""

    def __init__(self, layer: nn.Module, arguments: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.arguments)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: First(nn.LSTM(8, 8, num_layers=2, batch_first=True)), (4, 8)),
    "GRU": (lambda: First(nn.GRU(8, 8, bidirectional=True)), (4, 8)),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), (4, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 8)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), (3, 6, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8)), (4,)),
}


class Probe(nn.Module):
    """Any activation to class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_every_parameter_of_a_layer_is_found_in_its_stage(
    make: Callable[[], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    x, labels = labelled(*shape)
    if len(shape) == 1:
        x = torch.randint(5, (SAMPLES, *shape))
    module = Cut(make(), nn.Sequential(nn.LazyLinear(8), nn.ReLU()), Probe()).train(training)
    module(x)  # makes the lazy layers
    traced = trace(module, (x, labels))
    expected = {name: {int(name.split(".")[1])} for name, _ in module.named_parameters()}
    assert {name: stages for name, stages in traced.uses.items() if name in expected} == expected
    assert traced.cut_short is None


@pytest.mark.parametrize("kind", ["attention", "transformer", "convolution"])
def test_the_operations_of_a_layer_are_counted(kind: str) -> None:
    make, shape = LAYERS[kind]
    module = Cut(make(), Probe())
    module(labelled(*shape)[0])
    assert all(count > 0 for count in trace(module, labelled(*shape)).flops)


# ---------------------------------------------------------------------- tracing changes nothing


class Counting(Cut):
    """Does everything that leaves marks in a module."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)), nn.Linear(WIDTH, CLASSES)
        )
        self.register_buffer("seen", torch.zeros(CLASSES))
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)
        self.outputs: list[Tensor] = []
        self.recent: deque[int] = deque([1], maxlen=2)
        self.by_name: dict[str, int] = {}
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.names = {"before"}
        self.steps = 0
        self.logged = 0

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x, labels = batch
        torch.rand(3), np.random.rand(3), random.random()
        self.steps += 1
        self.parts[0].steps = 1  # a submodule's attribute
        self.seen += 1
        scores = self(x)
        loss = F.cross_entropy(scores, labels)
        self.outputs.append(loss)
        self.recent.append(2)
        self.by_name["loss"] = 1
        self.counts["loss"] += 1
        self.names.add("after")
        self.accuracy(scores, labels)
        self.accuracy.update(scores, labels)
        self.log("loss", loss)
        self.log_dict({"loss": loss})
        self.last = scores
        return loss


def test_tracing_changes_nothing_in_the_module() -> None:
    module = Counting()
    module.accuracy.update(torch.eye(CLASSES), torch.zeros(CLASSES, dtype=torch.int64))
    hooked: list[int] = []
    module.parts[1].register_forward_hook(lambda *_: hooked.append(1))
    value = module.accuracy.compute()
    state, parameters = state_of(module), [id(parameter) for parameter in module.parameters()]
    metric_states = [getattr(module.accuracy, name).clone() for name in module.accuracy._defaults]
    outside = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    keys = set(module.__dict__)
    trace(module)
    assert_same_state(state_of(module), state, exact=True)
    assert [id(parameter) for parameter in module.parameters()] == parameters
    assert not any(is_ghost(tensor) for tensor in itertools.chain(module.parameters(), module.buffers()))
    assert torch.equal(torch.get_rng_state(), outside[0])
    assert (str(np.random.get_state()), random.getstate()) == outside[1:]
    assert (module.steps, module.outputs, module.by_name, dict(module.counts)) == (0, [], {}, {})
    assert (list(module.recent), module.names) == ([1], {"before"})
    assert not hasattr(module, "last")
    assert not hasattr(module.parts[0], "steps")
    assert set(module.__dict__) == keys
    assert all(
        torch.equal(getattr(module.accuracy, name), before)
        for name, before in zip(module.accuracy._defaults, metric_states, strict=True)
    )
    assert torch.equal(module.accuracy.compute(), value)
    assert len(module.parts[1]._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in module.parameters())


class Calls(Metric):
    """Counts its updates in place, and outside itself."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")
        self._note = lambda: seen.append("metric")

    def update(self, value: Tensor) -> None:
        self.count.add_(1)
        self._note()

    def compute(self) -> Tensor:
        return self.count


def test_a_traced_step_logs_nothing_and_counts_no_metric() -> None:
    seen: list[str] = []

    class Logging(Cut):
        def log(self, *_args: Any, **_kwargs: Any) -> None:
            seen.append("log")

        def log_dict(self, *_args: Any, **_kwargs: Any) -> None:
            seen.append("log_dict")

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            loss: Tensor = super().training_step(batch)
            self.log("loss", self.metric(loss))
            self.log_dict(self.metrics(loss))
            self.metric.update(loss)
            self.metrics.update(loss)
            return loss

    module = Logging(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    module.metric = Calls(seen)
    module.metrics = MetricCollection({"calls": Calls(seen)})
    assert trace(module).cut_short is None
    assert seen == []
    assert module.metric.count == 0
    module.training_step(labelled(WIDTH))
    assert {"log", "log_dict", "metric"} == set(seen)


def test_lists_stay_the_same_objects() -> None:
    module = Counting()
    outputs = module.outputs
    trace(module)
    assert module.outputs is outputs


def test_a_step_that_fails_while_traced_leaves_the_module_whole() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such shape")

    module = Cut(nn.Linear(WIDTH, WIDTH), Broken(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    state, keys = state_of(module), set(module.__dict__)
    with pytest.raises(PartitionError, match="ValueError: no such shape"):
        trace(module)
    assert_same_state(state_of(module), state, exact=True)
    assert set(module.__dict__) == keys
    x = torch.ones(2, WIDTH)
    assert module.cuts[0](x) is x


def test_a_traced_manual_step_ends_before_the_backward_pass() -> None:
    class Manual(Cut):
        reached = False

        def training_step(self, batch: Any, batch_idx: int = 0) -> None:
            self.manual_backward(super().training_step(batch))
            type(self).reached = True

    module = Manual(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    traced = trace(module)
    assert traced.loss == LossInfo("cross_entropy", CLASSES)
    assert traced.cut_short is None
    assert not Manual.reached
    assert "manual_backward" not in module.__dict__


# ---------------------------------------------------------------------- ghosts


def tied() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def held(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("fail", [False, True])
def test_ghosts_give_every_tensor_back_even_after_an_exception(fail: bool) -> None:
    module = tied()
    before = held(module)

    def haunted() -> None:
        with Ghosts(module, None, CPU, trainable=True) as ghosts:
            assert all(is_ghost(tensor) for tensor in held(module).values())
            assert module[0].weight is module[2].weight
            assert ghosts.origin[id(module[0].weight)] is before["0.weight"]
            assert all(ghost.shape == before[name].shape for name, ghost in held(module).items())
            if fail:
                raise KeyError("here")

    if fail:
        with pytest.raises(KeyError, match="here"):
            haunted()
    else:
        haunted()
    assert held(module).keys() == before.keys()
    assert all(tensor is before[name] for name, tensor in held(module).items())


def test_only_named_tensors_become_ghosts() -> None:
    module = tied()
    with Ghosts(module, {"1.weight", "1.running_mean"}, CPU, trainable=False):
        assert {name for name, tensor in held(module).items() if is_ghost(tensor)} == {"1.weight", "1.running_mean"}


@pytest.mark.parametrize("trainable", [False, True])
def test_ghosts_record_a_graph_only_where_they_should(trainable: bool) -> None:
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    with Ghosts(module, None, CPU, trainable=trainable):
        assert module(torch.ones(2, 4)).requires_grad == trainable
        assert not module.bias.requires_grad


def test_a_memory_of_ghosts_runs_a_module_once_for_each_shape_and_returns_equal_shapes() -> None:
    class Counted(nn.Linear):
        runs = 0

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
            self.runs += 1
            return super().forward(x) * scale, x.sum(-1)

    module = Counted(4, 3)
    memory = GhostMemory([module])
    with Ghosts(module, None, CPU, trainable=False):
        ghosts = {samples: module.weight.new_empty(samples, 4) for samples in (8, 5)}
        expected = {samples: [part.shape for part in module(ghost)] for samples, ghost in ghosts.items()}
        memory.install()
        module.runs = 0
        for samples in (8, 5, 8, 5):
            result = module(ghosts[samples])
            assert [part.shape for part in result] == expected[samples]
            assert all(is_ghost(part) for part in result)
        assert module.runs == 2
        module(ghosts[8], scale=2.0)
        module.eval()(ghosts[8])
        assert module.runs == 4
        memory.remove()
        module(ghosts[8])
        assert module.runs == 5
    assert "forward" not in module.__dict__


def test_a_memory_of_ghosts_does_not_remember_values() -> None:
    module = nn.Linear(4, 3)
    memory = GhostMemory([module])
    memory.install()
    first, second = module(torch.ones(2, 4)), module(torch.zeros(2, 4))
    memory.remove()
    assert not torch.equal(first, second)
    assert torch.equal(second, module.bias.expand(2, 3))


def test_a_memory_of_ghosts_forgets_a_result_that_was_changed_in_place() -> None:
    module = nn.Linear(4, 3)
    memory = GhostMemory([module])
    with Ghosts(module, None, CPU, trainable=False):
        memory.install()
        ghost = module.weight.new_empty(2, 4)
        module(ghost).unsqueeze_(0)
        assert module(ghost).shape == (2, 3)
        memory.remove()


# ---------------------------------------------------------------------- placement


def slowest(costs: list[float], starts: list[int], ends: list[float]) -> float:
    bounds = [*starts, len(costs)]
    runs = itertools.pairwise(bounds)
    return max(sum(costs[start:end]) + (ends[end - 1] if end < len(costs) else 0) for start, end in runs)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_the_slowest_process_is_as_fast_as_with_any_other_cut(parts: int) -> None:
    draw = random.Random(parts)
    for _ in range(60):
        count = draw.randint(parts, 9)
        costs = [draw.choice([0.0, 1.0, draw.random() * 10]) for _ in range(count)]
        for ends in (None, [draw.choice([0.0, draw.random() * 5]) for _ in range(count)]):
            starts = balance(costs, parts, ends)
            cuts = itertools.combinations(range(1, count), parts - 1)
            best = min(slowest(costs, [0, *cut], ends or [0.0] * count) for cut in cuts)
            assert slowest(costs, starts, ends or [0.0] * count) == pytest.approx(best)
            assert starts[0] == 0
            assert starts == sorted(set(starts))
            assert len(starts) == parts


def test_a_placement_knows_where_everything_is() -> None:
    placement = Placement(["a", "b", "c", "d"], first=[0, 1, 4])
    assert placement.processes == 3
    assert [placement.process_of(stage) for stage in range(5)] == [0, 1, 1, 1, 2]
    assert [placement.sends_at(process) for process in range(3)] == ["a", "d", None]
    assert [placement.receives_at(process) for process in range(3)] == [None, "a", "d"]
    assert [placement.predictor_process(name) for name in "abcd"] == [0, 1, 1, 1]
    names = [placement.name(process, rank) for process, rank in enumerate((2, 1, 0))]
    assert names == ["stage 0 (rank 2)", "stages 1-3 (rank 1)", "stage 4 (rank 0)"]


def test_a_model_is_placed_by_its_stages_work() -> None:
    module = Cut(nn.Linear(WIDTH, 64), nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    placement = place(module, trace(module), 2)
    assert placement.first == [0, 1]
    wide = Cut(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, CLASSES))
    assert place(wide, trace(wide), 2).first == [0, 3]


def test_every_tensor_has_one_owner() -> None:
    module = Counting()
    placement = place(module, trace(module), 2)
    assert set(placement.owner) == set(held(module))
    assert placement.elsewhere(0) == {"parts.1.weight", "parts.1.bias"}
    assert placement.elsewhere(1) == set(held(module)) - placement.elsewhere(0)


def test_unused_tensors_belong_to_the_last_process() -> None:
    module = linears(2)
    module.spare = nn.Linear(2, 2)
    placement = place(module, trace(module), 2)
    assert placement.owner["spare.weight"] == placement.owner["spare.bias"] == 1


def tied_in_a_stage() -> Cut:
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    first[1].weight = first[0].weight
    return Cut(first, nn.Linear(WIDTH, CLASSES))


def test_a_tied_parameter_within_a_stage_is_placed_under_both_names() -> None:
    module = tied_in_a_stage()
    placement = place(module, trace(module), 2)
    assert placement.owner["parts.0.0.weight"] == placement.owner["parts.0.1.weight"] == 0


def test_a_tied_parameter_across_processes_is_refused_under_both_names() -> None:
    module = linears(3)
    module.parts[1].weight = module.parts[0].weight
    traced = trace(module)
    assert traced.uses["parts.0.weight"] == {0, 1}
    with pytest.raises(PartitionError, match=r"'parts\.0\.weight' \(also named \['parts\.1\.weight'\]\) is used by"):
        place(module, traced, 3)


def test_a_buffer_that_several_processes_use_is_kept_by_each() -> None:
    class Shared(Cut):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__(*parts)
            self.register_buffer("offset", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.cuts[0](self.parts[0](x + self.offset)) + self.offset)

    module = Shared(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    placement = place(module, trace(module), 2)
    assert placement.shared == {"offset"}
    assert "offset" not in placement.elsewhere(0) | placement.elsewhere(1)


def test_more_processes_than_stages_are_refused() -> None:
    module = linears(2)
    with pytest.raises(PartitionError, match="3 processes but only 2 stages"):
        place(module, trace(module), 3)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_recurrent_layers_of_a_gpu_run_without_data(kind: Any, options: dict[str, Any]) -> None:
    device, layer = torch.device("cuda", 0), kind(5, 6, batch_first=True, **options)
    own = layer.forward
    directions, count = (2, 4) if "num_layers" in options else (1, 1)
    with torch.no_grad(), Ghosts(layer, None, device, trainable=False):
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs, state = torch.empty(3, 4, 5, device=device), torch.empty(count, 3, 6, device=device)
        outputs, _state = layer(inputs, (state, state) if kind is nn.LSTM else state)
    assert is_ghost(outputs)
    assert (outputs.shape, outputs.device) == ((3, 4, 6 * directions), device)
    assert layer.forward == own
    assert layer(torch.ones(3, 4, 5))[0].shape == outputs.shape  # on the host again


def test_modules_of_torch_without_tensors_answer_ghosts_from_memory_and_compute_with_data() -> None:
    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Mine(), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Tanh())
    callback: Any = SimpleNamespace(boundaries=SimpleNamespace(sites=[Site("4")]))
    blocks = _remote_blocks(module, {"0.weight", "0.bias"}, callback)
    assert blocks == [module[0], module[1], module[3][0]]  # not what a user wrote, nor where the cut is
    memory = GhostMemory(blocks)
    with Ghosts(module[0], None, torch.device("cpu"), trainable=False):
        memory.install()
        ghost = module[0](torch.ones(1, 2))
        assert module[1](ghost) is module[1](ghost)
        assert module[1](torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
        assert module[1](torch.tensor([3.0, -2.0])).tolist() == [3.0, 0.0]
        memory.remove()
