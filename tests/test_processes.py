"""Stages that several processes of one machine share."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import dynprune, manifests

from dynprune.data.rollouts import read_rollouts
from dynprune.evaluation.training_curves import read_curve
from dynprune.stages.router import CURVE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "routers"),
    [
        (["method=fbc", "method.min_score=-10"], 1),
        (["method=dpo"], 1),
        (["method=dpo", "+method@method.start=fbc", "method.start.min_score=-10", "method.start.epochs=2"], 2),
    ],
)
def test_two_processes_train_a_router_together_and_one_of_them_evaluates(tmp_path, method, routers):
    dynprune(tmp_path, "experiment=tiny", *method, "method.batch_size=4", "hardware=ddp", "name=two")
    assert len(manifests(tmp_path, "router")) == routers
    assert (tmp_path / "outputs/two/report/table.json").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_batches_of_twice_the_size(tmp_path):
    command = ["experiment=tiny", "stage=router", "method=dpo", "method.epochs=4", "method.optimizer.lr=0.01"]
    curves, routers = [], []
    for name, options in (("one", ["method.batch_size=8"]), ("two", ["method.batch_size=4", "hardware=ddp"])):
        before = set(tmp_path.glob("outputs/artifacts/router/*/manifest.json"))
        dynprune(tmp_path, *command, *options, f"name={name}")
        [manifest] = set(tmp_path.glob("outputs/artifacts/router/*/manifest.json")) - before
        curves.append(read_curve(manifest.parent / CURVE))
        routers.append(load_file(manifest.parent / "router/router.safetensors"))
    one, two = curves
    assert two.epochs == one.epochs == list(range(4))
    assert one.training_loss[-1] < 0.99 * one.training_loss[0]
    assert two.training_loss == pytest.approx(one.training_loss, rel=1e-4)
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-4)
    for tensor_name, tensor in routers[0].items():
        assert torch.allclose(routers[1][tensor_name], tensor, atol=1e-4), tensor_name


@pytest.mark.slow
def test_two_processes_explore_what_one_explores(tmp_path):
    command = ["experiment=tiny", "data=bfcl", "stage=explore", "exploration.max_queries=100"]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        said = dynprune(folder, *command, f"hardware.processes={processes}").stdout
        assert ("to 2 processes" in said) == (processes == 2)
        # Those of the train split; there are some of the validation split too.
        explored = [list(read_rollouts(path.parent)) for path in folder.glob("outputs/artifacts/explore/*/manifest.json")]
        found.append([(r.id, r.pruned_layers, r.score, r.output) for r in max(explored, key=len)])
    assert len({row[0] for row in found[0]}) == 100
    assert found[0] == found[1]
    wrong = dynprune(folder, *command, "exploration.strategy.branch_factor=0", "hardware.processes=2", check=False)
    assert wrong.returncode != 0
    assert "exploration.strategy.branch_factor=0 is too small" in wrong.stdout + wrong.stderr
