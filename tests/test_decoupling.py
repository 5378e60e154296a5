"""``decouple``: a loop of one's own trains as the callback does, to the bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    BoundaryError,
    DelayedGradient,
    ExactGradients,
    MLPPredictor,
    NonFiniteLossError,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    TrueGradient,
    decouple,
)
from tests.models import CLASSES, FEATURES, assert_same_state, dataset, loader, make_trainer, state_of

STEPS = 12


def network(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(FEATURES, 16), nn.Dropout(dropout), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, CLASSES))


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


class Lit(pl.LightningModule):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = network(dropout)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def with_the_callback(boundaries: list[str], options: dict[str, Any], dropout: float) -> dict[str, Tensor]:
    module = Lit(dropout)
    torch.manual_seed(3)
    callback = SyntheticGradients(boundaries=[f"net.{name}" for name in boundaries], **options)
    trainer = make_trainer(max_steps=STEPS, max_epochs=-1, callbacks=[callback])
    trainer.fit(module, loader(shuffle=False))
    return state_of(module.net)


def batches(steps: int = STEPS) -> list[Any]:
    every = list(loader(shuffle=False))
    return [every[number % len(every)] for number in range(steps)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delay": 0, "predictor": MLPPredictor(hidden=8)},
        {"predictor": DelayedGradient()},
        {"exact": ExactGradients(every=2, bootstrap=True, correction=0.5)},
        {"exact": ExactGradients(warm_up=4)},
        {"training": PredictorTraining(update_probability=0.5)},
        {"predictor": TrueGradient()},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize("boundaries", [["1"], ["0", "4"]], ids=["one", "two"])
def test_trains_as_the_callback_does(boundaries: list[str], options: dict[str, Any]) -> None:
    # With true gradients nothing is decoupled, and dropout draws from torch's generator, as the loader does.
    dropout = 0.0 if isinstance(options.get("predictor"), TrueGradient) else 0.2
    oracle = with_the_callback(boundaries, options, dropout)
    holder = nn.ModuleDict({"net": network(dropout)})  # boundaries need equal names, which seed their predictors
    net = holder["net"]
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    with decouple(holder, [f"net.{name}" for name in boundaries], **options) as sg:
        for batch in batches():
            optimizer.zero_grad()
            sg.backward(lambda each: loss_of(net, each), batch)
            optimizer.step()
    assert_same_state(state_of(net), oracle, exact=True)


def test_a_scaled_loss_teaches_predictors_the_same() -> None:
    states = []
    for scale in (1.0, 0.25):
        net = network()
        torch.manual_seed(3)
        with decouple(net, ["1"], predictor=MLPPredictor(hidden=8)) as sg:
            for batch in batches():
                sg.backward(lambda each, s=scale, n=net: s * loss_of(n, each), batch, scale=scale)
            states.append(sg.state_dict()["boundaries"]["1"])
    for left, right in zip(*(torch.utils._pytree.tree_leaves(state) for state in states)):
        if isinstance(left, Tensor):
            torch.testing.assert_close(left, right)


def test_leaves_the_module_as_it_was() -> None:
    net = network()
    names, x = set(vars(net)), dataset()[0][0][None]
    net.eval()
    before = net(x)
    with decouple(net, ["1"]) as sg:
        assert torch.equal(net(x), before)  # between steps it is its ordinary self, too
        net.train()
        sg.backward(lambda each: loss_of(net, each), batches(1)[0])
        net.eval()
        net(x).sum().backward()
    assert set(vars(net)) == names
    assert not any(child._forward_hooks for child in net.modules())


def test_goes_on_from_a_saved_state() -> None:
    def run(net: nn.Module, optimizer: Any, part: list[Any], state: Any) -> Any:
        with decouple(net, ["1"]) as sg:
            if state is not None:
                sg.load_state_dict(state)
            for batch in part:
                optimizer.zero_grad()
                sg.backward(lambda each: loss_of(net, each), batch)
                optimizer.step()
            return sg.state_dict()

    nets = [network(), network()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    torch.manual_seed(3)
    run(nets[0], optimizers[0], batches(), None)
    torch.manual_seed(3)
    state = run(nets[1], optimizers[1], batches()[:5], None)
    run(nets[1], optimizers[1], batches()[5:], state)
    assert_same_state(state_of(nets[0]), state_of(nets[1]))


def test_metrics_say_how_good_predictions_are() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 16), Boundary(), nn.ReLU(), nn.Linear(16, CLASSES))
    with decouple(net) as sg:
        for batch in batches():
            sg.backward(lambda each: loss_of(net, each), batch)
        metrics = sg.metrics()
    assert -1 <= metrics["1/cosine"] <= 1
    assert metrics["1/norm_ratio"] > 0


def test_fabric_goes_backward() -> None:
    states = []
    for with_fabric in (False, True):
        net = network()
        torch.manual_seed(3)
        optimizer: Any = torch.optim.Adam(net.parameters(), lr=1e-2)
        call, go = net, Tensor.backward
        if with_fabric:
            fabric = Fabric(accelerator="cpu", devices=1)
            call, optimizer = fabric.setup(net, optimizer)
            go = fabric.backward
        with decouple(net, ["1"]) as sg:
            for batch in batches():
                optimizer.zero_grad()
                sg.backward(lambda each, run=call: loss_of(run, each), batch, backward=go)
                optimizer.step()
        states.append(state_of(net))
    assert_same_state(*states, exact=True)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(SyntheticGradientsError, match=r"decouple: Sequential has no boundary"), decouple(network()):
        pass
    with pytest.raises(TypeError, match="takes a plain module"), decouple(Lit()):
        pass
    with pytest.raises(ValueError, match="boundaries='auto'"), decouple(network(), "auto"):
        pass
    with pytest.raises(BoundaryError, match="'nett' is not a submodule"), decouple(network(), ["nett"]):
        pass
    net = network()
    with pytest.raises(BoundaryError), decouple(net, ["1"]) as sg:
        sg.backward(lambda each: net[5](torch.zeros(1, 16)).sum(), batches(1)[0])
    assert "trainer" not in vars(net)
    net = network()
    with pytest.raises(NonFiniteLossError, match="training batch 0"), decouple(net, ["1"]) as sg:
        sg.backward(lambda each: loss_of(net, each) * float("nan"), batches(1)[0])
