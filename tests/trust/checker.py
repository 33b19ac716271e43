"""`ast_match` against the Berkeley leaderboard's own checker, from its wheel, in an environment of its own.

The pairs of outputs and answers are what the embedded SLM really said (``outputs.jsonl.gz``), and mutations of right and wrong
answers. Every disagreement is kept with the reason for it, and with who is right.
"""

import gzip
import itertools
import json
import random
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynprune.data.bfcl import load_bfcl
from dynprune.data.tasks import Query
from dynprune.metrics.ast_match import check_calls
from dynprune.metrics.parsing import parse_calls
from trust.inputs import mutated

PAIRS = 24_000
REAL = Path(__file__).parent / "outputs.jsonl.gz"
_WHEEL = "bfcl-eval==2026.3.23"
_ENVIRONMENT = Path("build/trust/berkeley")
_SHOWN = "checker_disagreements.jsonl"
_UNEXPLAINED = "unexplained"
_FIRST_FIT = (
    "the leaderboard gives each reference call the first call that fits, though another order fits all by its own rule; "
    "ours is right"
)


def run(folder: Path) -> dict[str, Any]:
    """Checks all pairs by both.

    Args:
        folder: Where the list of disagreements goes.

    Returns:
        ``checker_pairs``, ``checker_real_outputs``, ``checker_right`` (by both), ``checker_disagreements`` and, by reason, how
        many of these there are.
    """
    queries = {query.id: query for query in load_bfcl()}
    real = [(queries[record["id"]], record["output"]) for record in _real() if record["id"] in queries]
    pairs = [(query, output, calls) for query, output in real if (calls := parse_calls(output).calls) is not None]
    num_real = len(pairs)
    for output, query in mutated(list(queries.values()), random.Random("checker"), 10 * PAIRS):
        if len(pairs) >= PAIRS:
            break
        calls = parse_calls(output).calls
        if calls is not None:
            pairs.append((query, output, calls))
    theirs = _by_berkeley([(query, calls) for query, _, calls in pairs])
    right, disagreements = 0, []
    for (query, output, calls), their in zip(pairs, theirs, strict=True):
        ours = check_calls(calls, query)
        right += ours.valid and their["valid"] is True
        if ours.valid != their["valid"]:
            reason = _reason(query, calls, ours.valid, their)
            disagreements.append({"id": query.id, "output": output, "ours": ours.valid, "berkeley": their, "reason": reason})
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in disagreements)
    (folder / _SHOWN).write_text(text, encoding="utf-8", errors="replace")
    return {
        "checker_pairs": len(pairs),
        "checker_real_outputs": num_real,
        "checker_right": right,
        "checker_disagreements": len(disagreements),
        "checker_reasons": dict(Counter(one["reason"] for one in disagreements).most_common()),
    }


def _real() -> Iterator[dict[str, str]]:
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _by_berkeley(pairs: Sequence[tuple[Query, Sequence[Any]]]) -> list[dict[str, Any]]:
    python = _ENVIRONMENT / "bin/python"
    if not python.exists():
        venv.create(_ENVIRONMENT, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", _WHEEL]
        subprocess.run(install, check=True)
    lines = [
        json.dumps({"tools": query.tools, "calls": calls, "allowed": query.allowed, "category": query.category})
        for query, calls in pairs
    ]
    script = Path(__file__).with_name("berkeley.py")
    said = subprocess.run([python, script], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if said.returncode != 0:
        sys.exit(said.stderr)
    return [json.loads(line) for line in said.stdout.splitlines()]


def _reason(query: Query, calls: Sequence[Any], ours: bool, theirs: Any) -> str:
    """Why the two disagree, and who is right; ``unexplained`` where that is not known."""
    if not ours or theirs["valid"] is not False or len(calls) != len(query.allowed):
        return _UNEXPLAINED
    # By the leaderboard's own verdict on each call alone, is there an order in which all are right?
    alone = iter(
        _by_berkeley([(replace(query, category="multiple", allowed=(one,)), [call]) for one in query.allowed for call in calls])
    )
    fits = [[next(alone)["valid"] is True for _ in calls] for _ in query.allowed]
    orders = itertools.permutations(range(len(calls)))
    if any(all(row[place] for row, place in zip(fits, order, strict=True)) for order in orders):
        return _FIRST_FIT
    return _UNEXPLAINED
