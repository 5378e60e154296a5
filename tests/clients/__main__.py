"""``python -m tests.clients CLIENT FILE [SEED ...]``: pickles what each run of the client gave, or what it raised.

For each seed it trains three times more, for as long as it takes to compare plain and decoupled training: ``"seeds"``.

A program of its own imports one package only, and with it the Lightning that the package imports.
"""

import logging
import pickle
import sys
from pathlib import Path

import torch

from tests.clients.runs import all_runs, long_runs

if __name__ == "__main__":
    name, out, *seeds = sys.argv[1:]
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    results = all_runs(name)
    results["seeds"] = {int(seed): long_runs(name, int(seed)) for seed in seeds}
    Path(out).write_bytes(pickle.dumps(results))
