"""Which stage each operation of a traced step is in, also where a step runs the network several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_sg.partition.trace import Leak, TurnedBack
from lightning_sg.partition.uses import SELECTING


@dataclass(eq=False)
class Note:
    """One operation of a traced step that depends on parameters, buffers or activations; or what crossed a boundary.

    Attributes:
        stage: The stage that it is in, as far as the step has shown.
        made_by: The submodule that it is in.
        names: The parameters and buffers that it uses.
        inputs: What else it uses.
        crossed: Whether it is what crossed a boundary.
        free: Whether it depends on buffers and the batch only, so that it is in no stage.
        reach: The latest stage that it depends on, going by what crossed boundaries.
        unsure: Whether it depends on a stage after the one that it seems to be in.
    """

    stage: int
    made_by: str
    names: Sequence[str] = ()
    inputs: Sequence[Use] = ()
    crossed: bool = False
    free: bool = False
    reach: int = 0
    unsure: bool = False

    def __post_init__(self) -> None:
        if self.crossed:
            self.reach = self.stage
        for use in self.inputs:
            if use.counts:
                self.reach = max(self.reach, use.note.reach)
                self.stage = max(self.stage, 0 if use.note.free else use.note.stage)

    def needs(self) -> list[Note]:
        """The operations whose values it uses."""
        return [use.note for use in self.inputs if use.counts]


@dataclass(frozen=True)
class Use:
    """An operation's use of what another has computed.

    Attributes:
        note: The other.
        operation: The torch operation that uses it.
        shape: The shape of what is used.
        differentiable: Whether a gradient flows back through this use.
        makers: The submodules that took part in computing it.
        counts: Whether its values are used, and not its shape, dtype or device only.
    """

    note: Note
    operation: str
    shape: tuple[int, ...]
    differentiable: bool
    makers: frozenset[str] = frozenset()
    counts: bool = True


@dataclass
class Notes:
    """The operations of a step in order.

    A step goes from boundary to boundary, so what comes after one is in the stage after it. Where it runs the network
    again, this shows when it comes to a boundary that it has crossed: what the tensors there were computed from, since
    anything has crossed a boundary, is in the stage before that boundary.

    Attributes:
        notes: The operations.
        turned_back: What comes to a boundary from a stage after it.
        since: Where the operations begin that came after the last crossing.
        returned: The operations whose results the step has returned; ``None`` if it has not come to its end.
    """

    notes: list[Note] = field(default_factory=list)
    since: int = 0
    turned_back: list[TurnedBack] = field(default_factory=list)
    returned: list[Note] | None = None

    def add(self, note: Note) -> Note:
        """Takes in the next operation."""
        self.notes.append(note)
        if note.crossed:
            self.since = len(self.notes)
        return note

    def claim(self, sources: Iterable[Note], stage: int, order: Sequence[str]) -> None:
        """A boundary has been reached again: finds what was computed for it.

        Args:
            sources: What the tensors that cross it come from.
            stage: The stage before the boundary.
            order: The boundaries in the order of the data.
        """
        pending, seen, claimed = list(sources), set[int](), set[int]()
        latest = max((note for note in pending), key=lambda note: note.reach, default=None)
        if latest is not None and latest.reach > stage:
            self.turned_back.append(TurnedBack(order[stage], order[latest.reach - 1], latest.made_by))
        while pending:
            note = pending.pop()
            if id(note) in seen or note.crossed or note.stage <= stage:
                continue
            seen.add(id(note))
            pending.extend(note.needs())
            if note.reach <= stage:
                note.stage = stage
                claimed.add(id(note))
            else:
                note.unsure = True
        for note in self.notes[self.since :]:  # what else was made of it meanwhile
            if note.reach <= stage < note.stage and any(id(need) in claimed for need in note.needs()):
                note.stage = stage
                claimed.add(id(note))

    def uses(self) -> dict[str, set[int]]:
        """For each parameter and buffer that was used, the stages that used it."""
        found: dict[str, set[int]] = {}
        for note in self.notes:
            if not note.unsure:
                for name in note.names:
                    found.setdefault(name, set()).add(note.stage)
        for note in self.notes:
            for name in note.names if note.unsure else ():
                found.setdefault(name, {note.stage})  # elsewhere it is known where the layer is
        return found

    def leaks(self, crossed: Mapping[int, frozenset[str]]) -> list[Leak]:
        """The activations that go around a boundary.

        Args:
            crossed: For the number of each boundary, the makers of what crossed it.
        """
        found, idle = [], self._idle()
        for note in self.notes:
            for use in () if id(note) in idle else note.inputs:
                made = use.note
                if made.free or not use.counts or made.stage >= note.stage or note.unsure:
                    continue
                makers = tuple(sorted(use.makers))
                found.append(
                    Leak(
                        *(made.stage, made.made_by, note.stage, note.made_by),
                        use.operation,
                        use.shape,
                        use.differentiable,
                        apart=() if use.makers & crossed[made.stage] else makers,
                        makers=makers,
                    )
                )
        return found

    def _idle(self) -> set[int]:
        """The operations that only select parts of a tensor, of which nothing comes."""
        if self.returned is None:
            return set()
        needed, idle = {id(note) for note in self.returned}, set[int]()
        for note in reversed(self.notes):
            selects = bool(note.inputs) and all(use.operation in SELECTING for use in note.inputs)
            if selects and not note.crossed and id(note) not in needed:
                idle.add(id(note))
            else:
                needed.update(id(need) for need in note.needs())
        return idle


__all__ = ["Note", "Notes", "Use"]
