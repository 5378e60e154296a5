"""Says in an error which stage or rank it is about, where what raised it could not know."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.errors import NonFinitePredictionError, StageLostError, SyntheticGradientsError
from lightning_sg.replicas import is_of_a_collective
from lightning_sg.transport import Chain, ProcessGrid
from lightning_sg.transport.news import News
from lightning_sg.words import first_line

_PATIENCE = 3.0  # seconds in which the news of a failure comes
_SLICE = 0.1


@contextmanager
def blaming(status: ProcessStatus) -> Iterator[None]:
    """Around a step or a backward pass.

    Args:
        status: Names this process, and finds out what has become of the others.

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
        if not is_of_a_collective(error):
            raise
        reason = status.blame()
        raise StageLostError(
            f"{reason} {status.name} was averaging with its peers in other replicas at {status.doing} "
            f"({first_line(error)}).",
            reason,
        ) from error


def who_failed(chain: Chain, grid: ProcessGrid) -> str:
    """Which process has failed, as the neighbours and the store of the run know it.

    Args:
        chain: Knows what has become of the neighbours, and where the store is.
        grid: Knows with which ranks this process met.
    """
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
        if news.silent >= _PATIENCE / 2:
            return "rank 0, which keeps the store of the run, does not answer: it was stopped, or is cut off."
    others = [row[grid.position] for row in grid.stage_ranks if row[grid.position] != grid.rank]
    which = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {', '.join(map(str, others))}"
    return f"{which}, with the same stage in another replica, is gone or took too long: its own output says why."


__all__ = ["blaming", "who_failed"]
