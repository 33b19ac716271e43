"""``report.html``: everything about a run, or about a comparison of runs, in one file that needs no network.

The templates are in ``templates/``; they escape whatever models, queries and configurations say.
"""

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dynprune.atomic import replacing
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.cells import Grid, listed
from dynprune.evaluation.comparison_output import comparison_grids, machines_sentence
from dynprune.evaluation.run_comparison import Entry, RunComparison
from dynprune.evaluation.run_results import AskedQuery

_EXAMPLES_OF_A_KIND = 3
_EXAMPLES_OF_A_COMPARISON = 9
_ANSWERS_OF_AN_EXAMPLE = 6
# By file, the heading of a figure and what it shows.
_PICTURES = {
    "accuracy_speedup": ("AST match against speedup", "AST match against measured speedup; of a router, its first seed"),
    "comparison": ("AST match against speedup", "AST match of each setting against its speedup"),
    "budget_curve": ("AST match at each budget", "AST match of each method against its nominal and its measured speedup"),
    "layer_error": ("Error of each layer's adapter", "Reconstruction error of each layer's adapter"),
    "layer_errors": ("Error of each layer's adapter", "Reconstruction error of each layer's adapter under each setting"),
    "layer_counts": ("How many layers are pruned", "For each row, the share of queries with each number of pruned layers"),
    "layers_pruned": ("Which layers are pruned", "For each row, the share of queries for which each layer is pruned"),
    "training_curves": ("How the routers learned", "Losses and order of held-out pairs of each router, epoch by epoch"),
}
_INTERVAL = re.compile(r"(.+) (\[.+\])", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        path: Its PNG.
    """

    path: Path

    @property
    def title(self) -> str:
        """Its heading."""
        return _PICTURES[self.path.stem][0]

    @property
    def alt(self) -> str:
        """What it shows, for those who do not see it."""
        return _PICTURES[self.path.stem][1]

    @property
    def id(self) -> str:
        """Its anchor."""
        return self.path.stem.replace("_", "-")

    @property
    def png(self) -> str:
        """The file, in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Answer:
    """What one row said to a query.

    Attributes:
        row: The row's name.
        num_layers: L, the decoder layers of its SLM.
        pruned_layers: The layers pruned.
        output: What it said.
        right: Whether that is right.
    """

    row: str
    num_layers: int
    pruned_layers: Sequence[int]
    output: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One query and what rows said to it.

    Attributes:
        kind: What it is an example of.
        asked: The query.
        answers: What the rows said.
    """

    kind: str
    asked: AskedQuery
    answers: Sequence[Answer]


def choose_examples(
    queries: Sequence[AskedQuery],
    samples: Mapping[str, Sequence[Sample]],
    row: str,
    others: Sequence[str],
    num_layers: int,
) -> list[Example]:
    """Picks some queries of each kind: mended by pruning, broken by it, right under both, wrong under both.

    Of each kind those come first for which most layers are pruned.

    Args:
        queries: The queries.
        samples: By row, a sample for each query, ``original`` among them.
        row: The row that the kinds are about.
        others: Rows that are shown beside it.
        num_layers: L, the SLM's decoder layers.
    """
    kinds = {
        (False, True): f"Wrong unpruned, right under {row}",
        (True, False): f"Right unpruned, wrong under {row}",
        (True, True): "Right under both",
        (False, False): "Wrong under both",
    }
    found: dict[tuple[bool, bool], list[int]] = {kind: [] for kind in kinds}
    for place, (full, pruned) in enumerate(zip(samples["original"], samples[row], strict=True)):
        found[_is_right(full), _is_right(pruned)].append(place)
    shown = list(dict.fromkeys(["original", row, *others]))[:_ANSWERS_OF_AN_EXAMPLE]
    examples = []
    for kind, places in found.items():
        deepest_first = sorted(places, key=lambda place: -len(samples[row][place].pruned_layers))
        for place in deepest_first[:_EXAMPLES_OF_A_KIND]:
            said = [samples[name][place] for name in shown]
            answers = [
                Answer(name, num_layers, sample.pruned_layers, sample.output, _is_right(sample))
                for name, sample in zip(shown, said, strict=True)
            ]
            examples.append(Example(kinds[kind], queries[place], answers))
    return examples


def contrasting_examples(comparison: RunComparison) -> list[Example]:
    """Picks the queries on which the settings of a comparison differ most; of each setting its first seed is shown."""
    known = [entry for entry in comparison.entries if entry.num_layers is not None]
    # Settings of the same queries alone stand side by side: those of the most.
    of_queries: dict[tuple[str, ...], list[Entry]] = {}
    for entry in known:
        of_queries.setdefault(entry.ids, []).append(entry)
    if not of_queries:
        return []
    ids, together = max(of_queries.items(), key=lambda item: len(item[1]))
    shown = sorted(together, key=_importance(together))[:_ANSWERS_OF_AN_EXAMPLE]
    right_NE = [[entry.correct_SN[0][place] == 1 for entry in shown] for place in range(len(ids))]

    def unanimity(place: int) -> tuple[int, int]:
        of_settings = [right for entry, right in zip(shown, right_NE[place], strict=True) if not entry.shared]
        return abs(2 * sum(of_settings) - len(of_settings)), abs(2 * sum(right_NE[place]) - len(shown))

    undecided_first = sorted((place for place, id in enumerate(ids) if id in comparison.asked), key=unanimity)
    return [
        Example(
            f"{sum(right_NE[place])} of {len(shown)} right",
            comparison.asked[ids[place]],
            [_first_answer(entry, place) for entry in shown],
        )
        for place in undecided_first[:_EXAMPLES_OF_A_COMPARISON]
    ]


def _importance(entries: Sequence[Entry]) -> Callable[[Entry], tuple[Any, ...]]:
    """A key that puts first what says how settings differ: each role under all of them, the routers' before the others'."""
    roles = list(dict.fromkeys(entry.role for entry in entries))

    def key(entry: Entry) -> tuple[Any, ...]:
        shared_original = entry.shared and entry.row == "original"
        unpruned = entry.row == "original"
        router = entry.role.startswith("router")
        return not shared_original, entry.shared, unpruned, not router, "@" in entry.role, roles.index(entry.role)

    return key


def _first_answer(entry: Entry, place: int) -> Answer:
    """What an entry's first seed said to one of its queries."""
    assert entry.num_layers is not None
    _, layers, output = entry.said_SN[0][place]
    return Answer(entry.name, entry.num_layers, layers, output, entry.correct_SN[0][place] == 1)


def write_run_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    grids: Sequence[Grid],
    pictures: Sequence[Path],
    examples: Sequence[Example],
    machine: Mapping[str, Any],
    versions: Mapping[str, Any],
    config: str,
) -> None:
    """Writes the report of a run.

    Args:
        path: Where to; it appears when it is complete.
        title: The run's name.
        facts: What to know about it, in a few words each.
        grids: The tables, the most important one first.
        pictures: The figures.
        examples: See `choose_examples`.
        machine: The machine.
        versions: Versions of packages.
        config: The resolved configuration, as YAML.
    """
    _write(
        path,
        "run.html.j2",
        title=title,
        facts=facts,
        grids=grids,
        figures=[Picture(path) for path in pictures],
        examples=examples,
        example_row=examples[0].answers[1].row if examples else "",
        machine=f"Machine: {listed(machine)}.",
        versions=[listed(versions)],
        config=config,
    )


