"""What a stage may do with an earlier activation that it was handed: ask for its shape, but use no value of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg.errors import BoundaryError
from lightning_sg.partition.checks import check_cuts
from lightning_sg.partition.fakes import FakeTensors, is_fake
from tests.partition.models import CLASSES, CPU, WIDTH, Cut, trace

Use = Callable[[Tensor, Tensor], Any]

SHAPES: dict[str, Use] = {
    "shape": lambda x, like: x.view(like.shape),
    "size": lambda x, like: x.view(like.size(0), -1),
    "len": lambda x, like: x.view(len(like), -1),
    "numel": lambda x, like: x * like.numel(),
    "dim": lambda x, like: x.flatten(like.dim() - 1),
    "stride": lambda x, like: x * like.stride(0),
    "dtype": lambda x, like: x.to(like.dtype),
    "device": lambda x, like: x.to(like.device),
    "requires_grad": lambda x, like: x * like.requires_grad * like.is_floating_point(),
    "to": lambda x, like: x.to(like),
    "type": lambda x, like: x.type(like.type()) * like.is_contiguous(),
    "zeros_like": lambda x, like: x + torch.zeros_like(like),
    "ones_like": lambda x, like: x * torch.ones_like(input=like),
    "full_like": lambda x, like: x * torch.full_like(like, 2.0),
    "empty_like": lambda x, like: x * torch.empty_like(like).fill_(2.0),
    "randn_like": lambda x, like: x + torch.randn_like(like),
    "new_zeros": lambda x, like: x + like.new_zeros(like.shape),
    "new_ones": lambda x, like: x + like.new_ones(1),
    "new_full": lambda x, like: x + like.new_full((1,), 3.0),
    "new_tensor": lambda x, like: x + like.new_tensor([2.0]),
    "new_empty": lambda x, like: x + like.new_empty(1).zero_(),
    "expand_as": lambda x, like: x + x[:, :1].expand_as(like),
    "view_as": lambda x, like: x.view_as(like),
    "reshape_as": lambda x, like: x.reshape_as(other=like),
    "type_as": lambda x, like: x.type_as(like),
    "hook": lambda x, like: (like.register_hook(lambda _gradient: None), x)[1],
}
VALUES: dict[str, Use] = {
    "add": lambda x, like: x + like,
    "in place": lambda x, like: x.clone().add_(like),
    "expand": lambda x, like: x + like[:, :1].expand_as(x),
    "transposed": lambda x, like: x + like.T.mT,
    "data": lambda x, like: x + like.data,
    "detached": lambda x, like: x + like.detach(),
    "rows": lambda x, like: x + sum(row for row in like),
    "set": lambda x, like: x.clone().index_put_((torch.tensor(0),), like[0]),
    "item set": lambda x, like: _with_row(x, like),
    "where": lambda x, like: torch.where(like > 0, x, -x),
    "read": lambda x, like: x * like.sum().item(),
    "norm": lambda x, like: F.layer_norm(x, (WIDTH,), like[0]),
    "filled by it": lambda x, like: x + torch.zeros(x.shape).copy_(like),
    "full of it": lambda x, like: x + torch.full_like(x, 0.0).masked_fill(like > 0, 1.0),
    "new of it": lambda x, like: x + x.new_zeros(x.shape).add(like),
    "all": lambda x, like: x * bool(like.isfinite().all()),
}


def _with_row(x: Tensor, like: Tensor) -> Tensor:
    rows = torch.zeros(x.shape)
    rows[0] = like[0]
    return x + rows


class Handed(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.use = use

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return self.layer(self.use(x, like))


class Handing(Cut):
    def __init__(self, use: Use) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), Handed(use))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.parts[0](x)
        return self.parts[1](self.cuts[0](hidden), hidden)


@pytest.mark.parametrize("name", SHAPES)
def test_asking_for_a_shape_is_no_use(name: str) -> None:
    traced = trace(Handing(SHAPES[name]))
    assert (traced.leaks, traced.cut_short) == ([], None)


@pytest.mark.parametrize("name", VALUES)
def test_a_use_of_values_is_refused_by_name(name: str) -> None:
    traced = trace(Handing(VALUES[name]))
    assert traced.leaks
    with pytest.raises(BoundaryError, match=r"'parts\.0' \(stage 0\) computes it .* in 'parts\.1' \(stage 1\) uses it"):
        check_cuts(traced, split=True)


class Showing(Cut):
    """Keeps parts of an early activation beside its output, for plots."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.parts[0](x)
        output = self.parts[1](self.cuts[0](hidden))
        self.shown = {"attention": hidden[..., :2].detach(), "last": hidden.unbind()[-1][:, None].T}
        return output

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        loss = super().training_step(batch)
        return {"loss": loss} if not self.returns else {"loss": loss, "attention": self.shown["attention"]}

    returns = False


