"""Names the private symbol of torch or Lightning that a new release moved or changed."""

from __future__ import annotations

import csv
import importlib
import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from tests.models import Classifier, loader, make_trainer

# One row for each import in `lightning_sg._compat`: its name there, the module and the name that it comes from.
SYMBOLS = [
    (
        "default_process_group_backend",
        "lightning.fabric.utilities.distributed",
        "_get_default_process_group_backend_for_device",
    ),
    ("init_dist_connection", "lightning.fabric.utilities.distributed", "_init_dist_connection"),
    ("prepare_for_backward", "lightning.pytorch.overrides.distributed", "prepare_for_backward"),
    ("reduce_over", "lightning.fabric.utilities.distributed", "_sync_ddp_if_available"),
    ("optimizers_to_device", "lightning.fabric.utilities.optimizer", "_optimizers_to_device"),
    (
        "MultiProcessingLauncher",
        "lightning.pytorch.strategies.launchers.multiprocessing",
        "_MultiProcessingLauncher",
    ),
    ("Loop", "lightning.pytorch.loops.loop", "_Loop"),
    (
        "SubprocessScriptLauncher",
        "lightning.pytorch.strategies.launchers.subprocess_script",
        "_SubprocessScriptLauncher",
    ),
    (None, "torch._subclasses.fake_tensor", "DataDependentOutputException"),
    (None, "torch._subclasses.fake_tensor", "DynamicOutputShapeException"),
    *((name, "torch._C._distributed_c10d", name) for name in ("PrefixStore", "Store", "TCPStore")),
    ("DisableTorchFunctionSubclass", "torch._C", "DisableTorchFunctionSubclass"),
    ("default_store", "torch.distributed.distributed_c10d", "_get_default_store"),
    ("enable_python_dispatcher", "torch._dispatch.python", "enable_python_dispatcher"),
    ("FakeTensor", "torch._subclasses.fake_tensor", "FakeTensor"),
    ("FakeTensorMode", "torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("TorchDispatchMode", "torch.utils._python_dispatch", "TorchDispatchMode"),
    *((name, "torch.utils._pytree", name) for name in ("tree_flatten", "tree_leaves", "tree_map_only")),
    ("tree_unflatten", "torch.utils._pytree", "tree_unflatten"),
    ("value_unchanged", "torch.autograd.grad_mode", "_unsafe_preserve_version_counter"),
]


@pytest.mark.parametrize(("_ours", "module", "theirs"), SYMBOLS, ids=[theirs for _, _, theirs in SYMBOLS])
def test_the_symbol_is_where_it_was(_ours: str | None, module: str, theirs: str) -> None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{module} (for {theirs}) has moved: {error}")
    assert hasattr(found, theirs), f"{theirs} has moved out of {module}"


def test_every_symbol_of_the_compat_module_has_its_row_here() -> None:
    compat = importlib.import_module("lightning_sg._compat")
    rows = {ours: getattr(importlib.import_module(module), theirs) for ours, module, theirs in SYMBOLS if ours}
    assert set(compat.__all__) == rows.keys() | {
        "DATA_DEPENDENT_ERRORS",
        "belongs_to",
        "goes_backward",
        "continue_loops",
        "logged_step",
        "logs_now",
        "resume_from_nothing",
        "saves_at_step",
        "set_rank_zero",
    }
    moved = [name for name, value in rows.items() if getattr(compat, name) is not value]
    assert not moved, f"{moved} of lightning_sg._compat are not what this test checks"


@pytest.fixture
def compat() -> Any:
    return importlib.import_module("lightning_sg._compat")


# ---------------------------------------------------------------------- Lightning


def test_init_dist_connection_takes_environment_backend_and_timeout(compat: Any) -> None:
    signature = inspect.signature(compat.init_dist_connection)
    try:
        signature.bind(LightningEnvironment(), "gloo", timeout=timedelta(seconds=5))
    except TypeError as error:
        pytest.fail(f"_init_dist_connection no longer takes what lightning_sg passes: {error}; it is {signature}")


def test_init_dist_connection_hands_the_timeout_to_torch(compat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_args, **kwargs: seen.update(kwargs))
    monkeypatch.setattr("atexit.register", lambda *_args: None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    compat.init_dist_connection(LightningEnvironment(), "gloo", timeout=timedelta(seconds=5))
    assert seen.get("timeout") == timedelta(seconds=5), "_init_dist_connection drops its timeout"


def test_the_default_backend_of_a_device_is_named(compat: Any) -> None:
    for device, backend in (("cpu", "gloo"), ("cuda:0", "nccl")):
        found = compat.default_process_group_backend(torch.device(device))
        assert found == backend, f"_get_default_process_group_backend_for_device({device}) is {found}"


def test_the_subprocess_launcher_is_made_from_environment_and_counts(compat: Any) -> None:
    try:
        launcher = compat.SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    except TypeError as error:
        pytest.fail(f"_SubprocessScriptLauncher(cluster_environment, num_processes, num_nodes) has changed: {error}")
    assert (launcher.num_processes, launcher.num_nodes) == (2, 1), "_SubprocessScriptLauncher swapped its arguments"
    assert callable(launcher.launch)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_the_multiprocessing_launcher_is_made_from_strategy_and_start_method(compat: Any, method: str) -> None:
    try:
        launcher = compat.MultiProcessingLauncher(DDPStrategy(), start_method=method)
    except TypeError as error:
        pytest.fail(f"_MultiProcessingLauncher(strategy, start_method=...) has changed: {error}")
    assert callable(launcher.launch)


def test_optimizers_to_device_moves_the_state_of_a_list_of_optimizers(compat: Any) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    compat.optimizers_to_device([optimizer], torch.device("meta"))
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta", "_optimizers_to_device moves nothing"


def test_the_rank_reaches_the_decorators_of_both_packages(compat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for decorator in (rank_zero_only, fabric_rank_zero_only):
        monkeypatch.setattr(decorator, "rank", getattr(decorator, "rank", 0), raising=False)
    for rank in (1, 0):
        compat.set_rank_zero(rank)
        for name, decorator in (("pytorch", rank_zero_only), ("fabric", fabric_rank_zero_only)):
            ran = decorator(lambda: True)()
            assert ran == (True if rank == 0 else None), f"rank_zero_only of lightning.{name} ignores its rank"


@pytest.mark.parametrize("every", [None, 3])
def test_a_checkpoint_callback_says_at_which_steps_it_saves(compat: Any, every: int | None) -> None:
    checkpoint = ModelCheckpoint(every_n_train_steps=every)
    try:
        saves = [step for step in range(1, 8) if compat.saves_at_step(checkpoint, step)]
    except AttributeError as error:
        pytest.fail(f"ModelCheckpoint._every_n_train_steps has moved: {error}")
    assert saves == ([] if every is None else [3, 6]), "ModelCheckpoint._every_n_train_steps has another meaning"


def test_what_is_logged_where_loggers_are_updated_reaches_them(compat: Any, tmp_path: Path) -> None:
    class Logs(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if compat.logs_now(trainer):
                pl_module.log("seen", float(trainer.global_step))

    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_epochs=2, log_every_n_steps=3, accumulate_grad_batches=2, logger=logger)
    trainer.callbacks.append(Logs())
    trainer.fit(Classifier(), loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["seen"]]
    every = [str(step) for step in range(3, trainer.global_step + 1, 3)]
    assert sorted({row["seen"].split(".")[0] for row in rows}) == every, "should_update_logs has another meaning"


def test_a_callback_logs_under_the_step_of_what_the_module_logs(compat: Any, tmp_path: Path) -> None:
    class Logs(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if compat.logs_now(trainer):
                pl_module.log("theirs", float(batch_idx))
                trainer.logger.log_metrics({"ours": float(batch_idx)}, step=compat.logged_step(trainer))

    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1, accumulate_grad_batches=2, logger=logger)
    trainer.callbacks.append(Logs())
    trainer.fit(Classifier(), loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = {name: {row["step"]: row[name] for row in rows if row[name]} for name in ("ours", "theirs")}
    assert found["ours"]
    assert found["ours"] == found["theirs"]


# ---------------------------------------------------------------------- tensors without data


def fake(compat: Any, *shape: int) -> Tensor:
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(shape)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda fake, real: F.linear(real, fake),
    "linear of a fake tensor": lambda fake, real: F.linear(fake, real),
    "add": lambda fake, real: real[:1] + fake,
    "cat": lambda fake, real: torch.cat([real, fake]),
    "layer_norm": lambda fake, real: F.layer_norm(real, (4,), fake[0]),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_fake_makes_a_fake_of_every_result_outside_its_mode(
    compat: Any, operation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    real = torch.ones(3, 4)
    try:
        result = operation(fake(compat, 2, 4), real)
    except Exception as error:
        pytest.fail(f"FakeTensorMode(allow_non_fake_inputs=True) refuses a real tensor beside a fake one: {error!r}")
    assert isinstance(result, compat.FakeTensor), "FakeTensor is no longer contagious outside its mode"
    assert result.device == torch.device("cpu"), "a FakeTensor's device is no longer the one it was made for"
    assert result.shape == operation(torch.ones(2, 4), real).shape


def test_a_fake_claims_the_device_it_was_made_for(compat: Any) -> None:
    with compat.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        made = torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16, device="cpu")
    assert (made.shape, made.stride(), made.dtype) == ((2, 3), (1, 2), torch.bfloat16)
    assert made.device == torch.device("cpu")
    assert isinstance(made, compat.FakeTensor)


def test_a_fake_can_be_a_parameter_with_a_graph(compat: Any) -> None:
    parameter = nn.Parameter(fake(compat, 2, 4), requires_grad=True)
    assert isinstance(parameter, compat.FakeTensor), "nn.Parameter no longer keeps a FakeTensor's class"
    assert F.linear(torch.ones(3, 4), parameter).requires_grad


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda tensor: tensor.sum().item(),
    "float": lambda tensor: float(tensor.sum()),
    "if": lambda tensor: bool(tensor.sum() > 0),
    "tolist": lambda tensor: tensor.tolist(),
    "mask": lambda tensor: tensor[tensor > 0],
    "nonzero": lambda tensor: tensor.nonzero(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_a_fakes_value_raises_one_of_the_known_errors(compat: Any, read: Callable[[Tensor], Any]) -> None:
    try:
        value = read(fake(compat, 3))
    except compat.DATA_DEPENDENT_ERRORS:
        return
    except Exception as error:
        pytest.fail(f"reading a FakeTensor raises {type(error).__name__}, which DATA_DEPENDENT_ERRORS lacks")
    pytest.fail(f"reading a FakeTensor gives {value!r} instead of an error")


# ---------------------------------------------------------------------- trees


def test_a_result_that_its_operation_has_saved_may_be_added_to_in_place(compat: Any) -> None:
    value = torch.tensor(4.0, requires_grad=True)
    result = value.sqrt()
    with compat.value_unchanged(result):
        result.add_(0 * value)
    result.backward()
    assert value.grad == 0.25, "value_unchanged does not keep the version of a tensor"


def test_trees_come_apart_and_together(compat: Any) -> None:
    tree = {"a": (torch.ones(2), [1, None]), "b": [torch.zeros(1), ("text", {})]}
    leaves, structure = compat.tree_flatten(tree)
    together = compat.tree_unflatten(leaves, structure)
    assert str(compat.tree_flatten(together)[1]) == str(structure), "tree_unflatten does not undo tree_flatten"
    assert together["a"][0] is tree["a"][0]
    assert together["a"][1] == [1, None]
    assert isinstance(together["b"][1], tuple)
    assert all(left is right for left, right in zip(compat.tree_leaves(tree), leaves, strict=True))


def test_trees_are_mapped_leaf_by_leaf_or_by_type(compat: Any) -> None:
    mapped = compat.tree_map_only(Tensor, lambda tensor: tensor + 1, {"a": torch.ones(()), "b": (1, "x")})
    assert mapped["a"] == 2, "tree_map_only has changed"
    assert mapped["b"] == (1, "x")


def test_a_structures_text_tells_structures_apart(compat: Any) -> None:
    texts = {str(compat.tree_flatten(tree)[1]) for tree in [(1, 2), [1, 2], {"a": 1, "b": 2}, {"a": 1, "c": 2}, (1,)]}
    assert len(texts) == 5, "the text of a tree's structure no longer tells structures apart"


def test_the_operation_counter_counts_what_a_matrix_product_and_its_gradient_take() -> None:
    from lightning_sg.training.cost import OperationCounter

    x, w = torch.randn(5, 3), torch.randn(3, 4, requires_grad=True)
    with OperationCounter() as forward:
        y = x @ w
    with OperationCounter() as backward:
        torch.autograd.grad(y.sum(), w)
    assert forward.work.flops == backward.work.flops == 2 * 5 * 3 * 4


def test_a_trainer_asks_its_strategy_for_the_accelerator_and_keeps_its_own(compat: Any) -> None:
    class Asked(DDPStrategy):
        asked = 0

        @property
        def _accelerator(self) -> Any:
            type(self).asked += 1
            return None

        @_accelerator.setter
        def _accelerator(self, value: Any) -> None:
            pass

        accelerator = None

    strategy = Asked()
    trainer = make_trainer(strategy=strategy)
    assert Asked.asked == 1
    assert compat.belongs_to(strategy, trainer)
    assert not compat.belongs_to(strategy, make_trainer())


def test_a_forward_pass_in_a_backward_pass_is_known(compat: Any) -> None:
    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(compat.goes_backward())
            return gradient

    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    Recomputes.apply(x).sum().backward()
    assert seen == [True]
    assert not compat.goes_backward()
