"""What a stage that is run alone leaves in the run's folder: what it came to, and a report of it."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynprune.evaluation.comparison_output import write_figures
from dynprune.evaluation.html_report import write_comparison_report
from dynprune.evaluation.machine import versions
from dynprune.evaluation.parts import Part
from dynprune.evaluation.run_comparison import compare_runs
from dynprune.evaluation.run_results import read_parts, write_parts
from dynprune.evaluation.training_curves import TrainingCurve
from dynprune.stages.run import Run

log = logging.getLogger(__name__)
_REPORT = "report.html"
# Those of a comparison without a table.
_FIGURES = ("layer_errors.png", "training_curves.png")


def report_parts(run: Run, parts: Mapping[str, Part], curves: Mapping[str, Sequence[TrainingCurve]] | None = None) -> None:
    """Notes what a stage came to, and writes ``report.html`` and its figures where it came to something.

    Args:
        run: The run.
        parts: By their names.
        curves: How its router learned: by method, a curve for each seed.
    """
    write_parts(run.folder, run.config.seed, parts, curves, run.shown_config)
    # What an earlier stage of this name left is about something else.
    for name in (*_FIGURES, _REPORT):
        (run.folder / name).unlink(missing_ok=True)
    if not parts:
        return
    comparison = compare_runs([replace(read_parts(run.folder), versions=versions())])
    pictures = write_figures(comparison, run.folder)
    write_comparison_report(run.folder / _REPORT, str(run.config.name), comparison, pictures)
    for path in (*pictures, run.folder / _REPORT):
        log.info("wrote %s", os.path.relpath(path))
