"""The whole pipeline on a tiny random model, as a user starts it: through the command line, in a folder of its own."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from safetensors.torch import load_file
from tiny import composed, dynprune, manifests, run_tiny, samples_of, table_of

from dynprune.adapters.checkpoint import load_adapters
from dynprune.data.pairs import read_pairs
from dynprune.data.rollouts import read_rollouts
from dynprune.evaluation.training_curves import read_curve

SCORES = ("json_match", "ast_match", "ratio_function_calls", "partial_match", "parse_rate", "agreement")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, dynprune(folder, "experiment=tiny", "name=first").stdout


@pytest.fixture
def run_here(tiny, caplog):
    """Runs the tiny experiment in the folder of the first run; returns what was logged."""
    folder, _ = tiny

    def run(name: str, *overrides: str) -> str:
        caplog.set_level(logging.INFO)
        run_tiny(folder, name, *overrides)
        return caplog.text

    return run


def test_one_command_makes_the_table_and_the_pictures(tiny):
    folder, said = tiny
    report = folder / "outputs/first/report"
    table = json.loads((report / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["original", "static-1", "static-2", "router-dpo"]
    for row in table["rows"]:
        assert row["n"] == 8
        for score in SCORES:
            assert row[score]["low"] <= row[score]["mean"] <= row[score]["high"]
        assert row["measured_speedup"]["low"] <= row["measured_speedup"]["median"] <= row["measured_speedup"]["high"]
    original, one, two, router = table["rows"]
    assert (original["mean_pruned_layers"], original["nominal_speedup"]) == (0, 0)
    assert original["agreement"]["mean"] == 1
    assert (one["nominal_speedup"], two["nominal_speedup"]) == (0.25, 0.5)
    assert router["nominal_speedup"] == pytest.approx((router["mean_pruned_layers"] - 1) / 4)
    assert {"machine", "versions", "config"} <= set(table)
    assert table["config"]["paths"]["run"] == "outputs/first"
    assert str(folder) not in json.dumps(table)
    figures = ("accuracy_speedup.png", "layer_error.png", "layers_pruned.png", "layer_counts.png", "training_curves.png")
    for name in figures:
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert name in said
    assert (report / "table.md").exists()
    assert (report / "table.csv").exists()
    html = (report / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(list(report.glob("*.png")))
    assert samples_of(folder, "first", "router-dpo")[0]["id"] in html
    samples = [json.loads(line) for line in (report / "samples/router-dpo.jsonl").read_text().splitlines()]
    assert sum(len(s["pruned_layers"]) for s in samples) / 8 == router["mean_pruned_layers"]


def test_static_sets_are_nested_and_what_the_rows_pruned(tiny):
    folder, _ = tiny
    report = folder / "outputs/first/report"
    sets = [
        {tuple(json.loads(line)["pruned_layers"]) for line in (report / f"samples/static-{k}.jsonl").read_text().splitlines()}
        for k in (1, 2)
    ]
    [one], [two] = sets
    assert len(one) == 1
    assert len(two) == 2
    assert set(one) < set(two)


def test_the_artifacts_are_in_the_thesis_columns_and_in_both_adapter_forms(tiny):
    folder, _ = tiny
    artifacts = folder / "outputs/artifacts"
    [thesis] = artifacts.glob("adapters/*/thesis")
    stack, thesis = load_adapters(thesis.parent), load_adapters(thesis)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), thesis.parameters(), strict=True))
    rollouts = {p.parent.name: list(read_rollouts(p.parent)) for p in artifacts.glob("explore/*/manifest.json")}
    assert sorted(len({r.id for r in rs}) for rs in rollouts.values()) == [2, 6]
    for rs in rollouts.values():
        tried = [(r.id, r.pruned_layers) for r in rs]
        assert len(set(tried)) == len(tried)
    pairs = [pair for p in artifacts.glob("pairs/*/pairs.parquet") for pair in read_pairs(p)]
    assert all((p.winner_score, len(p.winner_pruned_layers)) > (p.loser_score, len(p.loser_pruned_layers)) for p in pairs)


@pytest.mark.stages
def test_adapters_in_closed_form_are_trained_in_context_from_the_same_answers(tiny, run_here):
    folder, _ = tiny
    options = ("adapter=context", "adapter.bottleneck=16", "adapter.draw.max_layers=3", "adapter.context.epochs=2")
    said = run_here("context", "stage=adapters", *options)
    assert "reusing answers" in said
    [context] = manifests(folder, "context")
    stacks = {
        path.parts[-3]: load_adapters(path.parent)
        for stage in ("adapters", "context")
        for path in (folder / "outputs/artifacts" / stage).glob("*/adapters.safetensors")
        if stage == "context" or path.parent.name == context["upstream"]["adapters"]
    }
    assert all(stack.activation == "identity" for stack in stacks.values())
    assert torch.equal(stacks["adapters"].sink_Ld, stacks["context"].sink_Ld)
    assert not torch.equal(stacks["adapters"].up_Ldb, stacks["context"].up_Ldb)
    [harm] = [json.loads(p.read_text()) for p in (folder / "outputs/artifacts/harm").glob("*/harm.json")]
    assert len(harm) == 4


def test_ready_adapters_are_used_as_they_are_and_those_of_another_slm_are_said_to_be(tiny, run_here):
    folder, _ = tiny
    ready = min(path.parent for path in (folder / "outputs/artifacts/adapters").glob("*/thesis"))
    copy = folder / "ready"
    copy.mkdir()
    for name in ("adapters.json", "adapters.safetensors"):
        (copy / name).write_bytes((ready / name).read_bytes())
    said = run_here("ready", "stage=adapters", "adapter.folder=ready")
    assert "holds adapters of" not in said
    [made] = [m for m in manifests(folder, "adapters") if m["config"]["adapter"]["folder"] == "ready"]
    used = folder / "outputs/artifacts/adapters" / made["fingerprint"] / "adapters.safetensors"
    assert used.read_bytes() == (copy / "adapters.safetensors").read_bytes()

    # A card changes nothing, other weights do.
    (copy / "README.md").write_text("About them.")
    assert f"reusing adapters {made['fingerprint']}" in run_here("card", "stage=adapters", "adapter.folder=ready")
    config = json.loads((copy / "adapters.json").read_text())
    (copy / "adapters.json").write_text(json.dumps({**config, "slm": "another"}))
    assert "holds adapters of another, but the SLM is tiny-llama-4x32" in run_here(
        "other", "stage=adapters", "adapter.folder=ready"
    )


@pytest.mark.slow
def test_adapters_are_the_same_whether_the_answers_were_there_or_not(tiny, tmp_path):
    folder, _ = tiny
    options = ("experiment=tiny", "stage=adapters", "adapter.bottleneck=5", "name=again")
    # In the one folder the answers are there already, so that the SLM is loaded for the training alone.
    assert "reusing answers" in dynprune(folder, *options).stdout
    assert "made answers" in dynprune(tmp_path, *options).stdout
    [cold] = (tmp_path / "outputs/artifacts/adapters").glob("*/adapters.safetensors")
    warm = folder / "outputs/artifacts/adapters" / cold.parent.name / cold.name
    assert warm.read_bytes() == cold.read_bytes()


@pytest.mark.parametrize(
    "method", [*(pytest.param(method, marks=pytest.mark.slow) for method in ("awr", "ipo", "simpo")), "kto", "value"]
)
def test_every_other_method_trains_a_router_that_has_its_row(tiny, run_here, method):
    folder, _ = tiny
    run_here(method, f"method={method}", "++method.min_score=-10", "evaluation.latency.queries=0", "evaluation.max_queries=4")
    assert f"router-{method}" in table_of(folder, method)
    # Where a method's code has changed what is learned, routers of before are not taken for its own.
    [made] = [m["config"]["method"] for m in manifests(folder, "router") if m["config"]["method"]["name"] == method]
    assert made.get("version", 1) == {"value": 2}.get(method, 1)


def test_dpo_starts_from_the_router_that_another_method_trained(tiny):
    folder, _ = tiny
    (folder / "mine/experiment").mkdir(parents=True)
    (folder / "mine/experiment/started.yaml").write_text(
        "# @package _global_\ndefaults: [tiny, {/method@method.start: fbc}, _self_]\n"
        "method: {optimizer: {lr: 0}, start: {min_score: -10, epochs: 2}}\n"
    )
    run_tiny(folder, "started", f"hydra.searchpath=[file://{folder}/mine]", "experiment=started", "stage=router")
    # With a rate of 0 the router stays what it started as.
    trained = [m for m in manifests(folder, "router") if m["upstream"].get("start")]
    weights = [
        load_file(folder / "outputs/artifacts/router" / fingerprint / "router/router.safetensors")
        for fingerprint in (trained[0]["fingerprint"], trained[0]["upstream"]["start"])
    ]
    assert len(trained) == 1
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_same_command_again_reuses_everything(tiny, run_here):
    folder, _ = tiny
    # Beside the artifacts the store notes which runs there are.
    artifacts = (folder / "outputs/artifacts").glob("*/**/*")
    before = {path: path.stat().st_mtime_ns for path in artifacts if path.suffix != ".lock"}
    first = json.loads((folder / "outputs/first/report/table.json").read_text())
    run_here("second")
    second = json.loads((folder / "outputs/second/report/table.json").read_text())
    assert second["rows"] == first["rows"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_one_fixed_configuration_can_be_scored_alone_aloud_and_without_adapters(tiny, run_here):
    folder, _ = tiny
    said = run_here("fixed", "stage=evaluate", "evaluation.pruned_layers=[3,1]", "evaluation.verbose=true", "adapter=identity")
    assert said.count("pruned [1, 3]") == 8
    rows = json.loads((folder / "outputs/fixed/report/table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["original", "fixed-2"]
    assert not (folder / "outputs/fixed/report/layer_error.png").exists()


@pytest.mark.slow
def test_lossless_rows_have_the_originals_answers_and_are_timed_with_the_others(tiny, run_here):
    folder, _ = tiny
    run_here(
        "lossless",
        "+base@evaluation.lossless.lookup=lossless",
        "+base@evaluation.lossless.both=lossless",
        "evaluation.lossless.both.pruned_layers=router-dpo",
    )
    report = folder / "outputs/lossless/report"
    table = json.loads((report / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == [
        "original",
        "static-1",
        "static-2",
        "router-dpo",
        "lossless-lookup",
        "lossless-both",
    ]
    answers = {}
    for name in ("original", "lossless-lookup", "lossless-both"):
        samples = [json.loads(line) for line in (report / f"samples/{name}.jsonl").read_text().splitlines()]
        answers[name] = [(s["id"], s["token_ids"], s["pruned_layers"]) for s in samples]
    assert answers["lossless-lookup"] == answers["lossless-both"] == answers["original"]
    original, *_, lookup, both = table["rows"]
    assert original["lossless"] is None
    assert lookup["lossless"]["draft_passes"] == 0 < both["lossless"]["draft_passes"]
    assert lookup["lossless"]["passes"] + lookup["lossless"]["accepted"] == lookup["lossless"]["tokens"]
    for row in (lookup, both):
        assert row["ast_match"] == original["ast_match"]
        assert row["timed"] == 2
        assert row["lossless"]["near_ties"] == row["lossless"]["unexplained"] == 0
    # Identical rows are no comparison, and would only make the correction for many stricter.
    assert not [c for c in table["comparisons"] if c["row"].startswith("lossless")]


def pruned_by(folder: Path, name: str, row: str) -> list[tuple[int, ...]]:
    return [tuple(sample["pruned_layers"]) for sample in samples_of(folder, name, row)]


@pytest.mark.slow
def test_a_router_without_input_prunes_the_same_layers_for_all_and_costs_nothing(tiny, run_here):
    folder, _ = tiny
    # The encoder is never loaded: its name may be anything.
    run_here(
        "constant",
        "router=constant",
        "router.encoder.name_or_path=absent",
        "evaluation.budgets=[0.5,0.25]",
        "evaluation.budget_rule=mean",
        "evaluation.guarantee={loss:0.5,confidence:0.8}",
    )
    rows = table_of(folder, "constant")
    assert list(rows)[-4:] == ["router-dpo", "router-dpo@0.25", "router-dpo@0.5", "router-dpo@safe"]
    for name in list(rows)[-4:]:
        [layers] = set(pruned_by(folder, "constant", name))
        assert rows[name]["nominal_speedup"] == len(layers) / 4
    # One k for all: the mean meets the budget exactly, the larger set holds the smaller one.
    [[quarter], [half]] = (set(pruned_by(folder, "constant", f"router-dpo@{budget}")) for budget in (0.25, 0.5))
    assert (len(quarter), len(half)) == (1, 2)
    assert set(quarter) < set(half)
    # The full SLM is never right, so nothing is ever lost, and the largest budget is safe.
    assert pruned_by(folder, "constant", "router-dpo@safe") == pruned_by(folder, "constant", "router-dpo@0.5")


@pytest.mark.slow
def test_routers_of_one_table_can_have_settings_of_their_own(tiny, run_here):
    folder, _ = tiny
    run_here(
        "own",
        "+method@evaluation.routers.states=fbc",
        "+method@evaluation.routers.blind=fbc",
        "+method@evaluation.routers.dropped=fbc",
        "+evaluation.router_settings.dropped.inputs=none",
        "evaluation.routers.dropped=null",
        "evaluation.lossless=null",
        "evaluation.routers.states.min_score=-10",
        "evaluation.routers.blind.min_score=-10",
        "+evaluation.router_settings.states={inputs:slm_states,slm_layers:2,ratio:categorical}",
        "+evaluation.router_settings.blind.inputs=none",
        "evaluation.budgets=[0]",
    )
    rows = table_of(folder, "own")
    assert {row.partition("@")[0] for row in rows if row.startswith("router-")} == {"router-states", "router-blind"}
    # One reads the SLM's states: it costs the layers that it runs, and prunes only later ones.
    assert set(pruned_by(folder, "own", "router-states@0")) == {(2, 3)}
    assert rows["router-states@0"]["nominal_speedup"] == 0
    assert all(set(layers) <= {2, 3} for layers in pruned_by(folder, "own", "router-states"))
    # The other sees nothing and costs nothing.
    [layers] = set(pruned_by(folder, "own", "router-blind"))
    assert rows["router-blind"]["nominal_speedup"] == len(layers) / 4
    assert set(pruned_by(folder, "own", "router-blind@0")) == {()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stage=everything"], "stage=everything is unknown; allowed: all"),
        (["adapter.correct_by=ast_match"], "answers none of the 12 queries right (ast_match 0%)"),
        (["evaluation.static=[9]"], "evaluation.static asks for 9 layers"),
        (["router.k_max=9"], "router.k_max=9"),
        (["evaluation.pruned_layers=[4]"], "has layers 0 to 3, but [4]"),
        (["exploration.max_queries=0"], "exploration.max_queries=0 leaves no query"),
        (["model.architecture=nonsense"], "model.architecture='nonsense'"),
        (["stage=adapters", "adapter.fit=guess"], "adapter.fit=guess is unknown"),
        (["stage=adapters", "adapter.last_target=norm"], "adapter.last_target=norm is unknown; allowed: output, final_norm"),
        (["stage=adapters", "adapter.fit=ridge"], "allowed with it: adapter.activation=identity"),
        (["stage=adapters", "adapter=context"], "adapter.draw.max_layers=14 are not possible with 4 layers"),
        (["stage=adapters", "adapter.context.epochs=1", "adapter.context.batch_size=6"], "is no multiple of"),
        (["stage=adapt", "adapt.micro_batch_size=3"], "adapt.batch_size=4 is no multiple of adapt.micro_batch_size=3"),
        (["stage=adapt", "adapt.family_size=0"], "adapt.family_size=0 is not allowed; allowed: whole numbers from 1 on"),
        (["stage=adapt", "adapt.families=0"], "adapt.families=0 is not allowed"),
        (["stage=adapt", "adapt.swap=3"], "adapt.swap=3 is no probability; allowed: 0 to 1"),
        (
            ["stage=adapt", "adapt.templates=shipped", "adapt.families=1"],
            "adapt.families=1 with adapt.template_share=0.7 leaves an epoch no family of queries; raise adapt.families",
        ),
        (["evaluation.static=[0,2]"], "evaluation.static asks for 0 layers"),
        (["router.ratio=odd"], "router.ratio='odd' is unknown; allowed: normal, categorical"),
        (["router=slm_states", "router.slm_layers=2", "router.prunable_layers=[1,3]"], "allowed: layers from 2 on"),
        (["evaluation.budgets=[0.9]"], "a nominal speedup of 0.9 needs 4.6 pruned layers"),
        (["evaluation.guarantee={loss:0.1,confidence:0.9}"], "evaluation.guarantee needs budgets"),
        (
            ["+evaluation.router_settings.other.inputs=none"],
            "router_settings.other is about no router of the table; allowed: dpo",
        ),
        (
            ["+evaluation.router_settings.dpo.input=none"],
            "router_settings.dpo: Key 'input' is not in struct; allowed:",
        ),
        (
            ["+evaluation.router_settings.dpo=none"],
            "router_settings.dpo=none is no settings; allowed: keys of the group router",
        ),
        (["evaluation.budget_rule=median"], "evaluation.budget_rule='median' is unknown; allowed: same, mean"),
        (["evaluation.static_candidates=1"], "evaluation.static_candidates=1 is fewer than the 2 layers"),
        (
            ["evaluation.budgets=[0]", "evaluation.guarantee={loss:0.1,confidence:0.9}"],
            "by 22 validation queries at least",
        ),
        (["method.start=fbc"], "method.start=fbc is no method"),
        (["router.policy=value"], "type method=value"),
        (["data.only.categories=simple_python"], "type data.only.categories=[simple_python]"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tiny, arguments, sentence):
    folder, _ = tiny
    with pytest.raises((ValueError, InstantiationException)) as caught:
        run_tiny(folder, "mistake", *arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("stage", ["router", "all"])
def test_what_a_method_does_not_take_is_said_before_anything_is_explored(tmp_path, stage):
    with pytest.raises(InstantiationException, match=r"type router\.ratio=normal"):
        run_tiny(tmp_path, "early", f"stage={stage}", "method=value", "router.ratio=categorical")
    assert not (tmp_path / "outputs/artifacts/explore").exists()


@pytest.mark.slow
def test_a_mistake_is_shown_without_a_traceback(tiny):
    folder, _ = tiny
    # One that the run finds, and one that a target raises while Hydra instantiates it.
    for mistake, sentence in (("stage=everything", "is unknown; allowed: all"), ("model.architecture=nonsense", "='nonsense'")):
        result = dynprune(folder, "experiment=tiny", "name=mistake", mistake, check=False)
        said = result.stdout + result.stderr
        assert result.returncode == 1
        assert sentence in " ".join(said.split())
        assert "Traceback" not in said


def test_help_says_the_groups_and_commands_without_loading_torch(tmp_path):
    result = dynprune(tmp_path, "--help")
    for word in (
        "method: awr, dpo, fbc, ipo, kto, orpo, simpo, value",
        "dynprune experiment=quickstart",
        "outputs/NAME/report",
    ):
        assert word in result.stdout


def test_queries_that_the_delta_was_trained_on_are_left_out_of_every_split_but_adapt(tmp_path, monkeypatch):
    from dynprune.data.bfcl import load_bfcl
    from dynprune.stages.run import Run

    monkeypatch.chdir(tmp_path)
    queries = load_bfcl(["simple_python"], max_chars=500)
    trained = sorted(frozenset().union(*(query.functions for query in queries[::3])))
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta/adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "delta/functions.json").write_text(json.dumps(trained))
    typed = ("data=bfcl", "data.source.categories=[simple_python]", "data.source.max_chars=500", "paths.run=run")
    whole = Run(composed(*typed, "model=smollm2_135m", "model.delta=null")).splits
    clean = Run(composed(*typed, "model=smollm2_135m", "model.delta=delta")).splits
    assert clean["adapt"] == whole["adapt"]
    for name in ("train", "validation", "test"):
        assert [q for q in whole[name] if not q.functions & set(trained)] == clean[name]
        assert len(clean[name]) < len(whole[name])


@pytest.mark.slow
def test_a_router_learns_a_few_queries_by_heart(tiny, run_here):
    folder, _ = tiny
    before = {m["fingerprint"] for m in manifests(folder, "router")}
    run_here("overfit", "debug=overfit", "stage=router")
    [made] = {m["fingerprint"] for m in manifests(folder, "router")} - before
    losses = read_curve(folder / "outputs/artifacts/router" / made / "curve.csv").training_loss
    # DPO starts at the loss of a guess.
    assert losses[0] == pytest.approx(math.log(2), rel=0.1)
    assert losses[-1] < 0.01


@pytest.mark.slow
def test_a_profile_lies_beside_the_curves(tiny, run_here):
    folder, _ = tiny
    run_here("profile", "debug=profile", "stage=router", "seed=5")
    [profile] = (folder / "outputs/profile/logs/router-dpo").glob("*/fit-profile.txt")
    assert "training_step" in profile.read_text()
