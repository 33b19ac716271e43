"""The stage ``compare``: several runs in one table, whenever and wherever they were run."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dynprune.evaluation.comparison_output import render_comparison, write_comparison
from dynprune.evaluation.html_report import write_comparison_report
from dynprune.evaluation.run_comparison import compare_runs
from dynprune.evaluation.run_results import is_run, read_run
from dynprune.stages.run import Run

log = logging.getLogger(__name__)


def compare(run: Run) -> Path:
    """Compares the runs that ``runs`` matches, and writes the comparison into this run's folder.

    Returns:
        The folder.

    Raises:
        ValueError: ``runs`` matches no run.
    """
    pattern = run.config.runs
    if pattern is None:
        raise ValueError("stage=compare needs runs, the folders to compare; type runs='outputs/multiruns/…/*', in quotes")
    folders = [
        path for place in glob.glob(str(pattern)) if is_run(path := Path(place)) and path.resolve() != run.folder.resolve()
    ]
    if not folders:
        raise ValueError(f"runs={pattern} matches no folder of a run; allowed: folders with a report, as outputs/NAME")
    show_comparison(folders, run.folder)
    return run.folder


def show_comparison(folders: Sequence[Path], target: Path) -> None:
    """Compares runs, writes the comparison and prints it.

    Args:
        folders: The runs' folders, in any order.
        target: Where to write.
    """
    comparison = compare_runs([read_run(folder) for folder in sorted(folders, key=_by_number)])
    written = write_comparison(comparison, target)
    pictures = [path for path in written if path.suffix == ".png"]
    write_comparison_report(target / "report.html", "Comparison of runs", comparison, pictures)
    Console().print(render_comparison(comparison))
    for path in (*written, target / "report.html"):
        log.info("wrote %s", os.path.relpath(path))


def _by_number(folder: Path) -> tuple[int, str]:
    """Jobs of a sweep by their number, all others by name after them."""
    number = re.match(r"\d+(?=_)", folder.name)
    return (int(number[0]) if number else 10**9, folder.name)
