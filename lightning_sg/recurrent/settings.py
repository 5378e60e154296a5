"""The user's options for boundaries in time."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sg.arguments import check_fields, number, whole


@dataclass(frozen=True)
class ThroughTime:
    r"""How boundaries in time use and learn synthetic gradients.

    The target for the end of chunk t is the gradient at the start of chunk t + 1: that of the chunk's loss plus, by
    bootstrapping, the synthetic gradient at its end, propagated back to its start. The error :math:`δ_t`, target minus
    prediction, also teaches earlier chunks: k chunks before, it adds :math:`(γλ)^k δ_t \, ∂h_t / ∂h_{t-k}` to what is
    learned. This is BP(λ) of Pemberton & Costa 2024 (arXiv 2401.07044). With λ = 0, predictors learn from the one-step
    target alone; with λ = 1, from what later chunks really send back, without bias.

    Args:
        scale: γ, the factor on the synthetic gradient of a state; 0.1 as in Jaderberg et al. 2017. It does not apply to
            messages, because no message depends on an earlier one.
        trace_decay: λ, 0 to 1.
        chunks: How many chunks learn from each target, at most 10,000. With ``trace_decay=1``, n chunks give the n-step
            target.
        auxiliary: Weight of the auxiliary task of Jaderberg et al. 2017: a second predictor predicts the synthetic
            gradient at the end of a chunk from the state at its start, and the gradient of its loss is added to the
            target. 0 for none; with 1, predicting zero costs as much as a loss of 1.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a value is out of range.
    """

    scale: float = 0.1
    trace_decay: float = 0.0
    chunks: int = 16
    auxiliary: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            "ThroughTime",
            self,
            scale=number(above=0, most=1),
            trace_decay=number(least=0, most=1),
            chunks=whole(1, 10_000),
            auxiliary=number(least=0, most=1e6),
        )


__all__ = ["ThroughTime"]
