"""The stage ``adapt``: task-tunes an SLM by LoRA and scores it on the test split."""

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.tasks import Query
from dynprune.data.templates import Toolbox, load_templates, templates_file
from dynprune.evaluation.accuracy import Asked, run_queries
from dynprune.evaluation.machine import describe_machine
from dynprune.evaluation.statistics import mean_interval
from dynprune.slm.adaptation import Adaptation, AnswerData, new_delta, save_delta, trained_functions
from dynprune.slm.loading import SLM, delta_folder, wrap_with_delta
from dynprune.slm.pruning import LayerPruner, configuration_mask
from dynprune.stages.adapters import accumulation, adapters, drawing, harm, pruner_of, upstream_of
from dynprune.stages.checkpoints import StepCheckpoints, epoch_checkpoints, last_of
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, plain

log = logging.getLogger(__name__)

VERSION = 7


def adapt(run: Run) -> Artifact:
    """Makes the LoRA delta of an SLM: peft's two files, the functions it was trained on, and a model card.

    Where the SLM has a delta already, the training goes on from it. With ``adapt.layer_dropout`` the SLM learns to be pruned,
    the adapters of the run in the layers' places.
    """
    queries = run.queries("adapt", None, "data.splits.adapt")
    longer = longer_queries(run)
    toolboxes = usable_toolboxes(run)
    held_out = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    config = {
        "model": run.model_identity,
        # Of the templates their content counts, not where they lie.
        "adapt": {key: value for key, value in plain(run.config.adapt).items() if key != "templates"},
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
        "seed": run.config.seed,
    }
    accumulation("adapt", run.config.adapt)
    _check_shares(run.config.adapt, bool(toolboxes))
    upstream: dict[str, str] = {}
    stand_ins = adapters(run) if run.config.adapt.layer_dropout else None
    if run.config.adapt.layer_dropout:
        config["draw"] = plain(run.config.adapter.draw)
        upstream |= {**upstream_of(stand_ins), "harm": harm(run, stand_ins).fingerprint}

    def build(folder: Path) -> dict[str, Any]:
        start = time.monotonic()
        families = _train(run, [*queries, *longer], toolboxes, folder, stand_ins)
        seconds = time.monotonic() - start
        counts = {
            "training_families": families * run.config.adapt.epochs,
            "queries": len(queries),
            "longer_queries": len(longer),
            "toolboxes": len(toolboxes),
            **_score(run, held_out, folder),
        }
        _write_card(run, folder, counts, seconds)
        return counts

    data = {"adapt": digest([*queries, *longer]), "test": digest(held_out)}
    if toolboxes:
        text = json.dumps([asdict(toolbox) for toolbox in toolboxes], sort_keys=True)
        data["templates"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return run.store.get_or_build("adapt", VERSION, config, data, upstream, build, resumable=True)


def _check_shares(settings: DictConfig, has_templates: bool) -> None:
    """Refuses shares that are none, and epochs without queries or without templates.

    Raises:
        ValueError: If a setting is not possible.
    """
    for key in ("swap", "compose", "layer_dropout"):
        if not 0 <= settings[key] <= 1:
            raise ValueError(f"adapt.{key}={settings[key]} is no probability; allowed: 0 to 1")
    if not 0 <= settings.template_share < 1:
        raise ValueError(f"adapt.template_share={settings.template_share} is not allowed; allowed: 0 to below 1")
    if has_templates and settings.families is not None:
        filled = round(settings.families * settings.template_share)
        if filled in (0, settings.families):
            missing = "templates" if filled == 0 else "queries"
            raise ValueError(
                f"adapt.families={settings.families} with adapt.template_share={settings.template_share} leaves an epoch no "
                f"family of {missing}; raise adapt.families"
            )


def longer_queries(run: Run) -> list[Query]:
    """Queries too long for the splits, of functions that no held-out split calls, and of the categories that the run uses.

    Raises:
        ValueError: If the splits' queries are not limited, or have that length already.
    """
    longest, shortest = run.config.adapt.max_chars, run.config.data.source.get("max_chars")
    if longest is None:
        return []
    if shortest is None or longest <= shortest:
        raise ValueError(
            f"adapt.max_chars={longest} adds no longer queries, since the splits have those: data.source.max_chars is "
            f"{'null' if shortest is None else shortest}; allowed: null, or more than that; type adapt.max_chars=null"
        )
    found: list[Query] = instantiate(run.config.data.source, max_chars=longest)
    categories = plain(run.config.data.only.categories)
    return [
        query
        for query in found
        if query.num_chars > shortest
        and not query.functions & run.held_out_functions
        and (categories is None or query.category in categories)
    ]


def usable_toolboxes(run: Run) -> list[Toolbox]:
    """The templates to train on, without those that call a function that a held-out split calls."""
    if run.config.adapt.templates is None or run.config.adapt.template_share == 0:
        return []
    toolboxes = load_templates(templates_file(run.config.adapt.templates))
    kept = [toolbox for toolbox in toolboxes if not toolbox.functions & run.held_out_functions]
    if len(kept) < len(toolboxes):
        log.warning("left out %d sets of templates: held-out queries call their functions", len(toolboxes) - len(kept))
    return kept


def _train(run: Run, queries: Sequence[Query], toolboxes: Sequence[Toolbox], folder: Path, stand_ins: Artifact | None) -> int:
    """Trains and writes the delta; returns the number of families in an epoch."""
    settings = run.config.adapt
    draw = drawing(run, stand_ins) if settings.layer_dropout else None
    # The SLM that the adapters were measured on makes room for the one that is trained.
    run.release_slm()
    # The SLM as it was before its delta: that is what the delta is trained on.
    slm: SLM = instantiate(run.config.model, delta=None, device=run.config.hardware.device)
    data = AnswerData(
        queries,
        toolboxes,
        slm.tokenizer,
        settings.template_share,
        settings.swap,
        settings.compose,
        settings.families,
        settings.family_size,
        settings.micro_batch_size,
        run.config.seed,
    )
    delta = run.config.model.delta
    # What comes before may draw from the same generators, or not where it was made already.
    lightning.seed_everything(run.config.seed, workers=True)
    if delta is None:
        model = new_delta(slm, settings.rank, settings.alpha, plain(settings.targets))
    else:
        model = wrap_with_delta(slm.model, delta_folder(delta))
        _check_goes_on(settings, delta, model.peft_config["default"])
    trainer = run.trainer(
        "adapt",
        folder,
        [epoch_checkpoints(folder / "checkpoints"), StepCheckpoints(folder / "checkpoints")],
        max_epochs=settings.epochs,
        accumulate_grad_batches=accumulation("adapt", settings),
        gradient_clip_val=settings.clip,
        # Products in the SLM's own dtype; what is trained is kept in float32.
        precision=run.mixed_precision,
    )
    with pruner_of(run, stand_ins, slm) as pruner:

        def prune(batch: str, size: int) -> None:
            if draw is not None:
                rng = random.Random(f"{run.config.seed}-{batch}")
                chosen = [draw(rng) if rng.random() < settings.layer_dropout else () for _ in range(size)]
                pruner.prune(configuration_mask(slm, chosen))

        module = Adaptation(model, settings.learning_rate, settings.warmup_share, prune)
        trainer.fit(module, data, ckpt_path=last_of(folder / "checkpoints"))
    # What a delta was trained on stays trained, whatever follows.
    before = trained_functions(delta_folder(delta)) if delta is not None else frozenset()
    trained = before.union(*(query.functions for query in queries), *(toolbox.functions for toolbox in toolboxes))
    save_delta(model, folder, trained)
    return data.families_in_epoch


def _check_goes_on(settings: DictConfig, delta: str, stored: Any) -> None:
    """Refuses settings that are not those of the delta from which the training goes on.

    Raises:
        ValueError: If rank, scale or, where they are listed, targets differ.
    """
    targets = plain(settings.targets)
    if (stored.r, stored.lora_alpha) != (settings.rank, settings.alpha):
        raise ValueError(
            f"adapt.rank={settings.rank} adapt.alpha={settings.alpha} do not fit model.delta={delta}, from which the "
            f"training goes on; type adapt.rank={stored.r} adapt.alpha={stored.lora_alpha}, or model.delta=null"
        )
    if not isinstance(targets, str) and set(targets) != set(stored.target_modules):
        own = ",".join(sorted(stored.target_modules))
        raise ValueError(
            f"adapt.targets={targets} are not those of model.delta={delta}, from which the training goes on; type "
            f"adapt.targets=[{own}], or model.delta=null"
        )


def _score(run: Run, queries: Sequence[Query], folder: Path) -> dict[str, Any]:
    """Scores of the written delta on queries whose functions the training has not seen, loaded as a user loads it."""
    slm: SLM = instantiate(run.config.model, delta=str(folder), device=run.config.hardware.device)
    run.slm = slm
    with LayerPruner(slm) as pruner:
        asked = [Asked(query, ((),)) for query in queries]
        samples = run_queries(slm, pruner, asked, run.max_new_tokens(queries), run.config.hardware.batch_size, shared_bytes=0)
        scored = [sample.scores for sample in track(samples, "scoring the adapted SLM", len(queries))]
    del run.slm
    intervals = {name: mean_interval([scores[name] for scores in scored]) for name in scored[0]}
    return {
        "test_queries": len(queries),
        **{name: [interval.mean, interval.low, interval.high] for name, interval in intervals.items()},
    }


def _says_berkeley(run: Run) -> bool:
    """Whether the delta that the training goes on from was trained on the benchmark's questions."""
    delta = run.config.model.delta
    card = delta_folder(delta) / "README.md" if delta is not None else None
    return card is not None and card.exists() and "Berkeley" in card.read_text(encoding="utf-8")


def _start(run: Run) -> str:
    delta = run.config.model.delta
    if delta is None:
        return "the base model"
    return f"the delta {Path(delta).name} (content {run.model_identity['delta_content'][:12]})"


def _write_card(run: Run, folder: Path, counts: Mapping[str, Any], seconds: float) -> None:
    scores = "\n".join(
        f"| {name} | {values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}] |"
        for name, values in counts.items()
        if isinstance(values, list)
    )
    machine = describe_machine()
    processor = machine["accelerator"] if run.config.hardware.device != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    source = plain(run.config.data.source)
    warning = (
        "\n**The Berkeley leaderboard's own questions were trained on, so this model has no place on that leaderboard.**\n"
        if source["_target_"].endswith("load_bfcl") or _says_berkeley(run)
        else ""
    )
    beside = {
        "longer_queries": "{} longer ones of functions that no other split calls",
        "toolboxes": "templates for {} sets of tools",
    }
    more = "".join(f", {said.format(counts[key])}" for key, said in beside.items() if counts[key])
    text = f"""---
license: {run.config.adapt.license}
library_name: peft
---
# LoRA delta: tool calling for {run.config.model.get("file", run.config.model.get("name"))}

Made by `dynprune stage=adapt`. It answers a query and its tools with a JSON list of calls. Training and test queries share no
called function; `functions.json` lists those that were trained on.
{warning}
- Data: {json.dumps(source)}, of that {json.dumps(plain(run.config.data.only))}
- Number format: {run.model_identity["dtype"]} for products, float32 for what is trained
- Split: by called function, shares {json.dumps(plain(run.config.data.splits))}, seed {run.config.data.split_seed};
  trained on {counts["training_families"]} families of up to {run.config.adapt.family_size} queries over all epochs, drawn
  from {counts["queries"]} queries of the adapt split{more}
- Recipe: {json.dumps(plain(run.config.adapt))}
- Start: {_start(run)}
- Seed: {run.config.seed}
- Wall-clock of the training (of its last attempt): {seconds / 60:.0f} minutes on {processor}
- Licence: {run.config.adapt.license}

Held-out scores of this file, {counts["test_queries"]} test queries, greedy, with 95% intervals (`partial_match` runs from -5 to
10):

| score | mean |
| --- | --- |
{scores}
"""
    with replacing(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")
