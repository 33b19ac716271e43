"""The stage ``adapters``: distils the adapters of all layers from the answers that the SLM gets right."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint

from dynprune.adapters.checkpoint import load_adapters, save_adapters, save_thesis_adapters
from dynprune.adapters.distillation import Distillation
from dynprune.adapters.stack import AdapterStack
from dynprune.artifacts import Artifact
from dynprune.atomic import replacing
from dynprune.data.datamodule import StreamData
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.data.tasks import Query
from dynprune.metrics.scores import get_score
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.progress import track
from dynprune.stages.run import Run, content_digest, digest, once_a_run, plain

VERSION = 1


@once_a_run
def adapters(run: Run) -> Artifact | None:
    """Makes the adapters and measures their error; ``None`` where the configuration wants none."""
    if not run.config.adapter.enabled:
        return None
    settings = run.config.adapter
    pool = [query for split in settings.splits for query in run.splits[split]]
    queries = random.Random(run.config.seed).sample(pool, min(settings.max_samples, len(pool)))
    config = {
        "model": run.model_identity,
        "adapter": plain(settings),
        "folder": content_digest(settings.folder),
        "precision": run.config.hardware.trainer.precision,
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
        "seed": run.config.seed,
    }

    def build(folder: Path) -> dict[str, Any]:
        lightning.seed_everything(run.config.seed, workers=True)
        sequences = _correct_sequences(run, queries, folder)
        held_out = max(1, round(settings.validation_share * len(sequences)))
        training, validation = sequences[held_out:], sequences[:held_out]
        if not training:
            raise ValueError(
                f"{len(sequences)} correct answer is too few to distil from and to validate on; raise adapter.max_samples"
            )
        data = StreamData(
            HiddenStateStream(run.slm, training, settings.batch_tokens, run.config.seed),
            [HiddenStateStream(run.slm, validation, settings.batch_tokens, None)],
        )
        stack = (
            load_adapters(Path(settings.folder))
            if settings.folder is not None
            else AdapterStack(run.slm.num_layers, run.slm.hidden_size, settings.bottleneck)
        )
        # Refuses adapters of another model before anything is computed with them.
        LayerPruner(run.slm, stack)
        module = Distillation(stack, settings.loss, instantiate(settings.optimizer))
        checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True)
        trainer = run.trainer("adapters", folder, [checkpoint], max_epochs=settings.epochs)
        if settings.folder is None:
            last = folder / "checkpoints" / "last.ckpt"
            trainer.fit(module, data, ckpt_path=last if last.exists() else None)
        trainer.validate(module, data, verbose=False)
        save_adapters(stack, folder, run.slm.name)
        save_thesis_adapters(stack, folder / "thesis")
        errors = {"mse": module.mse_L.tolist(), "relative_error": module.relative_error_L.tolist()}
        with replacing(folder / "errors.json") as path:
            path.write_text(json.dumps(errors, indent=2), encoding="utf-8")
        return {
            "queries": len(queries),
            "correct": len(sequences),
            "mean_relative_error": float(module.relative_error_L.mean()),
        }

    return run.store.get_or_build("adapters", VERSION, config, digest(queries), {}, build, resumable=True)


def pruner_of(run: Run, artifact: Artifact | None) -> LayerPruner:
    """The pruner of the run's SLM with its adapters, to be entered."""
    if artifact is None:
        return LayerPruner(run.slm)
    stack = load_adapters(artifact.folder).to(device=run.slm.device, dtype=run.slm.model.dtype)
    return LayerPruner(run.slm, stack)


def _correct_sequences(run: Run, queries: Sequence[Query], folder: Path) -> list[tuple[int, ...]]:
    """Prompt and answer of the queries that the SLM answers right, as it answers them; kept for a second attempt."""
    kept = folder / "sequences.json"
    if kept.exists():
        return [tuple(sequence) for sequence in json.loads(kept.read_text(encoding="utf-8"))]
    correct_by = run.config.adapter.correct_by
    score = get_score(correct_by) if correct_by is not None else None
    limit = run.max_new_tokens(queries)
    requests = []
    for query in queries:
        prompt, reference = run.tokens(query)
        requests.append(Request(prompt, (), limit, (reference,)))
    right: dict[int, tuple[int, ...]] = {}
    with LayerPruner(run.slm) as pruner:
        answers = generate_all(run.slm, pruner, requests, run.config.hardware.batch_size)
        for position, answer in track(answers, "answers to distil from", len(requests)):
            output = run.slm.decode(answer.token_ids)
            if score is None or score(output, queries[position]) == 1.0:
                right[position] = (*requests[position].prompt, *answer.token_ids)
    if not right:
        raise ValueError(
            f"{run.slm.name} answers none of the {len(queries)} queries right ({correct_by} 0%), so there is nothing to distil "
            "from; task-tune it first (dynprune stage=adapt), raise adapter.max_samples, or set adapter.correct_by=null"
        )
    sequences = [right[position] for position in sorted(right)]
    with replacing(kept) as path:
        path.write_text(json.dumps(sequences), encoding="utf-8")
    return sequences
