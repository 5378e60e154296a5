"""Runs the user's own step on the stages of this process only: ghosts before them, messages around them."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sg import profiling
from lightning_sg._compat import DATA_DEPENDENT_ERRORS
from lightning_sg.batch.context import context_of
from lightning_sg.boundary import Crossing, Site, differentiable
from lightning_sg.callback import SyntheticGradients
from lightning_sg.checkpoint.whole import gather_union
from lightning_sg.crossings.exact import KeptGraph, keeping_weights
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.step import unscaled
from lightning_sg.distributed.tied import TiedWeights
from lightning_sg.errors import (
    BatchMismatchError,
    BoundaryError,
    PartitionError,
    StageLostError,
    SyntheticGradientsError,
)
from lightning_sg.inputs import InputTrainer
from lightning_sg.partition.checks import check_cuts, check_trainable
from lightning_sg.partition.fakes import GhostMemory, Ghosts, ghost_like, is_ghost
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.partition.placement import Placement, assign, place
from lightning_sg.partition.shadow import shadowed
from lightning_sg.partition.trace import copy_of, quiet, trace_step
from lightning_sg.recurrent.boundary import CutInTime
from lightning_sg.replicas import Replicas, ReplicatedStages
from lightning_sg.rng import StepRandomness
from lightning_sg.runtime import Exchange, Figures
from lightning_sg.training import Record
from lightning_sg.transport import Coding, Downstream, Message, Upstream, open_links

Choice = TypeVar("Choice")
Key = TypeVar("Key")
Value = TypeVar("Value")

# How many batches of validation, test or prediction a stage may be ahead of the next.
MAX_BATCHES_IN_EVALUATION = 2


class StageEnds(BaseException):
    """Leaves the user's step at the end of this process's stages; no ``except Exception`` of theirs stops it."""


class StageRuntime(Exchange):
    """This process's part of a split run.

    Args:
        module: The user's module.
        callback: Its boundaries and predictors.
        position: This process's place in the chain, 0 for the first stage.
        chains: Of each replica of the model, the global ranks in the order of the stages.
        device: This process's device.
        backend: The backend for tensors between stages.
        timeout: How many seconds an expected message may take.
        host_group: A gloo group of this replica's processes.
        coding: How activations and targets travel in training.
        pages: The parameters that are in files; those of its own stages, the process brings into memory.
        replicas: The processes with the same stages in other replicas.
        tied: Whether stages on several processes may use one parameter.
        ddp: Arguments for ``DistributedDataParallel``, if there are any.
    """

    split = True

    def __init__(
        self,
        module: pl.LightningModule,
        callback: SyntheticGradients,
        position: int,
        chains: list[list[int]],
        device: torch.device,
        backend: str,
        timeout: float,
        host_group: Any,
        coding: Coding,
        pages: PagedParameters,
        replicas: Replicas,
        ddp: dict[str, Any],
        tied: bool,
    ) -> None:
        super().__init__(replicas)
        self.host_group = host_group
        self.module = module
        self.callback = callback
        self.position = position
        self.chains = chains
        self.ranks = chains[replicas.index]
        self.device = device
        self.backend = backend
        self.timeout = timeout
        self.coding = coding
        self.pages = pages
        self.placement: Placement | None = None
        self.ends: int | None = None  # the number of the training batch after which training ends
        self.stop_wanted = False
        self.doing = "start-up"
        self._traced_training = False
        self._upstream: Upstream | None = None
        self._downstream: Downstream | None = None
        self._ddp = ddp
        self._may_tie = tied
        self._tied: TiedWeights | None = None
        self._replicated: ReplicatedStages | None = None
        self._ghosts: Ghosts | None = None
        self._memory = GhostMemory([])
        self._randomness = StepRandomness(position, device)
        self._number = -1
        self._fingerprint = 0
        self._reached = False  # the boundary before this process's stages
        self._wanted = False  # the target of this batch
        self._arrived: dict[str, dict[str, float]] = {}
        self._leaves: list[Tensor] = []
        self._answered = True
        self._unconfirmed: deque[int] = deque()
        self._surrogate: Tensor | None = None
        self._keeps = False  # this batch's graph until its exact gradient arrives
        self._figures: dict[str, dict[str, float]] = {}
        self._unlogged: set[str] = set()
        self._shared_versions: dict[str, int] = {}
        self.failed = False
        #: Called once, when this process knows which stages it trains.
        self.on_settled: Callable[[], None] | None = None

    # ------------------------------------------------------------------ who this is

    @property
    def is_last(self) -> bool:
        """Whether this process holds the last stage, where the loss is."""
        return self.position == len(self.ranks) - 1

    @property
    def has_loss(self) -> bool:
        """See :attr:`Exchange.has_loss`."""
        return self.is_last

    @property
    def leaves(self) -> list[Tensor]:
        """See :attr:`Exchange.leaves`."""
        return self._leaves

    def holds(self, parameter: str) -> bool:
        """See :meth:`Exchange.holds`."""
        placement = self.placement
        return placement is None or parameter not in placement.owner or placement.trains(self.position, parameter)

    def writes(self, name: str) -> bool:
        """Whether this process saves the parameter or buffer of that name; one does, the last if no stage uses it."""
        last = len(self.ranks) - 1
        return (last if self.placement is None else self.placement.owner.get(name, last)) == self.position

    @property
    def name(self) -> str:
        """This process in words."""
        if self.placement is None:
            return f"process {self.position} of {len(self.ranks)} (rank {self.ranks[self.position]})"
        return self.placement.name(self.position, self.ranks[self.position])

    @property
    def _profiler(self) -> Profiler:
        """The trainer's: waiting and sending are seen there beside Lightning's own profiling."""
        profiler: Profiler = self.module.trainer.profiler  # type: ignore[attr-defined]
        return profiler

    @property
    def final(self) -> bool:
        """Whether training ends after the batch that has just been counted."""
        return self.ends is not None and self.callback.batches > self.ends

    def owns(self, boundary: str) -> bool:
        """See :meth:`Exchange.owns`."""
        return self.placement is None or self.placement.predictor_process(boundary) == self.position

    def owns_inputs(self, boundary: str) -> bool:
        """See :meth:`Exchange.owns_inputs`: the process of the stage after the boundary."""
        placement = self.placement
        return placement is None or placement.process_of(placement.order.index(boundary) + 1) == self.position

    # ------------------------------------------------------------------ one step

    def take_batch(self, fingerprint: int) -> None:
        """Notes which batch the next step is about."""
        self._fingerprint = fingerprint

    def run(self, kind: str, step: Callable[..., Any], args: Any, kwargs: Any, *, training: bool) -> Any:
        """Runs one step of the user's on this process's stages.

        Args:
            kind: What it is, for messages: "training batch 17".
            step: The user's step.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            training: Whether it is a training step.

        Returns:
            In the last stage what the user's step returned; elsewhere, in training, a surrogate loss whose
            ``backward`` passes the synthetic gradient into the stage; elsewhere, in evaluation, ``None``.
        """
        self.doing = kind
        if self.placement is None or (training and not self._traced_training):
            with self._profiler.profile(profiling.START_UP):
                self._prepare(lambda: step(*copy_of(args), **copy_of(kwargs)), args[0] if args else None, training)
        if self.position > 0:
            self._profiler.start(profiling.GHOSTS)  # until the activations are asked for
        assert self.placement is not None
        self._number += 1
        self._reached, self._leaves, self._surrogate, self._keeps = False, [], None, False
        self._answered = self.position == 0
        manual = training and not self.module.automatic_optimization

        def run() -> Any:
            try:
                with self._on_own_stages(training, quiet_too=manual and not self.is_last):
                    return step(*args, **kwargs)
            except StageEnds:
                return self._surrogate

        try:
            result = self._replicated.run(run) if training and self._replicated is not None else run()
        except DATA_DEPENDENT_ERRORS as error:
            advice = (
                "With manual optimization the code behind a stage's last boundary runs without data there. Read values "
                "in `if self.trainer.is_global_zero:`, which is where the loss is."
                if manual
                else "Read values only of what this process computes itself."
            )
            raise PartitionError(
                f"{self.name}: {type(error).__name__}: {error}. The code reads a value of a tensor of another "
                f"stage. {advice}"
            ) from error
        if training and len(self.ranks) == 1 and self.replicas.any(self.stop_wanted):
            self.ends = self.callback.batches  # no neighbour tells this process
        if training and result is None and self.is_last and not manual and self._must_go_backward:
            raise SyntheticGradientsError(
                f"{self.name}: training_step returned None at {self.doing}. With replicas or a synchronized tied "
                "weight every process must go backward at every batch, as the others wait for its gradients. Return "
                "a loss, of zero if need be."
            )
        self._check_reached()
        self._check_shared_buffers()
        if manual or not training:
            self.return_targets()
        return result if training or self.is_last else None

    @contextlib.contextmanager
    def _on_own_stages(self, training: bool, quiet_too: bool) -> Iterator[None]:
        assert self._ghosts is not None
        assert self.callback.boundaries is not None
        sites = self.callback.boundaries.sites
        with ExitStack() as stack:
            stack.enter_context(quiet(self.module) if quiet_too else self._without_ghosts_in_logs())
            stack.enter_context(self._ghosts)
            stack.enter_context(self._randomness)
            if training and self.keeps_graph:
                stack.enter_context(keeping_weights(self.module))
            self._memory.install()
            stack.callback(self._memory.remove)
            for site in sites:
                site.open(self._crossing(site, training))
                stack.callback(site.close)
            yield

    def _without_ghosts_in_logs(self) -> AbstractContextManager[None]:
        """Lets the module log what this process has values of, and says once what it has not."""
        log, log_dict = self.module.log, self.module.log_dict

        def known(name: str, value: Any) -> bool:
            if is_ghost(value) and name not in self._unlogged:
                self._unlogged.add(name)
                warnings.warn(
                    f"'{name}' is computed in another stage than {self.name} and is not logged. Log it behind the last "
                    "boundary, or pass it through the boundary.",
                    stacklevel=2,
                )
            return not is_ghost(value)

        def log_known(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if known(name, value):
                log(name, value, *args, **kwargs)

        def log_dict_known(dictionary: Any, *args: Any, **kwargs: Any) -> None:
            here = {name: value for name, value in dictionary.items() if known(name, value)}
            log_dict(here if len(here) < len(dictionary) else dictionary, *args, **kwargs)

        return shadowed([(self.module, "log", log_known), (self.module, "log_dict", log_dict_known)])

    def _crossing(self, site: Site, training: bool) -> Crossing:
        """What happens at a boundary in this process."""
        assert self.placement is not None
        if site.name == self.placement.sends_at(self.position):
            return self._send_training if training else self._send_evaluation
        if site.name == self.placement.receives_at(self.position):
            return lambda ghosts: self._receive(ghosts, training)
        if training and self.owns(site.name):
            inputs = self.callback.inputs.trainers.get(site.name)
            return LocalCrossing(self.callback.trainers[site.name], self.callback.step, inputs)
        return lambda tensors: tensors

    # ------------------------------------------------------------------ the boundary at the start

    def _receive(self, ghosts: list[Tensor], training: bool) -> list[Tensor]:
        assert self._upstream is not None
        self._profiler.stop(profiling.GHOSTS)
        self._randomness.diverge()
        self._reached = True
        inputs = self._inputs_of_process() if training and torch.is_grad_enabled() else None
        if inputs is not None:
            inputs.settle()
            if not inputs.waits:
                return self._go_ahead(inputs, ghosts)
        message = self._take_activations(self._number, self._fingerprint, [tuple(ghost.shape) for ghost in ghosts])
        self._wanted = message.wants_target
        values = message.tensors
        if inputs is not None:
            self._check_predictable(inputs, message)
            # A predictor that goes on from a checkpoint may learn for the first time from what was saved with it.
            of_batch, learns = self.callback.inputs.of_batch, self._learns_inputs(inputs)
            values = inputs.cross(of_batch, message.tensors, learns=learns) or values
        tensors = []
        for tensor, spec in zip(values, message.specs):
            if training and spec.requires_grad and torch.is_grad_enabled():
                leaf = tensor.requires_grad_()
                self._leaves.append(leaf)
                tensor = leaf.clone()  # an in-place operation may follow, which a leaf refuses
            tensors.append(tensor)
        return tensors

    def _take_activations(self, number: int, fingerprint: int, shapes: list[tuple[int, ...]]) -> Message:
        """Waits for the activations of a batch, and takes what else the stage before had to say."""
        assert self._upstream is not None
        behind = self._number - number
        whose = self.doing if not behind else f"a batch {behind} before ({self.doing} is going on)"
        with self._profiler.profile(profiling.WAIT_ACTIVATIONS):
            message = self._upstream.inbox.receive(number, f"the activations of {whose}")
        self._check_same_batch(message, fingerprint, shapes)
        self.ends = message.ends if self.ends is None else self.ends
        self._arrived = _merged(self._arrived, message.figures)
        return message

    def _inputs_of_process(self) -> InputTrainer | None:
        """What predicts the activations that this process receives."""
        assert self.placement is not None
        return self.callback.inputs.trainers.get(self.placement.receives_at(self.position) or "")

    def _learns_inputs(self, inputs: InputTrainer) -> bool:
        return self.callback.random_updates.after(inputs.name)

    def _go_ahead(self, inputs: InputTrainer, ghosts: list[Tensor]) -> list[Tensor]:
        """Goes on with predicted activations; the true ones are waited for when they are due to be learned from."""
        number, fingerprint = self._number, self._fingerprint
        shapes = [tuple(ghost.shape) for ghost in ghosts]

        def fetch() -> tuple[Tensor, ...]:
            message = self._take_activations(number, fingerprint, shapes)
            self._check_predictable(inputs, message)
            return tuple(message.tensors)

        of_batch = self.callback.inputs.of_batch
        predicted = inputs.cross(of_batch, ghosts, learns=self._learns_inputs(inputs), fetch=fetch)
        assert predicted is not None
        self._wanted = True  # whether the stage before does want the target is in a message that is not waited for
        self._leaves = [tensor.requires_grad_() for tensor in predicted]
        return [leaf.clone() for leaf in self._leaves]

    def _check_predictable(self, inputs: InputTrainer, message: Message) -> None:
        """Refuses what cannot be predicted, and would have to be waited for."""
        fixed = [spec.shape for spec in message.specs if not spec.requires_grad]
        if fixed:
            raise BoundaryError(
                f"A tensor of shape {fixed[0]} that carries no gradient crosses boundary '{inputs.name}', between two "
                "processes. With SyntheticGradients(inputs=...) the stage after it does not wait for the one before, "
                "and only activations that carry a gradient are predicted. Make it from the batch in the stage that "
                "uses it (every stage has the batch), or train these stages in one process."
            )

    def _check_same_batch(self, message: Message, fingerprint: int, own: list[tuple[int, ...]]) -> None:
        assert self._upstream is not None
        sent = [spec.shape for spec in message.specs]
        if message.fingerprint == fingerprint and own == sent:
            return
        what = f"activations of shape {sent} where {own} are due" if own != sent else "other values"
        raise BatchMismatchError(
            f"{self.name} and {self._upstream.neighbour} were given different batches at {self.doing}: the latter's "
            f"has {what}. Every stage must load the same data in the same order: seed all processes alike "
            "(`seed_everything`), draw random augmentations from torch's generator, and take a replica's part of the "
            "data by `trainer.strategy.distributed_sampler_kwargs`, not by the process's rank."
        )

    def return_targets(self) -> None:
        """Answers the stage before: its target, or that there is none. Once for each batch."""
        if self._answered:
            return
        self._answered = True
        assert self._upstream is not None
        targets: Sequence[Tensor] = ()
        if self._wanted and any(leaf.grad is not None for leaf in self._leaves):
            scale = self.callback.step.gradient_scale()
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
            targets = [unscaled(gradient, scale) for gradient in gradients]
        with self._profiler.profile(profiling.SEND):
            self._upstream.send(
                Message(
                    number=self._number, step=self.doing, stop=self.stop_wanted, tensors=targets, coding=self.coding
                )
            )
        if self.is_last and self.callback.step.exact:
            found = self.callback.exact_pass
            leaves = found.leaves if found is not None else []
            sent: Sequence[Tensor | float] = targets or [0.0] * len(leaves)
            excess = [None if leaf is None else leaf.float() - target for leaf, target in zip(leaves, sent)]
            self._send_excess(self._number, self._leaves, excess)
        elif self.callback.step.exact and not self._keeps:
            self._send_excess(self._number, self._leaves, [])  # nothing of this process carries a gradient on
        self._leaves = []

    def _send_excess(self, number: int, leaves: list[Tensor], excess: Sequence[Tensor | None]) -> None:
        """Tells the stage before what the exact gradient of a batch is more than the target that it was sent."""
        if self._upstream is None or not leaves:
            return
        assert self.placement is not None
        boundary = self.placement.receives_at(self.position)
        assert boundary is not None
        if self.callback.trainers[boundary].distance == 1:
            return  # that target is exact
        tensors: Sequence[Tensor] = ()
        if any(part is not None for part in excess):
            tensors = [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(excess, leaves)]
        with self._profiler.profile(profiling.SEND):
            self._upstream.send(
                Message(number=_number_of_exact(number), step=self.doing, tensors=tensors, coding=self.coding)
            )

    # ------------------------------------------------------------------ the boundary at the end

    def _send_evaluation(self, tensors: list[Tensor]) -> list[Tensor]:
        self._send(tensors, training=False)
        self._unconfirmed.append(self._number)
        self._await_answers(MAX_BATCHES_IN_EVALUATION)
        raise StageEnds

    def _send_training(self, tensors: list[Tensor]) -> list[Tensor]:
        assert self.placement is not None
        boundary = self.placement.sends_at(self.position)
        assert boundary is not None
        if self.position == 0 and self.replicas.any(self.stop_wanted) and self.ends is None:
            self.ends = self.callback.batches + self._lead
        carriers = [tensor for tensor in tensors if differentiable(tensor)]
        if not carriers:
            self._send(tensors)
            self._surrogate = torch.zeros((), device=self.device, requires_grad=True)
            self._unconfirmed.append(self._number)
            self._await_answers(self.callback.delay + 1)
        else:
            trainer = self.callback.trainers[boundary]
            step = self.callback.step
            record = trainer.prepare(
                carriers,
                step.context,
                step.loss,
                exact=step.exact,
                true_share=step.true_share,
                bootstrap=step.bootstrap,
            )
            number = self._number
            record.skipped = not self.callback.random_updates.before(boundary)
            record.fetch = lambda: self._answer(number, wanted=record.wants_target)
            if step.exact:
                self._keeps = True
                kept = KeptGraph(number, carriers, record, step.crossings, self._leaves, step.gradient_scale())
                batch = self.callback.batches
                record.fetch_exact = lambda: self._take_exact(kept, batch, trainer.distance)
            self._send(tensors, wants_target=record.wants_target)
            trainer.predict(record)  # waits for targets, after the next stage has got its work
            self._surrogate = self._surrogate_of(record, carriers)
        if not self.module.automatic_optimization:
            return [ghost_like(tensor) for tensor in tensors]
        raise StageEnds

    def _surrogate_of(self, record: Record, carriers: list[Tensor]) -> Tensor:
        if record.true_share:
            record.collect()
        nothing = record.prediction is None if not record.true_share else record.targets is None
        if nothing and not self._has_boundaries_within():
            return torch.zeros((), device=self.device, requires_grad=True)
        # Even then goes backward: boundaries on the way, between this process's stages, have predictions of their own.
        surrogate: Tensor = _Inject.apply(None if nothing else record.used, record.samples, *carriers)
        return surrogate

    @property
    def keeps_graph(self) -> bool:
        """Whether this process needs the graph of the current batch until its exact gradient arrives."""
        step = self.callback.step
        # The first process hands nothing on: only its corrections, and boundaries within it, need the graph.
        needed = self.position > 0 or bool(self.callback.corrected()) or self._has_boundaries_within()
        return step.exact and not self.is_last and needed

    def _has_boundaries_within(self) -> bool:
        assert self.placement is not None
        own = [name for name in self.placement.order if self.owns(name)]
        return len(own) > 1  # besides the one at its end

    def _take_exact(self, kept: KeptGraph, batch: int, distance: int) -> None:
        """The exact gradient of an earlier batch is due here: takes it through this process's stages, and on."""
        record = kept.record
        record.collect()
        if distance == 1:
            record.exact_targets = record.targets
        else:
            assert self._downstream is not None
            number = _number_of_exact(kept.number)
            with self._profiler.profile(profiling.WAIT_EXACT):
                message = self._downstream.inbox.receive(number, f"an exact gradient ({self.doing} is going on)")
            if message.tensors:
                record.add_excess(message.tensors)
        with self._profiler.profile(profiling.EXACT), torch.autocast(self.device.type, enabled=False):
            excess, corrections = kept.backward(self.callback.corrected())
        self._send_excess(kept.number, kept.leaves, excess)
        self.callback.hold(batch, corrections)

    def flush(self) -> None:
        """See :meth:`Exchange.flush`: from the last stage to the first."""
        boundary = None if self.placement is None else self.placement.sends_at(self.position)
        if boundary is not None:
            self.callback.trainers[boundary].collect()

    def _send(self, tensors: list[Tensor], wants_target: bool = False, training: bool = True) -> None:
        assert self._downstream is not None
        message = Message(
            number=self._number,
            step=self.doing,
            fingerprint=self._fingerprint,
            wants_target=wants_target,
            ends=self.ends,
            figures=self._figures if training else {},
            tensors=tensors,
            coding=self.coding if training else "full",
        )
        with self._profiler.profile(profiling.SEND):
            self._downstream.send(message)
        if training:
            self._figures = {}

    def _answer(self, number: int, *, wanted: bool = True) -> tuple[Tensor, ...] | None:
        """Waits for the next stage's answer to a batch: the targets, or ``None``.

        A stage that has gone ahead could not know whether they are wanted.
        """
        assert self._downstream is not None
        behind = self._number - number
        ago = "this batch" if behind == 0 else f"{behind} batch{'es' * (behind > 1)} before"
        with self._profiler.profile(profiling.WAIT_TARGET):
            message = self._downstream.inbox.receive(number, f"the target of {ago} ({self.doing} is going on)")
        self.stop_wanted = self.stop_wanted or message.stop
        return (tuple(message.tensors) or None) if wanted else None

    @property
    def _lead(self) -> int:
        """How many batches the last stage may be ahead of this one, and still hear of an end in time."""
        if self.callback.inputs.settings is None:
            return 0
        return (len(self.ranks) - 1 - self.position) * (1 + self.callback.delay)

    def _await_answers(self, most: int) -> None:
        """Waits until at most so many batches without a prediction are unanswered."""
        while len(self._unconfirmed) > most:
            self._answer(self._unconfirmed.popleft())

    def backward_loss(self, loss: Tensor) -> Tensor:
        """The loss to go backward from: of a ghost, this stage's surrogate."""
        loss = self._loss_of_own_stages(loss)
        if self._replicated is not None:
            self._replicated.prepare(loss)
        return loss

    @property
    def borrowed(self) -> set[int]:
        """The ids of the parameters trained here that are copies of another process's."""
        return set() if self._tied is None else self._tied.borrowed

    @contextlib.contextmanager
    def summing_tied(self) -> Iterator[None]:
        """Around a backward pass: copies of a tied weight get the sum of their gradients."""
        if self._tied is None:
            yield
            return
        before = self._tied.gradients()
        if self._replicated is not None and not self._replicated.accumulates:
            # The backward pass averages what was accumulated, too.
            self.replicas.average_([gradient for gradient in before if gradient is not None])
        yield
        with self.meeting("adding up the gradients of a tied weight"):
            self._tied.add_up(before)

    def accumulating(self) -> AbstractContextManager[None]:
        """While entered, gradients are not averaged over the replicas."""
        return contextlib.nullcontext() if self._replicated is None else self._replicated.accumulating()

    def _loss_of_own_stages(self, loss: Tensor) -> Tensor:
        if not is_ghost(loss):
            return loss
        if self.is_last:
            raise PartitionError(
                f"{self.name}: the loss of {self.doing} depends on a parameter or activation of another stage, which "
                "has no data here. Compute it from the last stage's own tensors, or pass it through the boundary."
            )
        if self._surrogate is None:
            return torch.zeros((), device=self.device, requires_grad=True)  # a second backward of one batch
        surrogate, self._surrogate = self._surrogate, None
        return surrogate

    def _check_reached(self) -> None:
        """Refuses a step that did not pass this process's boundaries."""
        assert self.placement is not None
        missing = None
        if self.position and not self._reached:
            missing = self.placement.receives_at(self.position)
        elif not self.is_last and self.placement.sends_at(self.position) not in self._crossed():
            missing = self.placement.sends_at(self.position)
        if missing is not None:
            raise BoundaryError(
                f"{self.name}: boundary '{missing}' was not reached in {self.doing}, so the neighbouring stage "
                "waits for nothing. Every step must pass every boundary on its way to the loss."
            )

    def _check_shared_buffers(self) -> None:
        """Refuses a buffer that several processes use and one changes: the others would not hear of it."""
        if not self._shared_versions:
            return
        buffers = dict(self.module.named_buffers())
        for name, version in self._shared_versions.items():
            if buffers[name]._version != version:
                raise PartitionError(
                    f"{self.name}: buffer '{name}' is used by stages on different processes and was changed in "
                    f"{self.doing}. The others would not see it: give each stage a module of its own, or move a "
                    "boundary."
                )

    def _crossed(self) -> set[str]:
        assert self.callback.boundaries is not None
        return {site.name for site in self.callback.boundaries.sites if site.crossed}

    # ------------------------------------------------------------------ the first step

    def _prepare(self, call: Callable[[], Any], batch: Any, training: bool) -> None:
        """Follows the step without data: on the first one, and again on the first training step."""
        callback = self.callback
        if callback.undecided:
            names = callback.choose_boundaries(self.module, len(self.ranks), call, self.device, batch)
            names = self._of_first_replica(names)
            callback.cut(self.module.trainer, self.module, names)
        assert callback.boundaries is not None
        trace = trace_step(self.module, callback.boundaries.sites, call, self.device)
        check_cuts(trace, split=True)
        if training:
            check_trainable(self.module, trace)
            self._traced_training = True
            self.callback.accept(trace)
        if self.placement is None:
            predictors: dict[str, float] = {}
            if trace.stages > len(self.ranks):  # else there is nothing to balance
                predictors = callback.operations_of_predictors(trace, context_of(batch, callback.context))
            self.placement = place(self.module, trace, len(self.ranks), predictors, tied=self._may_tie)
            first = self._of_first_replica(self.placement.first)
            if first != self.placement.first:
                self.placement = Placement(self.placement.order, first)
                assign(self.placement, self.module, trace, tied=self._may_tie)
            if self.is_last and self.replicas.index == 0:
                rank_zero_info(f"The stages on {len(self.ranks)} processes:\n{self._described()}")
            names = [self.placement.name(place_, rank) for place_, rank in enumerate(self.ranks)]
            self._upstream, self._downstream = open_links(
                self.position, self.chains, self.replicas.index, names, self.device, self.backend, self.timeout
            )
        else:
            assign(self.placement, self.module, trace, tied=self._may_tie)
        with torch.inference_mode(False):  # what a validation step moves is trained later
            self._settle_in()
        self._share_buffers()
        if training and self.placement.tied:
            self._check_tied()
            self._tied = TiedWeights(
                self.module,
                self.placement,
                self.chains,
                self.replicas.index,
                self.position,
                self.backend,
                self.timeout,
            )
        if training:
            self.settle()

    def _of_first_replica(self, choice: Choice) -> Choice:
        """What replica 0 chose by its first batch, which may have other shapes: all replicas are cut alike."""
        if self.replicas.count == 1:
            return choice
        box = [choice]
        dist.broadcast_object_list(box, src=self.chains[0][self.position], group=self.replicas.host_group)
        return box[0]

    def settle(self) -> None:
        """Does what was put off until this process knows which stages it trains."""
        if self.on_settled is not None:
            on_settled, self.on_settled = self.on_settled, None
            on_settled()

    @property
    def _must_go_backward(self) -> bool:
        return self._replicated is not None or self._tied is not None

    def _described(self) -> str:
        assert self.placement is not None
        one = self.placement.describe(self.module, self.ranks)
        count = self.replicas.count
        return one if count == 1 else f"{one}\nand the same in {count - 1} other replica{'s' * (count > 2)}"

    def _settle_in(self) -> None:
        """Puts ghosts in the place of what other processes hold, and lets go of its device memory."""
        assert self.placement is not None
        elsewhere = self.placement.elsewhere(self.position)
        for name, parameter in self.module.named_parameters():
            if name not in elsewhere:
                self.pages.keep(parameter)
        self.pages.let_go()
        if self.device.type != "cpu":
            tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
            for name, tensor in tensors.items():
                if not self.pages.holds(tensor):
                    tensor.data = tensor.data.to("cpu" if name in elsewhere else self.device)
        self._ghosts = Ghosts(self.module, elsewhere, self.device, trainable=False)
        self._memory = GhostMemory(_remote_blocks(self.module, elsewhere, self.callback))
        if self.replicas.count > 1:
            self._replicated = ReplicatedStages(
                self.module, partial(self.placement.trains, self.position), self.replicas, self._ddp
            )

    def _check_tied(self) -> None:
        """Refuses what copies of a tied weight in several processes do not go with."""
        callback = self.callback
        trainers = callback.trainers.values()
        corrects = callback.correction > 0 or any(trained.correction for trained in trainers)
        couples = callback.guard is not None and callback.guard.fallback == "couple"
        waits = callback.warm_up or callback.mix or couples or any(trained.exact for trained in trainers)
        if corrects:
            what = "corrections (SyntheticGradients(correction=...), DelayedGradient)"
        elif waits and not self.module.automatic_optimization:
            what = "manual optimization where the true gradient is waited for (warm_up, mix, TrueGradient, 'couple')"
        else:
            return
        raise SyntheticGradientsError(f"tied_weights='synchronize' does not go with {what}.")

    def _share_buffers(self) -> None:
        """Gives buffers that several processes use the last one's values: without a seed each has made its own."""
        assert self.placement is not None
        buffers = dict(self.module.named_buffers())
        for name in sorted(self.placement.shared):
            values = buffers[name].detach().cpu().contiguous()
            dist.broadcast(values, src=self.ranks[-1], group=self.host_group)
            with torch.no_grad():
                buffers[name].copy_(values)
        self._shared_versions = {name: buffers[name]._version for name in self.placement.shared}

    # ------------------------------------------------------------------ for the callback

    def route(self, figures: Figures) -> Figures:
        """See :meth:`Exchange.route`: figures travel with the activations to the last stage, where loggers are."""
        received, self._arrived = self._arrived, {}
        if self.is_last:
            arrived = {name: {k: torch.tensor(v) for k, v in values.items()} for name, values in received.items()}
            return _merged(arrived, {name: values for name, values in figures.items() if values})
        trainer: Any = self.module.trainer
        self._figures = _merged(self._figures, received)
        if self.device.type == "cpu" or trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            own = {name: {k: float(v) for k, v in values.items()} for name, values in figures.items() if values}
            self._figures = _merged(self._figures, own)
        return {}

    def gather(self, states: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`Exchange.gather`."""
        with self.meeting("saving predictors"):
            return self.unite(states)

    def unite(self, own: dict[Key, Any]) -> dict[Key, Any]:
        """The union of the disjoint dicts of this replica's processes, in the last one. A collective."""
        return gather_union(own, self.host_group, self.ranks[-1])

    @contextlib.contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """A collective of all processes: says in words what it means when it breaks."""
        if self.failed:
            raise StageLostError(f"{self.name} failed at {self.doing}; no {what} with the other stages after that.")
        try:
            yield
        except RuntimeError as error:
            raise StageLostError(
                f"{self.name} waited for the other stages ({what} after {self.doing}), but one of them is gone or took "
                f"longer than {self.timeout:g} s. Its own output says why. ({error})"
            ) from error

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends a run in good order: waits for targets under way and says goodbye to the neighbours."""
        self.flush()
        for name, trainer in self.callback.trainers.items():
            if self.owns(name):
                trainer.collect()
        for name, inputs in self.callback.inputs.trainers.items():
            if self.owns_inputs(name):
                inputs.collect()
        self._await_answers(0)
        for link in self._links():
            link.close(self.timeout)
        self._upstream = self._downstream = self._replicated = self._tied = None
        for child in self.module.modules():  # what a remote block kept of its outputs is without data here
            for name, value in child.__dict__.items():
                if is_ghost(value):
                    child.__dict__[name] = None
            if isinstance(child, CutInTime):
                child.let_go_of_ghosts()

    def fail(self, error: BaseException) -> None:
        """Tells the neighbours why this process stops."""
        if self.failed:
            return
        self.failed = True
        reason = str(error) if isinstance(error, SyntheticGradientsError) else f"{type(error).__name__}: {error}"
        for link in self._links():
            link.fail(self.doing, reason[:2000])

    def _links(self) -> list[Upstream | Downstream]:
        return [link for link in (self._upstream, self._downstream) if link is not None]


def _merged(figures: dict[str, dict[str, Value]], more: dict[str, dict[str, Value]]) -> dict[str, dict[str, Value]]:
    """The figures of both, by boundary: of one with a predictor on either side, two processes have some."""
    return {name: {**figures.get(name, {}), **more.get(name, {})} for name in [*figures, *more]}


def _number_of_exact(number: int) -> int:
    """The number of the message that the exact gradient of batch ``number`` travels in, which has its own time."""
    return -1 - number


class _Inject(torch.autograd.Function):
    """A scalar whose gradient with respect to the activations is the given one, or none: d⟨h, ĝ⟩/dh = ĝ."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...] | None, samples: int, *activations: Tensor) -> Tensor:
        ctx.sg_gradients = gradients
        ctx.sg_samples = samples
        ctx.sg_dtypes = [activation.dtype for activation in activations]
        return torch.zeros((), device=activations[0].device)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sg_gradients is None:
            return (None, None, *(None for _ in ctx.sg_dtypes))
        factor = factor / ctx.sg_samples
        return (None, None, *((part * factor).to(dtype) for part, dtype in zip(ctx.sg_gradients, ctx.sg_dtypes)))


def _remote_blocks(module: nn.Module, elsewhere: set[str], callback: SyntheticGradients) -> list[nn.Module]:
    """The largest submodules all of whose tensors are elsewhere and that hold no boundary.

    Also torch's own modules without tensors, such as activation functions: they answer from memory what is asked with
    ghosts, and compute with what has data.
    """
    assert callback.boundaries is not None
    cut = {site.name for site in callback.boundaries.sites}
    blocks: list[nn.Module] = []

    def visit(child: nn.Module, prefix: str) -> None:
        inside = [f"{prefix}.{name}" for name, _ in child.named_parameters()]
        inside += [f"{prefix}.{name}" for name, _ in child.named_buffers()]
        holds_cut = any(name.startswith(f"{prefix}.") for name in cut)
        is_cut = prefix in cut
        own = not inside and type(child).__module__.startswith("torch.nn.modules.") and not list(child.children())
        if prefix and (inside or own) and not holds_cut and set(inside) <= elsewhere and not is_cut:
            blocks.append(child)
            return
        for name, grandchild in child.named_children():
            visit(grandchild, f"{prefix}.{name}" if prefix else name)

    visit(module, "")
    return list(dict.fromkeys(blocks))


__all__ = ["StageEnds", "StageRuntime"]
