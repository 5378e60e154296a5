"""What of Lightning works on several processes, and the test that shows it: writes docs/compatibility.md.

python -m tests.compatibility
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.clients import read, table
from tests.distributed.test_lightning_features import CASES

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
WORKS, DIFFERS, REFUSED = "works", "works, with a difference", "refused"
TESTS = Path(__file__).parent
SPLIT = "test_lightning_features.py::test_split_over_processes_it_does_what_it_does_in_one"


class Row(NamedTuple):
    """One feature.

    Attributes:
        area: What it belongs to.
        feature: Its name.
        verdict: One of the constants above.
        words: What differs, or why not.
        shown_by: The test, as ``file::function``; the file may be in any folder of ``tests/``.
    """

    area: str
    feature: str
    verdict: str
    words: str
    shown_by: str

    @property
    def path(self) -> Path:
        """The file with the test."""
        file, function = self.shown_by.split("::")
        (path,) = (path for path in TESTS.rglob(file) if f"def {function}(" in path.read_text())
        return path

    @property
    def test(self) -> str:
        """The test, with the path of its file in ``tests/``."""
        return f"{self.path.relative_to(TESTS)}::{self.shown_by.split('::')[1]}"


#: Cases of ``test_lightning_features.py`` by area: each is the same run in one process and in several, compared.
AREAS: dict[str, list[str]] = {
    "Loops": [
        "fast_dev_run", "overfit_batches", "limit_train_batches and limit_val_batches",
        "limit_train_batches as a share", "val_check_interval", "check_val_every_n_epoch", "max_steps", "min_epochs",
        "num_sanity_val_steps", "no sanity check", "several validation loaders", "an iterable dataset without length",
        "reload_dataloaders_every_n_epochs", "detect_anomaly", "deterministic",
    ],
    "Optimization": [
        "accumulate_grad_batches", "gradient_clip_val by value", "a plateau schedule on a validation metric",
        "optimizer_step and hooks around it", "two optimizers, by hand", "frozen layers",
        "an embedding with sparse gradients", "GradientAccumulationScheduler",
    ],
    "Precision": ["bf16-true", "64-true"],
    "Callbacks": [
        "ModelCheckpoint, the best and the last", "ModelCheckpoint on steps and a training metric", "EarlyStopping",
        "WeightAveraging", "StochasticWeightAveraging", "Timer", "ModelSummary", "TQDMProgressBar", "RichProgressBar",
        "DeviceStatsMonitor", "profiler='simple'",
    ],
    "Modules": [
        "nn.TransformerEncoder", "an LSTM inside a stage", "a skip connection inside a stage",
        "activation checkpointing inside a stage", "a dict with a mask and a number across a boundary", "BatchNorm",
        "a branch on the batch size", "torch.compile of a stage", "an in-place operation right behind a boundary",
        "a block that is called twice, a keyword argument", "an operation with several results, some unused",
        "a table made from a buffer, used by every stage", "bare parameters, an alias, a buffer",
        "hooks of the user's, forwards and backwards",
    ],
}  # fmt: skip

OTHERS = [
    Row("Loops", "validate, test and predict alone and from a checkpoint", WORKS, "outputs are rank 0's",
        "test_evaluation.py::test_evaluation_alone_and_from_a_checkpoint_is_that_of_one_process"),
    Row("Loops", "fit twice with one Trainer and one module", WORKS, "",
        "test_saving.py::test_training_goes_on_in_a_second_fit"),
    Row("Loops", "max_time", DIFFERS, "Lightning's Timer has all processes meet at every batch",
        "test_stopping.py::test_max_time_stops_all_stages_after_the_same_batch"),
    Row("Loops", "trainer.should_stop in mid-epoch", DIFFERS,
        "all stop after the same batch, up to (delay + 2) × stages later",
        "test_stopping.py::test_a_stop_that_one_stage_wants_stops_all_after_the_same_batch"),
    Row("Optimization", "manual optimization", DIFFERS,
        "values of the loss may be read on rank 0 only",
        "test_split_equals_one_process.py::test_split_equals_one_process"),
    Row("Optimization", "parameter groups by name, schedules on every step", WORKS, "",
        "test_split_equals_one_process.py::test_split_equals_one_process"),
    Row("Optimization", "gradient_clip_val by norm", DIFFERS, "of each process's own stages, with a warning",
        "test_support.py::test_clipping_by_norm_says_whose_norm_it_is"),
    Row("Optimization", 'gradient_clip_val by norm, clip_over="model"', WORKS, "stages wait for each other",
        "test_split_equals_one_process.py::test_clipping_by_the_norm_of_the_model_is_as_in_one_process"),
    Row("Optimization", "several passes through the network in a step, or none", WORKS, "",
        "test_several_crossings.py::test_predictors_learn_as_in_one_process"),
    Row("Optimization", "LBFGS and SAM", REFUSED, "they evaluate a step again for the same batch",
        "test_support.py::test_optimizers_that_evaluate_a_step_several_times_are_refused"),
    Row("Optimization", "gradients of gradients across a boundary", REFUSED, "a synthetic gradient has none",
        "test_unusual_modules.py::test_gradients_of_gradients_across_a_boundary_are_refused"),
    Row("Optimization", "LearningRateFinder", REFUSED, "it needs the loss in every process",
        "test_support.py::test_the_learning_rate_finder_is_refused_by_name"),
    Row("Optimization", "clip_gradients and clip_grad_norm_ by hand", DIFFERS,
        "of each process's own stages, with a warning; clip_gradients follows clip_over",
        "test_hook_watch.py::test_a_norm_of_some_of_the_gradients_is_warned_of_once"),
    Row("Optimization", "a plateau schedule stepped in a hook", WORKS, "",
        "test_whole_model.py::test_metrics_are_there_before_the_hooks"),
    Row("Callbacks", "hooks at the end of an epoch and around validation that use the whole model", WORKS, "",
        "test_whole_model.py::test_a_hook_of_a_callback_sees_the_whole_current_model"),
    Row("Callbacks", "hooks there that write to weights", WORKS, "",
        "test_whole_model.py::test_what_a_hook_writes_reaches_the_stage_that_trains_it"),
    Row("Callbacks", "hooks in mid-epoch that use weights of another stage", DIFFERS, "old values, with a warning",
        "test_hook_watch.py::test_weights_of_another_stage_are_warned_of_once"),
    Row("Callbacks", "an average of the weights kept by hand, AveragedModel, checkpoints of WeightAveraging", WORKS, "",
        "test_averages.py::test_an_average_is_where_its_original_is"),
    Row("Callbacks", "a callback that stops by the loss of a step", WORKS, "the last stage decides, with a warning",
        "test_outputs.py::test_a_callback_that_stops_when_the_loss_is_small_sees_the_loss"),
    Row("Callbacks", "torchmetrics in callbacks and dicts", WORKS, "",
        "test_collectives_of_users.py::test_a_metric_in_a_callback"),
    Row("Callbacks", "BatchSizeFinder, Tuner.scale_batch_size", REFUSED, "a process that fails ends all",
        "test_collectives_of_users.py::test_the_batch_size_finder_is_refused_by_name"),
    Row("Callbacks", "ModelPruning", REFUSED, "it puts other parameters into the model",
        "test_collectives_of_users.py::test_pruning_is_refused_by_name"),
    Row("Checkpoints", "trainer.save_checkpoint in one process alone", REFUSED, "every process must call it",
        "test_collectives_of_users.py::test_saving_on_one_rank_is_an_error_that_says_so"),
    Row("Precision", "bf16-mixed", WORKS, "", "test_split_equals_one_process.py::test_split_equals_one_process"),
    Row("Precision", "16-mixed", DIFFERS,
        "each process has a loss scale of its own, and skips its own steps; shown with a CPU's scaler",
        "test_scaler.py::test_scaled_losses_train_as_in_one_process"),
    Row("Checkpoints", "resume in mid-epoch on another number of processes", WORKS, "",
        "test_saving.py::test_a_run_goes_on_in_mid_epoch_on_any_number_of_processes"),
    Row("Checkpoints", "resume at the end of an epoch, optimizers and predictors included", WORKS, "",
        "test_saving.py::test_a_checkpoint_is_an_ordinary_checkpoint_and_resumes_on_other_numbers_of_processes"),
    Row("Checkpoints", "targets and exact gradients under way", WORKS, "",
        "crossings/test_exact.py::test_a_checkpoint_in_the_middle_of_an_epoch_waits_for_what_is_under_way"),
    Row("Checkpoints", "load in Lightning without this package", WORKS, "",
        "test_saving.py::test_a_checkpoint_of_a_split_run_loads_in_plain_lightning"),
    Row("Checkpoints", 'in shards, checkpoint="sharded"', WORKS, "",
        "test_sharded.py::test_a_run_goes_on_from_shards_on_any_number_of_processes"),
    Row("Checkpoints", "one file made of shards", WORKS, "",
        "test_merge.py::test_merged_shards_are_the_checkpoint_of_one_process"),
    Row("Checkpoints", "a crash while saving", WORKS, "the last good one stays",
        "test_sharded.py::test_a_crash_while_saving_leaves_the_last_good_checkpoint"),
    Row("Data", "shuffling, workers and augmentation without a seed typed", WORKS, "",
        "test_randomness.py::test_stages_get_the_same_batches_without_a_seed"),
    Row("Data", "stages that see different batches", REFUSED, "compared by a fingerprint of each batch",
        "test_batch_mismatch.py::test_stages_that_see_different_batches"),
    Row("Data", "replicas of the stages (data parallelism), samplers, predictors, sync_dist, metrics", WORKS, "",
        "test_data_parallel.py::test_replicas_train_as_one_process_does_on_all_their_batches"),
    Row("Data", "a run with replicas goes on with another number of processes", WORKS, "",
        "test_data_parallel.py::test_a_run_goes_on_in_another_number_of_processes"),
    Row("Data", "sync_batchnorm with replicas", REFUSED, "torch has it on GPUs only",
        "test_data_parallel.py::test_synchronised_batchnorm_is_refused"),
    Row("Data", "the callback under DDP", REFUSED, "use replicas", "test_errors.py::test_replicas_are_refused_by_name"),
    Row("Callbacks", "a metric of the last stage in ModelCheckpoint, EarlyStopping, schedulers", WORKS,
        "shared at the ends of epochs", "test_stopping.py::test_early_stopping_stops_all_stages"),
    Row("Callbacks", "progress bars show the alignment", WORKS, "sg/cosine, the mean over boundaries",
        "test_logs.py::test_progress_bars_show_the_alignment"),
    Row("Callbacks", "synthetic inputs: stages that do not wait for activations", WORKS, "",
        "inputs/test_split.py::test_one_two_and_four_processes_end_with_the_same_weights"),
    Row("Callbacks", "synthetic inputs, resumed on another number of processes", WORKS, "",
        "inputs/test_split.py::test_a_checkpoint_goes_on_with_another_number_of_processes"),
    Row("Callbacks", "synthetic inputs, a tensor without gradient across processes", REFUSED, "make it from the batch",
        "inputs/test_split.py::test_a_mask_between_processes_is_refused_by_name"),
    Row("Callbacks", "stages updated at random times", WORKS, "",
        "training/test_updates.py::test_several_processes_make_the_same_choices_as_one"),
    Row("Callbacks", "a summary of the stages", DIFFERS,
        "ModelSummary shows the whole model; the stages with their parameters are told at the first batch",
        "test_startup.py::test_the_stages_with_their_parameters_are_told_once"),
    Row("Loggers", "WandbLogger offline and TensorBoardLogger, metrics of all stages", WORKS, "",
        "test_launchers.py::test_metrics_of_all_stages_reach_the_logger"),
    Row("Loggers", 'WandbLogger.watch(log="gradients")', DIFFERS, "those of the last process's stages",
        "test_launchers.py::test_metrics_of_all_stages_reach_the_logger"),
    Row("Loggers", 'WandbLogger.watch(log="parameters" or "all")', REFUSED, "it reads every parameter in every step",
        "test_launchers.py::test_watching_every_parameter_is_refused"),
    Row("Loggers", "self.log of a value of an earlier stage", DIFFERS, "not logged, with a warning",
        "test_logs.py::test_a_value_of_another_stage_is_not_logged_and_it_is_said"),
    Row("Modules", "dropout and sampling, in training and evaluation", WORKS, "",
        "test_randomness.py::test_stages_draw_the_same_numbers_in_several_processes_as_in_one"),
    Row("Modules", "masks, positions and packed sequences made from the batch, in any stage", WORKS, "",
        "test_batch_alone.py::test_two_processes_compute_what_one_does"),
    Row("Modules", "configure_model, without the whole model in a process's memory", WORKS, "",
        "partition/test_paging.py::test_no_process_holds_the_whole_model_in_memory"),
    Row("Modules", 'configure_model under torch.device("meta")', WORKS, "",
        "partition/test_paging.py::test_a_model_made_on_the_meta_device_begins_and_trains_as_one_made_on_the_host"),
    Row("Modules", "a state carried from chunk to chunk in each stage, saved and resumed", WORKS, "",
        "recurrent/test_stages.py::test_two_processes_equal_one"),
    Row("Modules", "boundaries by name, a tuple across one", WORKS, "",
        "test_split_equals_one_process.py::test_split_equals_one_process"),
    Row("Modules", 'boundaries="auto"', WORKS, "",
        "partition/test_automatic.py::test_training_is_as_with_these_boundaries_named_in_one_process"),
    Row("Modules", "a tied weight within a process", WORKS, "",
        "partition/test_paging.py::test_training_is_as_in_one_process_and_a_checkpoint_resumes_in_either"),
    Row("Modules", "a tied weight across processes", REFUSED, "unless its copies are kept in step",
        "test_errors.py::test_tied_parameter_across_processes"),
    Row("Modules", 'a tied weight across processes, tied_weights="synchronize"', WORKS,
        "these stages wait for each other in every step", "test_tied.py::test_copies_train_as_one_weight"),
    Row("Modules", "transformers: GPT-2 (also tied), Llama, BERT with a padding mask, ViT, ResNet, by name", WORKS, "",
        "test_third_party.py::test_a_model_split_by_name_trains_as_in_one_process"),
    Row("Modules", "a skip connection across a boundary", REFUSED, "pass it through the boundary too",
        "test_errors.py::test_activation_that_goes_around_a_boundary"),
    Row("Modules", "a branch on the value of an activation", REFUSED, "before the last boundary",
        "test_errors.py::test_reading_a_value_before_the_last_boundary"),
    Row("Modules", "patched forwards, kept outputs, memory layouts", WORKS, "",
        "test_unusual_modules.py::test_patched_forwards_kept_outputs_and_layouts_survive_the_split"),
    Row("Modules", "a buffer that two processes change", REFUSED, "",
        "test_unusual_modules.py::test_a_buffer_that_two_processes_change_is_refused"),
    Row("Launchers", "subprocesses, torchrun, spawn, fork", WORKS, "",
        "test_launchers.py::test_every_launcher_trains_the_same"),
    Row("Launchers", "torchrun with restarts, a killed stage", WORKS, "from the last checkpoint",
        "test_launchers.py::test_a_killed_stage_restarts_the_job_which_ends_as_if_undisturbed"),
    Row("Launchers", "SLURM", WORKS, "", "test_launchers.py::test_slurm_starts_the_processes"),
    Row("Launchers", "Ctrl-C", WORKS, "no process is left behind",
        "test_launchers.py::test_control_c_ends_all_processes"),
]  # fmt: skip


def rows() -> list[Row]:
    """All of them, by area."""
    shown = [Row(area, name, WORKS, CASES[name].words, SPLIT) for area, names in AREAS.items() for name in names]
    areas = list(dict.fromkeys(row.area for row in (*shown, *OTHERS)))
    return sorted([*shown, *OTHERS], key=lambda row: areas.index(row.area))


def page() -> str:
    """The page."""
    lines = [
        "# What works on several processes",
        "",
        "Written by `python -m tests.compatibility`; the suite fails if it is out of date. Each row names the test",
        "that shows it, in `tests/`. Those of `distributed/test_lightning_features.py` train the same model in one",
        "process, in two and in three, and compare weights, metrics, learning rates, step counts and checkpoint files.",
        "",
        "Run on the CPU; some of it on a GPU too (see performance.md); none on more than one node.",
        "",
        "| area | feature | | | shown by |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        lines.append(f"| {row.area} | {row.feature} | {row.verdict} | {row.words} | `{row.test}` |")
    lines += [
        "",
        "## Models of other people's packages",
        "",
        "Small models of real packages, their code unchanged, on data made from fixed seeds, with the callback's",
        "defaults: `tests/clients/`, run by `make test-clients`. *Two processes* and *automatic boundaries* say `yes`",
        "where the weights end as in one process, to 1e-6. The loss is that of decoupled training over that of plain",
        "training, after as many steps as plain training needs to halve its loss: the mean over three seeds, with the",
        "smallest and the largest. *With late gradients* is the same with",
        "`SyntheticGradients(late=LateGradients(share=0.5))`, see [late gradients](late.md). Measured by",
        "`python -m benchmarks.clients`.",
        "",
        table(read()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
