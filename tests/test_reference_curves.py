"""Each method's loss curve on fixed rollouts is the one that was stored when it was last changed on purpose.

After such a change: ``python tests/test_reference_curves.py`` stores the curves anew, and the stage's version is raised.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import composed

from dynprune.data.rollouts import Rollout, RolloutWriter
from dynprune.evaluation.training_curves import read_curve
from dynprune.paths import conf_dir
from dynprune.stages.router import CURVE, router
from dynprune.stages.run import Run

STORED = Path(__file__).with_name("reference_curves.json")
METHODS = sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
CONFIGURATIONS = [(), (1,), (2,), (1, 2), (1, 3), (0, 2), (1, 2, 3)]


def write_rollouts(folder: Path) -> None:
    """Of every query the same configurations; which of them are right follows from its place alone."""
    queries = Run(composed("experiment=tiny", f"paths.run={folder}/unused", f"paths.artifacts={folder}/artifacts"))
    writer = RolloutWriter(folder / "rollouts", num_layers=4, score="json_match")
    asked = [*queries.queries("train", 12, "x"), *queries.queries("validation", 6, "x")]
    for place, query in enumerate(asked):
        hurt = {0, 1 + place % 3}
        found = [Rollout(query.id, layers, float(not hurt & set(layers)), "") for layers in CONFIGURATIONS]
        writer.append(found)


def curve(method: str, folder: Path) -> dict[str, list[float]]:
    places = [f"paths.run={folder}/run", f"paths.artifacts={folder}/artifacts", f"exploration.folder={folder}/rollouts"]
    sizes = ["exploration.max_queries=12", "exploration.max_validation_queries=6", "method.epochs=4", "method.batch_size=16"]
    run = Run(composed("experiment=tiny", f"method={method}", "method.optimizer.lr=0.01", *sizes, *places))
    found = read_curve(router(run).folder / CURVE)
    return {name: list(values) for name, values in asdict(found).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    write_rollouts(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_as_it_did_when_its_curve_was_stored(method, folder):
    stored = json.loads(STORED.read_text())[method]
    found = curve(method, folder)
    assert found["epochs"] == stored["epochs"] == [0, 1, 2, 3]
    for name in ("training_loss", "validation_loss", "preference_accuracy"):
        assert found[name] == pytest.approx(stored[name], rel=1e-3, abs=1e-4), name


def test_every_method_learns_something_on_these_rollouts():
    for method, stored in json.loads(STORED.read_text()).items():
        assert stored["training_loss"][-1] < 0.99 * stored["training_loss"][0], method


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_rollouts(Path(scratch))
        curves = {method: curve(method, Path(scratch)) for method in METHODS}
    STORED.write_text(json.dumps(curves, indent=1) + "\n")
