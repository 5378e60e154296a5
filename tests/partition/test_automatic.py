"""``boundaries="auto"``: where the model is cut, and that training is then as with these boundaries named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sg import LateGradients, LossModelPredictor, PredictorTraining, SyntheticGradients
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.partition.automatic import choose_boundaries
from lightning_sg.partition.step import call_training_step
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import Work
from lightning_sg.tools.plan import plan
from tests.models import (
    CLASSES,
    FEATURES,
    assert_same_state,
    block,
    dataset,
    fit_and_save,
    loader,
    make_trainer,
    state_of,
)
from tests.ranks import run_ranks

WIDTH = 16


class Net(pl.LightningModule):
    """Any network as a classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def mlp(*widths: int) -> nn.Sequential:
    sizes = [FEATURES, *widths]
    layers = [part for i, o in zip(sizes, widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def batch() -> tuple[Tensor, ...]:
    return dataset(16)[:]


def chosen(module: pl.LightningModule, stages: int, *, tied: bool = False, **predictors: float) -> list[str]:
    def work(trace: Trace, names: list[str]) -> dict[str, Work]:
        return dict.fromkeys(names, Work()) | {name.replace("_", "."): Work(cost) for name, cost in predictors.items()}

    run = partial(call_training_step, module, batch(), 0)
    return choose_boundaries(module, stages, run, torch.device("cpu"), work, tied=tied).names


def test_choosing_leaves_no_hook_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[RemovableHandle] = []
    register = nn.Module.register_forward_hook

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> RemovableHandle:
        handles.append(register(module, *args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(nn.Module, "register_forward_hook", noting)
    module = Net(mlp(64, 64))
    chosen(module, 2)
    assert handles
    assert not any(handle.id in (handle.hooks_dict_ref() or {}) for handle in handles)


def test_stages_are_of_about_equal_cost_and_end_after_an_activation_function() -> None:
    module = Net(mlp(*[64] * 8))
    # Seven layers of full width between a small one and a smaller one.
    assert chosen(module, 2) == ["net.7"]
    assert chosen(module, 4) == ["net.3", "net.7", "net.11"]
    assert chosen(module, 1) == []


def test_an_expensive_predictor_goes_to_the_shorter_stage() -> None:
    module = Net(mlp(*[64] * 8))
    assert chosen(module, 2, net_7=1e9) == ["net.9"]


def test_where_no_predictor_can_be_built_is_no_place_for_a_cut_if_there_is_another() -> None:
    class Fussy(LossModelPredictor):
        def build(self, activations: Any, context: Any, loss: Any) -> None:
            if activations[0].shape[1] == 63:
                raise ValueError("not 63")
            super().build(activations, context, loss)

    module = Net(mlp(64, 64, 63, 64, 64))
    assert boundary_of(module, SyntheticGradients(boundaries="auto")) == "net.5"
    assert boundary_of(module, SyntheticGradients(boundaries="auto", predictor=Fussy())) != "net.5"


def boundary_of(module: pl.LightningModule, callback: SyntheticGradients) -> str:
    (boundary,) = plan(module, batch(), callback, 2).boundaries
    return boundary.name


def test_the_stages_that_wait_for_late_gradients_get_fewer_layers() -> None:
    def first_stage(late: LateGradients | None) -> int:
        callback = SyntheticGradients(boundaries="auto", predictor="auto", late=late)
        return int(boundary_of(Net(mlp(*[64] * 16)), callback).removeprefix("net."))

    plain, every, every_4th = (first_stage(late) for late in (None, LateGradients(0.2), LateGradients(0.2, every=4)))
    assert every < every_4th < plain
    assert first_stage(LateGradients(0.2, recompute=True)) < every


def test_no_cut_goes_through_a_residual_block() -> None:
    module = Net(
        nn.Sequential(nn.Linear(FEATURES, WIDTH), *(Residual(WIDTH) for _ in range(6)), nn.Linear(WIDTH, CLASSES))
    )
    names = [f"net.{place}" for place in range(7)]
    assert chosen(module, 8) == names
    with pytest.raises(PartitionError, match=r"finds 7 places to cut Net, too few for 9 stages.*devices=8"):
        chosen(module, 9)


def test_a_module_that_runs_twice_is_no_place_for_a_cut() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.layers[0](x)))

    with pytest.raises(PartitionError, match="finds 0 places"):
        chosen(Net(Twice()), 2)


class Tied(nn.Module):
    """The layer ``first`` works again after the third block, and ``behind`` blocks follow."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3 + behind))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first.weight)
        for place, layer in enumerate(self.blocks):
            x = layer(x)
            if place == 2:
                x = F.linear(x, self.first.weight)
        return x


def test_no_cut_is_between_two_uses_of_a_parameter() -> None:
    module = Net(Tied(behind=2))
    assert chosen(module, 2) == ["net.blocks.3"]
    # Stages that keep copies of it equal may be cut anywhere.
    assert chosen(module, 3, tied=True) == ["net.blocks.1", "net.blocks.3"]
    with pytest.raises(PartitionError, match=r"finds 1 places.*'net\.first\.weight' is used before and after"):
        chosen(module, 3)


class TwiceInValidation(Net):
    """Its validation runs the network a second time, past its last module; so only that module runs once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = [block(FEATURES, WIDTH), block(WIDTH, WIDTH), block(WIDTH, WIDTH)]
        super().__init__(nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))
        hidden = self.net[:3](x)
        self.log("val_error", (F.linear(hidden, self.net[3].weight).argmax(1) != y).float().mean())


def test_a_validation_step_that_runs_the_network_twice_leaves_the_choice_to_training(tmp_path: Path) -> None:
    def work(boundaries: Any, devices: int) -> Any:
        pl.seed_everything(3, verbose=False)
        module = TwiceInValidation()
        callback = SyntheticGradients(boundaries=boundaries, training=PredictorTraining(seed=5))
        fit_and_save(module, callback, devices, tmp_path, None, 2)
        return callback.names, state_of(module)

    (names, state), _other = run_ranks(2, lambda: work("auto", 2))
    assert_same_state(state, work(names, 1)[1])


def test_frozen_layers_are_no_stage_of_their_own() -> None:
    net = mlp(*[64] * 4)
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    assert chosen(Net(net), 3) == ["net.5", "net.7"]


class Scaled(nn.Module):
    """Reads a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.detach().abs().max().item())


class Chosen(nn.Module):
    """Meets a shape that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.isfinite().all(1)]


