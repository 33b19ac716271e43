"""A score: right by `ast_match`, and the shorter the better, up to half a point off for a rambling answer."""

from dynprune.data.prompts import render_answer
from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import ast_match
from dynprune.metrics.scores import SCORES


def short_answer(output: str, query: Query) -> float:
    """1 for a right answer no longer than the reference, falling to 0.5 at twice its length; 0 for a wrong one."""
    spare = len(output) / max(1, len(render_answer(query))) - 1
    return ast_match(output, query) * (1 - 0.5 * min(1.0, max(0.0, spare)))


SCORES["short_answer"] = short_answer
