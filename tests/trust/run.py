"""``make trust``: runs the parts named on the command line, or all, and writes what they found into ``experiments/trust``.

Each part keeps its figures in a file of its own, so that parts can be run one by one; the README is made from all of them.
"""

import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dynprune.atomic import replacing
from dynprune.evaluation.cells import listed
from dynprune.evaluation.machine import describe_machine

FOLDER = Path("experiments/trust")
PARTS = ("inputs", "checker", "architectures", "greedy", "determinism", "dependencies", "faults", "mutants")
FIGURES = (
    *("faults_injected", "faults_survived", "inputs_tried", "input_failures", "architectures_passed", "architectures_refused"),
    *("checker_pairs", "checker_disagreements", "mutants_killed_share"),
)
"""What ``figures.json`` holds at least, null where a part has not been run."""


def main(parts: list[str]) -> None:
    """Runs parts and writes the report."""
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"{', '.join(sorted(unknown))}: no such part; allowed: {', '.join(PARTS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part in parts or PARTS:
        module = importlib.import_module(f"trust.{part}")
        print(f"{part}: {inspect.getdoc(module)}\n".partition("\n")[0], flush=True)
        start = time.monotonic()
        found = module.run(FOLDER) if inspect.signature(module.run).parameters else module.run()
        record = {
            "figures": found,
            "seconds": round(time.monotonic() - start),
            "machine": listed(describe_machine()),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        with replacing(FOLDER / "parts" / f"{part}.json") as path:
            path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
    _report()


def _report() -> None:
    """Puts the parts' figures together."""
    records = {part: json.loads(path.read_text(encoding="utf-8")) for part in PARTS if (path := _kept(part)).exists()}
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    for record in records.values():
        figures |= {key: value for key, value in record["figures"].items() if isinstance(value, int | float)}
    with replacing(FOLDER / "figures.json") as path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    with replacing(FOLDER / "README.md") as path:
        path.write_text(_readme(records), encoding="utf-8")


def _kept(part: str) -> Path:
    return FOLDER / "parts" / f"{part}.json"


def _readme(records: Mapping[str, Mapping[str, Any]]) -> str:
    blocks = [
        "# Trust",
        "What was done to break it, and what came of it. Written by `make trust` (`make trust PARTS=inputs` runs one part); "
        "[figures.json](figures.json) holds the figures alone.",
    ]
    for part, record in records.items():
        module = importlib.import_module(f"trust.{part}")
        lines = [f"| {key} | {_shown(value)} |" for key, value in record["figures"].items()]
        blocks.append(f"## {part.capitalize()}")
        blocks.append((inspect.getdoc(module) or "").replace("``", "`"))
        blocks.append("\n".join(["| figure | value |", "| --- | --- |", *lines]))
        blocks.append(f"{record['seconds']} s on {record['machine']}, {record['date']}.")
    return "\n\n".join(blocks) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_shown(count)}" for key, count in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)).replace("|", "\\|") or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    # For this process and what it forks, and for the commands that it starts: results hang on the number of threads.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    main(sys.argv[1:])
