"""How often steps cross the boundaries, as far as that can be told before they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_sg._compat import tree_flatten
from lightning_sg.distributed.stage import Stage
from lightning_sg.partition.counting import Counts, count_crossings

_REMEMBERED = 64  # kinds of batches of one step; what comes after is taken for one of these
_WORDS = 2


class ForeseenCrossings:
    """Tells a process when its part of a step is over, so that it need not run the code of later stages.

    A step is looked at the first time that it is given a batch of a form that it has not had, see
    :func:`count_crossings`. If all that is seen crosses each boundary equally often, such steps end with the last of
    these crossings. If not, they run on, as they may come back.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Any, ...], Counts] = {}

    def most(self, stage: Stage, name: str, arguments: Any, run: Callable[[int], Any]) -> Mapping[str, int] | None:
        """How often a step may cross each boundary; ``None`` if that is not known.

        Args:
            stage: This process.
            name: The step: ``"training_step"``, ...
            arguments: What it is given.
            run: Calls it as the one that comes so many batches later.
        """
        session = stage.session
        kind = (name, bool(session.module.trainer.sanity_checking), _form_of(arguments))
        known = [counts for key, counts in self._counts.items() if key[0] == name]
        if kind not in self._counts and len(known) < _REMEMBERED:
            found = count_crossings(session.module, session.boundaries.sites, run, stage.grid.device)
            self._counts[kind] = found
            known.append(found)
        together = known[0]
        for counts in known[1:]:
            together = together.joined(counts)
        if together.same:
            return together.most
        own = self._counts.get(kind)
        if own is not None and own.same and all(counts.same for counts in known):
            return own.most  # how often depends on the form of the batch, and on that alone
        return None


def _form_of(arguments: Any) -> Any:
    """What of a step's arguments says how they are built, but not their sizes and numbers."""
    leaves, structure = tree_flatten(arguments)
    words = [leaf for leaf in leaves if isinstance(leaf, str)]
    kinds = tuple((type(leaf), leaf.ndim) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
    flags = tuple(leaf for leaf in leaves if isinstance(leaf, bool))
    # A word or two may say what to do with a batch; more are a part of the data.
    return str(structure), kinds, flags, tuple(words) if len(words) <= _WORDS else ()


__all__ = ["ForeseenCrossings"]
