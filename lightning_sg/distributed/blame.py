"""Says in an error which stage or rank it is about, where what raised it could not know."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.errors import NonFinitePredictionError, StageLostError, SyntheticGradientsError
from lightning_sg.transport import Chain, RunStore
from lightning_sg.transport.words import first_line

_PATIENCE = 3.0  # seconds in which the news of a failure comes
_SLICE = 0.1


@contextmanager
def blaming(status: ProcessStatus, chain: Chain) -> Iterator[None]:
    """Around a step or a backward pass.

    Args:
        status: Names this process.
        chain: Knows what has become of the others.

    Raises:
        StageLostError: In the place of an error of torch's collectives, which name nobody.
        NonFinitePredictionError: With the stage.
    """
    try:
        yield
    except NonFinitePredictionError as error:
        if "(rank" in str(error):
            raise
        raise NonFinitePredictionError(f"{status.name} at {status.doing}: {error}") from error
    except SyntheticGradientsError:
        raise
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        reason = who_failed(chain)
        raise StageLostError(
            f"{reason} {status.name} was averaging with its peers in other replicas at {status.doing} "
            f"({first_line(error)}).",
            reason,
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "processgroup"))


def who_failed(chain: Chain) -> str:
    """Which process has failed, as the neighbours and the store of the run know it."""
    found: list[str] = []
    deadline = time.monotonic() + _PATIENCE
    if chain.news is not None:  # in a thread: the store's host may be stopped
        threading.Thread(target=_ask, args=(chain.news, found, deadline), daemon=True).start()
    while time.monotonic() < deadline:
        lost = [link.inbox.lost for link in chain.links if link.inbox.lost is not None]
        if lost or found:
            return (lost or found)[0]
        time.sleep(_SLICE)
    return "A process of another replica is gone or took too long: its own output says why."


def _ask(news: RunStore, found: list[str], deadline: float) -> None:
    """Asks the store for processes that have said why they stop."""
    while time.monotonic() < deadline and not found:
        failed = news.failed()
        if failed:
            rank, reason = next(iter(failed.items()))
            found.append(f"rank {rank} failed: {reason}")
        elif not news.answers():
            found.append("rank 0, which keeps the store of the run, is gone: its own output says why.")
        time.sleep(_SLICE)


__all__ = ["blaming", "who_failed"]
