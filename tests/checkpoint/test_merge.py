"""One ordinary checkpoint made of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sg import SyntheticGradientStrategy
from lightning_sg.checkpoint.sharded import merge
from lightning_sg.cli import main
from tests.checkpoint.shards import train
from tests.models import Classifier, assert_same_state
from tests.ranks import run_ranks


class Tied(Classifier):
    """Has a weight under two names, an unused parameter and an unused buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6][0].weight = self.net[4][0].weight
        self.unused = nn.Parameter(torch.arange(3.0))
        self.register_buffer("noted", torch.arange(2))
        self.alias = self.net[0]  # which gives its BatchNorm's buffers two names

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = "kept"


def test_merged_shards_are_the_checkpoint_of_one_process(tmp_path: Path) -> None:
    train(1, tmp_path / "one", make=Tied)
    run_ranks(2, lambda: train(2, tmp_path / "two", make=Tied))
    one = torch.load(tmp_path / "one" / "last.ckpt", weights_only=False)
    two = merge(tmp_path / "two" / "last.ckpt")
    assert two["own"] == "kept"
    assert {key for key in two if two[key] or one.get(key)} - {"optimizer_states"} >= {"state_dict", "loops", "epoch"}
    assert_same_state(one["state_dict"], two["state_dict"])
    (own,), (merged,) = one["optimizer_states"], two["optimizer_states"]
    assert own["param_groups"] == merged["param_groups"]
    torch.testing.assert_close(merged["state"], own["state"], rtol=1e-5, atol=1e-5)
    plain = Tied()
    plain.load_state_dict(two["state_dict"])


def test_the_command_refuses_what_is_no_folder_of_shards_and_overwrites_nothing(tmp_path: Path) -> None:
    run_ranks(2, lambda: train(2, tmp_path / "shards"))
    with pytest.raises(SystemExit, match="is not a folder of shards"):
        main(["merge", str(tmp_path), str(tmp_path / "a")])
    (tmp_path / "there").touch()
    with pytest.raises(SystemExit, match=r"exists; nothing was written"):
        main(["merge", str(tmp_path / "shards" / "last.ckpt"), str(tmp_path / "there")])
    with pytest.raises(ValueError, match="'whole' or 'sharded', not 'shards'"):
        SyntheticGradientStrategy(checkpoint="shards")  # type: ignore[arg-type]
