"""The evaluation harness runs a pruned model; where nothing is pruned it finds what it finds of the plain one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import run_tiny
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="the extra harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynprune.harness import DynamicLM
from dynprune.slm.pruning import LayerPruner

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " a city of", " the"], "answer": 0},
    {"question": "Two and two is", "choices": [" five", " four"], "answer": 1},
    {"question": "Water freezes at", "choices": [" zero degrees", " night", " noon", " x"], "answer": 0},
]
SHARED = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "metadata": {"version": 1},
}
TASKS = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "say": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> TaskManager:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, own in TASKS.items():
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **SHARED, **data, **own}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def found(model, manager: TaskManager) -> dict[str, list]:
    """What each task's questions came to: the log-likelihood of each choice, or the text."""
    results = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0)
    said = {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    return {
        "choose": [[float(nats) for ((nats, _),) in sample["resps"]] for sample in said["choose"]],
        "say": [sample["filtered_resps"][0] for sample in said["say"]],
    }


def check_against_the_plain_model(folder: Path, tmp_path: Path) -> None:
    manager = write_tasks(tmp_path / "tasks")
    unpruned = DynamicLM(str(folder), layers="unpruned", batch_size=2)
    plain = HFLM(pretrained=unpruned.model.slm.model, tokenizer=unpruned.model.slm.tokenizer, batch_size=1, device="cpu")
    ours, theirs = found(unpruned, manager), found(plain, manager)
    for mine, other in zip(ours["choose"], theirs["choose"], strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    assert ours["say"] == theirs["say"]
    pruned = found(DynamicLM(str(folder), layers="1+2", batch_size=2), manager)
    assert pruned["choose"] != [pytest.approx(nats, abs=1e-3) for nats in ours["choose"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    run_tiny(folder, "run", "evaluation.latency.queries=0", "stage=export")
    return folder / "outputs/run/model"


def test_with_nothing_pruned_it_finds_what_the_plain_model_finds(exported, tmp_path):
    check_against_the_plain_model(exported, tmp_path)


def test_with_nothing_pruned_it_finds_what_the_plain_embedded_model_finds(tmp_path):
    few = ("exploration.max_queries=2", "exploration.max_validation_queries=1")
    # The harness's own model takes the logarithm in the SLM's number format.
    typed = ("model=smollm2_135m_fc", "model.dtype=float32", "adapter=identity")
    run_tiny(tmp_path, "run", *typed, "stage=export", *few)
    check_against_the_plain_model(tmp_path / "outputs/run/model", tmp_path)


def test_likelihoods_are_those_of_each_requests_own_layers_recomputed_alone(exported):
    model = DynamicLM(str(exported), budget=0.25, batch_size=3)
    contexts = [question["question"] for question in QUESTIONS]
    asked = [Instance("loglikelihood", {}, (context, " yes and no"), 0) for context in contexts]
    slm = model.model.slm
    for context, (nats, greedy) in zip(contexts, model.loglikelihood(asked, disable_tqdm=True), strict=True):
        layers = model.model.route(context, budget=0.25)
        assert len(layers) == 2
        before, after = model.tok_encode(context), model.tok_encode(context + " yes and no")
        with torch.inference_mode(), LayerPruner(slm, model.model.adapters) as pruner:
            pruner.prune(layers)
            log_p = slm.model(input_ids=torch.tensor([after]), use_cache=False).logits[0].double().log_softmax(-1)
        wanted = after[len(before) :]
        rows = log_p[len(before) - 1 : -1]
        assert nats == pytest.approx(sum(float(row[token]) for row, token in zip(rows, wanted, strict=True)), abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == wanted)


def test_the_likelihood_of_a_text_longer_than_the_window_is_that_of_its_parts(exported):
    model = DynamicLM(str(exported), layers="unpruned", batch_size=2, max_length=8)
    text = "abcdefghijklmnopqrst"
    [nats] = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    slm, tokens = model.model.slm, model.tok_encode(text)
    total, whole = 0.0, [model.eot_token_id, *tokens]
    for place, token in enumerate(tokens):
        # Each token once, after those of its window: whole windows of eight, the last one filled up from before.
        start = min(place // 8 * 8, len(tokens) - 8)
        with torch.inference_mode():
            logits = slm.model(input_ids=torch.tensor([whole[start : place + 1]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    assert nats == pytest.approx(total, abs=1e-2)


def test_the_harness_knows_it_by_name_and_answers_end_at_the_tasks_stop_texts(exported):
    assert get_model("dynprune") is DynamicLM
    assert DynamicLM.create_from_arg_string(f"pretrained={exported},layers=unpruned")._choose(["Hello"]) == [()]
    model = DynamicLM.create_from_arg_string(f"pretrained={exported},layers=unpruned", {"batch_size": 2})
    [free] = model.generate_until([Instance("generate_until", {}, ("Hello", {"max_gen_toks": 16}), 0)], disable_tqdm=True)
    stop = free[3]
    settings = {"until": [stop], "max_gen_toks": 16}
    [cut] = model.generate_until([Instance("generate_until", {}, ("Hello", settings), 0)], disable_tqdm=True)
    assert cut == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": "auto"}, "batch_size=auto is no number of requests"),
        ({"layers": "3+99"}, "layers=3\\+99 are no layers; allowed: unpruned, or numbers from 0 to 3"),
        ({"layers": "1", "budget": 0.1}, "leave one of the two out"),
    ],
)
def test_arguments_that_are_not_possible_are_refused(exported, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DynamicLM(str(exported), **arguments)


def test_what_a_task_asks_is_read_as_the_harness_reads_it(exported):
    model = DynamicLM(str(exported), layers="unpruned", max_length=64)

    def said(**settings):
        return model.generate_until([Instance("generate_until", {}, ("Hello " * 20, settings), 0)], disable_tqdm=True)[0]

    with pytest.raises(ValueError, match="answers are greedy"):
        said(temperature=0.7)
    with pytest.raises(ValueError, match="leaves no room for a context within max_length=64"):
        said(max_gen_toks=64)
    # A temperature without sampling means nothing; other libraries' names for the limit are known.
    longer = said(max_new_tokens=40, do_sample=False, temperature=1.0)
    assert len(model.tok_encode(longer)) > len(model.tok_encode(said(max_gen_toks=4)))
    # What does not fit is left out at the beginning: 24 tokens are left of the context.
    model.max_length = 10_000
    [request] = [Instance("generate_until", {}, (("Hello " * 20)[-24:], {"max_gen_toks": 40}), 0)]
    assert model.generate_until([request], disable_tqdm=True)[0] == longer


def test_a_token_that_begins_texts_stands_before_them_as_the_tokenizer_puts_it(exported):
    model = DynamicLM(str(exported), layers="unpruned")
    tokenizer = model.tokenizer
    plain = model.tok_encode("Hello")
    begin = tokenizer.add_special_tokens({"bos_token": "<begin>"}) and tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", begin)])
    assert model.tok_encode("Hello") == [begin, *plain]
    assert model.tok_encode("<begin>Hello") == [begin, *plain]
    assert model.tok_encode("Hello", add_special_tokens=False) == plain
    assert model.prefix_token_id == begin


def test_the_command_prints_the_harness_table(exported, tmp_path):
    write_tasks(tmp_path / "tasks")
    command = [sys.executable, "-m", "dynprune.harness", "--model", "dynprune", "--model_args", f"pretrained={exported}"]
    command += ["--tasks", "choose,say", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "|choose|" in result.stdout
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert math.isfinite(json.loads(file.read_text())["results"]["choose"]["acc,none"])
