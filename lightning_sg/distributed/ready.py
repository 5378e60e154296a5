"""A stage whose program is known: runs its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg._compat import DATA_DEPENDENT_ERRORS, tree_leaves
from lightning_sg.boundary import Crossing
from lightning_sg.crossings.kept_graph import keeping_weights
from lightning_sg.crossings.replay import ReplayedBatch, replaying
from lightning_sg.distributed.arrivals import Arrivals, PredictedActivations, TrueActivations
from lightning_sg.distributed.logs import LogsOfStage
from lightning_sg.distributed.program import StageProgram
from lightning_sg.distributed.skipping import BatchSkipped
from lightning_sg.distributed.stage import Stage
from lightning_sg.distributed.stage_pass import EvaluationPass, StageEnds, WithoutDataError
from lightning_sg.distributed.training_pass import TrainingPass
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.partition.fakes import is_fake
from lightning_sg.partition.quiet import quiet
from lightning_sg.partition.step import StepEnds, call_training_step
from lightning_sg.partition.without_values import WithoutValues
from lightning_sg.passes import hearing_passes
from lightning_sg.rng import StepRandomness
from lightning_sg.words import first_line


class ReadyStage:
    """A stage whose program is known.

    Attributes:
        program: How it runs a step.
        traced_training: Whether that is known of training steps, too.
        batch: The newest batch.
        logs: Keeps what it has no values of out of the logs.
        call: Runs the newest step once more, on a copy of its batch.

    Args:
        stage: This process.
        program: How it runs a step.
        logs: See above.
        call: See above.
        traced_training: Whether the program comes from a training step.
    """

    def __init__(
        self, stage: Stage, program: StageProgram, logs: LogsOfStage, call: Callable[..., Any], *, traced_training: bool
    ) -> None:
        self.program = program
        self.call = call
        self.traced_training = traced_training
        self.batch: EvaluationPass | None = None
        self._stage = stage
        self.logs = logs
        self._arrivals = self._make_arrivals()

    def _make_arrivals(self) -> Arrivals:
        inlet, session = self.program.inlet, self._stage.session
        inputs = session.inputs.trainers.get(inlet.boundary or "")
        return TrueActivations(inlet) if inputs is None else PredictedActivations(inlet, inputs, session)

    def run(self, step: Callable[[], Any], fingerprint: int, most: Mapping[str, int] | None, *, training: bool) -> Any:
        """Runs one step.

        Args:
            step: The user's step.
            fingerprint: Of the batch.
            most: For each boundary, how often the step may cross it; ``None`` if that is not known.
            training: Whether it is a training step.
        """
        stage, program = self._stage, self.program
        if not stage.grid.is_first:
            stage.profiler.start(profiling.FAKE_TENSORS)  # until the activations are asked for
        batch = self.batch = (
            TrainingPass(stage, program, fingerprint, most, self._arrivals)
            if training
            else EvaluationPass(stage, program, fingerprint, most)
        )
        program.first_uses.begin()
        try:
            result = program.data_parallel.run(lambda: self._run(step, batch)) if training else self._run(step, batch)
        except DATA_DEPENDENT_ERRORS as error:
            raise self._reads_values(error, training) from error
        if not (stage.grid.is_first or batch.begun):
            stage.profiler.stop(profiling.FAKE_TENSORS)
        if training:
            self._check_result(result)
        program.shared.check(stage.status.name, stage.status.doing)
        batch.finish_step()
        if stage.grid.is_last and not training:
            self._check_predictions(result)
        return result if training or stage.grid.is_last else None

    def _run(self, step: Callable[[], Any], batch: EvaluationPass) -> Any:
        """Runs the user's code until it has left this process's stages for good; returns the step's result here."""
        result, why = None, ""
        try:
            with self._on_own_stages(batch):
                result = step()
        except StageEnds:
            pass
        except BatchSkipped:
            batch.skip()
            return None
        except Exception as error:
            if self._stage.grid.is_last or not batch.elsewhere or isinstance(error, SyntheticGradientsError):
                raise
            # It is the code of later stages, which may do anything: there it runs on values.
            why = f"the code after it has not run on tensors without data ({type(error).__name__}: {first_line(error)})"
        batch.end_forward(why)
        trained = isinstance(batch, TrainingPass) and not self._stage.grid.is_last
        if trained and batch.result is None and any(map(is_fake, tree_leaves(result))):
            batch.result = torch.zeros((), device=self._stage.grid.device, requires_grad=True)  # nothing was run here
        return result if batch.result is None else batch.result

    @contextmanager
    def _on_own_stages(self, batch: EvaluationPass) -> Iterator[None]:
        """Puts fake tensors in the place of what other processes hold, and opens the boundaries."""
        stage, program, session = self._stage, self.program, self._stage.session
        training = isinstance(batch, TrainingPass)
        by_hand = training and not session.module.automatic_optimization
        # Where it does not end there, the code behind the last boundary of a stage runs without data.
        goes_on = (by_hand or batch.beyond) and not stage.grid.is_last
        with ExitStack() as stack:
            stack.enter_context(quiet(session.module) if goes_on else self.logs.without_fakes())
            stack.enter_context(program.fakes)
            stack.enter_context(stage.randomness)
            stack.enter_context(hearing_passes(session.module, session.boundaries.sites, stage.randomness.next_stage))
            if training and stage.keeps_graph:
                stack.enter_context(keeping_weights(session.module))
            program.outputs.install()
            stack.callback(program.outputs.remove)
            for site in session.boundaries.sites:
                if site.name == program.outlet.boundary:
                    site.open(batch.hand_over)
                elif site.name == program.inlet.boundary:
                    site.open(batch.receive)
                elif training and session.ownership.owns(site.name):
                    site.open(session.crossing(site.name).forward)
                else:
                    site.open(_unchanged)
                stack.callback(site.close)
            if goes_on and not by_hand:
                stack.enter_context(WithoutValues(lambda: batch.beyond))
            yield

    def rerun(self, batch: ReplayedBatch, crossings: Mapping[str, Crossing], numbers: StepRandomness) -> None:
        """Runs an old batch again on one of this process's stages; see :class:`~lightning_sg.crossings.replay.Rerun`.

        Args:
            batch: The batch.
            crossings: What happens at boundaries; at others nothing does.
            numbers: Random numbers of the step.
        """
        program, session = self.program, self._stage.session

        def with_data(crossing: Crossing) -> Crossing:
            def cross(tensors: list[Tensor]) -> list[Tensor]:
                program.fakes.begin_stages()
                return crossing(tensors)

            return cross

        opened = {name: with_data(crossing) for name, crossing in crossings.items()}
        with ExitStack() as stack:
            stack.enter_context(program.fakes)
            stack.enter_context(numbers)
            stack.enter_context(replaying(session.module, session.boundaries.sites, batch, opened, numbers.next_stage))
            program.outputs.install()
            stack.callback(program.outputs.remove)
            stack.enter_context(suppress(StepEnds))
            call_training_step(session.module, batch.data, batch.index)

    def _check_result(self, result: Any) -> None:
        """Refuses a step without a loss where other processes wait for its gradients."""
        stage = self._stage
        if len(stage.grid.ranks) == 1 and stage.grid.peers.any(stage.stopping.wanted):
            stage.stopping.ends = stage.session.batches  # no neighbour tells this process
        automatic = stage.session.module.automatic_optimization
        if result is None and stage.grid.is_last and automatic and self.program.must_go_backward:
            raise SyntheticGradientsError(
                f"{stage.status.name}: training_step returned None at {stage.status.doing}. With replicas or a "
                "synchronized tied weight every process must go backward at every batch, as the others wait for its "
                "gradients. Return a loss, of zero if need be."
            )

    def _check_predictions(self, result: Any) -> None:
        """Refuses predictions that other stages have computed.

        Raises:
            WithoutDataError: If there is one.
        """
        status = self._stage.status
        if status.doing.startswith("predict") and any(is_fake(leaf) for leaf in tree_leaves(result)):
            raise WithoutDataError(f"{status.name}: the result of {status.doing}")

    def _reads_values(self, error: BaseException, training: bool) -> PartitionError:
        """The error for code that reads a value of a tensor without data."""
        manual = training and not self._stage.session.module.automatic_optimization
        advice = (
            "With manual optimization the code behind a stage's last boundary runs without data there. Read values "
            "in `if self.trainer.is_global_zero:`, which is where the loss is."
            if manual
            else "Read values only of what this process computes itself."
        )
        return PartitionError(
            f"{self._stage.status.name}: {type(error).__name__}: {error}. The code reads a value of a tensor of "
            f"another stage. {advice}"
        )


def _unchanged(tensors: list[Tensor]) -> list[Tensor]:
    """What happens at a boundary of other processes' stages, and at one's own in evaluation."""
    return tensors


__all__ = ["ReadyStage"]
