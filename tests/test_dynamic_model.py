"""A model to take away: what a run exports answers as the run did, wherever it is loaded."""

import json
import os

import pytest
import torch
from tiny import run_tiny, samples_of
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer

from dynprune import DynamicModel
from dynprune.slm.pruning import LayerPruner

TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an exported model, and the folder of its run."""
    folder = tmp_path_factory.mktemp("export")
    run_tiny(folder, "run", "evaluation.latency.queries=0")
    run_tiny(folder, "run", "evaluation.latency.queries=0", "stage=export")
    return folder / "outputs/run/model", folder


@pytest.fixture(scope="module")
def model(exported):
    return DynamicModel.from_pretrained(exported[0])


class Collecting(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_it_answers_the_queries_of_its_run_as_the_run_did(exported, model):
    from tiny import composed

    from dynprune.stages.run import Run

    _, folder = exported
    os_folder = os.getcwd()
    os.chdir(folder)
    try:
        queries = Run(composed("experiment=tiny", "paths.run=outputs/again")).queries("test", 8, "x")
    finally:
        os.chdir(os_folder)
    samples = {sample["id"]: sample for sample in samples_of(folder, "run", "router-dpo")}
    limit = 1 + max(len(sample["token_ids"]) for sample in samples.values())
    asked = [list(query.messages) for query in queries]
    answers = model.generate(asked, [list(query.tools) for query in queries], return_routing=True, max_new_tokens=limit)
    for query, answer in zip(queries, answers, strict=True):
        assert list(answer.pruned_layers) == samples[query.id]["pruned_layers"]
        assert answer.text.startswith(samples[query.id]["output"])


def test_a_round_trip_gives_the_same_tokens_and_the_same_files(model, tmp_path):
    asked = ["Add 1 and 2.", [{"role": "user", "content": "And 3?"}]]
    first = model.generate(asked, TOOLS, return_routing=True, max_new_tokens=12)
    model.save_pretrained(tmp_path / "copy")
    copy = DynamicModel.from_pretrained(tmp_path / "copy")
    assert copy.generate(asked, TOOLS, return_routing=True, max_new_tokens=12) == first
    copy.save_pretrained(tmp_path / "again")
    files = [path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / "copy" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_a_number_format_is_that_of_the_slm_the_adapters_and_the_frozen_encoder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    half = DynamicModel.from_pretrained(tmp_path / "model", dtype="bfloat16")
    for part in (half.slm.model, half.adapters, half.router.encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.router.layers_hidden.parameters()} == {torch.float32}
    assert len(half.route(["Add 1 and 2."], TOOLS)) == 1


def test_one_question_one_answer_and_several_a_list(model):
    alone = model.generate("Add 1 and 2.", TOOLS, max_new_tokens=5)
    several = model.generate(["Add 1 and 2.", "Add 3."], TOOLS, max_new_tokens=5)
    assert isinstance(alone, str)
    assert several[0] == alone
    assert model.route([{"role": "user", "content": "Add 1 and 2."}], TOOLS) == model.route(["Add 1 and 2."], TOOLS)[0]


def test_openai_tools_are_the_same_tools(model):
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    assert model.route("Add 1.", wrapped, budget=0.25) == model.route("Add 1.", TOOLS, budget=0.25)
    assert model.generate("Add 1.", wrapped, max_new_tokens=5) == model.generate("Add 1.", TOOLS, max_new_tokens=5)


@pytest.mark.parametrize(("budget", "layers"), [(0.0, 1), (0.25, 2), (0.3, 3)])
def test_a_budget_counts_the_routers_own_cost(model, budget, layers):
    # Four layers, of which the router costs one.
    assert model.router_layers == 1
    assert len(model.route("Add 1.", TOOLS, budget=budget)) == layers


def test_answers_are_those_of_the_pruned_model_recomputed_without_a_cache(model):
    answer = model.generate("Add 1 and 2.", TOOLS, budget=0.25, max_new_tokens=8, return_routing=True)
    from dynprune.data.prompts import prompt_tokens
    from dynprune.dynamic_model import _query

    ids = list(prompt_tokens(model.slm.tokenizer, _query("0", "Add 1 and 2.", TOOLS)))
    said = []
    with torch.inference_mode(), LayerPruner(model.slm, model.adapters) as pruner:
        pruner.prune(answer.pruned_layers)
        for _ in range(8):
            token = int(model.slm.model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())
            if token in model.slm.stop_ids:
                break
            said.append(token)
    assert answer.text == model.slm.decode(said)


def test_streaming_gives_the_prompt_and_the_tokens_of_the_answer(model):
    streamer = Collecting()
    answer = model.generate("Add 1 and 2.", TOOLS, max_new_tokens=8, return_routing=True, streamer=streamer)
    assert answer == model.generate("Add 1 and 2.", TOOLS, max_new_tokens=8, return_routing=True)
    prompt, *tokens = streamer.parts
    assert prompt.shape[0] == 1
    assert model.slm.decode([int(token) for token in tokens]) == answer.text
    assert streamer.ended


def test_the_slm_is_whole_again_after_every_call(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model.slm.model(input_ids=ids).logits
        model.generate("Add 1.", TOOLS, budget=0.3, max_new_tokens=3)
        assert torch.equal(model.slm.model(input_ids=ids).logits, before)


def test_a_pipeline_of_transformers_runs_under_fixed_layers(model):
    with model.pruned([1, 2]) as slm:
        said = pipeline("text-generation", model=slm.model, tokenizer=slm.tokenizer)("Add 1", max_new_tokens=4, do_sample=False)
        ids = slm.tokenizer("Add 1", return_tensors="pt").input_ids
        tokens = slm.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"] == model.slm.decode(tokens[0].tolist())
    with torch.inference_mode():
        whole = model.slm.model(input_ids=ids).logits
        with model.pruned([1, 2]) as slm:
            assert not torch.equal(slm.model(input_ids=ids).logits, whole)


def test_the_card_holds_the_measured_table(exported, model):
    _, folder = exported
    assert (folder / "outputs/run/report/table.md").read_text() in model.card


def test_pushing_uploads_what_saving_writes(model, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path):
            uploaded.update(
                {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*") if path.is_file()}
            )

    uploaded = {}
    monkeypatch.setattr("dynprune.dynamic_model.HfApi", Hub)
    assert model.push_to_hub("me/mine") == "https://hub/me/mine"
    model.save_pretrained(tmp_path / "saved")
    saved = {
        str(path.relative_to(tmp_path / "saved")): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    assert uploaded == saved


def test_saving_replaces_what_was_there_as_a_whole(model, tmp_path):
    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/old.txt").write_text("old")
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/old.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_folder_with_something_else_is_not_touched(model, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than a model"):
        model.save_pretrained(tmp_path / "project")
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["thesis.txt"]


def test_a_table_of_another_configuration_is_not_the_models(exported):
    _, folder = exported
    run_tiny(folder, "run", "evaluation.latency.queries=0", "stage=export", "router.k_max=2")
    card = DynamicModel.from_pretrained(folder / "outputs/run/model").card
    run_tiny(folder, "run", "evaluation.latency.queries=0", "stage=export")
    assert "Not measured" in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"messages": "Add.", "budget": 0.9}, r"budget=0.9 needs 4.6 pruned layers.* prunes 0 to 4; allowed: 0 to 0.75"),
        ({"messages": "Add.", "budget": -0.1}, r"budget=-0.1"),
        ({"messages": ["a", "b"], "tools": [TOOLS]}, r"tools has 1 lists for 2 questions"),
        ({"messages": []}, r"messages is empty"),
        ({"messages": "Add.", "max_new_tokens": 0}, r"max_new_tokens=0 leaves no room"),
        ({"messages": "Add.", "tools": [{"description": "?"}]}, r"has no name; allowed: name, description, parameters"),
        ({"messages": ["a", "b"], "streamer": Collecting()}, r"streamer takes the answer to one question"),
    ],
)
def test_what_cannot_be_answered_is_said(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        model.generate(**arguments)


# To look for it would run code of the package `this`.
INNER_PACKAGE = {"wheel": "this.x", "file": "f", "dtype": "auto"}


def described(change):
    def edit(folder):
        path = folder / "dynprune.json"
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: (folder / "dynprune.json").unlink(), r"holds no dynprune.json; .* stage=export"),
        (described(lambda d: d.update(format=9)), r"has format 9; this version of dynprune reads 1"),
        (
            described(lambda d: d["slm"].update(kind="gguf", arguments={"wheel": "this.x", "file": "f", "dtype": "auto"})),
            r"'this.x'",
        ),
        (described(lambda d: d["slm"].update(kind="os.system")), r"slm.kind='os.system' is unknown; allowed: hf, gguf, tiny"),
        (described(lambda d: d["slm"]["arguments"].update(delta="../../etc")), r"lies outside of the folder"),
        (
            described(lambda d: d["slm"]["arguments"].update(trust_remote_code=True)),
            r"slm.arguments do not fit slm.kind='tiny': got an unexpected keyword argument 'trust_remote_code'",
        ),
        (described(lambda d: d["slm"]["arguments"].update(device="cuda")), r"slm.arguments do not fit .* 'device'"),
        (
            described(lambda d: d["slm"]["arguments"].update(num_layers=6)),
            r"was made for 4 layers of width 32, but tiny-llama-6x32",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(model, tmp_path, edit, said):
    model.save_pretrained(tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(ValueError, match=said):
        DynamicModel.from_pretrained(tmp_path / "model")


def test_a_name_that_nobody_has_is_refused(monkeypatch):
    def offline(name, revision):
        raise OSError("offline")

    monkeypatch.setattr("dynprune.dynamic_model.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'me/mine' is neither a folder nor in the local cache.*offline"):
        DynamicModel.from_pretrained("me/mine")


def test_a_routed_answer_says_whether_it_was_cut_off(model, monkeypatch):
    short = model.generate("Add 1.", TOOLS, max_new_tokens=1, return_routing=True)
    longer = model.generate("Add 1.", TOOLS, max_new_tokens=9, return_routing=True)
    assert short.truncated
    assert longer.text.startswith(short.text)
    # Whatever is said first ends the answer now.
    monkeypatch.setattr(type(model.slm), "stop_ids", tuple(range(model.slm.model.config.vocab_size)))
    ended = model.generate("Add 1.", TOOLS, max_new_tokens=9, return_routing=True)
    assert (ended.text, ended.truncated) == ("", False)
