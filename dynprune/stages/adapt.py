"""The stage ``adapt``: task-tunes an SLM by LoRA and scores it on the test split."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import Asked, run_queries
from dynprune.evaluation.machine import describe_machine
from dynprune.evaluation.statistics import mean_interval
from dynprune.slm.adaptation import Adaptation, AnswerData, new_delta, save_delta, trained_functions
from dynprune.slm.loading import SLM, delta_folder, wrap_with_delta
from dynprune.slm.pruning import LayerPruner, configuration_mask
from dynprune.stages.adapters import accumulation, adapters, drawing, harm, pruner_of, upstream_of
from dynprune.stages.checkpoints import last_of
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, plain

VERSION = 3


def adapt(run: Run) -> Artifact:
    """Makes the LoRA delta of an SLM: peft's two files, the functions it was trained on, and a model card.

    Where the SLM has a delta already, the training goes on from it. With ``adapt.layer_dropout`` the SLM learns to be pruned,
    the adapters of the run in the layers' places.
    """
    queries = run.queries("adapt", None, "data.splits.adapt")
    held_out = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    config = {
        "model": run.model_identity,
        "adapt": plain(run.config.adapt),
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
        "seed": run.config.seed,
    }
    accumulation("adapt", run.config.adapt)
    upstream: dict[str, str] = {}
    stand_ins = adapters(run) if run.config.adapt.layer_dropout else None
    if run.config.adapt.layer_dropout:
        config["draw"] = plain(run.config.adapter.draw)
        upstream |= {**upstream_of(stand_ins), "harm": harm(run, stand_ins).fingerprint}

    def build(folder: Path) -> dict[str, Any]:
        start = time.monotonic()
        _train(run, queries, folder, stand_ins)
        seconds = time.monotonic() - start
        counts = {"training_samples": len(queries) * run.config.adapt.epochs, **_score(run, held_out, folder)}
        _write_card(run, folder, counts, seconds)
        return counts

    data = {"adapt": digest(queries), "test": digest(held_out)}
    return run.store.get_or_build("adapt", VERSION, config, data, upstream, build, resumable=True)


def _train(run: Run, queries: Sequence[Query], folder: Path, stand_ins: Artifact | None) -> None:
    settings = run.config.adapt
    draw = drawing(run, stand_ins) if settings.layer_dropout else None
    # The SLM that the adapters were measured on makes room for the one that is trained.
    run.release_slm()
    # The SLM as it was before its delta: that is what the delta is trained on.
    slm: SLM = instantiate(run.config.model, delta=None, device=run.config.hardware.device)
    data = AnswerData(queries, slm.tokenizer, settings.swap, settings.compose, settings.micro_batch_size, run.config.seed)
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
        # Written at the end of each epoch, so that a killed run loses an epoch at most.
        [ModelCheckpoint(folder / "checkpoints", save_last=True)],
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
    save_delta(model, folder, before.union(*(query.functions for query in queries)))


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
  trained on the adapt split only, {counts["training_samples"]} samples over all epochs
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
