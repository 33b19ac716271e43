"""One's own score, policy, strategy, method, data and model: the files of docs/own, run as its page says."""

import importlib
import itertools
import json
import math
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import dynprune, manifests, run_tiny, table_of

from dynprune import plugins
from dynprune.data.tasks import Query
from dynprune.exploration.strategy import Estimate, Generate
from dynprune.metrics.scores import SCORES
from dynprune.plugins import concerned, import_plugins
from dynprune.router.outputs import RouterOutputs
from dynprune.router.policies import POLICIES
from dynprune.router.ratio import NormalRatio
from dynprune.slm.loading import load_tiny

OWN = Path(__file__).parents[1] / "docs/own"
COMMANDS = re.findall(r"\| `(dynprune [^`]+)` \|", (OWN / "README.md").read_text(encoding="utf-8"))
TOUR = re.findall(r"^dynprune .*plugins=.*", (OWN.parent / "tour.md").read_text(encoding="utf-8"), re.MULTILINE)
MODULES = sorted(path.stem for path in OWN.glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one's own files, and what they registered taken back at the end."""
    folder = tmp_path_factory.mktemp("own") / "work"
    shutil.copytree(OWN, folder)
    before = [*sys.path], dict(SCORES), dict(POLICIES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path[:] = before[0]
    for registry, entries in ((SCORES, before[1]), (POLICIES, before[2])):
        registry.clear()
        registry.update(entries)
    for name in MODULES:
        sys.modules.pop(name, None)


def run_own(folder, name, *typed):
    run_tiny(folder, name, f"hydra.searchpath=[file://{folder}/conf]", *typed)


@pytest.mark.parametrize("path", sorted(OWN.rglob("*.py")) + sorted(OWN.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.stages
def test_a_score_of_ones_own_is_searched_by_and_stands_in_the_table(folder):
    run_own(folder, "score", "plugins=[short_answer]", "exploration.score=short_answer", "evaluation.latency.queries=0")
    [explored] = {m["config"]["score"] for m in manifests(folder, "explore")}
    assert explored == "short_answer"
    table = json.loads((folder / "outputs/score/report/table.json").read_text())
    assert "short_answer" in table["rows"][0]
    answer = [{"name": "add", "arguments": {"a": 1}}]
    parameters = {"type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"name": "add", "description": "", "parameters": parameters}
    query = Query("q", "", (), (tool,), tuple(answer), ({"add": {"a": [1]}},))
    text = json.dumps(answer)
    score = SCORES["short_answer"]
    assert score(text, query) == 1
    assert score(text + " " * len(text), query) == 0.5
    assert score(text.replace("1", "2"), query) == 0


def test_a_policy_of_ones_own_is_a_distribution_and_trains(folder):
    run_own(folder, "policy", "plugins=[independent]", "router.policy=independent", "stage=router")
    saved = (folder / "outputs/artifacts/router").glob("*/router/router.json")
    assert "independent" in {json.loads(path.read_text())["extra"]["policy"]["name"] for path in saved}
    policy = POLICIES["independent"](num_layers=4)
    outputs = RouterOutputs(torch.randn(1, 4), NormalRatio(torch.tensor([0.4]), torch.tensor([-1.0])))
    masks = [torch.tensor([mask], dtype=torch.bool) for mask in itertools.product([False, True], repeat=4)]
    assert sum(policy.log_prob(outputs, mask_BL).exp().item() for mask_BL in masks) == pytest.approx(1, abs=1e-5)


def test_a_strategy_of_ones_own_finds_what_trying_all_finds(folder):
    strategy = importlib.import_module("one_by_one").OneByOne(max_layers=3)
    harm = {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.2}
    proposals, asked = strategy.propose(4, random.Random(0)), []
    proposal = next(proposals)
    try:
        while True:
            asked += proposal.configurations if isinstance(proposal, Generate) else ()
            worth = [
                sum(harm[layer] for layer in one) if isinstance(proposal, Estimate) else 1.0 for one in proposal.configurations
            ]
            proposal = proposals.send(worth)
    except StopIteration:
        pass
    best = [min(itertools.combinations(range(4), size), key=lambda one: sum(map(harm.get, one))) for size in range(4)]
    assert asked == best
    run_own(folder, "strategy", "plugins=[one_by_one]", "exploration=one_by_one", "exploration.max_queries=2", "stage=explore")


def test_a_method_of_ones_own_has_its_equation(folder):
    hinge = importlib.import_module("hinge").Hinge
    module = hinge.__new__(hinge)
    module.__dict__["_margin"] = 2.0
    module.__dict__["log_probs"] = lambda outputs, batch: (torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -5.0]))
    assert hinge.preference_terms(module, None, None).loss_B.tolist() == [1.0, 0.0]
    run_own(folder, "method", "plugins=[hinge]", "method=hinge", "stage=router", "exploration.max_queries=2")
    assert "hinge" in {m["config"]["method"]["name"] for m in manifests(folder, "router")}
    # It has no part in the rollouts that it learns from.
    assert any("hinge" in m["config"].get("plugins", {}) for m in manifests(folder, "router"))
    assert not any("hinge" in m["config"].get("plugins", {}) for m in manifests(folder, "explore"))


def test_data_of_ones_own_is_split_by_its_functions(folder):
    run_own(folder, "data", "plugins=[lights]", "data=lights", "stage=explore", "exploration.max_queries=2")
    queries = importlib.import_module("lights").load_lights(3)
    assert len(queries) == 6
    assert all(SCORES["ast_match"](json.dumps(query.answers), query) == 1 for query in queries)
    assert not math.isnan(SCORES["partial_match"]("", queries[0]))


def test_a_plugin_concerns_what_names_it_and_everything_where_nobody_knows_what_it_does(folder):
    for name in ("hinge", "independent", "short_answer"):
        importlib.import_module(name)
    method = {"method": {"_target_": "hinge.Hinge", "margin": 2.0}}
    search = {"exploration": [{"_target_": "dynprune.exploration.dfs.DepthFirstSearch"}], "plugins": ["hinge"]}
    policy = {"router": {"policy": "independent"}}
    of = concerned(["hinge"], {**method, **search})
    assert (of(method), of(search)) == (True, False)
    of = concerned(["independent", "hinge"], {**method, **search, **policy})
    assert (of(method), of(search), of(policy)) == (True, False, True)
    # Of a name that only begins alike it is no part.
    assert not concerned(["hinge"], method)({"_target_": "hinges.Door"})
    assert concerned(["short_answer"], {"score": "short_answer"})(search)
    assert concerned(["hinge", "changes_something"], method)(search)
    assert not concerned([], method)(method)


def test_what_ones_own_file_holds_belongs_to_the_fingerprint(folder):
    def names():
        return {m["fingerprint"] for m in manifests(folder, "explore") if "one_by_one" in m["config"].get("plugins", {})}

    before = names()
    path = folder / "one_by_one.py"
    path.write_text(path.read_text() + "\n# Changed.\n")
    sys.modules.pop("one_by_one")
    # As another process would.
    plugins._imported.cache_clear()
    run_own(folder, "changed", "plugins=[one_by_one]", "exploration=one_by_one", "exploration.max_queries=2", "stage=explore")
    assert before
    assert len(names()) == 2 * len(before)


def test_all_of_a_packages_files_count_and_a_list_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / f"a_package/{name}.py").write_text("")
    [before] = import_plugins(["a_package"]).values()
    (tmp_path / "a_package/inner.py").write_text("x = 1")
    # What was imported counts, until another process imports anew.
    assert import_plugins(["a_package"]) == {"a_package": before}
    plugins._imported.cache_clear()
    assert import_plugins(["a_package"]) != {"a_package": before}
    with pytest.raises(ValueError, match=r"plugins=mine is no list of modules; allowed: plugins=\[mine\]"):
        import_plugins("mine")


def test_a_module_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"plugins names 'nothing_here', which is no module in .*allowed: \[mine\] for a mine.py"
    ):
        import_plugins(["nothing_here"])
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(ValueError, match=r"plugins names 'a_folder', which is a folder"):
        import_plugins(["a_folder"])
    (tmp_path / "needs_more.py").write_text("import nothing_here_either\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_here_either"):
        import_plugins(["needs_more"])


def test_the_page_has_a_command_for_each():
    assert len(COMMANDS) == 6
    assert {module for module in MODULES if not any(module in command for command in COMMANDS)} == set()


@pytest.mark.slow
def test_the_command_of_the_tour_gives_a_method_of_ones_own_its_row(tmp_path):
    [command] = TOUR
    shutil.copytree(OWN, tmp_path / "docs/own")
    words = [word for word in shlex.split(command)[1:] if word != "experiment=quickstart"]
    dynprune(tmp_path / "docs/own", *words, "experiment=tiny", "evaluation.max_queries=4")
    assert "router-hinge" in table_of(tmp_path, "hinge")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_as_it_is_written(command, tmp_path):
    shutil.copytree(OWN, tmp_path / "work")
    if "model=mine" in command:
        slm = load_tiny("llama", 4, 32, 0)
        slm.model.save_pretrained(tmp_path / "work/slm")
        slm.tokenizer.save_pretrained(tmp_path / "work/slm")
    tiny = ["experiment=tiny", "exploration.max_queries=3", "evaluation.latency.queries=0", "evaluation.max_queries=4"]
    dynprune(tmp_path / "work", *shlex.split(command)[1:], *tiny)
