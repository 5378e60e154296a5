"""What can be chosen about boundaries in time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThroughTime:
    r"""How synthetic gradients at boundaries in time are used and learned.

    The target of the prediction at the end of chunk t is the gradient at the start of chunk t + 1: of that chunk's
    loss, and of the synthetic gradient at its end, as seen from its start (bootstrapping). With an error
    :math:`δ_t` of target less prediction, the chunk k before is given :math:`(γλ)^k δ_t \, ∂h_t / ∂h_{t-k}` of it to
    learn too, which is BP(λ) of Pemberton & Costa 2024 (arXiv 2401.07044): λ = 0 is the one-step target alone, λ = 1
    what later chunks really bring, free of bias.

    Args:
        scale: γ, by which the synthetic gradient of a state is multiplied before it is used; 0.1 as in Jaderberg et
            al. 2017. That of a message, which no later one depends on, is used whole.
        trace_decay: λ, 0 to 1.
        chunks: How many chunks learn from each target. With ``trace_decay=1`` and n chunks it is the n-step target.
        auxiliary: The weight of an auxiliary task, Jaderberg et al. 2017: from the state at the start of a chunk a
            second predictor foretells the synthetic gradient at its end, and what would make that easier is added to
            the target. 0 for none; at 1 a complete failure costs as much as a loss of 1.

    Raises:
        ValueError: If one is out of range.
    """

    scale: float = 0.1
    trace_decay: float = 0.0
    chunks: int = 16
    auxiliary: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.scale <= 1 and 0 <= self.trace_decay <= 1 and self.chunks >= 1 and self.auxiliary >= 0):
            raise ValueError(
                "ThroughTime needs 0 < scale <= 1, 0 <= trace_decay <= 1, chunks >= 1 and auxiliary >= 0, not "
                f"{self.scale}, {self.trace_decay}, {self.chunks} and {self.auxiliary}."
            )


__all__ = ["ThroughTime"]
