"""Boundaries in time: what they carry, and what synthetic gradients there amount to, against full backpropagation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    AlignmentGuard,
    AutoPredictor,
    BoundaryError,
    Chunks,
    LinearPredictor,
    MLPPredictor,
    SyntheticGradients,
    SyntheticGradientsError,
    ThroughTime,
    TimeBoundary,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.predictors import GradientPredictor
from tests.models import assert_same_state, make_trainer, state_of

SAMPLES, FEATURES, WIDTH, LENGTH, CHUNK = 6, 3, 5, 12, 3


class Recurrent(pl.LightningModule):
    """Says at every step what the input was ``lag`` steps before; with any recurrent module, or a nested state."""

    def __init__(self, kind: str = "lstm", lag: int = 2, learning_rate: float = 0.1, width: int = WIDTH) -> None:
        super().__init__()
        self.kind = kind
        self.lag = lag
        self.learning_rate = learning_rate
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "nested": nn.GRU, "two layers": nn.LSTM}
        layers = 2 if kind == "two layers" else 1
        self.core = kinds[kind](FEATURES, width, num_layers=layers, batch_first=True)
        self.out = nn.Linear(width, FEATURES)
        self.memory = TimeBoundary()

    def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.kind != "nested":
            out, state = self.core(x, state)
        else:
            out, hidden = self.core(x, None if state is None else state["layers"][0])
            state = {"layers": (hidden,), "steps": torch.tensor(x.shape[1]), "name": "core"}
        return self.out(out), state

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean()

    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        (x, y), first, last = chunk
        out, state = self.unroll(x, self.memory.read(first))
        self.memory.write(state, last)
        return self.loss(out, y)

    def validation_step(self, chunk: Any, batch_idx: int) -> None:
        (x, y), first, last = chunk
        out, state = self.unroll(x, self.memory.read(first))
        self.memory.write(state, last)
        self.log("val_loss", self.loss(out, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def sequences(batches: int = 2, lag: int = 2, seed: int = 0, length: int = LENGTH, samples: int = SAMPLES) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        x = torch.randn(samples, length, FEATURES, generator=generator)
        y = torch.cat([torch.zeros(samples, lag, FEATURES), x[:, : length - lag]], dim=1) if lag else x
        made.append((x, y))
    return made


class Oracle(GradientPredictor):
    """Is told the true gradients, in the order in which they are asked for."""

    needs_target = False
    gradients: list[tuple[Tensor, ...]]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        self.asked += 1
        return self.gradients[self.asked - 1]


def make(kind: str, **arguments: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(kind, **arguments)


def true_gradients(module: Recurrent, batch: Any, chunk: int = CHUNK) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """The gradients of the chunks' mean losses by the states at the chunks' ends, times N; and the loss of all.

    Those of the samples' states in rows, as predictors see them.
    """
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, x.shape[1], chunk):
        out, state = module.unroll(x[:, start : start + chunk], state)
        losses.append(module.loss(out, y[:, start : start + chunk]))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        ends.append([leaf for leaf in leaves if leaf.requires_grad])
    total = torch.stack(losses).sum()
    gradients = []
    for number, end in enumerate(ends[:-1]):
        # Of later chunks alone: this chunk's own loss goes backward by itself.
        later = torch.autograd.grad(torch.stack(losses[number + 1 :]).sum(), end, retain_graph=True)
        gradients.append(tuple(part.movedim(1, 0).flatten(1) * len(x) for part in later))
    return gradients, total


def fit(module: Recurrent, data: Any, callback: Any = None, **arguments: Any) -> pl.Trainer:
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 1, **arguments})
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("kind", ["lstm", "gru", "nested", "two layers"])
def test_the_true_future_gradient_gives_full_backpropagation_element_by_element(kind: str) -> None:
    batch = sequences(1)[0]
    whole = make(kind)
    gradients, loss = true_gradients(whole, batch)
    (loss / len(range(0, LENGTH, CHUNK))).backward()

    oracle = Oracle()
    oracle.gradients = gradients
    seen: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in module.named_parameters()})

    module = make(kind)
    # One optimizer step for all chunks, so that all have the same weights.
    trainer = make_trainer(
        callbacks=[SyntheticGradients(predictor=oracle, through_time=ThroughTime(scale=1.0)), Look()],
        max_epochs=1,
        accumulate_grad_batches=LENGTH // CHUNK,
    )
    trainer.fit(module, Chunks([batch], CHUNK))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def by_hand(module: Recurrent, data: list[Any]) -> None:
    """Truncated backpropagation through time, written out."""
    optimizer = module.configure_optimizers()
    for x, y in data:
        state = None
        for start in range(0, LENGTH, CHUNK):
            out, state = module.unroll(x[:, start : start + CHUNK], state)
            loss = module.loss(out, y[:, start : start + CHUNK])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = torch.utils._pytree.tree_map(
                lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state
            )


@pytest.mark.parametrize("callback", [None, SyntheticGradients(predictor=ZeroPredictor())])
@pytest.mark.parametrize("kind", ["lstm", "gru", "nested"])
def test_no_predictor_and_a_zero_one_are_truncated_backpropagation_bit_for_bit(kind: str, callback: Any) -> None:
    expected, module = make(kind), make(kind)
    by_hand(expected, sequences())
    fit(module, Chunks(sequences(), CHUNK), callback)
    assert_same_state(state_of(module), state_of(expected), exact=True)


def held_out(module: Recurrent, lag: int) -> float:
    module.eval()
    with torch.no_grad():
        (x, y) = sequences(1, lag, seed=99, samples=256)[0]
        return float(module.loss(module.unroll(x, None)[0], y))


class FixedStates(GradientPredictor):
    """Knows the true gradient: the loss of the next chunk, of one step, is back-propagated before it is there."""

    needs_target = False
    module: Recurrent
    data: list[Any]

    def build(self, activations: Any, context: Any, loss: Any) -> None:
        self.asked = 0

    def forward(self, activations: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        batch, step = divmod(self.asked, LENGTH - 1)
        self.asked += 1
        x, y = self.data[batch]
        with torch.enable_grad():
            state = activations[0].unsqueeze(0).requires_grad_()
            out, _state = self.module.unroll(x[:, step + 1 :], state)
            # Each chunk is one step, and its loss the mean over it.
            rest = self.module.loss(out, y[:, step + 1 :]) * (LENGTH - step - 1)
            (gradient,) = torch.autograd.grad(rest, [state])
        return (gradient[0] * len(x),)


def test_the_true_gradient_is_better_than_a_trained_predictor_and_that_better_than_none_on_held_out_data() -> None:
    # A chunk is a single step: within it, nothing tells the network to remember what it is asked for a step later.
    lag, batches = 1, 40
    data = sequences(batches, lag, samples=32)
    losses = {}
    for name in ("zero", "trained", "oracle"):
        module = make("gru", lag=lag, learning_rate=0.5, width=16)
        oracle = FixedStates()
        predictors = {"zero": ZeroPredictor(), "trained": MLPPredictor(32, conditional=False), "oracle": oracle}
        callback = SyntheticGradients(
            predictor=predictors[name], through_time=ThroughTime(scale=1.0), bound=2.0, guard=None
        )
        FixedStates.module, FixedStates.data = module, data
        fit(module, Chunks(data, 1), callback)
        losses[name] = held_out(module, lag)
    assert losses["oracle"] < 0.9 * losses["trained"], losses
    assert losses["trained"] < 0.97 * losses["zero"], losses


def test_validation_between_two_chunks_leaves_the_state_of_training_alone() -> None:
    undisturbed, disturbed = make("lstm"), make("lstm")
    callback = SyntheticGradients(predictor=MLPPredictor(8, conditional=False), seed=1)
    fit(undisturbed, Chunks(sequences(), CHUNK, sequence_length=LENGTH), callback)
    trainer = make_trainer(
        callbacks=[SyntheticGradients(predictor=MLPPredictor(8, conditional=False), seed=1)],
        max_epochs=1,
        val_check_interval=3,
    )
    validation = Chunks(sequences(1, seed=5), 5)
    trainer.fit(disturbed, Chunks(sequences(), CHUNK, sequence_length=LENGTH), validation)
    assert_same_state(state_of(disturbed), state_of(undisturbed), exact=True)
    assert "val_loss" in trainer.callback_metrics


def test_the_state_in_validation_is_carried_from_chunk_to_chunk() -> None:
    module = make("lstm")
    trainer = make_trainer()
    whole = trainer.validate(module, Chunks(sequences(1), LENGTH), verbose=False)[0]["val_loss"]
    parts = trainer.validate(module, Chunks(sequences(1), CHUNK), verbose=False)[0]["val_loss"]
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [ThroughTime(), ThroughTime(trace_decay=0.9), ThroughTime(auxiliary=0.5)], ids=["plain", "trace", "aux"]
)
@pytest.mark.parametrize("known", [True, False], ids=["length known", "unknown"])
@pytest.mark.parametrize("stop", [2, 4, 7, 8, 9])
def test_a_run_resumed_in_the_middle_of_a_sequence_equals_one_that_went_on(
    settings: ThroughTime, stop: int, known: bool, tmp_path: Path
) -> None:
    def callback() -> SyntheticGradients:
        return SyntheticGradients(predictor=MLPPredictor(8, conditional=False), through_time=settings, seed=1)

    def data() -> Chunks:
        return Chunks(sequences(), CHUNK, sequence_length=LENGTH if known else None)

    uninterrupted = make("lstm")
    fit(uninterrupted, data(), callback(), max_epochs=2)
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, "stopped", every_n_train_steps=stop, save_on_train_epoch_end=False
    )
    trainer = make_trainer(callbacks=[callback(), checkpoint], max_steps=stop, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(make("lstm"), data())
    resumed = Recurrent("lstm")
    trainer = make_trainer(callbacks=[callback()], max_epochs=2)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_state(state_of(resumed), state_of(uninterrupted), exact=True)


def returns(module: Recurrent, batch: Any, predictor: LinearPredictor, decay: float, scale: float) -> list[Any]:
    """The targets of BP(λ) looking forward, by recursion over one graph of the whole sequence."""
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, LENGTH, CHUNK):
        out, state = module.unroll(x[:, start : start + CHUNK], state)
        losses.append(module.loss(out, y[:, start : start + CHUNK]) * len(x))
        ends.append(state)
    # The last state has nothing after it.
    target, found = None, []
    for number in range(len(ends) - 2, -1, -1):
        outputs, seeds = [losses[number + 1]], [torch.ones(())]
        if target is not None:
            own = predictor((ends[number + 1][0].detach(),), None)[0]
            outputs.append(ends[number + 1])
            seeds.append((scale * ((1 - decay) * own + decay * target)).detach().unsqueeze(0))
        (gradient,) = torch.autograd.grad(outputs, [ends[number]], seeds, retain_graph=True)
        target = gradient[0]
        found.append((ends[number][0].detach(), target))
    return found[::-1]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_trace_learns_what_the_returns_looking_forward_say(decay: float) -> None:
    """The sum over a sequence of all updates is that of the λ-returns, if neither network nor predictor change."""
    batch = sequences(1)[0]
    module = make("rnn", learning_rate=0.0)
    torch.manual_seed(3)
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    updates: list[Tensor] = []

    class Watched(LinearPredictor):
        def build(self, activations: Any, context: Any, loss: Any) -> None:
            super().build(activations, context, loss)
            with torch.no_grad():
                self.net[-1].weight.copy_(weight)
                self.net[-1].bias.copy_(bias)

        def forward(self, activations: Any, context: Any) -> Any:
            return (self.net(activations[0]),)

        def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
            predicted = self(activations, context)[0]
            error = ((predicted - targets[0]) ** 2).sum() / 2
            updates.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(error, self.net.parameters(), retain_graph=True)])
            )
            return ((predicted - targets[0]) ** 2).sum() / 2

    callback = SyntheticGradients(
        predictor=Watched(conditional=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        through_time=ThroughTime(scale=0.7, trace_decay=decay),
        bound=1e9,
        guard=None,
    )
    # The bound is zero before the first target: so that the second sequence has all of it.
    fit(module, Chunks([batch, batch], CHUNK), callback)
    updates = updates[len(updates) // 2 :]
    reference = Watched(conditional=False)
    reference.build((torch.zeros(1, WIDTH),), None, None)
    expected = torch.zeros_like(updates[0])
    for state, target in returns(make("rnn"), batch, reference, decay, 0.7):
        error = ((reference((state,), None)[0] - target) ** 2).sum() / 2
        expected += torch.cat([g.flatten() for g in torch.autograd.grad(error, reference.net.parameters())])
    torch.testing.assert_close(torch.stack(updates).sum(0), expected, rtol=1e-4, atol=1e-5)


def test_with_a_full_trace_predictions_converge_to_the_true_gradient_of_a_linear_network() -> None:
    """No bias of bootstrapping: least squares from states to true gradients is what is learned."""

    class Linear(Recurrent):
        def __init__(self) -> None:
            super().__init__("rnn", lag=1, learning_rate=0.0)
            self.weights = nn.Linear(FEATURES + WIDTH, WIDTH, bias=False)
            nn.init.orthogonal_(self.weights.weight, 0.9)

        def unroll(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            state = x.new_zeros(len(x), WIDTH) if state is None else state
            outs = []
            for step in x.unbind(1):
                state = self.weights(torch.cat([step, state], dim=1))
                outs.append(self.out(state))
            return torch.stack(outs, dim=1), state

    torch.manual_seed(0)
    module = Linear()
    batch = sequences(1, lag=1, samples=40)[0]
    callback = SyntheticGradients(
        predictor=LinearPredictor(conditional=False, normalize="none"),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995),
        through_time=ThroughTime(scale=1.0, trace_decay=1.0),
        bound=10.0,
    )
    chunk = 4
    fit(module, Chunks([batch] * 250, chunk), callback)
    x, y = batch
    state, losses, ends = None, [], []
    for start in range(0, LENGTH, chunk):
        out, state = module.unroll(x[:, start : start + chunk], state)
        losses.append(module.loss(out, y[:, start : start + chunk]))
        ends.append(state)
    truths = []
    for number in range(len(ends) - 1):
        later = torch.stack(losses[number + 1 :]).sum()
        truths.append(torch.autograd.grad(later, ends[number], retain_graph=True)[0] * len(x))
    states = torch.cat([end.detach() for end in ends[:-1]])
    truth = torch.cat(truths)
    best = torch.linalg.lstsq(torch.cat([states, torch.ones(len(states), 1)], dim=1), truth).solution
    fitted = torch.cat([states, torch.ones(len(states), 1)], dim=1) @ best
    learned = callback.times.trainers["memory"].predictor((states,), None)[0]
    assert float((learned - fitted).norm() / fitted.norm()) < 0.1


def test_a_sequence_that_has_ended_has_nothing_to_learn_from() -> None:
    x, y = sequences(1)[0]
    lengths = torch.tensor([12, 3, 6, 7, 12, 1])
    seen: list[tuple[int, ...]] = []

    class Looking(MLPPredictor):
        def forward(self, activations: Any, context: Any) -> Any:
            seen.append(tuple(activations[0].shape))
            return super().forward(activations, context)

    data = Chunks([(x, y, lengths)], CHUNK, lengths=2)

    class Ragged(Recurrent):
        def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
            (x, y, _lengths), first, last = chunk
            return super().training_step(((x, y), first, last), batch_idx)

    torch.manual_seed(0)
    module = Ragged("gru")
    fit(module, data, SyntheticGradients(predictor=Looking(8, conditional=False), train_every=1000))
    # After 3 steps four sequences go on, after 6 three, after 9 two, after 12 none; the second shape 4 is learned from.
    assert [shape[0] for shape in seen if shape[0]] == [4, 3, 4, 2]


def test_samples_that_begin_anew_do_so_from_zero_or_from_what_is_given() -> None:
    memory = TimeBoundary()
    memory.write({"h": torch.ones(3, 2)})
    first = torch.tensor([True, False, True])
    assert memory.read(first)["h"].tolist() == [[0, 0], [1, 1], [0, 0]]
    begun = memory.read(first, initial={"h": torch.full((3, 2), 5.0)})
    assert begun["h"].tolist() == [[5, 5], [1, 1], [5, 5]]
    assert memory.read(True, initial="none") == "none"


def test_a_learned_initial_state_is_trained() -> None:
    class Begins(Recurrent):
        def __init__(self) -> None:
            super().__init__("gru")
            self.start = nn.Parameter(torch.zeros(1, SAMPLES, WIDTH))

        def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
            (x, y), first, last = chunk
            out, state = self.unroll(x, self.memory.read(first, initial=self.start))
            self.memory.write(state, last)
            return self.loss(out, y)

    module = Begins()
    fit(module, Chunks(sequences(), CHUNK), SyntheticGradients(predictor=MLPPredictor(8, conditional=False)))
    assert module.start.abs().sum() > 0


def test_the_model_keeps_no_keys_and_no_state() -> None:
    module = make("lstm")
    fit(module, Chunks(sequences(), CHUNK, stateful=True), SyntheticGradients())
    assert not any("memory" in name for name in module.state_dict())
    assert copy.deepcopy(module).memory.read() is None


def test_bad_states_and_predictors_are_refused_by_name() -> None:
    with pytest.raises(BoundaryError, match="no tensor"):
        TimeBoundary().write("state")
    memory = TimeBoundary(batch_dim=2)
    with pytest.raises(BoundaryError, match="batch_dim"):
        memory.write(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(SyntheticGradientsError, match="'memory' needs the true gradient"):
        fit(make("lstm"), Chunks(sequences(), CHUNK), SyntheticGradients(predictor=TrueGradient()))
    with pytest.raises(ValueError, match="trace_decay"):
        ThroughTime(trace_decay=2)


def test_the_figures_of_a_boundary_in_time_are_logged() -> None:
    trainer = fit(
        make("gru"), Chunks(sequences(8), CHUNK), SyntheticGradients(predictor=MLPPredictor(8)), log_every_n_steps=1
    )
    assert {"sg/memory/cosine", "sg/memory/norm_ratio", "sg/memory/loss"} <= set(trainer.callback_metrics)


def test_without_a_choice_a_linear_predictor_sees_the_state_and_the_guard_is_patient() -> None:
    for guard, threshold in ((AlignmentGuard(patience=7), -0.2), (AlignmentGuard(threshold=0.1), 0.1)):
        callback = SyntheticGradients(guard=guard)
        fit(make("lstm"), Chunks(sequences(), CHUNK), callback)
        (trained,) = callback.times.trainers.values()
        assert isinstance(trained.predictor, AutoPredictor)
        assert isinstance(trained.predictor.chosen, LinearPredictor)
        assert trained.predictor.choice.startswith("LinearPredictor")
        watch = trained._watch
        assert watch is not None
        assert (watch.guard.threshold, watch.guard.patience) == (threshold, guard.patience)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    trainer = fit(make("gru"), Chunks(_as(precision, sequences(4)), CHUNK), SyntheticGradients(), precision=precision)
    assert trainer.global_step == 16


def _as(precision: str, data: list[Any]) -> list[Any]:
    return [(x.double(), y.double()) for x, y in data] if precision == "64-true" else data


class RootMeanSquare(Recurrent):
    """Its loss ends in an operation that keeps its result for the backward pass."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return super().loss(out, y).sqrt()


def test_manual_optimization() -> None:
    class Manual(RootMeanSquare):
        def __init__(self) -> None:
            super().__init__("gru")
            self.automatic_optimization = False

        def training_step(self, chunk: Any, batch_idx: int) -> None:
            loss = super().training_step(chunk, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def callback() -> SyntheticGradients:
        return SyntheticGradients(predictor=MLPPredictor(8, conditional=False), seed=1)

    torch.manual_seed(0)
    manual = Manual()
    torch.manual_seed(0)
    automatic = RootMeanSquare("gru")
    fit(manual, Chunks(sequences(), CHUNK), callback())
    fit(automatic, Chunks(sequences(), CHUNK), callback())
    assert_same_state(state_of(manual), state_of(automatic), exact=True)