class Listed(nn.Module):
    """Takes a way out of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x.tolist())


def with_obstacle(kind: type[nn.Module]) -> Net:
    torch.manual_seed(0)
    blocks = [block(FEATURES, WIDTH), *(block(WIDTH, WIDTH) for _ in range(4))]
    return Net(nn.Sequential(*blocks[:3], kind(), *blocks[3:], nn.Linear(WIDTH, CLASSES)))


@pytest.mark.parametrize("kind", [Scaled, Chosen, Listed])
def test_places_behind_the_first_value_that_is_read_are_left_out(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    module = with_obstacle(kind)
    with caplog.at_level("INFO"):
        planned = plan(module, batch(), SyntheticGradients(boundaries="auto"), 3)
    assert len(planned.boundaries) == 2
    assert all(boundary.name[:5] in ("net.0", "net.1", "net.2") for boundary in planned.boundaries)
    assert "Places behind 'net.2' are left out: " in caplog.text
    with pytest.raises(PartitionError, match=r"finds \d+ places .*Places behind 'net\.2' are left out"):
        chosen(module, 20)


def test_what_stops_the_step_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        plan(with_obstacle(Scaled), batch(), SyntheticGradients(boundaries="auto"), 2)
    assert "'net.3' does not run on tensors without data (DataDependentOutputException" in caplog.text


def test_a_value_that_is_read_before_all_places_is_an_error() -> None:
    module = Net(nn.Sequential(Outer(), nn.Linear(FEATURES, CLASSES)))
    with pytest.raises(PartitionError, match="It reads a value"):
        chosen(module, 2)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.item()


@pytest.mark.parametrize("kind", [Scaled, Chosen, Listed])
def test_such_a_model_trains_in_two_processes_as_in_one(kind: type[nn.Module], tmp_path: Path) -> None:
    def work(boundaries: Any, devices: int) -> Any:
        pl.seed_everything(3, verbose=False)
        module = with_obstacle(kind)
        callback = SyntheticGradients(boundaries=boundaries, training=PredictorTraining(seed=5))
        fit_and_save(module, callback, devices, tmp_path, None, 2)
        return callback.names, state_of(module)

    (names, state), _other = run_ranks(2, lambda: work("auto", 2))
    assert_same_state(state, work(names, 1)[1])


def classifier() -> Net:
    torch.manual_seed(0)
    return Net(
        nn.Sequential(block(FEATURES, WIDTH), *(block(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, CLASSES))
    )


def train(folder: Path, boundaries: Any, devices: int, checkpoint: str | None = None, epochs: int = 2) -> Any:
    pl.seed_everything(3, verbose=False)
    module, callback = classifier(), SyntheticGradients(boundaries=boundaries, training=PredictorTraining(seed=5))
    fit_and_save(module, callback, devices, folder, checkpoint, epochs)
    return callback.names, state_of(module)


@pytest.mark.parametrize("processes", [2, 3])
def test_training_is_as_with_these_boundaries_named_in_one_process(tmp_path: Path, processes: int) -> None:
    (names, state), *others = run_ranks(processes, lambda: train(tmp_path, "auto", processes))
    assert len(names) == processes - 1
    assert all(other[0] == names for other in others)
    _names, alone = train(tmp_path, names, 1)
    assert_same_state(state, alone)


def test_a_resumed_run_keeps_the_cuts_of_its_checkpoint(tmp_path: Path) -> None:
    # Of a cut that "auto" would not choose.
    run_ranks(2, lambda: train(tmp_path, ["net.0"], 2))
    checkpoint = str(tmp_path / "last.ckpt")
    (names, state), _other = run_ranks(2, lambda: train(tmp_path, "auto", 2, checkpoint, epochs=3))
    assert names == ["net.0"]
    _names, whole = train(tmp_path, ["net.0"], 1, epochs=3)
    assert_same_state(state, whole)


def test_one_process_trains_undivided_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="it trains undivided"):
        _names, state = train(tmp_path, "auto", 1)
    pl.seed_everything(3, verbose=False)
    module = classifier()
    make_trainer().fit(module, loader(shuffle=False), loader(shuffle=False))
    assert_same_state(state, state_of(module), exact=True)


def test_predictors_by_name_are_refused() -> None:
    callback = SyntheticGradients(boundaries="auto", predictor={})
    with pytest.raises(SyntheticGradientsError, match="one predictor for all"):
        plan(classifier(), batch(), callback, 2)


def test_a_plan_chooses_as_a_run_does(tmp_path: Path) -> None:
    planned = plan(classifier(), batch(), SyntheticGradients(boundaries="auto"), 2)
    (names, _state), _other = run_ranks(2, lambda: train(tmp_path, "auto", 2, epochs=1))
    assert [boundary.name for boundary in planned.boundaries] == names
