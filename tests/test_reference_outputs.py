"""What each stage makes of fixed inputs is what was stored when its version was last raised.

After a change on purpose: raise the stage's version, then ``python tests/test_reference_outputs.py`` stores the outputs anew;
it refuses what has changed under its old version. How each method's router learns is in test_reference_curves.py.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tiny import composed, run_tiny

from dynprune.stages.adapt import adapt
from dynprune.stages.run import Run

STORED = Path(__file__).with_name("reference_outputs.json")
RUN = [
    *("adapter=context", "adapter.max_samples=6", "adapter.bottleneck=4", "adapter.context.epochs=1"),
    *("adapter.context.batch_size=2", "adapter.context.micro_batch_size=2", "adapter.draw.probe_samples=2"),
    *("adapter.draw.max_layers=3", "exploration.max_queries=3", "exploration.max_validation_queries=1", "method.epochs=1"),
    *("exploration.estimate_all=true", "exploration.score=partial_match", "pairs.prefer_by=likelihood"),
    *("evaluation.max_queries=2", "evaluation.latency.queries=1", "evaluation.static_samples=2"),
    "evaluation.baselines.static_accuracy={sizes:[1,2],finalists:2,max_queries:2}",
    "evaluation.baselines.block_influence={sizes:[2]}",
    "evaluation.baselines.library={max_queries:4,groups:2}",
    "evaluation.baselines.nearest_centroid={sizes:[2],clusters:2}",
    "evaluation.baselines.pudding.sizes=[1]",
]
LOCAL = ["stage=adapters", "adapter=bottleneck", "adapter.max_samples=6", "adapter.epochs=1", "adapter.bottleneck=4"]
ADAPT = ["evaluation.max_queries=2", "adapt.rank=2", "adapt.alpha=4", "adapt.epochs=1", "adapt.families=4"]
# What it holds is measured.
LEFT_OUT = {"latency"}


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """By stage, its version and what its artifacts of all runs hold, as far as it can be written as JSON."""
    run_tiny(folder, "whole", *RUN)
    run_tiny(folder, "local", *LOCAL)
    places = [f"paths.run={folder}/adapt", f"paths.artifacts={folder}/outputs/artifacts"]
    adapt(Run(composed("experiment=tiny", "stage=adapt", "data.source.max_chars=600", *ADAPT, *places)))
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / "outputs/artifacts").glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["stage"] not in LEFT_OUT:
            stage = found.setdefault(manifest["stage"], {"version": manifest["version"], "artifacts": []})
            assert stage["version"] == manifest["version"]
            stage["artifacts"].append({"counts": manifest["counts"], **content(path.parent)})
    for stage in found.values():
        # By content, not by fingerprint: that names versions of whatever it is made from.
        stage["artifacts"].sort(key=lambda artifact: json.dumps(artifact, sort_keys=True))
    return dict(sorted(found.items()))


def content(folder: Path) -> dict[str, Any]:
    """What the files of an artifact say, by their names."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".parquet":
            found[name] = short(pyarrow.parquet.read_table(path).to_pylist())
        elif path.suffix == ".jsonl":
            found[name] = short([json.loads(line) for line in path.read_text().splitlines()])
        elif path.suffix == ".json" and path.name not in ("manifest.json", "adapter_config.json"):
            found[name] = short(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            found[name] = tensors(load_file(path))
        elif path.suffix == ".npz":
            found[name] = tensors({key: torch.from_numpy(array) for key, array in numpy.load(path).items()})
    assert found, f"nothing in {folder} is compared"
    return found


def tensors(of: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of each tensor its norm and its direction."""
    return {key: [float(tensor.double().norm()), turned(tensor)] for key, tensor in of.items()}


def turned(tensor: torch.Tensor) -> float:
    """The cosine of the angle between a tensor and one of the same shape that rises from place to place."""
    flat, rising = tensor.double().flatten(), torch.arange(1, tensor.numel() + 1, dtype=torch.float64)
    return float(flat @ rising / (flat.norm() * rising.norm()).clamp(min=1e-12))


def short(value: object) -> Any:
    """The same with a digest in place of a long text or a long list of numbers."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, list) and not (len(value) > 8 and all(type(item) is int for item in value)):
        return [short(item) for item in value]
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Any, found: Any, place: str = "") -> Iterator[str]:
    """Where two outputs differ by more than roundings."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in sorted(stored.keys() | found.keys()):
            if key in stored and key in found:
                yield from differences(stored[key], found[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: {'gone' if key in stored else 'new'}"
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for number, (one, other) in enumerate(zip(stored, found, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif isinstance(stored, float) and isinstance(found, float):
        if found != pytest.approx(stored, rel=1e-3, abs=1e-5):
            yield f"{place}: {stored} became {found}"
    elif type(stored) is not type(found) or stored != found:
        yield f"{place}: {stored!r} became {found!r}"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return outputs(tmp_path_factory.mktemp("reference"))


@pytest.mark.stages
def test_every_stage_makes_what_it_made_when_its_version_was_raised(found):
    stored = json.loads(STORED.read_text())
    assert stored.keys() == found.keys()
    raised = [stage for stage in stored if stored[stage]["version"] != found[stage]["version"]]
    assert not raised, f"store the outputs of {raised} anew: python tests/{Path(__file__).name}"
    changed = {stage: list(differences(stored[stage], found[stage])) for stage in stored}
    changed = {stage: where[:5] for stage, where in changed.items() if where}
    assert not changed, f"raise VERSION where these are made, then: python tests/{Path(__file__).name}"


@pytest.mark.parametrize(
    ("other", "place"),
    [
        ({"a": [1, 2.0], "b": "x"}, None),
        ({"a": [1, 2.0 + 1e-5], "b": "x"}, None),
        ({"a": [1, 2.1], "b": "x"}, "/a[1]: 2.0 became 2.1"),
        ({"a": [True, 2.0], "b": "x"}, "/a[0]: 1 became True"),
        ({"a": [1], "b": "x"}, "/a: [1, 2.0] became [1]"),
        ({"a": [1, 2.0]}, "/b: gone"),
        ({"a": [1, 2.0], "b": "x", "c": None}, "/c: new"),
    ],
)
def test_a_difference_is_named_by_its_place(other, place):
    assert list(differences({"a": [1, 2.0], "b": "x"}, other)) == ([] if place is None else [place])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        new = outputs(Path(scratch))
    old = json.loads(STORED.read_text()) if STORED.exists() else {}
    kept = [stage for stage in old if stage in new and old[stage]["version"] == new[stage]["version"]]
    if unraised := {stage: where for stage in kept if (where := list(differences(old[stage], new[stage]))[:5])}:
        sys.exit(f"nothing is stored, since these changed under their old versions: {json.dumps(unraised, indent=1)}")
    STORED.write_text(json.dumps(new, indent=1) + "\n")
