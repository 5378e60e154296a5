"""Takes from a batch the features that input predictors use: its input, and no labels unless the user names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import tree_leaves
from lightning_sg.batch.chunks import content_of
from lightning_sg.batch.context import LABEL_KEYS, ContextSource
from lightning_sg.batch.entries import entry_of
from lightning_sg.errors import SyntheticGradientsError


def features_of(batch: Any, source: ContextSource) -> Tensor:
    """Takes the features from a batch.

    Args:
        batch: The batch, on the stage's device.
        source: ``"auto"``: the first tensor in the batch; in a dict, the first one whose name is not a usual name of
            labels. Another string or a number: that key or index. A callable: its result for the batch.

    Returns:
        A float32 tensor ``(N, ...)``, detached.

    Raises:
        SyntheticGradientsError: If there is no such entry, or it is not a floating-point, uint8 or bool tensor with a
            batch dimension.
    """
    assert source is not None
    option = f"SyntheticInputs(source={source!r})"
    batch = content_of(batch)
    features = _first_tensor(batch) if source == "auto" else entry_of(batch, source, option)
    if not isinstance(features, Tensor) or features.ndim == 0:
        found = f"a {type(features).__name__}" if not isinstance(features, Tensor) else "a scalar"
        raise SyntheticGradientsError(
            f"{option} finds {found} in the batch where a tensor (N, ...) is needed. Name the input: a key, an index, "
            "or a function of the batch."
        )
    if not (features.is_floating_point() or features.dtype in (torch.uint8, torch.bool)):
        raise SyntheticGradientsError(
            f"{option} finds a tensor of {features.dtype} in the batch. Indices of classes or tokens "
            "say little as they are; give a function that encodes them, such as "
            "`source=lambda batch: one_hot(batch['tokens'], 100).float()`."
        )
    return features.detach().float()


def _first_tensor(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    return next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)


__all__ = ["features_of"]
