"""``python -m tests.clients CLIENT FILE``: pickles to the file what each run of the client gave, or what it raised.

A program of its own imports one package only, and with it the Lightning that the package imports.
"""

import logging
import pickle
import sys
from pathlib import Path

import torch

from tests.clients.runs import all_runs

if __name__ == "__main__":
    name, out = sys.argv[1:]
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    Path(out).write_bytes(pickle.dumps(all_runs(name)))
