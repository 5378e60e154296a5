"""Says in an error which stage or rank it is about, where what raised it could not know."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.errors import NonFinitePredictionError, StageLostError, SyntheticGradientsError
from lightning_sg.transport import Chain
from lightning_sg.transport.news import News
from lightning_sg.words import first_line

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
    deadline = time.monotonic() + _PATIENCE
    with News(chain.news) as news:
        while time.monotonic() < deadline:
            for link in chain.links:
                if link.inbox.lost is not None:
                    return link.inbox.lost
            for rank, reason in news.failed.items():
                return f"rank {rank} failed: {reason}"
            if news.store_gone:
                return "rank 0, which keeps the store of the run, is gone: its own output says why."
            time.sleep(_SLICE)
    return "A process of another replica is gone or took too long: its own output says why."


__all__ = ["blaming", "who_failed"]
