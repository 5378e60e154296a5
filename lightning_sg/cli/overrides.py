"""Options of SyntheticGradients on the command line, on top of those in a configuration: ``--sg.delay 3``."""

from __future__ import annotations

from typing import Any

from jsonargparse import SUPPRESS, Namespace

from lightning_sg.callback import SyntheticGradients
from lightning_sg.lightning_api import LightningArgumentParser

#: The group of options; they are also a section of a configuration.
KEY = "sg"

_PATH = "lightning_sg.SyntheticGradients"


def add_options(parser: LightningArgumentParser) -> None:
    """Adds ``--sg.*``: every option of the callback, none with a default, so that only what is given is changed."""
    group = parser.add_argument_group(
        f"Options of SyntheticGradients: --{KEY}.* change what the configuration's callback says, or add the callback"
    )
    group.add_class_arguments(SyntheticGradients, KEY, as_group=False, instantiate=False)
    for action in parser._actions:  # nested groups have no setter of their own
        if action.dest.startswith(f"{KEY}."):
            action.default = SUPPRESS


def apply_options(config: Namespace) -> None:
    """Moves what ``--sg.*`` say into the callback among the trainer's; without a callback there, adds one.

    Args:
        config: The configuration of a command; changed.
    """
    given = config.pop(KEY, None)
    if not given:
        return
    callbacks = config.trainer.callbacks
    callbacks = [] if callbacks is None else callbacks if isinstance(callbacks, list) else [callbacks]
    mine = [each for each in callbacks if _is_mine(each)]
    if not mine:
        mine = [Namespace(class_path=_PATH, init_args=Namespace())]
        callbacks = [*callbacks, *mine]
    for callback in mine:
        callback.init_args = merged(callback.get("init_args") or Namespace(), given)
    config.trainer.callbacks = callbacks


def _is_mine(callback: Any) -> bool:
    path = callback.get("class_path", "") if isinstance(callback, Namespace) else ""
    return path.startswith("lightning_sg.") and path.endswith(f".{SyntheticGradients.__name__}")


def merged(below: Any, above: Any) -> Any:
    """One configuration on top of another.

    Args:
        below: What holds where ``above`` says nothing.
        above: What holds otherwise. An object of another class takes the place of the whole object below it.
    """
    if not (isinstance(below, Namespace) and isinstance(above, Namespace)):
        return above
    if below.get("class_path") != above.get("class_path"):
        return above
    result = Namespace(**vars(below))
    for key, value in vars(above).items():
        result[key] = merged(vars(below).get(key), value)
    return result


__all__ = ["KEY", "add_options", "apply_options", "merged"]
