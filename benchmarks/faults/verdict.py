"""Judges how a disturbed training ended by what was to be expected of the fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from signal import SIGINT, SIGKILL
from typing import Protocol

from benchmarks.faults.outcome import Ending, Outcome

NAMED, UNCLEAR, HUNG, WRONG, SURVIVED = "named", "unclear", "hung", "silently wrong", "survived"
KINDS = (NAMED, UNCLEAR, HUNG, WRONG, SURVIVED)


@dataclass(frozen=True)
class Verdict:
    """The judgement.

    Attributes:
        kind: ``"named"``: every other rank ended with an error that names the one that failed, and its reason if it
            had one. ``"unclear"``: it ended, but not so. ``"hung"``: a rank had to be killed, or a process was left
            behind. ``"silently wrong"``: exit code 0 with other weights than an undisturbed run's, or a bad checkpoint.
            ``"survived"``: the weights of an undisturbed run, to the bit.
        why: What speaks for it.
    """

    kind: str
    why: str = ""


class Expectation(Protocol):
    """What is to be expected of a fault; follows from the fault alone."""

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """Judges.

        Args:
            outcome: How it ended.
            undisturbed: The checksum of the weights of the same training without a fault.
        """


@dataclass(frozen=True)
class Names:
    """All other ranks end with an error that names the rank that failed.

    Attributes:
        rank: The rank that failed.
        reason: A pattern of what every error also says, its own included.
        may_end: Whether others may also end well: they may need nothing more of it.
    """

    rank: int
    reason: str = ""
    may_end: bool = False

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        own = outcome.endings[self.rank]
        if self.reason and not re.search(self.reason, own.error):
            return Verdict(UNCLEAR, f"rank {self.rank} itself does not say {self.reason!r}: {_head(own)}")
        if self.reason and _is_aborted(own):
            return Verdict(UNCLEAR, f"rank {self.rank} aborted with exit code {own.code} after its own error")
        others = outcome.others(self.rank)
        well = [ending for ending in others if ending.digest]
        if well and not self.may_end:
            return Verdict(UNCLEAR, f"rank {well[0].rank} ended as if nothing had happened")
        patterns = [rf"\brank {self.rank}\b", *([self.reason] if self.reason else [])]
        failed = [ending for ending in others if not ending.digest]
        return _unless_unclear(failed, patterns, SURVIVED if others and not failed else NAMED)


@dataclass(frozen=True)
class Refuses:
    """All ranks end with an error that says what is wrong.

    Attributes:
        patterns: What every error says.
        may_be_harmless: Whether the weights may also be those of an undisturbed run: a flipped bit may mean nothing.
    """

    patterns: tuple[str, ...]
    may_be_harmless: bool = False

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        well = [ending for ending in outcome.endings.values() if ending.digest]
        if self.may_be_harmless and len(well) == len(outcome.endings):
            return Verdict(SURVIVED)
        if well:
            return Verdict(WRONG, f"rank {well[0].rank} ended as if nothing was wrong")
        return _unless_unclear(list(outcome.endings.values()), self.patterns, NAMED)


@dataclass(frozen=True)
class Fails:
    """Of all ranks that failed by themselves, one is named by all others. For causes that strike several ranks.

    Attributes:
        own: A pattern of the errors of those that failed by themselves.
    """

    own: str

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        if well := [ending for ending in outcome.endings.values() if ending.digest]:
            return Verdict(WRONG, f"rank {well[0].rank} ended as if nothing was wrong")
        failed = {
            e.rank for e in outcome.endings.values() if re.search(self.own, e.error) and "LostError" not in e.error
        }
        if not failed:
            return Verdict(UNCLEAR, f"no rank says {self.own!r}: {_head(outcome.endings[0])}")
        others = [ending for ending in outcome.endings.values() if ending.rank not in failed]
        return _unless_unclear(others, [rf"\brank ({'|'.join(map(str, sorted(failed)))})\b", self.own], NAMED)


@dataclass(frozen=True)
class Survives:
    """A pause that nobody notices: all ranks have the weights of an undisturbed run."""

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        failed = [ending for ending in outcome.endings.values() if not ending.digest]
        if failed:
            return Verdict(UNCLEAR, f"rank {failed[0].rank} did not survive: {_head(failed[0])}")
        return Verdict(SURVIVED)


@dataclass(frozen=True)
class Launched:
    """The process that started all ranks ends with an error that names the rank: it ends the other ranks itself.

    Attributes:
        rank: The rank that failed.
    """

    rank: int

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        return _unless_unclear([outcome.endings[0]], [rf"\b(rank|process) {self.rank}\b"], NAMED)


@dataclass(frozen=True)
class Ends:
    """All ranks were told to end, and do; there is nobody left to name anybody."""

    def judge(self, outcome: Outcome, undisturbed: str) -> Verdict:
        """See :class:`Expectation`."""
        if (found := _disaster(outcome, undisturbed)) is not None:
            return found
        # At Ctrl-C, Lightning's launcher ends what it has started by SIGKILL; and Python ends itself by SIGINT where
        # the signal meets a process that already ends by an error, outside of what Lightning catches.
        right = (-SIGKILL, -SIGINT)
        aborted = [each for each in outcome.endings.values() if _is_aborted(each) and each.code not in right]
        if aborted:
            return Verdict(UNCLEAR, f"rank {aborted[0].rank} aborted with exit code {aborted[0].code}")
        return Verdict(NAMED)


def _disaster(outcome: Outcome, undisturbed: str) -> Verdict | None:
    """What no fault excuses."""
    for ending in outcome.endings.values():
        if ending.killed:
            deaf = ", and did not answer SIGTERM" if ending.deaf else ""
            return Verdict(HUNG, f"rank {ending.rank} had to be killed{deaf}")
    if outcome.left:
        return Verdict(HUNG, f"{outcome.left} processes were left behind")
    for ending in outcome.endings.values():
        if ending.digest and undisturbed and ending.digest != undisturbed:
            return Verdict(WRONG, f"rank {ending.rank} ended well, with other weights")
    if outcome.executed:
        return Verdict(WRONG, "code from the checkpoint was run")
    if outcome.checkpoints:
        return Verdict(WRONG, f"bad checkpoint: {outcome.checkpoints[0]}")
    return None


def _unless_unclear(endings: list[Ending], patterns: list[str] | tuple[str, ...], otherwise: str) -> Verdict:
    for ending in endings:
        if _is_aborted(ending):
            return Verdict(UNCLEAR, f"rank {ending.rank} aborted with exit code {ending.code}")
        for pattern in patterns:
            if not re.search(pattern, ending.error, re.IGNORECASE):
                return Verdict(UNCLEAR, f"rank {ending.rank} does not say {pattern!r}: {_head(ending)}")
        if ending.code == 0:
            return Verdict(UNCLEAR, f"rank {ending.rank} ended with exit code 0 after an error: {_head(ending)}")
    return Verdict(otherwise)


def _is_aborted(ending: Ending) -> bool:
    return ending.code is not None and (ending.code < 0 or ending.code == 134)


def _head(ending: Ending) -> str:
    """The first line of an error; without one, the last line of the log."""
    lines = ending.error.strip().splitlines() or [f"no error, exit code {ending.code}", *ending.log.splitlines()[-1:]]
    return " / ".join(lines[:1] if ending.error.strip() else lines)[:400]


__all__ = [
    "HUNG",
    "KINDS",
    "NAMED",
    "SURVIVED",
    "UNCLEAR",
    "WRONG",
    "Ends",
    "Expectation",
    "Fails",
    "Launched",
    "Names",
    "Refuses",
    "Survives",
    "Verdict",
]
