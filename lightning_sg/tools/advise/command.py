"""``lightning-sg advise``: says whether the split of a configuration is worth it on this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_sg.arguments import checked, whole
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.tools.advise.advice import Advice, Trial
from lightning_sg.tools.advise.measure import LOG, SKIPPED, Measured, read_measured

#: What makes the same configuration plain backpropagation in one process.
PLAIN = ("--sg.boundaries=[]", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1")


def main(args: Sequence[str] | None = None) -> None:
    """Trains a few steps without and with each split, and prints a comparison and what to do.

    Args:
        args: The arguments after ``advise``; by default those of the process.

    Raises:
        SystemExit: If a training fails.
    """
    arguments, rest = parser().parse_known_args(args)
    if not any(each in ("-c", "--config") or each.startswith(("--config=", "--model")) for each in rest):
        parser().error("give --config FILE, or --model and --data, as to 'lightning-sg fit'")
    steps: int = arguments.steps
    trials = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(f"Training {SKIPPED + steps} steps by plain backpropagation, in one process ...", flush=True)
            plain = measure([*rest, *PLAIN], steps, Path(folder) / "plain")
            print("The same as the configuration says ...", flush=True)
            trials.append(Trial("as configured", None, measure(rest, steps, Path(folder) / "split")))
            for place, cut in enumerate(arguments.cut):
                names = [name.strip() for name in cut.split(",")]
                print(f"The same with boundaries {names} ...", flush=True)
                options = [*rest, f"--sg.boundaries=[{', '.join(names)}]"]
                trials.append(Trial(", ".join(names), names, measure(options, steps, Path(folder) / f"cut{place}")))
    except SyntheticGradientsError as error:
        raise SystemExit(str(error)) from None
    print(f"\n{Advice(plain, trials)}")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``advise`` itself."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg advise",
        usage="lightning-sg advise [--steps N] [--cut NAMES]... --config FILE [OPTIONS]",
        description="Trains a few steps of a configuration on this machine, by plain backpropagation in one process "
        "and as the configuration says, and compares time, waiting, memory, alignment and loss. All other options "
        "are those of 'lightning-sg fit'.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=_steps, default=40, help="how many steps are measured (default: 40)")
    parser.add_argument(
        "--cut",
        metavar="NAMES",
        action="append",
        default=[],
        help="also measure these boundaries, names with commas between them; may be repeated",
    )
    return parser


def _steps(value: str) -> int:
    try:
        return checked("advise", "--steps", int(value), whole(4, 100_000))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a whole number from 4 to 100,000, not {value!r}") from error


def measure(arguments: Sequence[str], steps: int, folder: Path) -> Measured:
    """Runs ``lightning-sg fit`` for a few steps.

    Args:
        arguments: Its options.
        steps: How many steps are timed, after some others.
        folder: A new folder, for what it writes.

    Raises:
        SyntheticGradientsError: If the training fails, with the end of what it printed.
    """
    folder.mkdir()
    options = [
        f"--trainer.max_steps={SKIPPED + steps}",
        "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger={pl.__name__}.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        f"--trainer.logger.name={LOG}",
        "--trainer.profiler=lightning_sg.Timeline",
        f"--trainer.profiler.dirpath={folder}",
        f"--trainer.profiler.skip={SKIPPED}",
        f"--trainer.profiler.batches={steps}",
        "--trainer.callbacks+=lightning_sg.tools.advise.memory.PeakMemory",
        f"--trainer.callbacks.folder={folder}",
    ]
    command = [sys.executable, "-m", "lightning_sg", "fit", *arguments, *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK")}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise SyntheticGradientsError(f"A training of {SKIPPED + steps} steps failed. It said:\n{ran.stdout[-3000:]}")
    return read_measured(folder)


__all__ = ["PLAIN", "main", "measure", "parser"]
