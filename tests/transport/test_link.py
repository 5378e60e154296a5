"""Messages between neighbouring stages: their form, their order, and what happens when one side is gone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg._compat import default_store
from lightning_sg.errors import PartitionError, StageLostError
from lightning_sg.partition.fakes import fake_like
from lightning_sg.transport import (
    COMPRESSIONS,
    Activations,
    Compression,
    Downstream,
    Message,
    ProcessGrid,
    Residual,
    Target,
    Upstream,
    Watch,
    open_chain,
)
from lightning_sg.transport.away import Away
from lightning_sg.transport.message import End, Failed, TensorSpec
from tests.ranks import DEVICE, run_ranks

CPU = torch.device("cpu")
DTYPES = ["float32", "float64", "float16", "bfloat16", "complex64", "int64", "int32", "int16", "int8", "uint8", "bool"]

# ---------------------------------------------------------------------- the form of a message


def sent(message: Message) -> Any:
    return Message.decode(message.encode())


FULL = Activations(
    number=2**40,
    doing="training batch 17",
    fingerprint=2**32 - 1,
    wants_target=True,
    metrics={"net.1": {"loss": 0.1, "cosine": -1.0}, "net.3": {}},
)


MESSAGES = [
    Activations(),
    End(),
    FULL,
    Target(number=3, stop=True),
    Residual(number=4),
    Failed(reason="grün ∂ℓ/∂h 試験 🙂"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert sent(message) == message


def test_floats_arrive_exactly() -> None:
    metrics = {"cut": {"a": 0.1 + 0.2, "b": 1e-308, "c": float("inf")}}
    assert sent(Activations(metrics=metrics)).metrics == metrics


def test_the_forms_of_many_tensors_arrive() -> None:
    tensors = [torch.zeros(tuple(range(1, 1 + number % 4))) for number in range(60)]
    assert sent(Activations(tensors=tensors)).specs == [TensorSpec.of(tensor) for tensor in tensors]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_tensors_form_arrives(dtype: str, shape: tuple[int, ...], compression: Compression) -> None:
    tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    (spec,) = sent(Activations(tensors=[tensor], compression=compression)).specs
    received = spec.arrange(spec.empty(CPU))
    assert (spec.shape, spec.dtype, spec.requires_grad) == (shape, dtype, False)
    assert (received.shape, received.dtype) == (tensor.shape, tensor.dtype)


def test_whether_a_tensor_carries_a_gradient_arrives() -> None:
    specs = sent(Activations(tensors=[torch.zeros(2, requires_grad=True), torch.zeros(2)])).specs
    assert [spec.requires_grad for spec in specs] == [True, False]


def test_a_tensor_without_data_is_not_sent() -> None:
    with pytest.raises(PartitionError, match="of another stage, was to be sent in training batch 3"):
        Activations(doing="training batch 3", tensors=[torch.zeros(1), fake_like(torch.zeros(2))])


def over_the_wire(tensor: Tensor, compression: Compression) -> Tensor:
    spec = TensorSpec.of(tensor, compression)
    return spec.arrange(spec.parts(tensor))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 7, 11), (256,), (257,), (1000, 3)])
def test_int8_is_off_by_at_most_half_a_level_of_its_block(shape: tuple[int, ...]) -> None:
    tensor = 1e-6 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    blocks = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 256)).view(-1, 256)
    half = blocks.abs().amax(dim=1, keepdim=True) / 254
    difference = torch.nn.functional.pad((over_the_wire(tensor, "int8") - tensor).flatten(), (0, -tensor.numel() % 256))
    assert (difference.view(-1, 256).abs() <= half * (1 + 1e-5)).all()


def test_bf16_is_what_torch_rounds_to() -> None:
    tensor = torch.randn(7, 9).T
    received = over_the_wire(tensor, "bf16")
    assert torch.equal(received, tensor.bfloat16().float())
    assert received.stride() == tensor.stride()


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(compression: Compression) -> None:
    assert not over_the_wire(torch.zeros(300), compression).any()
    for value in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.ones(600)
        tensor[300] = value
        received = over_the_wire(tensor, compression)
        assert not received[256:512].isfinite().all()
        assert torch.equal(received[:256], torch.ones(256))
        assert torch.equal(received[512:], torch.ones(88))


def test_only_what_gets_smaller_is_rounded() -> None:
    for compression in COMPRESSIONS:
        for tensor in (torch.arange(5), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.complex64)):
            assert torch.equal(over_the_wire(tensor, compression), tensor)
    assert TensorSpec.of(torch.ones(2).half(), "bf16").compression == "full"
    assert TensorSpec.of(torch.ones(2).half(), "int8").compression == "int8"


@pytest.mark.parametrize(("compression", "share"), [("full", 1.0), ("bf16", 0.5), ("int8", 0.25 + 1 / 256)])
def test_how_many_bytes_are_sent(compression: Compression, share: float) -> None:
    tensor = torch.randn(64, 512)
    parts = TensorSpec.of(tensor, compression).parts(tensor)
    assert sum(part.numel() * part.element_size() for part in parts) == share * 4 * tensor.numel()


# ---------------------------------------------------------------------- between processes

NAMES = ["stage 0 (rank 0)", "stage 1 (rank 1)", "stage 2 (rank 2)"]


def connected(
    work: Callable[[Any, Any], Any],
    processes: int = 2,
    timeout: float = 20.0,
    ranks: list[int] | None = None,
    away: Away | None = None,
) -> list[Any]:
    """Calls ``work`` with the links of each process; rank 0 outlives the others, whose store it holds."""

    def run() -> Any:
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        order = tuple(ranks or range(processes))
        device, backend = (CPU, "gloo") if DEVICE == "cpu" else (torch.device(DEVICE, 0), "nccl")
        grid = ProcessGrid((order,), 0, order.index(dist.get_rank()), device, backend, timeout)
        chain = open_chain(grid, default_store(), Watch(timeout, away=away), NAMES[:processes])
        return work(chain.upstream, chain.downstream)

    return run_ranks(processes, run)


def pair(
    above: Callable[[Downstream], Any], below: Callable[[Upstream], Any], timeout: float = 20.0
) -> tuple[Any, Any]:
    """Runs the stage above a boundary and the one below it, each with its only link."""

    def work(upstream: Upstream | None, downstream: Downstream | None) -> Any:
        if downstream is not None:
            assert upstream is None
            return above(downstream)
        assert upstream is not None
        return below(upstream)

    first, second = connected(work, timeout=timeout)
    return first, second


def listed(tensors: Any) -> list[tuple[str, Any]]:
    """Tensors as plain values, to be compared in the parent process."""
    return [(str(tensor.dtype), tensor.tolist()) for tensor in tensors]


def test_messages_are_sent_ahead_of_the_receiver_and_asked_for_by_number() -> None:
    count = 9

    def above(link: Downstream) -> Any:
        for number in range(count):
            link.outbox.send(Activations(number=number, tensors=[torch.full((2,), float(number))]))
        dist.barrier()  # only now does the receiver ask for anything
        answers = [link.inbox.receive(Target, number, "an answer").doing for number in range(2)]
        link.close(20)
        return answers

    def below(link: Upstream) -> Any:
        dist.barrier()
        order = [count - 1, *range(count - 1)]
        received = [link.inbox.receive(Activations, number, "a batch") for number in order]
        for number in range(2):
            link.outbox.send(Target(number=number, doing=f"answer {number}"))
        link.close(20)
        return [(message.number, message.tensors[0].tolist()) for message in received]

    answers, received = pair(above, below)
    assert answers == ["answer 0", "answer 1"]
    assert received == [(number, [float(number)] * 2) for number in [count - 1, *range(count - 1)]]


def odd_tensors() -> list[Tensor]:
    table = torch.arange(12.0).reshape(3, 4)
    return [
        torch.empty(0, 3),
        table.T,
        torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.ones(2, 1, 3).transpose(0, 1),
        table[:, 1:3],
        torch.empty(0, dtype=torch.int64),
        torch.tensor(3.5),
        torch.ones(1, dtype=torch.bool).expand(4),
        table.bfloat16() / 3,
        table.requires_grad_() * 2,
        *((torch.arange(5) % 2).to(getattr(torch, dtype)) for dtype in DTYPES),
    ]


def test_tensors_of_every_kind_arrive_unchanged() -> None:
    def above(link: Downstream) -> None:
        link.outbox.send(Activations(number=0, tensors=odd_tensors()))
        link.close(20)

    def below(link: Upstream) -> Any:
        message = link.inbox.receive(Activations, 0, "a batch")
        link.close(20)
        return listed(message.tensors), [tuple(tensor.shape) for tensor in message.tensors]

    _, (values, shapes) = pair(above, below)
    assert values == listed(odd_tensors())
    assert shapes == [tuple(tensor.shape) for tensor in odd_tensors()]


def test_a_tensor_keeps_its_layout_in_memory() -> None:
    layouts = [
        lambda: torch.arange(12.0).reshape(3, 4).T,
        lambda: torch.ones(2, 2, 3, 4).to(memory_format=torch.channels_last),
        lambda: torch.ones(2, 3, 4).permute(2, 0, 1),
    ]

    def above(link: Downstream) -> None:
        link.outbox.send(Activations(number=0, tensors=[make() for make in layouts]))
        link.close(20)

    def below(link: Upstream) -> Any:
        message = link.inbox.receive(Activations, 0, "a batch")
        link.close(20)
        return [tensor.stride() for tensor in message.tensors]

    assert pair(above, below)[1] == [make().stride() for make in layouts]


def test_a_long_message_and_the_tensors_behind_it_arrive() -> None:
    metrics = {f"boundary {number} ∂": {"loss": number / 7} for number in range(200)}

    def above(link: Downstream) -> None:
        link.outbox.send(Activations(number=0, metrics=metrics, tensors=[torch.ones(2)]))
        link.outbox.send(Activations(number=1, tensors=[torch.zeros(3)]))
        link.close(20)

    def below(link: Upstream) -> Any:
        messages = [link.inbox.receive(Activations, number, "a batch") for number in range(2)]
        link.close(20)
        return messages[0].metrics, [listed(message.tensors) for message in messages]

    _, received = pair(above, below)
    assert received == (metrics, [listed([torch.ones(2)]), listed([torch.zeros(3)])])


def test_a_chain_has_a_link_to_each_neighbour_in_any_order_of_ranks() -> None:
    def work(upstream: Upstream | None, downstream: Downstream | None) -> Any:
        seen = [] if upstream is None else upstream.inbox.receive(Activations, 0, "a batch").doing.split()
        own = str(dist.get_rank())
        if downstream is not None:
            downstream.outbox.send(Activations(doing=" ".join([*seen, own])))
        for link in (upstream, downstream):
            if link is not None:
                link.close(20)
        return [*seen, own], upstream and upstream.neighbour, downstream and downstream.neighbour

    first, second, third = connected(work, processes=3, ranks=[2, 0, 1])
    assert second == (["2", "0", "1"], NAMES[1], None)
    assert first == (["2", "0"], NAMES[0], NAMES[2])
    assert third == (["2"], None, NAMES[1])


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lightning_sg")]


def test_closing_waits_until_the_neighbour_has_heard_everything() -> None:
    def above(link: Downstream) -> Any:
        for number in range(8):
            link.outbox.send(Activations(number=number, tensors=[torch.ones(100_000)]))
        link.close(20)
        for thread in own_threads():
            thread.join(20)
        return link.inbox.join(0), len(own_threads())

    def below(link: Upstream) -> Any:
        link.close(20)  # has asked for none of the messages yet
        return sum(link.inbox.receive(Activations, number, "a batch").tensors[0].sum().item() for number in range(8))

    assert pair(above, below) == ((True, 0), 800_000)


def lost(call: Callable[[], Any]) -> str:
    try:
        call()
    except StageLostError as error:
        return str(error)
    return ""


def test_a_neighbour_that_dies_is_named_to_who_waits_and_to_who_sends() -> None:
    def above(link: Downstream) -> Any:
        link.outbox.send(Activations(number=0))
        waiting = lost(lambda: link.inbox.receive(Target, 0, "the target of training batch 0"))

        def send_until_it_fails() -> None:
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                link.outbox.send(Activations(number=1, doing="training batch 1", tensors=[torch.ones(1000)]))

        return waiting, lost(send_until_it_fails)

    def below(link: Upstream) -> None:
        link.inbox.receive(Activations, 0, "a batch")
        os._exit(1)

    (waiting, sending), nothing = pair(above, below)
    assert nothing is None
    assert waiting.startswith("stage 1 (rank 1) is gone: its connection closed")
    assert waiting.endswith("This stage was waiting for the target of training batch 0.")
    assert sending.startswith("stage 1 (rank 1) is gone: training batch 1 could not be sent to it")


def test_what_a_neighbour_sent_before_it_failed_can_still_be_had() -> None:
    def above(link: Downstream) -> Any:
        first = lost(lambda: link.inbox.receive(Target, 1, "batch 1"))
        second = link.inbox.receive(Target, 0, "batch 0").doing
        dist.barrier()
        return first, second

    def below(link: Upstream) -> None:
        link.outbox.send(Target(number=0, doing="the last word"))
        link.fail("training batch 1", "ValueError: odd")
        dist.barrier()

    (error, last), _ = pair(above, below)
    assert error.startswith("stage 1 (rank 1) failed at training batch 1: ValueError: odd.")
    assert last == "the last word"


def test_a_stage_tells_its_neighbour_why_it_fails() -> None:
    def above(link: Downstream) -> str:
        message = lost(lambda: link.inbox.receive(Target, 0, "the target of training batch 3"))
        dist.barrier()
        return message

    def below(link: Upstream) -> None:
        link.fail("training batch 3", "ValueError: the loss is odd")
        dist.barrier()

    message, _ = pair(above, below)
    assert message == (
        "stage 1 (rank 1) failed at training batch 3: ValueError: the loss is odd. "
        "This stage was waiting for the target of training batch 3."
    )


def test_telling_a_dead_neighbour_is_no_error() -> None:
    def above(link: Downstream) -> str:
        message = lost(lambda: link.inbox.receive(Target, 0, "a target"))
        for _ in range(6):
            link.fail("training batch 0", "the neighbour is gone")
        return message

    def below(link: Upstream) -> None:
        os._exit(1)

    message, _ = pair(above, below)
    assert "is gone" in message


def test_a_silent_neighbour_is_reported_after_the_timeout_and_its_message_can_still_come() -> None:
    def above(link: Downstream) -> Any:
        began = time.monotonic()
        message = lost(lambda: link.inbox.receive(Target, 0, "the target of training batch 0"))
        waited = time.monotonic() - began
        dist.barrier()
        dist.barrier()
        return message, waited, link.inbox.receive(Target, 0, "a target").doing

    def below(link: Upstream) -> None:
        dist.barrier()
        link.outbox.send(Target(number=0, doing="late"))
        link.outbox.flush(10)
        dist.barrier()

    (message, waited, late), _ = pair(above, below, timeout=0.5)
    assert message.startswith("stage 1 (rank 1) did not send the target of training batch 0 within 0.5 s.")
    assert 0.5 <= waited < 10
    assert late == "late"
