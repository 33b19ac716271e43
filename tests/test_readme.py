"""The commands of README and tour: each composes here, and those that compute run on the tiny model in the slow tests."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dynprune.paths import conf_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


LINES = commands(README)
# A method of one's own is run by the tests of its page.
DYNPRUNE = [line for line in dict.fromkeys(LINES + commands(TOUR)) if line.startswith("dynprune ") and "plugins=" not in line]
TINY = [
    "experiment=tiny",
    "method.epochs=1",
    "adapter.epochs=1",
    "adapter.bottleneck=16",
    "adapter.draw.max_layers=2",
    "adapter.context.epochs=1",
    "exploration.max_queries=3",
    "adapt.epochs=1",
    "adapt.targets=[q_proj]",
    "evaluation.latency.queries=1",
]


def inline(page: str) -> list[list[str]]:
    """The words of each piece of code within a sentence; what stands for something else, such as FOLDER, is given a name."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    left = [span for span in spans if not re.search(r"X|…|=$|\w\(|^eval ", span)]
    return [shlex.split(span.replace("FOLDER", "folder").replace("NAME", "name")) for span in dict.fromkeys(left)]


INLINE = list(map(list, dict.fromkeys(map(tuple, [*inline(README), *inline(TOUR)]))))
# Of what has an equals sign, environment variables, placeholders and the harness's own arguments are no keys.
SETTINGS = [
    words
    for words in INLINE
    if any("=" in word for word in words)
    and (words[0] == "dynprune" or ("=" in words[0] and not re.match(r"[A-Z]|\+?key=|layers=", words[0])))
]
TARGETS = [words for words in INLINE if words[0] == "make"]


def overrides(line: str) -> list[str]:
    return [word for word in shlex.split(line)[1:] if "=" in word]


def test_the_commands_are_found():
    assert len(DYNPRUNE) >= 8
    assert [line for line in LINES if not line.startswith("dynprune ")] == ["make run", "make test"]


@pytest.mark.parametrize("target", ["run", "test"])
def test_the_make_targets_run_what_they_say(target):
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"run": "dynprune experiment=quickstart", "test": "pytest"}[target] in said


@pytest.mark.parametrize("line", DYNPRUNE)
def test_every_command_composes(line):
    jobs = [override.split(",")[0] if " -m " in line else override for override in overrides(line)]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("config", overrides=jobs).paths.artifacts


@pytest.mark.slow
@pytest.mark.parametrize("words", SETTINGS, ids=" ".join)
def test_every_setting_within_a_sentence_composes(words):
    if "hydra/launcher=ray" in words:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    # Routers of a table stand in a preset, and launchers are Hydra's own.
    preset = [] if any(word.startswith("experiment=") for word in words) else ["experiment=quickstart"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("config", overrides=[*preset, *(word for word in words if "=" in word)], return_hydra_config=True)


@pytest.mark.parametrize("words", TARGETS, ids=" ".join)
def test_every_make_target_within_a_sentence_exists(words):
    assert subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", DYNPRUNE)
def test_every_command_runs_on_the_tiny_model(line, tmp_path):
    (tmp_path / "queries.jsonl").write_text("".join(f"{json.dumps(_record(number))}\n" for number in range(60)))
    if "model=hf" in line:
        _save_tiny_model(tmp_path / "slm")
    filled = line.replace("FOLDER_OR_HUB_ID", "slm").replace("FILE", "queries.jsonl").replace("seed=1,2,3", "seed=1,2")
    left_out = ("experiment=quickstart", "model=smollm2_135m", "export_router=dpo")
    words = [word for word in shlex.split(filled)[1:] if word not in left_out]
    words = [word.replace("[2,5,8,11,14,17]", "[1,3]").replace("[2,5,8]", "[1,2]") for word in words]
    tiny = list(TINY)
    if "fbc" in line:
        tiny.append("++method.min_score=-10")
    if "stage=compare" in line:
        first = ["-m", *tiny, "evaluation.pruned_layers=[1],[2]"]
        subprocess.run([sys.executable, "-m", "dynprune", *first], cwd=tmp_path, check=True, timeout=500)
    result = subprocess.run(
        [sys.executable, "-m", "dynprune", *words, *tiny], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def _record(number: int) -> dict:
    tool = {"name": f"f{number}", "description": "Does it.", "parameters": {"x": {"type": "int"}}}
    call = {"name": f"f{number}", "arguments": {"x": number}}
    return {"id": number, "query": f"f {number}", "tools": json.dumps([tool]), "answers": json.dumps([call])}


def _save_tiny_model(folder: Path) -> None:
    from dynprune.slm.loading import load_tiny

    slm = load_tiny("llama", num_layers=4, hidden_size=32, seed=0)
    slm.model.save_pretrained(folder)
    slm.tokenizer.save_pretrained(folder)


def test_the_quickstart_table_is_the_one_that_was_measured():
    measured = (ROOT / "experiments/quickstart/table.md").read_text(encoding="utf-8")
    main_table = re.search(r"(?:^\|.*\n)+", measured, re.MULTILINE)
    shown = README.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    assert main_table is not None
    assert main_table[0] in shown
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", shown)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
