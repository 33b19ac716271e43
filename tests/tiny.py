"""The tiny experiment, in this process, which need not import everything again, or in its own; and what it wrote."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dynprune.app import run_stage
from dynprune.paths import conf_dir


def composed(*overrides: str) -> DictConfig:
    """The configuration that overrides give."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run_tiny(folder: Path, name: str, *overrides: str) -> None:
    """Runs ``experiment=tiny`` as if typed in a folder."""
    with contextlib.chdir(folder):
        run_stage(composed("experiment=tiny", f"paths.run=outputs/{name}", *overrides), multirun=False)


def dynprune(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command ``dynprune`` as if typed in a folder."""
    result = subprocess.run(
        [sys.executable, "-m", "dynprune", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def table_of(folder: Path, name: str) -> dict[str, dict]:
    """The rows of a run's table, by their names."""
    rows = json.loads((folder / f"outputs/{name}/report/table.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def samples_of(folder: Path, name: str, row: str) -> list[dict]:
    """What a row of a run's table said."""
    lines = (folder / f"outputs/{name}/report/samples/{row}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def manifests(folder: Path, stage: str) -> list[dict]:
    """The manifests of a stage's artifacts."""
    return [json.loads(path.read_text()) for path in sorted((folder / "outputs/artifacts" / stage).glob("*/manifest.json"))]
