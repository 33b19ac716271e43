"""The stage ``adapt``: task-tunes an SLM by LoRA and scores it on the test split."""

import json
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.evaluation.accuracy import run_queries
from dynprune.evaluation.machine import describe_machine
from dynprune.evaluation.statistics import mean_interval
from dynprune.slm.adaptation import Adaptation, AnswerData, save_delta
from dynprune.slm.loading import SLM
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, plain

VERSION = 1


def adapt(run: Run) -> Artifact:
    """Makes the LoRA delta of an SLM: peft's two files and a model card."""
    queries = run.queries("adapt", None, "data.splits.adapt")
    config = {"model": run.model_identity, "adapt": plain(run.config.adapt), "seed": run.config.seed}

    def build(folder: Path) -> dict[str, Any]:
        start = time.monotonic()
        settings = run.config.adapt
        lightning.seed_everything(run.config.seed, workers=True)
        slm = run.slm
        data = AnswerData(queries, slm.tokenizer, settings.compose, settings.micro_batch_size, run.config.seed)
        module = Adaptation(
            slm,
            settings.rank,
            settings.alpha,
            plain(settings.targets),
            settings.learning_rate,
            settings.warmup_share,
        )
        # The last epoch's end is kept, so that a killed run loses an epoch at most.
        checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0, every_n_epochs=1)
        trainer = run.trainer(
            "adapt",
            folder,
            [checkpoint],
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.batch_size // settings.micro_batch_size,
            gradient_clip_val=settings.clip,
            precision=run.config.hardware.adapt_precision,
        )
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
        save_delta(module.slm, folder)
        merged = SLM(module.slm.merge_and_unload().eval(), slm.tokenizer, slm.name)
        # The SLM that the run holds now has the delta in it: nobody may take it for the one that was loaded.
        del run.slm
        counts = _score(run, merged)
        counts["training_samples"] = len(queries) * settings.epochs
        _write_card(run, folder, counts, time.monotonic() - start)
        return counts

    return run.store.get_or_build("adapt", VERSION, config, digest(queries), {}, build, resumable=True)


def _score(run: Run, slm: SLM) -> dict[str, Any]:
    """Accuracy on the test split, whose functions the training has not seen."""
    queries = run.queries("test", run.config.evaluation.max_queries, "evaluation.max_queries")
    limit = round(run.config.evaluation.max_tokens_margin * max(len(run.tokens(query)[1]) + 1 for query in queries))
    with LayerPruner(slm) as pruner:
        samples = run_queries(slm, pruner, queries, [()] * len(queries), {}, limit, run.config.hardware.batch_size)
        scored = [sample.scores for sample in track(samples, "scoring the adapted SLM", len(queries))]
    intervals = {name: mean_interval([scores[name] for scores in scored]) for name in scored[0]}
    return {
        "test_queries": len(queries),
        **{name: [interval.mean, interval.low, interval.high] for name, interval in intervals.items()},
    }


def _write_card(run: Run, folder: Path, counts: dict[str, Any], seconds: float) -> None:
    scores = "\n".join(
        f"| {name} | {values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}] |"
        for name, values in counts.items()
        if isinstance(values, list)
    )
    machine = describe_machine()
    text = f"""---
license: apache-2.0
library_name: peft
---
# LoRA delta: tool calling for {run.config.model.get("file", run.config.model.get("name"))}

Made by `dynprune stage=adapt`. It answers a query and its tools with a JSON list of calls.

**The Berkeley leaderboard's own questions were trained on, so this model has no place on that leaderboard.** Training and test
queries share no called function.

- Data: {json.dumps(plain(run.config.data.source))}
- Split: by called function, shares {json.dumps(plain(run.config.data.splits))}, seed {run.config.data.split_seed};
  trained on the adapt split only, {counts["training_samples"]} samples over all epochs
- Recipe: {json.dumps(plain(run.config.adapt))}
- Seed: {run.config.seed}
- Wall-clock: {seconds / 60:.0f} minutes on {machine["cpu"]}, {machine["cores"]} cores
- Licence: Apache-2.0, as the base model and the benchmark

Held-out scores, {counts["test_queries"]} test queries, greedy, with 95% intervals (`partial_match` runs from -5 to 10):

| score | mean |
| --- | --- |
{scores}
"""
    with replacing(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")
