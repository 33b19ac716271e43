"""Weights & Biases, offline: what a job leaves there is read back from its own file."""

import time

import pytest
import wandb
from tiny import run_tiny
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
LOGGERS = ("logger=[csv,wandb]", "logger.wandb.offline=true", "evaluation.latency.queries=0")


def records(folder):
    """What was sent, or would have been: the records of the one offline run under a folder, to its end."""
    deadline = time.monotonic() + 30
    # Its process writes the file a little after the run has finished.
    while not exit_codes(found := list(_read(folder))):
        assert time.monotonic() < deadline, "the run has no end"
        time.sleep(0.1)
    return found


def _read(folder):
    """LevelDB's log: blocks of records in one piece or several, after a header of seven bytes."""
    [path] = folder.rglob("run-*.wandb")
    data, place, pieces = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data):
            return
        # A record in one piece, or its last piece.
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


def logged(found):
    return {item.key or item.nested_key[0] for record in found for item in record.history.item}


def exit_codes(found):
    return [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]


@pytest.mark.slow
def test_a_job_is_one_run_with_its_curves_table_and_figures(tmp_path):
    run_tiny(tmp_path, "tracked", *LOGGERS)
    found = records(tmp_path / "outputs/tracked")
    keys = logged(found)
    assert {"adapters-train/loss", "router-dpo-train/loss", "router-dpo-validation/rewards/accuracies"} <= keys
    assert {"report/table", "report/page", "report/accuracy_speedup", "report/layers_pruned"} <= keys
    assert exit_codes(found) == [0]
    assert wandb.run is None
    # The other logger goes on as without it.
    assert list((tmp_path / "outputs/tracked/logs/router-dpo").glob("*/metrics.csv"))
    [artifact] = [
        record.artifact
        for record in found
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "report"
    ]
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"table.json", "report.html"} <= names


def test_a_job_that_fails_is_a_failed_run(tmp_path):
    with pytest.raises(ValueError, match="k_max=99"):
        run_tiny(tmp_path, "failed", *LOGGERS, "router.k_max=99")
    assert exit_codes(records(tmp_path / "outputs/failed")) == [1]
    assert wandb.run is None
