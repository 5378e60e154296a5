"""Arranges the panels of a Weights & Biases project: alignment, time and the task's metrics side by side.

pip install wandb wandb-workspaces
wandb login
python -m examples.wandb_workspace ENTITY PROJECT           # saves the workspace and prints its address
python -m examples.wandb_workspace ENTITY PROJECT --print   # prints it instead, without a connection
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

#: The panels of each section: a title, and a regular expression for the names of what is in it.
PANELS: dict[str, list[tuple[str, str]]] = {
    "Task": [("Training", r"^train.*"), ("Validation", r"^val.*")],
    "Alignment": [
        ("Cosine of prediction and target", r"^sg/.+/cosine$"),
        ("Norm of prediction over norm of target", r"^sg/.+/norm_ratio$"),
        ("Guard", r"^sg/.+/guarded$"),
    ],
    "Time": [("Milliseconds a step", r"^sg/step_ms$"), ("Share of waiting", r"^sg/waiting$")],
    "Errors of predictions, with metrics='all'": [
        ("Bias", r"^sg/.+/bias$"),
        ("Variance", r"^sg/.+/variance$"),
        ("Loss of the predictor", r"^sg/.+/loss$"),
        ("Cosine of the target itself", r"^sg/.+/bootstrapped_cosine$"),
    ],
}


def workspace(entity: str, project: str) -> Any:
    """The workspace, not yet saved."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            panels=[
                reports.LinePlot(title=title, x="trainer/global_step", metric_regex=names) for title, names in panels
            ],
            is_open=True,
        )
        for name, panels in PANELS.items()
    ]
    over_time = reports.LinePlot(title="Task over seconds", x="RelativeTime(Process)", metric_regex=r"^(train|val).*")
    sections[2].panels.append(over_time)
    picture = workspaces.Section(name="Summary", panels=[reports.MediaBrowser(media_keys=["sg/summary"])], is_open=True)
    return workspaces.Workspace(
        entity=entity, project=project, name="Synthetic gradients", sections=[picture, *sections]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Saves the workspace, or prints it."""
    parser = argparse.ArgumentParser(description="Arranges the panels of a Weights & Biases project.")
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--print", action="store_true", help="print the workspace in place of saving it")
    arguments = parser.parse_args(args)
    made = workspace(arguments.entity, arguments.project)
    if arguments.print:
        print(made._to_model().model_dump_json(by_alias=True, indent=2))  # it has no public form
        return
    made.save()
    print(made.url)


if __name__ == "__main__":
    main()
