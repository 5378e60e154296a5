"""Cross-entropy over a sample of the classes, for large vocabularies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SampledSoftmax(nn.Module):
    r"""Estimates the cross-entropy over K classes from a few of them.

    The denominator contains the row's own class, the classes of up to ``samples`` labels of the batch, and at least as
    many others drawn uniformly. The drawn classes stand for all the rest: if m of R are drawn, :math:`\log(R / m)` is
    added to their logits. So frequent classes are counted exactly and only rare ones are estimated.
    Source: Jean et al. 2015, arXiv 1412.2007, section 3.

    The module draws from its own generator, seeded by torch's seed when the module was made and by the number of calls
    of :meth:`advance`. So equal predictors draw the same classes in every process, and the user's random numbers are
    not touched.

    Args:
        classes: The number of classes K, more than ``2 * samples``.
        samples: The number of labels of the batch whose classes are counted exactly.
    """

    def __init__(self, classes: int, samples: int) -> None:
        super().__init__()
        self.classes = classes
        self.samples = samples
        self.seed = torch.initial_seed() & (2**31 - 1)
        self.round = 0

    def forward(self, rows: Tensor, labels: Tensor, last: nn.Linear, smoothing: float) -> Tensor:
        """Returns the loss of each row.

        Args:
            rows: ``(P, D)``, the input of ``last`` for P rows.
            labels: ``(P,)`` in ``0 .. K-1``.
            last: The layer whose outputs are the logits.
            smoothing: The share of each label that is spread over all classes.

        Returns:
            ``(P,)``.
        """
        chosen, correction = self.draw(labels)
        logits = rows @ last.weight[chosen].T + (last.bias[chosen] + correction)
        logits = logits.masked_fill(chosen == labels.unsqueeze(1), -torch.inf)
        own = (rows * last.weight[labels]).sum(-1) + last.bias[labels]
        total = torch.cat([own.unsqueeze(1), logits], dim=1).logsumexp(1)
        if smoothing == 0:
            return total - own
        # The mean logit over all classes is the logit of the mean weight, so it needs no sampling.
        mean = rows @ last.weight.mean(0) + last.bias.mean()
        return total - (1 - smoothing) * own - smoothing * mean

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the classes.

        Args:
            labels: ``(P,)``.

        Returns:
            The classes, ``(2 * samples,)``, all different, and the corrections of their logits, of the same shape.
        """
        generator = torch.Generator(labels.device).manual_seed((self.seed << 31) + self.round)
        some = labels[:: max(1, -(-labels.numel() // self.samples))]
        present = torch.zeros(self.classes, device=labels.device, dtype=torch.float32).index_fill(0, some, 1.0)
        # Classes that are present have keys above all others, so the top keys are these and a uniform draw of the rest.
        # Their number is fixed, because counting the distinct labels would synchronize with the device.
        keys = present + torch.rand(self.classes, generator=generator, device=labels.device, dtype=torch.float32)
        chosen = keys.topk(2 * self.samples).indices
        known = present[chosen]
        rest, drawn = self.classes - present.sum(), 2 * self.samples - known.sum()
        return chosen, (1 - known) * (rest / drawn).log()

    def advance(self) -> None:
        """Draws other classes from now on."""
        self.round += 1

    def get_extra_state(self) -> dict[str, int]:
        """The state with which a resumed run draws the same classes."""
        return {"seed": self.seed, "round": self.round}

    def set_extra_state(self, state: Any) -> None:
        """Restores :meth:`get_extra_state`."""
        self.seed, self.round = int(state["seed"]), int(state["round"])


__all__ = ["SampledSoftmax"]
