"""The stage ``bench``: ratios of times, both sides in turns in one run, medians, with the machine named."""

import json
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dynprune.atomic import replacing
from dynprune.benchmarks.exploration import explore_lines, explore_shards
from dynprune.benchmarks.line import Line
from dynprune.benchmarks.pruning import prune_overhead, prune_overhead_b8
from dynprune.benchmarks.scaling import measure_scaling, plot_scaling
from dynprune.benchmarks.training import distill, distill_memory, log_prob, router_step
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.stages.progress import track
from dynprune.stages.run import Run

log = logging.getLogger(__name__)
_SINGLE: Sequence[Callable[[Run], Line]] = (
    prune_overhead,
    prune_overhead_b8,
    distill,
    distill_memory,
    log_prob,
    router_step,
    explore_shards,
)


def bench(run: Run) -> Path:
    """Measures all lines and writes ``bench.json``, and the figure ``scaling.png``.

    Returns:
        The file.
    """
    lines = []
    for line in track(_measured(run), "benchmarks", 2 + len(_SINGLE)):
        log.info("%s: %.4g against %.4g %s, a ratio of %.2f", line.name, line.this, line.against, line.unit, line.ratio)
        lines.append(line)
    document = {
        "lines": [asdict(line) for line in lines],
        "machine": {**describe_machine(), "dtype": run.model_identity["dtype"]},
        "versions": versions(),
        "commit": _commit(),
    }
    target = Path(run.config.paths.outputs) / "bench" / "bench.json"
    with replacing(target) as path:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    figure = target.parent / "scaling.png"
    plot_scaling(measure_scaling(run.config.hardware.batch_size, run.shared_bytes), figure)
    table = Table("line", "ratio", "target", "this", "against", "unit")
    for line in lines:
        table.add_row(line.name, f"{line.ratio:.2f}", line.target, f"{line.this:.4g}", f"{line.against:.4g}", line.unit)
    Console().print(table)
    log.info("wrote %s and %s", target, figure)
    return target


def _measured(run: Run) -> Iterator[Line]:
    yield from explore_lines(run)
    for measure in _SINGLE:
        yield measure(run)


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