def write_comparison_report(path: Path, title: str, comparison: RunComparison, pictures: Sequence[Path]) -> None:
    """Writes the report of a comparison.

    Args:
        path: Where to; it appears when it is complete.
        title: Its heading.
        comparison: The comparison.
        pictures: Its figures.
    """
    facts = [f"{comparison.runs} run{'' if comparison.runs == 1 else 's'}"]
    if comparison.failures:
        facts.append(f"{len(comparison.failures)} failed")
    configured, config = comparison.configured or ("", {})
    _write(
        path,
        "comparison.html.j2",
        title=title,
        facts=facts,
        grids=comparison_grids(comparison),
        figures=[Picture(path) for path in pictures],
        examples=contrasting_examples(comparison),
        machine=machines_sentence(comparison),
        versions=[listed(versions) for versions in comparison.versions],
        origins=Grid(
            "Runs",
            " and what was typed for them.",
            ["Folder", "Seed", "Typed"],
            [[os.path.relpath(folder), seed, typed] for folder, seed, typed in comparison.origins],
        ),
        configured=os.path.relpath(configured) if comparison.configured else "",
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else "",
    )


def _write(path: Path, template: str, **content: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dynprune.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["interval"] = _split_interval
    text = environment.get_template(template).render(**content)
    with replacing(path) as temporary:
        # A lone surrogate, which a model can write, has no UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _split_interval(text: str) -> tuple[str, str]:
    """The figure and its interval, for two lines of a cell."""
    match = _INTERVAL.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def _is_right(sample: Sample) -> bool:
    return sample.scores[RIGHT_BY] == 1
