"""Every argument of everything public is checked when it is given, and the error names it.

A new argument without an entry in :data:`BAD` fails the test: nobody can forget one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_sg
from lightning_sg import (
    AlignmentGuard,
    Critic,
    Evolution,
    ExactGradients,
    HeadOptions,
    LateGradients,
    LinearPredictor,
    Matching,
    MLPInputPredictor,
    Noise,
    OwnLoss,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
    Tasks,
    ThroughTime,
    TrueGradient,
)
from lightning_sg.arguments import Check, by_name, checked, either, listed, number, optional, text, whole
from lightning_sg.settings import Settings
from lightning_sg.tools.plan.estimate import plan
from lightning_sg.tools.timeline.command import parser as timeline_parser
from tests.models import Classifier

NAN, INF, HUGE = float("nan"), float("inf"), 10**400

WHOLE = [1.0, 1.5, True, "1", NAN, INF, 10**9, HUGE, [1], torch.tensor(1)]
COUNT = [-1, None, *WHOLE]
POSITIVE = [0, *COUNT]
NUMBER = [NAN, INF, -INF, 1e30, HUGE, True, "1", 1j, [1.0], None, torch.tensor(1.0)]
SHARE = [-0.1, 1.1, *NUMBER]
FLAG = ["no", "True", 0, 1, 1.0, None, [], torch.tensor(True)]
NAME = ["best", "", 3, True, None, ["zero"], NAN]
OBJECT = [5, True, "adam", 1.5, [], {}, None]
FUNCTION = [5, True, "adam", [1], torch.optim.SGD([torch.zeros(1)], lr=0.1)]
CLASSES = [0, -1, 1.5, True, "2", NAN, 10**9, [3], {"a": 0}, {"a": "2"}, {3: 4}, {"a": True}]
SOURCE = [1.5, True, "", [], {}, NAN, 10**9]
PATH = [5, True, "", ["folder"], NAN]
WHICH = ["no", 1, 0.0, None, torch.tensor([1, 0]), [True]]

PREDICTOR = {"hidden": POSITIVE, "layers": COUNT}
HEAD = {
    **PREDICTOR,
    "classes": CLASSES,
    "head": [HeadOptions, *OBJECT],
    "own_loss": [OwnLoss, 5, True, len, {}],
    "tasks": [Tasks, *OBJECT],
}
ESTIMATOR = [5, True, "critic", [], {}, LinearPredictor()]
SAMPLED: dict[str, list[Any]] = {
    "estimator": [Evolution, *ESTIMATOR],
    "replay": COUNT,
    "evaluations": [0, -1, *WHOLE],
    "in_evaluation": NAME,
}
CALLBACK = {
    "boundaries": ["first", 5, True, {"first"}, {"first": 1}, [1], ["first", None], [""], b"first", ["a", "b", "a"]],
    "predictor": [
        5,
        "best",
        None,
        True,
        LinearPredictor,
        [TrueGradient()],
        {"a": 5},
        {1: TrueGradient()},
        {"a": "auto"},
    ],
    "delay": COUNT,
    "context": SOURCE,
    "exact": [ExactGradients, 4, *OBJECT],
    "training": [PredictorTraining, *OBJECT],
    "guard": [AlignmentGuard, True, False, 0.5, "zero", {}],
    "through_time": [ThroughTime, *OBJECT],
    "inputs": [SyntheticInputs, True, False, MLPInputPredictor(), "auto", {}],
    "on_non_finite": NAME,
    "metrics": NAME,
    "late": [LateGradients, True, False, 0.5, {}],
}
LIGHTNINGS: dict[str, list[Any]] = {
    "accelerator": ["cpu", 5, True],
    "parallel_devices": [2, "cpu", ["cpu"], [0, 1], True],
    "cluster_environment": ["slurm", 5, True],
    "checkpoint_io": ["torch", 5, True],
    "precision_plugin": ["bf16", 16, True],
}

#: By class or function, for each argument: values that must be refused.
BAD: dict[str, dict[str, list[Any]]] = {
    "SyntheticGradients": CALLBACK,
    "SyntheticGradientStrategy": {
        "timeout": [0, -1.0, *NUMBER],
        "start_method": [3, *NAME],
        "process_group_backend": ["mpi", "", 3, True, ["gloo"]],
        "wire": ["int4", *NAME],
        "clip_over": NAME,
        "replicas": POSITIVE,
        "ddp": [5, True, "fast", ["find_unused_parameters"], {"find_unused": True}, {3: True}, {"module": None}],
        "checkpoint": NAME,
        "tied_weights": NAME,
        "away": [True, 5, "120", {"seconds": 5}],
        **LIGHTNINGS,
    },
    "Away": {
        "batches": POSITIVE,
        "seconds": [0, -1.0, *NUMBER],
        "patience": [0, -1.0, *NUMBER],
        "folder": PATH,
        "every": POSITIVE,
    },
    "ExactGradients": {"every": COUNT, "bootstrap": FLAG, "correction": [-0.1, *NUMBER], "warm_up": COUNT},
    "LateGradients": {
        "share": [0, -0.1, 1.1, *(each for each in NUMBER if each is not None)],
        "every": POSITIVE,
        "recompute": FLAG,
        "adapts": FLAG,
    },
    "PredictorTraining": {
        "optimizer": FUNCTION,
        "lr_scheduler": FUNCTION,
        "every": POSITIVE,
        "updates": POSITIVE,
        "ema": [1, *SHARE],
        "bound": [0, -1.0, *NUMBER],
        "seed": [-1, 2**64, 1.5, True, "1", NAN],
        "update_probability": [0, *SHARE],
    },
    "AlignmentGuard": {
        "threshold": [-1.1, 1, NAN, INF, True, "0", [0.0]],
        "margin": [-0.1, 2.1, *NUMBER],
        "patience": POSITIVE,
        "fallback": [LinearPredictor, TrueGradient(), *NAME],
    },
    "ThroughTime": {
        "scale": [0, *SHARE],
        "trace_decay": SHARE,
        "chunks": POSITIVE,
        "auxiliary": [-0.1, *NUMBER],
    },
    "SyntheticInputs": {
        "predictor": [MLPInputPredictor, LinearPredictor(), 5, True, "auto"],
        "optimizer": FUNCTION,
        "source": [None, *SOURCE],
        "warm_up": COUNT,
    },
    "MLPInputPredictor": {**PREDICTOR, "hidden_norm": NAME},
    "MLPPredictor": {**PREDICTOR, "conditional": FLAG, "normalize": NAME},
    "LinearPredictor": {"conditional": FLAG, "normalize": NAME},
    "LossModelPredictor": {**HEAD, "objective": NAME, "matching": [Matching, *OBJECT]},
    "LocalLoss": HEAD,
    "FeedbackAlignment": {
        **PREDICTOR,
        "scale": [0, -1.0, *NUMBER],
        "normalize": NAME,
        "classes": CLASSES,
    },
    "AutoPredictor": {
        "classes": CLASSES,
        "options": [5, True, "hidden", ["hidden"], {"hiden": 9}, {"hidden": 0}, {"hidden": 1.5}, {3: 4}],
    },
    "HeadOptions": {
        "normalize": NAME,
        "rank": [-1, *WHOLE],
        "samples": [-1, *WHOLE],
        "conv_layers": COUNT,
        "conv_width": POSITIVE,
        "pooled_side": POSITIVE,
        "hidden_norm": NAME,
    },
    "Matching": {"weight": [-0.1, *NUMBER], "between": FLAG, "measure": NAME},
    "OwnLoss": {"function": [None, *FUNCTION], "outputs": POSITIVE},
    "Tasks": {
        "losses": [5, True, "mse", ["mse"], {"a": "hinge"}, {"a": None}, {3: "mse"}],
        "weights": [5, True, [1.0], {"a": NAN}, {"a": -1.0}, {"a": "1"}, {"a": True}, {"a": 1e30}, {3: 1.0}],
    },
    "DelayedGradient": {"shrink": [0, *SHARE]},
    "TimeBoundary": {"batch_dim": [-1, *WHOLE]},
    "MessageBoundary": {"batch_dim": [-1, *WHOLE], "most": POSITIVE},
    "Chunks": {
        "loader": [5, True, None],
        "length": POSITIVE,
        "batch_first": FLAG,
        "lengths": SOURCE,
        "stateful": FLAG,
        "cut": [5, True, "cut", [1]],
        "sequence_length": [0, -1, *WHOLE],
    },
    "parallel_streams": {
        "sequence": [5, "text", [1, 2, 3], None, np.zeros(9)],
        "number": POSITIVE,
        "shift": COUNT,
    },
    "BlackBox": {
        "noise": [Noise, -0.1, NAN, INF, True, "much", [0.1, -0.1], ["0.1"], {}, None],
        "estimator": [Critic, *ESTIMATOR],
        "replay": COUNT,
        "evaluations": POSITIVE,
        "measure": FLAG,
    },
    "Bernoulli": SAMPLED,
    "Categorical": SAMPLED,
    "Noise": {
        "deviation": [-0.1, NAN, INF, 1e30, HUGE, True, "1", 1j, None, [0.1, -0.1], ["0.1"], [True], {}],
        "final": [-0.1, NAN, INF, 1e30, True, "1", [1.0]],
        "steps": COUNT,
        "schedule": NAME,
    },
    "Critic": {**PREDICTOR, "updates": POSITIVE, "batch": POSITIVE},
    "ScoreFunction": {**PREDICTOR, "baseline": FLAG},
    "ControlVariate": {
        **PREDICTOR,
        "objective": NAME,
        "temperature": [0, -1.0, *NUMBER],
        "updates": [0, -1, *WHOLE],
        "batch": POSITIVE,
    },
    "GumbelSoftmax": {"temperature": [0, -1.0, *NUMBER], "hard": FLAG},
    "Timeline": {"dirpath": PATH, "filename": [None, *PATH], "skip": COUNT, "batches": POSITIVE},
}

#: Arguments without which the others cannot be given.
NEEDED: dict[str, dict[str, Any]] = {
    "OwnLoss": {"function": len, "outputs": 3},
    "Chunks": {"loader": [], "length": 3},
    "parallel_streams": {"sequence": torch.zeros(9), "number": 2},
}
#: Public names that take no arguments of users: bases, errors, an enumeration, and a record that ``Chunks`` makes.
#: ``decouple`` checks its own when its block is entered: tests/test_decoupling.py.
WITHOUT = {
    "GradientPredictor",
    "InputPredictor",
    "Boundary",
    "TrueGradient",
    "ZeroPredictor",
    "TargetUse",
    "Evolution",
    "StraightThrough",
    "Chunk",
    "AtomicCheckpointIO",
    "Decoupled",
    "advise",  # tests/tools/advise/test_function.py
    "decouple",
}

CASES = [
    pytest.param(owner, argument, value, id=f"{owner}-{argument}-{type(value).__name__}-{place}")
    for owner, arguments in BAD.items()
    for argument, values in arguments.items()
    for place, value in enumerate(values)
]


def parameters(public: Callable[..., Any]) -> set[str]:
    named = inspect.signature(public).parameters.values()
    return {each.name for each in named if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


@pytest.mark.parametrize("name", lightning_sg.__all__)
def test_every_public_argument_has_values_that_are_refused(name: str) -> None:
    public = getattr(lightning_sg, name)
    if name in WITHOUT or (isinstance(public, type) and issubclass(public, Exception)):
        return
    more = set(LIGHTNINGS) if public is SyntheticGradientStrategy else set()
    assert set(BAD[name]) == parameters(public) | more, f"tests/test_arguments.py has no bad values for {name}"


@pytest.mark.parametrize(("owner", "argument", "value"), CASES)
def test_a_bad_value_is_refused_by_the_name_of_its_argument(owner: str, argument: str, value: Any) -> None:
    given = {**NEEDED.get(owner, {}), argument: value}
    with pytest.raises((TypeError, ValueError), match=rf"{argument}\b") as raised:
        getattr(lightning_sg, owner)(**given)
    assert f"{owner}({argument}=" in str(raised.value)


@pytest.mark.parametrize("argument", CALLBACK)
def test_the_settings_are_checked_as_those_of_the_callback(argument: str) -> None:
    for value in CALLBACK[argument]:
        with pytest.raises((TypeError, ValueError), match=rf"SyntheticGradients\({argument}="):
            Settings(**{argument: value})


@pytest.mark.parametrize("value", WHICH)
def test_where_sequences_start_and_end_is_said_by_bools(value: Any) -> None:
    memory = lightning_sg.TimeBoundary()
    with pytest.raises(TypeError, match=r"TimeBoundary\.read\(first="):
        memory.read(first=value)
    with pytest.raises(TypeError, match=r"TimeBoundary\.write\(last="):
        memory.write(torch.zeros(2, 3), last=value)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "nan", "1000000000"])
def test_numbers_of_the_command_line_are_checked(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        timeline_parser().parse_args([".", "--batches", value])
    assert "--batches" in capsys.readouterr().err


def test_what_is_allowed_is_taken_and_becomes_a_plain_number() -> None:
    exact = ExactGradients(every=np.int64(3), correction=np.float32(0.5), bootstrap=np.bool_(True))  # type: ignore[arg-type]
    assert (exact.every, exact.correction, exact.bootstrap) == (3, 0.5, True)
    assert [type(each) for each in (exact.every, exact.correction, exact.bootstrap)] == [int, float, bool]
    assert type(SyntheticGradients(delay=np.int32(2)).settings.delay) is int  # type: ignore[arg-type]
    assert SyntheticGradients(delay=1_000).settings.delay == 1_000
    assert PredictorTraining(seed=2**64 - 1, bound=1e9).bound == 1e9
    assert SyntheticGradients(boundaries=("a", "b")).settings.names == ["a", "b"]
    assert SyntheticGradients(predictor={"a": TrueGradient(), "b": LinearPredictor()}).settings.predictor
    assert SyntheticGradients(context=-1).settings.context == -1
    assert PredictorTraining(optimizer=torch.optim.SGD).optimizer is torch.optim.SGD  # type: ignore[comparison-overlap]
    assert lightning_sg.Timeline(dirpath=Path("here")).batches == 30
    strategy = SyntheticGradientStrategy(timeout=5, ddp={"find_unused_parameters": True})
    assert (strategy.timeout, strategy.ddp) == (5, {"find_unused_parameters": True})


def test_a_subclass_is_called_by_its_own_name() -> None:
    class Wide(lightning_sg.LocalLoss):
        pass

    with pytest.raises(ValueError, match=r"Wide\(hidden=\.\.\.\): hidden must be a whole number from 1 to .*, not 0"):
        Wide(hidden=0)


def test_checked_options_can_be_copied() -> None:
    settings = SyntheticGradients(boundaries=["a"], guard=None).settings
    assert copy.deepcopy(settings).boundaries == ["a"]


# The checks themselves


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (number(above=0, most=1), 0, r"f\(x=\.\.\.\): x must be a finite number above 0 and at most 1, not 0\."),
        (number(least=0), INF, "at least 0, not inf"),
        (whole(1, 2_000), "a" * 500, r"from 1 to 2,000, not 'a+\.\.\.a+'\.$"),
        (optional(text()), 3, "a string that is not empty, or None, not 3"),
        (either(whole(0, 1), text()), 1.5, "a whole number from 0 to 1, or a string that is not empty, not 1.5"),
        (
            listed(text(), "a list of names"),
            ["a", 3],
            r"not \['a', 3\]\. The entry 3 is not a string that is not empty",
        ),
        (by_name(whole(0, 1), "a dict"), {"a": 5}, r"That of 'a', 5, is not a whole number from 0 to 1\."),
        (whole(0, 1), torch.zeros(50, 50), "not <Tensor>"),
        (whole(0, 1), TrueGradient, "not TrueGradient"),
        pytest.param(whole(0, 1), 10**9_999, "not <int of more than a thousand digits>", id="too long a number"),
    ],
)
def test_the_error_shows_the_value_and_what_is_allowed(check: Check, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checked("f", "x", value, check)


def test_the_error_tells_a_type_from_a_range() -> None:
    with pytest.raises(ValueError, match="x must be"):
        checked("f", "x", 3, whole(0, 1))
    with pytest.raises(TypeError, match="x must be"):
        checked("f", "x", 0.0, whole(0, 1))


@pytest.mark.parametrize("value", POSITIVE)
def test_a_plan_checks_its_processes(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"plan\(processes="):
        plan(Classifier(), [], processes=value)
