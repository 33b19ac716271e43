"""A sweep as typed: it goes on where a job fails, ends with a comparison, and can be finished later."""

import json
import os

import pytest
from omegaconf import OmegaConf
from tiny import dynprune, manifests, run_tiny

from dynprune.evaluation.run_results import write_failure
from dynprune.sweep import CompareJobs

pytestmark = pytest.mark.stages

SWEEP = ("-m", "experiment=tiny", "evaluation.latency.queries=0", "evaluation.max_queries=4", "method=dpo,orpo")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    result = dynprune(folder, *SWEEP, "router.k_max=2,99", check=False)
    [sweep] = (folder / "outputs/multiruns").iterdir()
    return folder, sweep, result


def test_a_sweep_ends_with_a_comparison_in_which_failed_jobs_say_why(swept):
    _, sweep, result = swept
    assert result.returncode == 1
    document = json.loads((sweep / "comparison.json").read_text())
    rows = {(entry["setting"], entry["row"]) for entry in document["entries"]}
    assert {("", "original"), ("method=dpo, k_max=2", "router-dpo"), ("method=orpo, k_max=2", "router-orpo")} <= rows
    assert [failure["setting"] for failure in document["failed"]] == ["method=dpo, k_max=99", "method=orpo, k_max=99"]
    assert all("router.k_max=99" in failure["reason"] for failure in document["failed"])
    assert "Comparison of runs" in result.stdout
    assert {path.name for path in sweep.glob("comparison.*")} == {f"comparison.{end}" for end in ("json", "csv", "md", "png")}
    # A user's mistake is said, not traced.
    assert "Traceback" not in result.stdout + result.stderr


def test_a_sweep_over_methods_computes_adapters_and_rollouts_once_and_says_so(swept):
    folder, _, result = swept
    assert [len(manifests(folder, stage)) for stage in ("adapters", "explore", "static")] == [1, 2, 1]
    # The sweep changes the methods alone: what lies before them is that of the first job.
    assert "reusing adapters" in result.stdout
    assert "reusing explore" in result.stdout
    # Its jobs run one after another in one process.
    assert result.stdout.count("loading the SLM") == 1
    assert {m["config"]["method"]["name"] for m in manifests(folder, "router")} == {"dpo", "orpo"}


def test_routers_with_other_seeds_learn_from_the_same_adapters_and_rollouts(swept):
    folder, _, _ = swept
    before = [manifests(folder, stage) for stage in ("adapters", "explore")]
    routers = len(manifests(folder, "router"))
    run_tiny(folder, "seed", "stage=router", "seed=7")
    assert [manifests(folder, stage) for stage in ("adapters", "explore")] == before
    assert len(manifests(folder, "router")) == routers + 1


@pytest.mark.slow
def test_a_sweep_that_was_cut_off_is_finished_without_doing_anything_twice(swept):
    folder, sweep, result = swept
    assert f"hydra.sweep.dir={sweep.relative_to(folder)} skip_completed=true" in result.stdout
    place = f"hydra.sweep.dir={sweep.relative_to(folder)}"
    tables = {path: path.stat().st_mtime_ns for path in sweep.glob("*/report/table.json")}
    again = dynprune(folder, *SWEEP, "router.k_max=2,99", place, "skip_completed=true", check=False)
    assert len(tables) == 2
    assert again.stdout.count("which has its table") == 2
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*/report/table.json")} == tables
    assert len(json.loads((sweep / "comparison.json").read_text())["failed"]) == 2


def test_runs_are_compared_later_too(swept, capsys):
    folder, sweep, _ = swept
    run_tiny(folder, "later", "stage=compare", f"runs='{sweep.relative_to(folder)}/*'")
    assert "Comparison of runs" in capsys.readouterr().out
    later, first = (json.loads((place / "comparison.json").read_text()) for place in (folder / "outputs/later", sweep))
    assert later["entries"] == first["entries"]
    assert later["comparisons"] == first["comparisons"]


@pytest.mark.parametrize(("typed", "said"), [((), "needs runs"), (("runs='outputs/nothing/*'",), "matches no folder of a run")])
def test_there_must_be_runs_to_compare(swept, typed, said):
    folder, _, _ = swept
    with pytest.raises(ValueError, match=said):
        run_tiny(folder, "nothing", "stage=compare", *typed)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers_run_the_jobs_beside_each_other_and_end_with_the_same_comparison(swept, tmp_path, launcher):
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="the extra ray is not installed")
    _, sweep, _ = swept
    dynprune(tmp_path, *SWEEP, "router.k_max=2,99", f"hydra/launcher={launcher}", check=False)
    [other] = (tmp_path / "outputs/multiruns").iterdir()
    first, second = (json.loads((folder / "comparison.json").read_text()) for folder in (sweep, other))
    # Their folders differ; what the jobs found does not.
    for key in ("setting", "row", "ast_match", "mean_pruned_layers"):
        assert [entry[key] for entry in first["entries"]] == [entry[key] for entry in second["entries"]]
    assert [failure["reason"] for failure in first["failed"]] == [failure["reason"] for failure in second["failed"]]


@pytest.mark.slow
def test_a_search_is_judged_on_held_out_queries_alone(tmp_path):
    said = dynprune(tmp_path, "hparams_search=router", "experiment=tiny").stdout
    [sweep] = (tmp_path / "outputs/multiruns").iterdir()
    routers = json.loads((sweep / "comparison.json").read_text())["routers"]
    assert len(routers) == 18
    assert "Routers on held-out queries" in said
    assert not list((tmp_path / "outputs/artifacts").glob("evaluate"))


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_folder_that_cannot_be_written_to_is_said_in_a_sentence(tmp_path, mode):
    (tmp_path / "outputs").write_text("no folder")
    said = dynprune(tmp_path, *mode, "experiment=tiny", check=False)
    assert said.returncode == 1
    assert "outputs" in said.stderr
    assert "allowed: a folder that can be written to, type paths.outputs=FOLDER" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_sweep_fails_by_its_own_jobs_not_by_those_that_failed_in_its_folder_before(tmp_path, capsys):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    (tmp_path / "before").mkdir()
    write_failure(tmp_path / "before", ValueError("of another sweep"), seed=0)
    os.utime(tmp_path / "before/failure.json", (1, 1))
    sweep = CompareJobs()
    sweep.on_multirun_start(config)
    sweep.on_multirun_end(config)
    assert "of another sweep" in capsys.readouterr().out
    (tmp_path / "now").mkdir()
    write_failure(tmp_path / "now", ValueError("of this sweep"), seed=0)
    with pytest.raises(SystemExit):
        sweep.on_multirun_end(config)
