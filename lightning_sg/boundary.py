"""Marks where the network is cut: by the ``Boundary`` module, or by module name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sg._compat import tree_flatten, tree_unflatten
from lightning_sg.errors import BoundaryError
from lightning_sg.gradient_flow import Blocked, blocked, refuse_recomputation
from lightning_sg.subclasses import plain_tensor

# Takes the tensors that reach a boundary and returns the tensors that the next stage uses.
Crossing = Callable[[list[Tensor]], list[Tensor]]


class Boundary(nn.Module):
    """Marks, inside ``forward``, where one stage of the network ends and the next begins.

    It has no parameters and no state. Without :class:`~lightning_sg.SyntheticGradients` it is the identity, so a model
    with boundaries trains, loads and exports as if it had none.

    Example::

        >>> import torch
        >>> cut = Boundary()
        >>> x = torch.ones(2, 3)
        >>> cut(x) is x
        True
        >>> h, c = cut(x, 2 * x)  # several tensors cross together
    """

    def __init__(self) -> None:
        super().__init__()
        self._site: Site | None = None

    def forward(self, *values: Any) -> Any:
        """Passes ``values`` to the next stage.

        Args:
            *values: Tensors of any shape and dtype, or (nested) tuples, lists and dicts of them.

        Returns:
            The same structure: a single value as it is, several values as a tuple.
        """
        value = values[0] if len(values) == 1 else values
        return value if self._site is None else self._site.cross(value)


class Site:
    """One boundary of one module, by whichever way it was declared.

    Attributes:
        name: Its name in the module.
        crossings: How often the current step has reached it: as often as it runs the network.
        blocked: Why no gradient flows back through it in the current step, if it was reached and none does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.crossings = 0
        self.blocked: Blocked | None = None
        self._crossing: Crossing | None = None
        self._without_gradient = True
        self._passed: Callable[[], None] | None = None

    def open(self, crossing: Crossing, *, without_gradient: bool = True) -> None:
        """Starts a step: the tensors that reach the boundary go through ``crossing``, whenever any do.

        Args:
            crossing: Takes the tensors and returns those that the next stage uses.
            without_gradient: Whether a pass under ``no_grad`` counts. If ``False``, the boundary is the identity there.
        """
        self._crossing = crossing
        self._without_gradient = without_gradient
        self.crossings, self.blocked = 0, None

    @property
    def crossed(self) -> bool:
        """Whether the current step has reached it."""
        return self.crossings > 0

    @property
    def is_open(self) -> bool:
        """Whether a step is under way."""
        return self._crossing is not None

    @contextmanager
    def instead(self, crossing: Crossing | None) -> Iterator[None]:
        """Has another step go through another crossing for a while; ``None`` for the identity."""
        before = self._crossing, self._without_gradient, self.crossings, self.blocked
        self._crossing, self._without_gradient = crossing, True
        try:
            yield
        finally:
            self._crossing, self._without_gradient, self.crossings, self.blocked = before

    def whenever_passed(self, call: Callable[[], None] | None) -> None:
        """Has ``call`` called whenever the current step has passed the boundary, whether that is open or not."""
        self._passed = call

    def close(self) -> None:
        """Ends the step: makes the boundary the identity."""
        self._crossing = None

    def cross(self, value: Any) -> Any:
        """Applies the current step's crossing to all tensors in ``value``.

        Raises:
            BoundaryError: If a backward pass reaches the boundary by recomputation, or ``value`` contains no tensor.
        """
        if self._crossing is None:
            self._pass()
            return value
        refuse_recomputation(self.name)
        if not (self._without_gradient or torch.is_grad_enabled()):
            if not self.crossed:
                self.blocked = blocked(())
            self._pass()
            return value
        leaves, structure = tree_flatten(value)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not places:
            raise BoundaryError(f"Boundary '{self.name}' was given no tensor, but {type(value).__name__}.")
        tensors = [plain_tensor(leaves[place]) for place in places]
        why = blocked(tensors)
        if why is None or not self.crossed:
            self.blocked = why
        self.crossings += 1
        for place, tensor in zip(places, self._crossing(tensors)):
            leaves[place] = tensor
        self._pass()
        return tree_unflatten(leaves, structure)

    def _pass(self) -> None:
        if self._passed is not None:
            self._passed()

    def __reduce__(self) -> tuple[type[Site], tuple[str]]:
        # A copy of the model (weight averaging, export, another process) is an ordinary model without stages.
        return Site, (self.name,)


class _CutAfter:
    """A forward hook that cuts after a submodule. As a class it can be copied and pickled with the module."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return self._site.cross(output)


class Boundaries:
    """Installs boundaries in a module until :meth:`remove`.

    Attributes:
        sites: The boundaries, in the order of ``names``.

    Args:
        module: The module to cut.
        names: Names of submodules as in ``module.named_modules()``. The cut is after a submodule's output; the name of
            a :class:`Boundary` selects that boundary. ``None`` selects every :class:`Boundary` in ``module``.

    Raises:
        BoundaryError: If a name is unknown (the message lists the nearest) or given twice.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] | None = None) -> None:
        modules = dict(module.named_modules())
        if names is None:
            names = [name for name, child in modules.items() if isinstance(child, Boundary)]
        self.sites: list[Site] = []
        self._annotated: list[Boundary] = []
        self._handles: list[RemovableHandle] = []
        repeated = {name for name in names if list(names).count(name) > 1}
        if repeated:
            raise BoundaryError(f"Boundary {sorted(repeated)} is listed more than once.")
        for name in names:
            if name not in modules or not name:
                raise BoundaryError(_unknown(name, list(modules), type(module).__name__))
        for name in names:
            self._install(Site(name), modules[name])

    def _install(self, site: Site, child: nn.Module) -> None:
        self.sites.append(site)
        if isinstance(child, Boundary):
            child._site = site
            self._annotated.append(child)
        else:
            self._handles.append(child.register_forward_hook(_CutAfter(site)))

    def remove(self) -> None:
        """Removes the boundaries from the module."""
        self.close()
        for boundary in self._annotated:
            boundary._site = None
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """Ends the step at every boundary."""
        for site in self.sites:
            site.close()

    def __len__(self) -> int:
        return len(self.sites)


def _unknown(name: str, known: list[str], owner: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or [other for other in known if other][:3]
    return (
        f"Boundary '{name}' is not a submodule of {owner}. The nearest names are {near}. "
        "Use a name from `model.named_modules()`."
    )


def differentiable(tensor: Tensor) -> bool:
    """Whether a gradient flows back through a boundary to ``tensor``.

    Raises:
        BoundaryError: If ``tensor`` is complex, because predictors cannot learn complex gradients.
    """
    if tensor.requires_grad and tensor.is_complex():
        raise BoundaryError(
            f"A complex activation of shape {tuple(tensor.shape)} reaches a boundary. Pass its real view: "
            "`torch.view_as_complex(boundary(torch.view_as_real(h)))`."
        )
    return tensor.requires_grad and tensor.is_floating_point()


__all__ = ["Boundaries", "Boundary", "Crossing", "Site", "differentiable"]
