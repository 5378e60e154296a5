"""Fake tensors stand for real ones, and remote blocks answer from memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg.partition.fakes import FakeOutputs, FakeTensors, is_fake, remote_blocks
from tests.partition.models import CPU, held


def tied() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


@pytest.mark.parametrize("fail", [False, True])
def test_fakes_give_every_tensor_back_even_after_an_exception(fail: bool) -> None:
    module = tied()
    before = held(module)

    def use() -> None:
        with FakeTensors(module, None, CPU, trainable=True) as fakes:
            assert all(is_fake(tensor) for tensor in held(module).values())
            assert module[0].weight is module[2].weight
            assert fakes.origin[id(module[0].weight)] is before["0.weight"]
            assert all(fake.shape == before[name].shape for name, fake in held(module).items())
            if fail:
                raise KeyError("here")

    if fail:
        with pytest.raises(KeyError, match="here"):
            use()
    else:
        use()
    assert held(module).keys() == before.keys()
    assert all(tensor is before[name] for name, tensor in held(module).items())


def test_only_named_tensors_become_fakes() -> None:
    module = tied()
    with FakeTensors(module, {"1.weight", "1.running_mean"}, CPU, trainable=False):
        assert {name for name, tensor in held(module).items() if is_fake(tensor)} == {"1.weight", "1.running_mean"}


@pytest.mark.parametrize("trainable", [False, True])
def test_fakes_record_a_graph_only_where_they_should(trainable: bool) -> None:
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    with FakeTensors(module, None, CPU, trainable=trainable):
        assert module(torch.ones(2, 4)).requires_grad == trainable
        assert not module.bias.requires_grad


def test_a_memory_of_fakes_runs_a_module_once_for_each_shape_and_returns_equal_shapes() -> None:
    class Counted(nn.Linear):
        runs = 0

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
            self.runs += 1
            return super().forward(x) * scale, x.sum(-1)

    module = Counted(4, 3)
    memory = FakeOutputs([module])
    with FakeTensors(module, None, CPU, trainable=False):
        fakes = {samples: module.weight.new_empty(samples, 4) for samples in (8, 5)}
        expected = {samples: [part.shape for part in module(fake)] for samples, fake in fakes.items()}
        memory.install()
        module.runs = 0
        for samples in (8, 5, 8, 5):
            result = module(fakes[samples])
            assert [part.shape for part in result] == expected[samples]
            assert all(is_fake(part) for part in result)
        assert module.runs == 2
        module(fakes[8], scale=2.0)
        module.eval()(fakes[8])
        assert module.runs == 4
        memory.remove()
        module(fakes[8])
        assert module.runs == 5
    assert "forward" not in module.__dict__


def test_a_memory_of_fakes_does_not_remember_values() -> None:
    module = nn.Linear(4, 3)
    memory = FakeOutputs([module])
    memory.install()
    first, second = module(torch.ones(2, 4)), module(torch.zeros(2, 4))
    memory.remove()
    assert not torch.equal(first, second)
    assert torch.equal(second, module.bias.expand(2, 3))


def test_a_memory_of_fakes_forgets_a_result_that_was_changed_in_place() -> None:
    module = nn.Linear(4, 3)
    memory = FakeOutputs([module])
    with FakeTensors(module, None, CPU, trainable=False):
        memory.install()
        fake = module.weight.new_empty(2, 4)
        module(fake).unsqueeze_(0)
        assert module(fake).shape == (2, 3)
        memory.remove()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_recurrent_layers_of_a_gpu_run_without_data(kind: Any, options: dict[str, Any]) -> None:
    device, layer = torch.device("cuda", 0), kind(5, 6, batch_first=True, **options)
    own = layer.forward
    directions, count = (2, 4) if "num_layers" in options else (1, 1)
    whole = nn.Module()
    whole.layer = layer
    whole.register_buffer("inputs", torch.empty(3, 4, 5))
    whole.register_buffer("state", torch.empty(count, 3, 6))
    with torch.no_grad(), FakeTensors(whole, None, device, trainable=False):
        state = (whole.state, whole.state) if kind is nn.LSTM else whole.state
        outputs, _state = layer(whole.inputs, state)
    assert is_fake(outputs)
    assert (outputs.shape, outputs.device) == ((3, 4, 6 * directions), device)
    assert layer.forward == own
    assert layer(torch.ones(3, 4, 5))[0].shape == outputs.shape  # on the host again


def test_modules_of_torch_without_tensors_answer_fakes_from_memory_and_compute_with_data() -> None:
    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Mine(), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Tanh())
    blocks = remote_blocks(module, {"0.weight", "0.bias"}, {"4"})
    assert blocks == [module[0], module[1], module[3][0]]  # not what a user wrote, nor where the cut is
    memory = FakeOutputs(blocks)
    with FakeTensors(module[0], None, torch.device("cpu"), trainable=False):
        memory.install()
        fake = module[0](torch.ones(1, 2))
        assert module[1](fake) is module[1](fake)
        assert module[1](torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
        assert module[1](torch.tensor([3.0, -2.0])).tolist() == [3.0, 0.0]
        memory.remove()


def test_an_activation_function_in_a_stage_of_this_process_runs_without_being_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would cost many times its arithmetic, in every step."""

    def watch() -> None:
        raise AssertionError("watched")

    memory = FakeOutputs([activation := nn.ReLU()])
    monkeypatch.setattr("lightning_sg.partition.fakes.Reads", watch)
    memory.install()
    assert activation(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    memory.remove()
