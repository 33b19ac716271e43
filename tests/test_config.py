"""Every file in conf/ composes, and every `_target_` takes the keys that stand beside it."""

import inspect
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from dynprune.app import folder_name
from dynprune.methods.base import RouterTraining
from dynprune.paths import conf_dir
from dynprune.stages.evaluate import with_own_router
from dynprune.stages.router import new_training
from dynprune.stages.run import Run

CONF = conf_dir()
# What a person must state, for files with `???`.
STATED = {
    "model/hf": ["model.name=somewhere", "model.dtype=float32"],
    "data/jsonl": ["data.source.path=somewhere"],
}
# What the code adds when it instantiates a node.
ADDED = {
    "dynprune.slm.loading": {"device"},
    "dynprune.methods": {"router", "policy", "optimizer"},
    "lightning.pytorch.loggers": {"name"},
    "torch.optim": {"params"},
}
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
GROUPS = [str(path) for path in FILES if path.parent != Path(".") and path.parts[0] != "base"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, "paths.run=somewhere"])


def override_of(option: str) -> str:
    # Presets may lie in folders of their group.
    group, name = option.split("/", 1) if option.startswith("experiment/") else option.rsplit("/", 1)
    return f"{group}={name}"


def nodes_with_targets(node):
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_missing(node, key):
                yield from nodes_with_targets(node[key])
    elif isinstance(node, ListConfig):
        for item in node:
            yield from nodes_with_targets(item)


@pytest.mark.parametrize("option", [option for option in GROUPS if not option.startswith("hydra/")])
def test_every_option_composes_and_its_targets_take_its_keys(option):
    config = composed(override_of(option), *STATED.get(option, []))
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    targets = list(nodes_with_targets(config))
    assert targets
    for node in targets:
        target = get_object(node._target_)
        given = {str(key) for key in node if not str(key).startswith("_")}
        added = next((names for prefix, names in ADDED.items() if node._target_.startswith(prefix)), set())
        signature = inspect.signature(target)
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        needed = {
            name
            for name, p in signature.parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        assert accepts_any or given <= set(signature.parameters), node._target_
        assert needed <= given | added, node._target_


@pytest.mark.parametrize("option", [o for o in GROUPS if o.startswith(("exploration/", "model/tiny", "logger/csv"))])
def test_options_that_need_nothing_from_outside_instantiate(option):
    config = composed(override_of(option))
    group = option.split("/")[0]
    if group == "exploration":
        instantiate(config.exploration.strategy)
    elif group == "model":
        assert instantiate(config.model, device="cpu").num_layers == config.model.num_layers
    else:
        instantiate(config.logger.csv, name="x")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_key_has_a_comment_of_its_own_above_it(path):
    lines = (CONF / path).with_suffix(".yaml").read_text().splitlines()
    assert lines[0].startswith("#")
    for number, line in enumerate(lines):
        key = re.match(r"^( *)([a-z_0-9]+):( .+)?$", line)
        if key is None or not key[3] or key[2].startswith("_"):
            continue
        above = lines[number - 1].strip()
        if number and lines[number - 1].endswith("|"):
            # The text of a block, not a key.
            break
        previous = re.match(r"^ *_[a-z_]+: .+$", lines[number - 1])
        assert above.startswith("#") or previous, f"{path}.yaml:{number + 1}: {line}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "experiment"], ids=str)
def test_every_preset_says_what_it_reproduces_and_with_which_command(path):
    text = (CONF / path).with_suffix(".yaml").read_text()
    assert text.startswith("# @package _global_\n# Reproduces ")
    assert f"# Command: dynprune experiment={path.relative_to('experiment')}" in text


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "experiment"], ids=str)
def test_every_preset_trains_routers_that_its_methods_take(make_slm, path, tmp_path):
    config = composed(
        override_of(str(path)), "hardware=cpu", "router.encoder.name_or_path=tiny:", f"paths.artifacts={tmp_path}"
    )
    config.paths.run = str(tmp_path / "run")
    run = Run(config)
    vars(run).update(slm=make_slm(num_layers=30), splits={}, model_identity={"dtype": "float32"})
    methods = config.evaluation.routers or {config.method.name: config.method}
    for name, method in methods.items():
        if method is not None:
            assert isinstance(new_training(with_own_router(run, name), method), RouterTraining)


def test_an_unknown_key_is_refused():
    with pytest.raises(Exception, match=r"method\.bta"):
        composed("method.bta=1")


def test_the_folder_of_a_job_is_named_by_as_many_overrides_as_a_name_holds():
    def subdir(overrides: str) -> str:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", return_hydra_config=True)
        config.hydra.job.num, config.hydra.job.override_dirname = 12, overrides
        return config.hydra.sweep.subdir

    assert subdir("method=fbc,seed=1") == "12_method=fbc,seed=1"
    # Letters of two bytes: the cut may not go through one.
    for name in ("é" * 200, "e" + "é" * 200):
        long = subdir(f"seed=1,name={name}")
        assert long.startswith("12_seed=1,name=")
        assert 230 < len(long.encode()) <= 255
    # A path in an override makes no folders of its own, in which nobody would look for a job.
    assert subdir("model.name=../../a/b,seed=1") == "12_" + folder_name("model.name=../../a/b,seed=1")
    assert folder_name("../../a/b") == "..∕..∕a∕b"