def test_parts_of_an_activation_of_which_nothing_comes_are_no_use() -> None:
    module = Showing(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    assert trace(module).leaks == []
    module.returns = True
    assert [leak.operation for leak in trace(module).leaks] == ["__getitem__"]


def test_parts_of_an_activation_that_are_used_later_are_a_use() -> None:
    class Later(Showing):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
            loss = super().training_step(batch)["loss"]
            return loss + self.shown["attention"].sum()

    assert trace(Later(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))).leaks


def test_what_was_filled_with_an_activation_before_the_boundary_is_refused_behind_it() -> None:
    class Filling(Handing):
        def forward(self, x: Tensor) -> Tensor:
            hidden, rows = self.parts[0](x), torch.zeros(x.shape)
            rows[:] = hidden
            return self.parts[1](self.cuts[0](hidden), rows)

    assert trace(Filling(VALUES["add"])).leaks
    assert trace(Filling(SHAPES["zeros_like"])).leaks == []


def test_the_shape_of_a_parameter_of_another_stage_is_no_use_of_it() -> None:
    class Asking(Cut):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.parts[0].weight
            crossed = self.cuts[0](self.parts[0](x))
            return self.parts[1](crossed.view(-1, weight.size(0)).to(weight.dtype) + torch.zeros_like(weight[0]))

    traced = trace(Asking(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)))
    assert traced.uses["parts.0.bias"] == {0}
    assert traced.leaks == []


def test_what_depends_on_parameters_of_an_earlier_stage_and_the_batch_is_refused_by_their_name() -> None:
    class Embedding(Cut):
        def forward(self, x: Tensor) -> Tensor:
            other = self.parts[0](x.flip(0))
            return self.parts[1](self.cuts[0](self.parts[0](x)) + other)

    traced = trace(Embedding(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)))
    with pytest.raises(BoundaryError, match=r"depends on parameters of 'parts', not on the batch alone"):
        check_cuts(traced, split=True)


def test_sequences_that_are_packed_before_the_boundary_are_refused_behind_it_but_for_their_lengths() -> None:
    class Packing(Cut):
        leaks = False

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([1, 3, 2, 1, 1])
            hidden = self.parts[0](x[:, None].expand(-1, 3, -1))
            packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            padded, again = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
            crossed = self.cuts[0](padded)
            mask = torch.arange(3) < again[:, None]
            return self.parts[1]((padded if self.leaks else crossed)[mask].view(-1, WIDTH)[:5] + crossed[:, 0])

    module = Packing(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    assert trace(module).leaks == []
    module.leaks = True
    assert trace(module).leaks


def test_the_marks_of_a_trace_do_not_stay_on_tensors_of_the_user() -> None:
    kept = torch.zeros(5, WIDTH)

    class Keeping(Cut):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.parts[0](x)
            kept[:] = hidden
            return self.parts[1](self.cuts[0](hidden))

    module = Keeping(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    trace(module)
    assert not any(name.startswith("_sg") for name in vars(kept))


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_fake_tensor_gives_a_shape_has_data(inference: bool) -> None:
    module, x = nn.Linear(WIDTH, WIDTH), torch.ones(2, WIDTH)
    with torch.inference_mode(inference), FakeTensors(module, None, CPU, trainable=False) as fakes:
        like = module(x)
        filled = [torch.zeros_like(like), like.new_ones(2, 3), x.type_as(like), x[:, :1].expand_as(like), x.to(like)]
        assert [each.tolist() for each in filled] == [
            [[0.0] * WIDTH] * 2,
            [[1.0] * 3] * 2,
            *[[[1.0] * WIDTH] * 2] * 3,
        ]
        assert is_fake(torch.randn_like(like))
        fakes.begin_stages()
        assert not is_fake(torch.randn_like(like))


@pytest.mark.parametrize("inference", [False, True])
def test_sizes_that_the_batch_decides_are_found_for_fake_tensors(inference: bool) -> None:
    module, x = nn.Linear(WIDTH, WIDTH), torch.ones(4, 3, WIDTH)
    lengths, mask = torch.tensor([3, 1, 2, 2]), torch.tensor([True, False, True, True])
    with torch.inference_mode(inference), FakeTensors(module, None, CPU, trainable=False):
        hidden = module(x)
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        padded, again = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        assert (packed.data.shape, packed.batch_sizes.tolist()) == ((8, WIDTH), [4, 3, 1])
        assert (padded.shape, again.tolist()) == ((4, 3, WIDTH), lengths.tolist())
        found = [hidden[mask], hidden.masked_select(mask[:, None, None]), hidden.repeat_interleave(lengths, 0)]
        assert [tuple(each.shape) for each in found] == [(3, 3, WIDTH), (9 * WIDTH,), (8, 3, WIDTH)]
        assert all(is_fake(each) for each in (packed.data, *found))
        assert hidden[mask.nonzero()[:, 0]].shape == (3, 3, WIDTH)
