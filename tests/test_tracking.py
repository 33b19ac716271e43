"""Weights & Biases, offline: what a job leaves there is read back from its own file."""

import pytest
import wandb
from tiny import run_tiny
from wandb.proto import wandb_internal_pb2

LOGGERS = ("logger=[csv,wandb]", "logger.wandb.offline=true", "evaluation.latency.queries=0")


def records(folder):
    """What was sent, or would have been: the records of the one offline run under a folder."""
    [path] = folder.rglob("run-*.wandb")
    data, found = path.read_bytes(), []
    place, block = 7, 32768
    pieces = b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        # A record in one piece, or its last piece.
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return found


def logged(found):
    return {item.key or item.nested_key[0] for record in found for item in record.history.item}


def exit_codes(found):
    return [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]


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
