"""Marks where nothing can be differentiated: the boundaries whose scores come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_sg._compat import FakeTensor
from lightning_sg.arguments import checked, either, flag, instance, listed, number, one_of, whole
from lightning_sg.blackbox.critic import Critic
from lightning_sg.blackbox.discrete import BernoulliSampling, CategoricalSampling
from lightning_sg.blackbox.estimator import Estimator
from lightning_sg.blackbox.evolution import Evolution
from lightning_sg.blackbox.noise import Gaussian, Noise
from lightning_sg.blackbox.sampling import Sampling, repeated
from lightning_sg.blackbox.scores import Coming, are_coming, arrived
from lightning_sg.errors import BoundaryError

_ROWS = 100_000_000


class Scoring(Protocol):
    """Supplies the gradient of a boundary from its scores, in training."""

    @property
    def is_open(self) -> bool:
        """Whether a training batch is under way; otherwise the step is only traced."""

    def cross(self, activation: Tensor, context: Any) -> Tensor:
        """Takes what reaches the boundary and returns what goes on."""

    def score(self, score: Any) -> Tensor:
        """Takes the scores of what has crossed, and returns the loss."""


class ScoredBoundary(nn.Module):
    """Base of the boundaries that nothing can be differentiated behind.

    It has no parameters and no state. Its estimator belongs to :class:`~lightning_sg.SyntheticGradients`, which trains
    it and keeps it in checkpoints.

    Attributes:
        sampling: What it does to activations in training.
        replay: How many rows with their scores are kept to learn from.
        evaluations: How many values are drawn for each sample in training.
        measures: Whether the estimated gradient is compared with the true one.
    """

    measures = False

    def __init__(self, sampling: Sampling, estimator: Estimator, replay: int, evaluations: int) -> None:
        super().__init__()
        name = type(self).__name__
        self.sampling = sampling
        # In a tuple, so that the template is no submodule.
        self._template = (checked(name, "estimator", estimator, instance(Estimator, words="an estimator")),)
        self.replay = checked(name, "replay", replay, whole(0, _ROWS))
        self.evaluations = checked(name, "evaluations", evaluations, whole(1, 1_000_000))
        self._scoring: Scoring | None = None
        self._traced: Tensor | None = None

    @property
    def estimator(self) -> Estimator:
        """Makes the gradient from the scores; a template, of which training makes a copy."""
        return self._template[0]

    def dtype_of(self, activation: Tensor) -> torch.dtype:
        """The dtype of what goes on."""
        return activation.dtype

    def connect(self, scoring: Scoring | None) -> None:
        """Sets who supplies the gradient in training; ``None`` for nobody."""
        self._scoring = scoring
        self._traced = None

    def forward(self, activation: Tensor, *beside: Tensor, context: Any = None) -> Any:
        """Passes the activation on, explored or sampled in training.

        Args:
            activation: ``(N, ...)``, floating point.
            *beside: Tensors ``(N, ...)`` that the score depends on too, such as a goal. They come out in step with the
                activation, once for each evaluation, and are the context if none is given.
            context: What the estimator is told besides the activation: tensors ``(N, ...)`` in any nesting. By default
                ``beside``, and without that what the callback's ``context`` option takes from the batch.

        Returns:
            ``(E · N, ...)`` with E evaluations in training, of all samples once, then of all samples again; ``(N,
            ...)`` in evaluation. Detached, unless the estimator lets the true gradient through. With ``beside`` a tuple
            of it and these tensors.

        Raises:
            BoundaryError: In training without :class:`~lightning_sg.SyntheticGradients`, or if what is given is no
                floating-point tensor with the samples first.
        """
        if not isinstance(activation, Tensor) or not activation.is_floating_point() or not activation.ndim:
            kind = f"{activation.dtype} {tuple(activation.shape)}" if isinstance(activation, Tensor) else "no tensor"
            raise BoundaryError(
                f"{type(self).__name__} takes a floating-point tensor with the samples first, not {kind}."
            )
        if not (self.training and torch.is_grad_enabled()):
            value, times = self.sampling.settled(activation).to(self.dtype_of(activation)), 1
        else:
            value, times = self._train(activation, context if context is not None else beside or None)
        if not beside:
            return value
        return value, *(repeated(tensor, times) for tensor in beside)

    def _train(self, activation: Tensor, context: Any) -> tuple[Tensor, int]:
        scoring = self._scoring
        if isinstance(activation, FakeTensor) or (scoring is not None and not scoring.is_open):
            # A traced step only shows what follows what.
            mean = self.sampling.mean(activation).to(self.dtype_of(activation))
            self._traced = repeated(mean, self.evaluations)
            return self._traced, self.evaluations
        if scoring is None:
            raise BoundaryError(
                f"{type(self).__name__} has nobody to make a gradient of its scores. Train with "
                "`pl.Trainer(callbacks=[SyntheticGradients()])`, or in a loop of your own with `decouple`; outside "
                "of training, use `module.eval()` or `torch.no_grad()`."
            )
        return scoring.cross(activation, context), self.evaluations

    def loss(self, score: Any | Coming) -> Tensor:
        """Takes the scores of what has crossed since the last call, and returns the loss to go backward from.

        The value is the mean of the scores. Its backward pass gives the activation the gradient that the estimator
        makes of them, and parameters after the boundary their true gradient, if the scores carry one.

        Args:
            score: The cost, which is minimised: ``(R,)`` for R = E · N rows, or with more of the activation's
                dimensions, one for each element; a tensor or an array. A ``concurrent.futures.Future`` of that, or a
                list of them with rows that follow each other, if it comes later: then the value is the mean of the
                scores that came last.

        Returns:
            A scalar. In evaluation the mean of the scores.

        Raises:
            BoundaryError: If nothing has crossed the boundary in this step, there is no score for each row, or the
                scores carry a gradient to what went into it.
        """
        if self.training and torch.is_grad_enabled():
            if self._scoring is not None and self._scoring.is_open and not isinstance(score, FakeTensor):
                return self._scoring.score(score)
            if self._traced is not None:
                traced, self._traced = self._traced, None
                mean = score.float().mean() if isinstance(score, Tensor) else torch.zeros((), device=traced.device)
                return mean + 0 * traced.float().sum()
        if are_coming(score):
            score = arrived(score, type(self).__name__, 0)
        return torch.as_tensor(score).float().mean()

    def extra_repr(self) -> str:
        """What ``print`` shows in the parentheses."""
        return f"estimator={type(self.estimator).__name__}, replay={self.replay}, evaluations={self.evaluations}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model (weight averaging, export, another process) has nobody to supply gradients.
        return {**self.__dict__, "_scoring": None, "_traced": None}


class BlackBox(ScoredBoundary):
    """A boundary with no way back: what follows is a simulator, a renderer, a service, any code.

    In training the activation is explored with noise, and goes on detached. The cost of what came of it returns to
    :meth:`~ScoredBoundary.loss`, and :class:`~lightning_sg.SyntheticGradients` trains an estimator that makes the
    gradient of it. In evaluation the activation goes on as it is. What goes on is float32 under mixed precision, too.

    Args:
        noise: The standard deviation of the exploration noise, for all elements or one for each position of the last
            dimension, or a :class:`Noise` with a schedule.
        estimator: Makes the gradient: :class:`Critic` by default, :class:`ScoreFunction`, :class:`ControlVariate`,
            :class:`Evolution`, or :class:`StraightThrough`.
        replay: How many rows of activation, context and score the critic learns from; 0 for those of the batch.
        evaluations: How many values to try for each sample in training.
        measure: Compare the estimated gradient with the true one, where what follows is differentiable after all, and
            log how far they agree: ``cosine``, ``norm_ratio``, ``bias`` and ``variance``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or two do not go together.

    Example::

        >>> import torch
        >>> plant = BlackBox(noise=0.1).eval()
        >>> plant(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def __init__(
        self,
        noise: float | Sequence[float] | Noise = 0.1,
        estimator: Estimator | None = None,
        replay: int = 10_000,
        evaluations: int = 1,
        measure: bool = False,
    ) -> None:
        deviation = number(least=0, most=1e6)
        listed_ = listed(deviation, "a list of numbers")
        noise = checked("BlackBox", "noise", noise, either(instance(Noise), deviation, listed_))
        noise = noise if isinstance(noise, Noise) else Noise(noise)
        super().__init__(Gaussian(noise), Critic() if estimator is None else estimator, replay, evaluations)
        self.measures = checked("BlackBox", "measure", measure, flag())
        self.estimator.check(evaluations, noise.largest > 0)

    def dtype_of(self, activation: Tensor) -> torch.dtype:
        """Float32 at least: code without gradients seldom knows half precision, and NumPy has no bfloat16."""
        return torch.promote_types(activation.dtype, torch.float32)

    def extra_repr(self) -> str:
        """What ``print`` shows in the parentheses."""
        assert isinstance(self.sampling, Gaussian)
        return f"noise={self.sampling.noise.deviation}, {super().extra_repr()}"


class _Discrete(ScoredBoundary):
    """Base of the boundaries that sample from logits.

    Attributes:
        makes: The kind of sampling.
    """

    makes: ClassVar[type[Sampling]]

    def __init__(
        self,
        estimator: Estimator | None = None,
        replay: int = 0,
        evaluations: int | None = None,
        in_evaluation: Literal["mode", "sample"] = "mode",
    ) -> None:
        estimator = Evolution() if estimator is None else estimator
        times = (2 if isinstance(estimator, Evolution) else 1) if evaluations is None else evaluations
        super().__init__(self.makes(), estimator, replay, times)
        self.in_evaluation = checked(type(self).__name__, "in_evaluation", in_evaluation, one_of("mode", "sample"))
        self.estimator.check(times, explores=True)

    def forward(self, activation: Tensor, *beside: Tensor, context: Any = None) -> Any:
        """Samples from logits; see :meth:`ScoredBoundary.forward`."""
        settled = not (self.training and torch.is_grad_enabled()) and isinstance(activation, Tensor)
        if not settled or self.in_evaluation == "mode" or isinstance(activation, FakeTensor):
            return super().forward(activation, *beside, context=context)
        generator = torch.Generator(activation.device).manual_seed(int(torch.randint(2**62, ())))
        value = self.sampling.draw(activation.detach(), 1, generator, 0).value
        return (value, *beside) if beside else value


class Bernoulli(_Discrete):
    """Samples zeros and ones from logits, hard in the forward pass: codes, gates, masks.

    What follows may have parameters, which get their true gradient. Only the way through is estimated.

    Args:
        estimator: Makes the gradient of the logits: :class:`Evolution` by default (antithetic pairs, two evaluations),
            :class:`ControlVariate` (RELAX), :class:`ScoreFunction`, :class:`Critic`, or :class:`StraightThrough` and
            :class:`GumbelSoftmax`, if what follows is differentiable.
        replay: How many rows a critic learns from; 0 for those of the batch, since scores change where what follows
            learns, too.
        evaluations: How many samples to draw in training; by default 2 for :class:`Evolution`, else 1.
        in_evaluation: ``"mode"``: the more probable value; ``"sample"``: as in training, once.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or two do not go together.
    """

    makes = BernoulliSampling


class Categorical(_Discrete):
    """Samples one-hot vectors from logits over the last dimension: codes, routing, actions.

    Arguments and errors are those of :class:`Bernoulli`.
    """

    makes = CategoricalSampling


def scored_boundaries(module: nn.Module) -> dict[str, ScoredBoundary]:
    """The scored boundaries of a module, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ScoredBoundary)}


__all__ = ["Bernoulli", "BlackBox", "Categorical", "ScoredBoundary", "Scoring", "scored_boundaries"]
