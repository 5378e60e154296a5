"""A head that guesses the model's last outputs, and evaluates the model's own loss on them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.predictors.base import Gradients
from lightning_sg.predictors.forms import OutputForm, form_of_output, with_positions
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.predictors.view import Place, View

# A gradient at zero that is so many times as large as at other outputs says nothing of where to go.
_STEEP = 100.0


class ReplayHead(nn.Module):
    """Maps activations to the model's loss, by guesses of what the loss takes from the network.

    One network makes the outputs of all samples, another those of all positions, and another those of all cells, as far
    as the loss takes such.

    Args:
        loss: The model's loss.
        forms: The forms of the outputs that it takes.
        views: Turns activations into rows, for each kind of place.
        nets: Maps rows to outputs, for each kind of place.
    """

    def __init__(
        self, loss: ReplayedLoss, forms: list[OutputForm], views: dict[Place, View], nets: dict[Place, nn.Sequential]
    ) -> None:
        super().__init__()
        self.replayed = loss
        self.forms = forms
        self.views = nn.ModuleDict({str(place): view for place, view in views.items()})
        self.nets = nn.ModuleDict({str(place): net for place, net in nets.items()})
        self.parameters_of_loss = nn.ParameterList(loss.parameters)
        self._warned = False

    # ------------------------------------------------------------------ as of a head with one kind of place

    @property
    def view(self) -> View:
        """The view of the only kind of place.

        Raises:
            ValueError: If there are several.
        """
        if len(self.views) > 1:
            raise ValueError("the model's loss takes outputs for samples and for positions, which have no common error")
        (view,) = self.views.values()
        assert isinstance(view, View)
        return view

    @property
    def net(self) -> nn.Sequential:
        """The network of the first kind of place."""
        net = next(iter(self.nets.values()))
        assert isinstance(net, nn.Sequential)
        return net

    def outputs(self, activations: Gradients) -> Tensor:
        """The outputs at the only kind of place, ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""
        outputs: Tensor = self.net(self.view(seen_by(self.forms[0].place, activations)))
        return outputs

    def criterion(self, outputs: Tensor, context: Any) -> Tensor:
        """The loss of given outputs at the only kind of place, ``(N,)``: for every sample the mean."""
        return self._loss({form.place: outputs for form in self.forms}, context)

    # ------------------------------------------------------------------ what heads do

    def sample_losses(self, activations: Gradients, context: Any) -> Tensor:
        """The loss of each sample, ``(N,)``: for every sample the mean, because the loss does not tell them apart."""
        rows = {place: self.nets[place](view(seen_by(place, activations))) for place, view in self.views.items()}
        return self._loss(rows, context)

    def update(self, activations: Gradients) -> None:
        """Updates running statistics; call it once for each batch that is learned from."""
        for place, view in self.views.items():
            assert isinstance(view, View)
            view.update(seen_by(place, activations))

    def describe(self) -> str:
        """Describes the head in words."""
        linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        hidden = [layer.out_features for layer in linear[:-1] if layer.bias is not None]
        depth = (
            f"head with {len(hidden)} hidden layer{'s' * (len(hidden) > 1)} of {hidden[0]}" if hidden else "linear head"
        )
        count = sum(form.size for form in self.forms)
        places = " and ".join(f"each {place}" for place in self.views)
        return f"{depth} for {places}, {count} outputs with {self.replayed.words}"

    def learns_from_zero(self, activations: Gradients, context: Any) -> bool:
        """Whether outputs may start at zero: whether the loss has a gradient of its usual size there.

        It has none where it compares samples that are all alike, and one of any size where it normalizes outputs.

        Args:
            activations: The first activations.
            context: What the loss uses of the first batch.
        """
        if self.replayed.alone:
            return False
        sizes = [self._steepness(activations, context, spread) for spread in (0.0, 1.0)]
        return 0 < sizes[0] <= _STEEP * sizes[1]  # also false if one is not a number

    def _steepness(self, activations: Gradients, context: Any, spread: float) -> float:
        """The norm of the gradient of the loss at random outputs of a standard deviation."""
        rows = {}
        with torch.no_grad():
            for place, view in self.views.items():
                seen, last = view(seen_by(place, activations)), self.nets[place][-1]  # type: ignore[index]
                outputs = torch.randn(*seen.shape[:-1], last.out_features, device=seen.device)
                rows[place] = (outputs * spread).requires_grad_()
        with torch.enable_grad():
            loss = self._loss(rows, context).mean()
            found = torch.autograd.grad(loss, list(rows.values()), allow_unused=True, materialize_grads=True)
        return float(torch.stack([gradient.norm() for gradient in found]).norm())

    def _loss(self, rows: dict[Any, Tensor], context: Any) -> Tensor:
        number = next(iter(rows.values())).shape[0]
        start: dict[Any, int] = dict.fromkeys(rows, 0)
        outputs = []
        for form in self.forms:
            first = start[form.place]
            start[form.place] = first + form.size
            outputs.append(form.of(rows[form.place][..., first : first + form.size]))
        try:
            loss = self.replayed(outputs, context, list(self.parameters_of_loss))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            loss = self._none(outputs, error)
        return loss.expand(number)

    def _none(self, outputs: list[Tensor], error: Exception) -> Tensor:
        """A loss without a gradient for a batch that the model's operations cannot be repeated on."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The model's loss, repeated on a head's outputs, does not work with this batch: {error}. A gradient "
                "of zero is predicted for such batches. Say what to predict from: SyntheticGradients(context=...), or "
                "with which loss: LossModelPredictor(own_loss=...).",
                stacklevel=2,
            )
        return torch.stack([output.sum() * 0.0 for output in outputs]).sum()


def seen_by(place: str, activations: Gradients) -> Gradients:
    """What the network for one kind of place sees of the activations."""
    if place != "position":
        return activations
    return tuple(activations[number] for number in with_positions(activations))


def forms_of(loss: ReplayedLoss, activations: Gradients) -> list[OutputForm]:
    """The forms of all outputs that a loss takes.

    Raises:
        ValueError: If one does not fit the activations.
    """
    crops = loss.crops or (None,) * len(loss.shapes)
    return [form_of_output(shape, activations, crop) for shape, crop in zip(loss.shapes, crops, strict=True)]


__all__ = ["ReplayHead", "forms_of", "seen_by"]
