"""A million outputs, from right to hostile, against every score: none raises, hangs, or gives credit that is not due.

What is due is computed here by other means: JSON read by recursive descent, calls matched by trying all orders, and for
`ast_match`, whose whole rule is compared with the leaderboard's own checker elsewhere, a condition that no right output can
fail.
"""

import itertools
import json
import math
import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dynprune.data.bfcl import load_bfcl
from dynprune.data.tasks import Query
from dynprune.metrics.parsing import MAX_DEPTH
from dynprune.metrics.scores import SCORES
from trust.strict_json import Malformed, read

INPUTS = 1_000_000
_IN_A_JOB = 10_000
_PROCESSES = 2
_SECONDS_AN_INPUT = 10
_SHOWN = 20
_MOST_ORDERS = 5
_STRANGE = (
    *("NaN", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "1e-400", "0.1e1", "1E2", "-0", "01", "1.", ".5", "+1", "0x10"),
    *("true", "false", "null", "True", "None", "{}", "[]", '""', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\x00"', "'x'"),
    *('{"a": 1, "a": 2}', "[" * 70 + "]" * 70, "[" * 63 + "]" * 63, "\ud800", "\u2028", "\ufeff", "/* */", "// x\n", ","),
)  # fmt: skip
_HUGE = (
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    '[{"name": "' + "x" * 10_000_000 + '", "arguments": {}}]',
    '[{"name": "f", "arguments": {"a": "' + "\\u0041" * 1_700_000 + '"}}]',
    "9" * 10_000_000,
    " " * 10_000_000,
    "[" + ",".join(["{}"] * 1_000_000) + "]",
    "```json" + "`" * 1_000_000,
)


def run() -> dict[str, Any]:
    """Tries all inputs.

    Returns:
        ``inputs_tried``, ``input_failures``, how many of the inputs each score gave credit, and the first failures.
    """
    jobs = [(number, _IN_A_JOB) for number in range(INPUTS // _IN_A_JOB)]
    tried, failures, credited = 0, [], Counter[str]()
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        for count, failed, credit in pool.imap_unordered(_job, [("huge", 0), *jobs]):
            tried += count
            failures += failed
            credited += credit
    return {
        "inputs_tried": tried,
        "input_failures": len(failures),
        "inputs_credited": dict(sorted(credited.items())),
        "first_input_failures": failures[:_SHOWN],
    }


def _job(job: tuple[int | str, int]) -> tuple[int, list[str], Counter[str]]:
    number, count = job
    queries = load_bfcl()
    inputs = _huge(queries) if number == "huge" else mutated(queries, random.Random(f"inputs {number}"), count)
    tried, failures, credited = 0, [], Counter[str]()
    for output, query in inputs:
        tried += 1
        for name, value in _scores(output, query):
            if isinstance(value, str):
                failures.append(f"{name} {value}: {query.id}: {output[:300]!r}")
            elif value > 0:
                credited[name] += 1
    return tried, failures, credited


def _huge(queries: Sequence[Query]) -> Iterator[tuple[str, Query]]:
    return ((text, query) for text in _HUGE for query in queries[:2])


def _scores(output: str, query: Query) -> Iterator[tuple[str, float | str]]:
    """By name each score, or what is wrong with it."""
    most = _most(output, query)
    for name, score in SCORES.items():
        start = time.perf_counter()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(_SECONDS_AN_INPUT)
        try:
            value = score(output, query)
        except BaseException as error:
            yield name, f"raised {type(error).__name__}"
            continue
        finally:
            signal.alarm(0)
        low, high = (-5.0, 10.0) if name == "partial_match" else (0.0, 1.0)
        if type(value) is not float or not low <= value <= high:
            yield name, f"gave {value!r}"
        elif not most[name](value):
            yield name, f"gave {value!r}, which is not due"
        else:
            yield name, value if time.perf_counter() - start < _SECONDS_AN_INPUT else "took too long"


def _too_long(*_: object) -> None:
    raise TimeoutError


def _most(output: str, query: Query) -> Mapping[str, Callable[[float], bool]]:
    """By score, whether a value is due."""
    calls = _calls(output)
    reference = list(query.answers)
    if calls is None:
        nothing = dict.fromkeys(SCORES, lambda value: value == 0)
        malformed = {"partial_match": lambda value: value == -5, "exact_match": lambda value: value == 0}
        return {**nothing, **malformed}
    same = len(calls) == len(reference) and all(map(_equal, calls, reference))
    pairs = _most_pairs(calls, reference, lambda call, answer: float(_equal(call, answer)))
    ratio = pairs / max(len(calls), len(reference)) if calls or reference else 1.0
    partial = 10.0 * _most_pairs(calls, reference, _credit) / len(reference) if reference else 10.0 * (not calls)
    names = Counter(call["name"] for call in calls) == Counter(answer["name"] for answer in reference)
    return {
        "parse_rate": lambda value: value == 1,
        "exact_match": lambda value: value == (output == json.dumps(reference, ensure_ascii=False)),
        "json_match": lambda value: value == same,
        "name_match": lambda value: value == names,
        "ratio_function_calls": lambda value: math.isclose(value, ratio),
        "partial_match": lambda value: math.isclose(value, partial, abs_tol=1e-9),
        "partial_match_normalized": lambda value: math.isclose(value, (partial + 5) / 15, abs_tol=1e-9),
        "ast_match": lambda value: value == 0 or (value == 1 and _may_be_right(calls, query)),
    }


def _calls(output: str) -> list[dict[str, Any]] | None:
    text = output.strip()
    if text.startswith("```json") and text.endswith("```"):
        text = text[7:-3].strip()
    try:
        value = read(text, MAX_DEPTH)
    except (Malformed, RecursionError):
        return None
    calls = [value] if isinstance(value, dict) else value
    right = isinstance(calls, list) and all(
        isinstance(call, dict)
        and sorted(call) == ["arguments", "name"]
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
        for call in calls
    )
    return calls if right else None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return sorted(a) == sorted(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _credit(call: Mapping[str, Any], answer: Mapping[str, Any]) -> float:
    if call["name"] != answer["name"]:
        return 0.0
    wanted, given = answer["arguments"], call["arguments"]
    if not wanted:
        return 1.0 if not given else 0.5
    return 0.5 + 0.5 * sum(key in given and _equal(given[key], value) for key, value in wanted.items()) / len(wanted)


def _most_pairs(calls: Sequence[Any], reference: Sequence[Any], worth: Callable[[Any, Any], float]) -> float:
    """The best one-to-one matching: by trying all orders of few calls, else by dynamic programming over subsets."""
    if not calls or not reference:
        return 0.0
    worth_of = [[worth(call, answer) for call in calls] for answer in reference]
    if max(len(calls), len(reference)) <= _MOST_ORDERS:
        few, many = sorted((len(reference), len(calls)))
        by_reference = len(reference) == few
        return max(
            sum(worth_of[i][j] if by_reference else worth_of[j][i] for i, j in enumerate(order))
            for order in itertools.permutations(range(many), few)
        )
    # Calls that are worth nothing change no sum; what is left are few.
    useful = [j for j in range(len(calls)) if any(row[j] for row in worth_of)][:16]
    best = {0: 0.0}
    for row in worth_of:
        grown = dict(best)
        for taken, total in best.items():
            for place, j in enumerate(useful):
                if row[j] and not taken >> place & 1:
                    key = taken | 1 << place
                    grown[key] = max(grown.get(key, 0.0), total + row[j])
        best = grown
    return max(best.values())


def _may_be_right(calls: Sequence[Mapping[str, Any]], query: Query) -> bool:
    """Whether each reference call can have a call of its name, with its parameters alone and no value that it does not list."""
    if len(calls) != len(query.allowed):
        return False
    fits = [[_may_fit(call, *next(iter(allowed.items()))) for call in calls] for allowed in query.allowed]
    return _most_pairs(range(len(calls)), range(len(calls)), lambda call, allowed: float(fits[allowed][call])) == len(calls)


def _may_fit(call: Mapping[str, Any], name: str, parameters: Mapping[str, Sequence[Any]]) -> bool:
    if call["name"] != name or not set(call["arguments"]) <= set(parameters):
        return False
    for key, options in parameters.items():
        if key not in call["arguments"]:
            if "" not in options:
                return False
        elif not set(_leaves(call["arguments"][key])) <= {leaf for option in options for leaf in _leaves(option)} | {""}:
            return False
    return True


def _leaves(value: Any) -> Iterator[object]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield "key", key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield "".join(c for c in value.replace("'", '"').lower() if c not in " ,./-_*^")
    else:
        yield type(value) is bool, value


def mutated(queries: Sequence[Query], rng: random.Random, count: int) -> Iterator[tuple[str, Query]]:
    """Answers to queries, right and wrong ones, changed some times: first as values, then as text."""
    for _ in range(count):
        query = rng.choice(queries)
        calls = json.loads(json.dumps(list((query if rng.random() < 0.9 else rng.choice(queries)).answers)))
        if rng.random() < 0.5 and len(calls) == len(query.allowed):
            calls = [_allowed_call(allowed, rng) for allowed in query.allowed]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            calls = rng.choice(_ON_CALLS)(calls, rng)
        text = json.dumps(calls, ensure_ascii=rng.random() < 0.3, indent=rng.choice((None, None, None, 2)))
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))):
            text = rng.choice(_ON_TEXT)(text, rng)
        yield text, query


def _allowed_call(allowed: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    name, parameters = next(iter(allowed.items()))
    arguments = {}
    for key, options in parameters.items():
        value = rng.choice(options) if isinstance(options, list) and options else options
        if value != "" or rng.random() < 0.2:
            arguments[key] = value
    return {"name": name, "arguments": arguments}


def _other_value(calls: list[Any], rng: random.Random) -> list[Any]:
    return [_changed(call, rng) for call in calls]


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it changed, or none."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    choices: list[Any] = [None, True, False, 0, 1, -1, 1.0, 0.5, "", "x", [], {}, [value], {"x": value}, str(value)]
    if isinstance(value, bool):
        choices += [int(value), str(value), not value] * 3
    elif isinstance(value, int | float):
        choices += [float(value), value + 1, -value, str(value), bool(value)] * 3
    elif isinstance(value, str):
        choices += [value.upper(), value.lower(), value + " ", value.replace(" ", ""), f"{value}.", value[::-1], value[:-1]] * 3
    elif isinstance(value, list):
        choices += [value[::-1], value[1:], value + value, value[:1]] * 3
    return rng.choice(choices)


def _ordered(calls: list[Any], rng: random.Random) -> list[Any]:
    return rng.sample(calls, len(calls))


def _fewer(calls: list[Any], rng: random.Random) -> list[Any]:
    return rng.sample(calls, rng.randrange(len(calls) + 1))


def _more(calls: list[Any], rng: random.Random) -> list[Any]:
    return calls + rng.sample(calls, min(len(calls), rng.choice((1, 1, 2, 3))))


def _argument(calls: list[Any], rng: random.Random) -> list[Any]:
    """One call with an argument less, or one more."""
    if not calls or not isinstance(calls[0], dict) or not isinstance(calls[0].get("arguments"), dict):
        return calls
    arguments = dict(calls[0]["arguments"])
    if arguments and rng.random() < 0.6:
        del arguments[rng.choice(list(arguments))]
    else:
        arguments[rng.choice(("x", "", "unit", "name"))] = rng.choice((1, "", None, [], "x"))
    return [{**calls[0], "arguments": arguments}, *calls[1:]]


def _cut(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + text[start + rng.choice((1, 1, 2, 5, 50)) :]


def _inserted(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice((*'[]{}:,"\\ \n0eE-.', *_STRANGE)) + text[at:]


def _repeated(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    end = start + rng.choice((1, 5, 20, 60))
    return text[:end] + text[start:end] + text[end:]


def _number(text: str, rng: random.Random) -> str:
    """A value in the text replaced by something strange."""
    places = [i for i, c in enumerate(text) if c == ":"]
    if not places:
        return text
    at = rng.choice(places) + 1
    end = min((text.find(c, at) for c in ",}]" if text.find(c, at) >= 0), default=at)
    return text[:at] + " " + rng.choice(_STRANGE) + text[end:]


def _wrapped(text: str, rng: random.Random) -> str:
    before, after = rng.choice(
        (
            ("```json\n", "\n```"),
            ("```json", "```"),
            ("```\n", "\n```"),
            ("Sure: ", ""),
            ("", " Done."),
            ("[", "]"),
            ("\n\t ", " \r\n"),
            ("\xa0", "\u2003"),
            ('"', '"'),
            ("", ";"),
            ("<tool_call>", "</tool_call>"),
            ("", text),
        )
    )
    return before + text + after


def _bare(text: str, rng: random.Random) -> str:
    return text.strip()[1:-1]


def _quotes(text: str, rng: random.Random) -> str:
    return text.replace('"', "'")


_ON_CALLS = (_other_value, _other_value, _other_value, _ordered, _fewer, _more, _argument, _argument)
_ON_TEXT = (_cut, _inserted, _inserted, _repeated, _number, _number, _wrapped, _bare, _quotes)
