"""One run of Weights & Biases for each job: its trainings' curves, its table, figures and report, and how it ended."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from dynprune.stages.run import Run, plain


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Keeps a run of Weights & Biases open for a job, if ``logger`` has one; Lightning's loggers go on in it.

    It ends with exit code 1 if the job fails, so that a failed job of a sweep is no finished one there.

    Args:
        run: The job.
    """
    settings = run.config.logger.get("wandb")
    if settings is None or run.store.rank > 0:
        yield
        return
    # Its process lives on from one job to the next, in the folder in which the first one began.
    place = Path(settings.save_dir).resolve()
    place.mkdir(parents=True, exist_ok=True)
    opened = wandb.init(
        project=settings.project,
        dir=place,
        name=str(run.folder.name),
        # The jobs of a sweep lie in one folder.
        group=str(run.folder.parent.name),
        # None leaves it to WANDB_MODE.
        mode="offline" if settings.offline else None,
        config=plain(run.config),
        reinit="finish_previous",
    )
    opened.define_metric("trainer/global_step")
    opened.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    try:
        yield
    except BaseException:
        opened.finish(exit_code=1)
        raise
    opened.finish(exit_code=0)


def track_report(folder: Path) -> None:
    """Logs a report, if a run of Weights & Biases is open: the table, each figure, the page, and all files as an artifact.

    Args:
        folder: The folder of the report.
    """
    if wandb.run is None:
        return
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    logged: dict[str, Any] = {"report/table": wandb.Table(columns=list[str | int](header), data=lines)}
    logged |= {f"report/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    logged["report/page"] = wandb.Html(str(folder / "report.html"), inject=False)
    wandb.run.log(logged)
    artifact = wandb.Artifact(f"report-{wandb.run.id}", type="report")
    artifact.add_dir(str(folder))
    wandb.run.log_artifact(artifact)
