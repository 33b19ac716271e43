"""Every stage twice with one seed, and once with another number of threads.

The runs are processes of their own, one after another in an empty folder of the same name, which checkpoints mention: the
whole pipeline with all that is searched for its table, adapters that learn by gradient, those that learn together, and the
SLM's delta. Two runs alike must leave the same files, byte for byte, in every artifact; what is measured alone may differ:
what manifests and the delta's card say of time and memory, and the timing of the table. With two threads instead of one the
rollouts must be the same, byte for byte.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_RUNS = (
    (
        *("exploration.estimate_all=true", "pairs=all", "method=dpo"),
        "evaluation.baselines.static_accuracy={sizes:[1],finalists:2,max_queries:3}",
        "evaluation.baselines.block_influence={sizes:[1]}",
        "evaluation.baselines.library={max_queries:6,groups:2}",
        "evaluation.baselines.nearest_centroid={sizes:[1],clusters:2}",
        "evaluation.baselines.pudding.sizes=[1]",
        "+base@evaluation.lossless.lookup=lossless",
    ),
    ("stage=adapters", "adapter=bottleneck", "adapter.bottleneck=16", "adapter.epochs=2"),
    (
        *("stage=adapters", "adapter=context", "adapter.bottleneck=16", "adapter.context.epochs=2"),
        *("adapter.draw.max_layers=2", "adapter.draw.probe_samples=4"),
    ),
    ("stage=adapt", "data.source.max_chars=600", "adapt.rank=2", "adapt.alpha=4", "adapt.epochs=1", "adapt.families=16"),
)
# And the hash of all that.
_MEASURED = ("attempts", "wall_clock_s", "created", "peak_memory_mib", "sha256")
_TIMING, _CARD = "latency", "README.md"


def run() -> dict[str, Any]:
    """Runs all three.

    Returns:
        The figures of the report.
    """
    with tempfile.TemporaryDirectory(prefix="dynprune-determinism-") as scratch:
        one, again, threads = (_artifacts(Path(scratch) / "work", number) for number in (1, 1, 2))
    different = sorted(name for name in one.keys() | again.keys() if one.get(name) != again.get(name))
    rollouts = [name for name in one if name.startswith("explore/") and name.endswith(".parquet")]
    assert rollouts, "nothing was explored"
    return {
        "deterministic_files": len(one),
        "deterministic_files_by_stage": dict(sorted(Counter(name.partition("/")[0] for name in one).items())),
        "different_files": different,
        "rollout_files": len(rollouts),
        "rollout_files_changed_by_threads": sorted(name for name in rollouts if one[name] != threads.get(name)),
    }


def _artifacts(folder: Path, threads: int) -> dict[str, bytes]:
    """The content of all files that a run leaves in its artifacts, by their paths."""
    folder.mkdir()
    for number, words in enumerate(_RUNS):
        subprocess.run(
            [sys.executable, "-m", "dynprune", "experiment=tiny", *words, f"hydra.run.dir=outputs/{number}"],
            cwd=folder,
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    root = folder / "outputs/artifacts"
    content = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not path.is_file() or name.startswith(f"{_TIMING}/") or path.name == _CARD:
            continue
        content[name] = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content[name])
            content[name] = json.dumps({key: value for key, value in manifest.items() if key not in _MEASURED}).encode()
    shutil.rmtree(folder)
    return content
