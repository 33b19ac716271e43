"""Agreement: how often a pruned SLM still says what the unpruned SLM says, right or wrong.

Correctness cannot tell a faithful pruned SLM from another one of the same accuracy, which gains some queries and loses as
many others; agreement can, and needs no reference answers.
"""

from collections.abc import Sequence

from dynprune.metrics.parsing import json_equal, parse_calls


def agreement(outputs: Sequence[str], full_outputs: Sequence[str]) -> list[float]:
    """Compares outputs with the unpruned SLM's own.

    Two outputs are equal if they parse as equal calls: what acts on an output sees the calls alone, so that white space,
    the order of keys and 5.0 for 5 are no difference. The order of the calls is one, as in `json_match`: calls are run in
    their order. Where neither parses there are no calls to compare, and "both are broken" would call any two broken
    outputs equal; so the texts must be equal, white space around them aside. If only one parses, they differ.

    Args:
        outputs: What the pruned SLM said, one output per query.
        full_outputs: What the unpruned SLM said, in the same order of queries.

    Returns:
        For each query 1.0 if the outputs are equal, else 0.0.

    Raises:
        ValueError: The two have different lengths.
    """
    if len(outputs) != len(full_outputs):
        raise ValueError(
            f"Agreement compares the outputs to the same queries, but there are {len(outputs)} outputs with pruning and "
            f"{len(full_outputs)} without; evaluate both on the same queries."
        )
    return [float(_equal(output, full)) for output, full in zip(outputs, full_outputs, strict=True)]


def _equal(a: str, b: str) -> bool:
    calls_a, calls_b = parse_calls(a).calls, parse_calls(b).calls
    if calls_a is None or calls_b is None:
        return calls_a is calls_b and a.strip() == b.strip()
    return json_equal(list(calls_a), list(calls_b))
