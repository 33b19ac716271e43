"""The answers that adapters are distilled from: those that the SLM gets right, as it gives them."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

from dynprune.artifacts import Artifact
from dynprune.atomic import Pieces, replacing
from dynprune.metrics.scores import get_score, perfect_score
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.likelihood import Answered
from dynprune.slm.pruning import LayerPruner
from dynprune.stages.progress import track
from dynprune.stages.run import Run, digest, once_a_run

VERSION = 1
_ANSWERS = "answers.json"


@once_a_run
def answers(run: Run) -> Artifact:
    """Prompts and answers of the queries that the SLM answers right, as it answers them."""
    settings = run.config.adapter
    pool = [query for split in settings.splits for query in run.splits[split]]
    queries = random.Random(run.config.adapter.seed).sample(pool, min(settings.max_samples, len(pool)))
    config = {
        "model": run.model_identity,
        "correct_by": settings.correct_by,
        "max_tokens_margin": run.config.evaluation.max_tokens_margin,
    }

    def build(folder: Path) -> dict[str, Any]:
        score = get_score(settings.correct_by, "adapter.correct_by") if settings.correct_by is not None else None
        perfect = perfect_score(settings.correct_by) if settings.correct_by is not None else None
        limit = run.max_new_tokens(queries)
        requests = []
        for query in queries:
            prompt, reference = run.tokens(query)
            requests.append(Request(prompt, (), limit, (reference,)))
        answered: dict[int, tuple[int, ...]] = {}
        pieces = Pieces(folder, "part")
        for piece in pieces.read():
            answered |= {position: tuple(ids) for position, ids in json.loads(piece)}
        left = [position for position in range(len(requests)) if position not in answered]
        with LayerPruner(run.slm) as pruner:
            generated = generate_all(run.slm, pruner, [requests[position] for position in left], run.config.hardware.batch_size)
            tracked = track(generated, "answers to distil from", len(left))
            while some := [
                (left[index], answer.token_ids) for index, answer in islice(tracked, run.config.hardware.batch_size)
            ]:
                pieces.add(json.dumps(some))
                answered |= dict(some)
        right = [
            (requests[position].prompt, answered[position])
            for position, query in enumerate(queries)
            if score is None or score(run.slm.decode(answered[position]), query) == perfect
        ]
        if not right:
            raise ValueError(
                f"{run.slm.name} answers none of the {len(queries)} queries right ({settings.correct_by} 0%), so there is "
                "nothing to distil from; task-tune it first (dynprune stage=adapt), raise adapter.max_samples, or set "
                "adapter.correct_by=null"
            )
        with replacing(folder / _ANSWERS) as path:
            path.write_text(json.dumps(right), encoding="utf-8")
        pieces.remove()
        return {"queries": len(queries), "correct": len(right)}

    return run.store.get_or_build("answers", VERSION, config, digest(queries), {}, build, resumable=True)


def split_answers(run: Run, source: Artifact) -> tuple[list[Answered], list[Answered]]:
    """Samples to train on and samples held out."""
    samples: list[Answered] = [tuple(sample) for sample in json.loads((source.folder / _ANSWERS).read_text(encoding="utf-8"))]
    held_out = max(1, round(run.config.adapter.validation_share * len(samples)))
    if held_out >= len(samples):
        raise ValueError(
            f"{len(samples)} correct answer is too few to distil from and to validate on; raise adapter.max_samples"
        )
    return samples[held_out:], samples[:held_out]
