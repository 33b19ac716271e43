"""Scores of an output against the reference calls: pure functions ``(output, query) -> float``.

`exact_match`, `json_match`, `ratio_function_calls` and `partial_match` have the meaning that the thesis gives
them, and its scale, except that

- ``true`` is not 1, as it is in Python;
- calls are matched one to one: in a dict by name, two calls of one function would overwrite each other;
- `ratio_function_calls` divides by the larger number of calls, so that calls nobody asked for cost something.

A malformed output scores 0, and -5 in `partial_match`. The right answer to a query without reference calls is
an empty list.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dynprune.data.tasks import Query
from dynprune.metrics.parsing import json_equal, parse_calls

PARTIAL_MATCH_RANGE = (-5.0, 10.0)
"""`partial_match` of a malformed output and of a perfect one."""


def exact_match(output: str, query: Query) -> float:
    """1 if the output is, to the letter, the reference answer that the SLM is trained to write; else 0."""
    return float(output == json.dumps(list(query.answers), ensure_ascii=False))


def json_match(output: str, query: Query) -> float:
    """1 if the output, as JSON, equals the reference calls, in their order; else 0."""
    calls = parse_calls(output).calls
    return float(calls is not None and json_equal(list(calls), list(query.answers)))


def ratio_function_calls(output: str, query: Query) -> float:
    """Share of calls that are right, 0 to 1.

    The number of reference calls that have an equal call of their own in the output, in any order, by the
    number of reference calls or of calls in the output, whichever is larger.
    """
    calls = parse_calls(output).calls
    if calls is None:
        return 0.0
    if not calls and not query.answers:
        return 1.0
    left = list(calls)
    for answer in query.answers:
        twin = next((i for i, call in enumerate(left) if json_equal(call, answer)), None)
        if twin is not None:
            del left[twin]
    return (len(calls) - len(left)) / max(len(calls), len(query.answers))


def partial_match(output: str, query: Query) -> float:
    """Partial credit for names and arguments: -5 for malformed, 0 for no name right, up to 10 for all right.

    The reference calls share the 10 points equally. Half of a call's points are for its name, half for its
    arguments in equal parts (for a call without arguments, for giving none). Calls are matched one to one so
    that the sum is largest. As in the thesis's code, calls and arguments beyond the reference's cost nothing.
    """
    malformed, perfect = PARTIAL_MATCH_RANGE
    calls = parse_calls(output).calls
    if calls is None:
        return malformed
    if not query.answers:
        return 0.0 if calls else perfect
    if not calls:
        return 0.0
    credit = np.array([[_credit(call, answer) for call in calls] for answer in query.answers])
    matched = credit[linear_sum_assignment(credit, maximize=True)]
    return perfect * float(matched.sum()) / len(query.answers)


def partial_match_normalized(output: str, query: Query) -> float:
    """`partial_match` mapped from [-5, 10] to [0, 1]: malformed is 0, no name right 1/3, all right 1."""
    malformed, perfect = PARTIAL_MATCH_RANGE
    return (partial_match(output, query) - malformed) / (perfect - malformed)


def parse_rate(output: str, query: Query) -> float:
    """1 if the output parses as calls, right or wrong; else 0."""
    return float(parse_calls(output).calls is not None)


def name_match(output: str, query: Query) -> float:
    """1 if the output calls the reference's functions, each as often, in any order; else 0."""
    calls = parse_calls(output).calls
    if calls is None:
        return 0.0
    return float(Counter(call["name"] for call in calls) == Counter(call["name"] for call in query.answers))


def _credit(call: Mapping[str, Any], answer: Mapping[str, Any]) -> float:
    """What a call is worth as a reference call: 0, or 0.5 for the name and up to 0.5 for the arguments."""
    if call["name"] != answer["name"]:
        return 0.0
    given, wanted = call["arguments"], answer["arguments"]
    if not wanted:
        return 0.5 if given else 1.0
    right = sum(name in given and json_equal(given[name], value) for name, value in wanted.items())
    return 0.5 + 0.5 * right / len(wanted)
