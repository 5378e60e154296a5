"""A fault: what happens, in which rank and at which moment. ``Fault.at(rank=1, step=5).by(SIGKILL)``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: Moments that are no hook of Lightning's.
START = "start"  #: before the process meets the others
CONNECTING = "connecting"  #: the processes know each other, the links between neighbours are not open yet
GATHERING = "gathering"  #: between the first and the second weight that is gathered for a checkpoint
END = "end"  #: after ``fit``, when nobody is waited for any more
#: From here on a rank may already have all that it needs from the others.
ENDINGS = ("on_fit_end", "teardown", END)


@dataclass(frozen=True)
class Action:
    """What happens to the process.

    Attributes:
        name: In words, for tables.
        seconds: For a pause or an outage, how long it lasts; ``None`` for good.
    """

    name: str
    seconds: float | None = None

    def __call__(self) -> None:
        """Runs in the process at the moment of the fault; what is done from outside, the runner does."""


@dataclass(frozen=True)
class Signal(Action):
    """The process gets a signal; a SIGCONT follows a SIGSTOP after ``seconds``."""

    number: int = signal.SIGKILL

    def __call__(self) -> None:
        """Sends it."""
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Raising(Action):
    """The user's code raises."""

    error: BaseException = field(default_factory=RuntimeError)

    def __call__(self) -> None:
        """Raises it."""
        raise self.error


@dataclass(frozen=True)
class Exiting(Action):
    """The process ends by ``os._exit``, or by ``sys.exit``."""

    code: int = 1
    at_once: bool = True

    def __call__(self) -> None:
        """Ends the process."""
        if self.at_once:
            os._exit(self.code)
        sys.exit(self.code)


@dataclass(frozen=True)
class Hanging(Action):
    """The user's code does not return."""

    def __call__(self) -> None:
        """Sleeps without end."""
        while True:
            time.sleep(60)


@dataclass(frozen=True)
class Filling(Action):
    """The disk of the checkpoints is full from now on, but for ``spare`` bytes."""

    folder: Path = Path()
    spare: int = 0

    def __call__(self) -> None:
        """Writes until nothing more fits."""
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            size = 0
            try:
                while True:
                    size += filler.write(bytes(4096))
            except OSError:
                filler.truncate(max(0, size - self.spare))


@dataclass(frozen=True)
class Fault:
    """One fault. Begin with :meth:`at`, end with :meth:`by`.

    Attributes:
        rank: The rank that it happens to.
        hook: A hook of Lightning's, or one of the moments above.
        step: The first global step at which the hook counts.
        delay: Seconds from the hook to the fault; the process works on meanwhile.
        action: What happens.
    """

    rank: int
    hook: str
    step: int = 0
    delay: float = 0.0
    action: Action = Action("nothing")

    @staticmethod
    def at(rank: int, step: int = 0, hook: str = "training_step") -> Fault:
        """The moment: a hook of Lightning's in one rank, from a step on."""
        return Fault(rank, hook, step)

    def after(self, seconds: float) -> Fault:
        """Some time later, wherever the process is then. For signals and ``exit_with``."""
        return replace(self, delay=seconds)

    def by(self, what: Action | int, seconds: float | None = None) -> Fault:
        """What happens: an action, or the number of a signal."""
        if isinstance(what, int):
            what = Signal(signal.Signals(what).name, seconds, what)
        return replace(self, action=what)

    @property
    def is_ending(self) -> bool:
        """Whether the other ranks may end well without this one."""
        return self.hook in ENDINGS

    @property
    def is_pause(self) -> bool:
        """Whether the process, or its link, is back after a while."""
        return self.action.seconds is not None

    @property
    def keeps(self) -> bool:
        """Whether the fault itself keeps its rank from ending."""
        stopped = isinstance(self.action, Signal) and self.action.number == signal.SIGSTOP
        return isinstance(self.action, Hanging) or (stopped and not self.is_pause)

    def strike(self, note: Path) -> None:
        """Lets it happen to this process.

        Args:
            note: The file that tells the runner; its time stamp is that of the fault.
        """
        if self.delay:
            threading.Thread(target=self._strike_later, args=(note,), daemon=True).start()
            return
        note.touch()
        self.action()

    def _strike_later(self, note: Path) -> None:
        time.sleep(self.delay)
        note.touch()
        self.action()

    def __str__(self) -> str:
        step = f" at step {self.step}" if self.step else ""
        later = f", {1000 * self.delay:.0f} ms later" if self.delay else ""
        lasts = f" for {self.action.seconds:g} s" if self.action.seconds is not None else ""
        return f"rank {self.rank}, {self.hook}{step}{later}: {self.action.name}{lasts}"


class Trap:
    """Waits in a process for the fault's moment, and strikes: once, unless it raises.

    Args:
        fault: The fault.
        note: See :meth:`Fault.strike`.
    """

    def __init__(self, fault: Fault, note: Path) -> None:
        self._fault = fault
        self._note = note
        self._sprung = False

    def reach(self, hook: str, step: int = 0) -> None:
        """The process has come to a hook."""
        # A step may be run ahead of its time without data, where nobody hears what it raises: code raises again.
        ready = not self._sprung or isinstance(self._fault.action, Raising)
        if hook == self._fault.hook and step >= self._fault.step and ready:
            self._sprung = True
            self._fault.strike(self._note)

    def wrap(self, kind: type[Any], hook: str) -> type[Any]:
        """A subclass of a module or a callback that comes to the trap in that hook."""
        original = getattr(kind, hook)

        def reached(this: Any, *args: Any, **kwargs: Any) -> Any:
            trainer = this._trainer if hasattr(this, "_trainer") else args[0]
            self.reach(hook, 0 if trainer is None else trainer.global_step)
            return original(this, *args, **kwargs)

        return type(kind.__name__, (kind,), {hook: reached, "__module__": kind.__module__})


def raising(error: BaseException) -> Action:
    """The user's code raises ``error``."""
    return Raising(type(error).__name__, None, error)


def exit_with(code: int) -> Action:
    """The process is gone at once, by ``os._exit``."""
    return Exiting("os._exit", None, code)


def leaving(code: int) -> Action:
    """The user's code calls ``sys.exit``."""
    return Exiting("sys.exit", None, code, at_once=False)


def filling(folder: Path, spare: int = 0) -> Action:
    """The disk is full, but for ``spare`` bytes."""
    return Filling("full disk", None, folder, spare)


def unplugging(seconds: float | None = None) -> Action:
    """The rank's network device goes down; the runner does it."""
    return Action("link down", seconds)


#: The user's code never returns.
hanging = Hanging("hang")
#: Every process gets SIGINT, as from a terminal; the runner does it.
interrupting_all = Action("SIGINT to all")

__all__ = [
    "CONNECTING",
    "END",
    "ENDINGS",
    "GATHERING",
    "START",
    "Action",
    "Fault",
    "Filling",
    "Raising",
    "Signal",
    "Trap",
    "exit_with",
    "filling",
    "hanging",
    "interrupting_all",
    "leaving",
    "raising",
    "unplugging",
]
