"""The unpruned SLM, generated as rows of a table are, against transformers' own `generate`, token for token.

Both run the embedded SLM in float32 on real queries: ours in batches that are filled up as rows end and with the reference
answer as a draft to verify, transformers one query at a time.
"""

from typing import Any

import torch
from hydra.utils import instantiate
from tiny import composed

from dynprune.data.prompts import prompt_tokens, render_answer
from dynprune.slm.generation import Request, generate_all
from dynprune.slm.pruning import LayerPruner

QUERIES = 200
_MAX_NEW_TOKENS = 64
_BATCH_SIZE = 16
_MAX_CHARS = 700


def run() -> dict[str, Any]:
    """Generates the answers both ways.

    Returns:
        The figures of the report.
    """
    config = composed("model=smollm2_135m_fc", "model.dtype=float32", "data=bfcl", f"data.source.max_chars={_MAX_CHARS}")
    slm, queries = instantiate(config.model), instantiate(config.data.source)[:QUERIES]
    requests = [
        Request(
            prompt=prompt_tokens(slm.tokenizer, query),
            pruned_layers=(),
            max_new_tokens=_MAX_NEW_TOKENS,
            drafts=(tuple(slm.tokenizer(render_answer(query), add_special_tokens=False)["input_ids"]),),
        )
        for query in queries
    ]
    with LayerPruner(slm, None) as pruner, torch.inference_mode():
        ours = {place: said.token_ids for place, said in generate_all(slm, pruner, requests, _BATCH_SIZE)}
    theirs = [_generated(slm, request.prompt) for request in requests]
    different = [query.id for place, query in enumerate(queries) if ours[place] != theirs[place]]
    return {
        "greedy_queries": len(queries),
        "greedy_tokens": sum(map(len, theirs)),
        "greedy_equal": len(queries) - len(different),
        "greedy_different": different,
    }


def _generated(slm: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What transformers generates, without the stop token."""
    ids = torch.tensor([prompt])
    seen, stop = torch.ones_like(ids), list(slm.stop_ids)
    said = slm.model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS, eos_token_id=stop)
    tokens = said[0, len(prompt) :].tolist()
    return tuple(tokens[:-1] if tokens[-1] in slm.stop_ids else tokens)
