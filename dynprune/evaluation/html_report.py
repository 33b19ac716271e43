"""``report.html``: everything about a run, or about a comparison of runs, in one file that needs no network.

The templates are in ``templates/``; they escape whatever models, queries and configurations say.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dynprune.atomic import replacing
from dynprune.data.tasks import Query
from dynprune.evaluation.accuracy import RIGHT_BY, Sample
from dynprune.evaluation.cells import Grid, listed
from dynprune.evaluation.comparison_output import comparison_grids, machines_sentence
from dynprune.evaluation.run_comparison import RunComparison

_EXAMPLES_OF_A_KIND = 3
_ANSWERS_OF_AN_EXAMPLE = 6
# By file, the heading of a comparison's figure and what it shows.
_COMPARED = {
    "comparison": ("AST match against speedup", "AST match of each setting against its speedup"),
    "layer_errors": ("Error of each layer's adapter", "Reconstruction error of each layer's adapter under each setting"),
}
_INTERVAL = re.compile(r"(.+) (\[.+\])", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        title: Its heading.
        alt: What it shows, for those who do not see it.
        path: Its PNG.
    """

    title: str
    alt: str
    path: Path

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
        pruned_layers: The layers pruned.
        output: What it said.
        right: Whether that is right.
    """

    row: str
    pruned_layers: Sequence[int]
    output: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One query and what rows said to it.

    Attributes:
        kind: What it is an example of.
        id: The query's id.
        query: The last user message.
        reference: The reference calls, as JSON.
        answers: What the rows said.
    """

    kind: str
    id: str
    query: str
    reference: str
    answers: Sequence[Answer]


def choose_examples(
    queries: Sequence[Query], samples: Mapping[str, Sequence[Sample]], row: str, others: Sequence[str]
) -> list[Example]:
    """Picks some queries of each kind: mended by pruning, broken by it, right under both, wrong under both.

    Of each kind those come first for which most layers are pruned.

    Args:
        queries: The queries.
        samples: By row, a sample for each query, ``original`` among them.
        row: The row that the kinds are about.
        others: Rows that are shown beside it.
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
                Answer(name, sample.pruned_layers, sample.output, _is_right(sample))
                for name, sample in zip(shown, said, strict=True)
            ]
            query = queries[place]
            reference = json.dumps(query.answers, ensure_ascii=False)
            examples.append(Example(kinds[kind], query.id, query.messages[-1]["content"], reference, answers))
    return examples


def write_run_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    grids: Sequence[Grid],
    pictures: Sequence[Picture],
    examples: Sequence[Example],
    num_layers: int,
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
        num_layers: L, the SLM's decoder layers.
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
        figures=pictures,
        examples=examples,
        example_row=examples[0].answers[1].row if examples else "",
        num_layers=num_layers,
        machine=listed(machine),
        versions=listed(versions),
        config=config,
    )


def write_comparison_report(path: Path, comparison: RunComparison, pictures: Sequence[Path]) -> None:
    """Writes the report of a comparison.

    Args:
        path: Where to; it appears when it is complete.
        comparison: The comparison.
        pictures: Its figures.
    """
    facts = [f"{comparison.runs} runs"]
    if comparison.failures:
        facts.append(f"{len(comparison.failures)} failed")
    _write(
        path,
        "comparison.html.j2",
        title="Comparison of runs",
        facts=facts,
        grids=comparison_grids(comparison),
        figures=[Picture(*_COMPARED[picture.stem], picture) for picture in pictures],
        machines=machines_sentence(comparison),
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
