import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dynprune.evaluation import table as table_module
from dynprune.evaluation.comparisons import Comparison
from dynprune.evaluation.machine import describe_machine, versions
from dynprune.evaluation.statistics import Interval, MedianInterval
from dynprune.evaluation.table import Lossless, TableRow, render_table, write_table

MACHINE = {"cpu": "Model X", "cores": 4, "accelerator": None}
VERSIONS = {"python": "3.12.1", "torch": "2.13.0"}
CONFIG = {"seed": 1, "path": Path("some/where"), "rate": float("nan"), "layers": [np.int64(3)]}


def make_row(name="router-dpo", **changes):
    scores = {
        "json_match": Interval(0.5, 0.431, 0.569),
        "ast_match": Interval(0.542, 0.471, 0.61),
        "agreement": Interval(0.81, 0.75, 0.858),
        "parse_rate": Interval(0.98, 0.95, 0.99),
        "name_match": Interval(0.93, 0.886, 0.958),
        "ratio_function_calls": Interval(0.7, 0.65, 0.75),
        "partial_match": Interval(5.25, 4.1, 6.3),
    }
    fields = {
        "n": 200,
        "scores": scores,
        "mean_pruned_layers": 5.5,
        "nominal_speedup": 0.15,
        "measured_speedup": MedianInterval(0.123, 0.11, 0.135),
        "prefill_speedup": MedianInterval(0.2, 0.19, 0.21),
        "decode_speedup": None,
        "seconds": MedianInterval(2.342, 2.1, 2.6),
        "cache_mib": MedianInterval(7.26, 7.0, 7.5),
        "timed": 50,
        "truncated": 3,
    }
    return TableRow(name, **(fields | changes))


ROWS = [
    make_row("original", mean_pruned_layers=0.0, nominal_speedup=0.0, measured_speedup=None),
    make_row("router-dpo"),
]
COMPARISON = Comparison(
    "router-dpo",
    "original",
    "ast_match",
    200,
    Interval(-0.03, -0.08, 0.02),
    Interval(-0.03, -0.09, 0.03),
    9,
    15,
    0.3072,
    0.0004,
)


def write(folder, rows=ROWS, comparisons=(COMPARISON,)):
    write_table(rows, folder, MACHINE, VERSIONS, CONFIG, comparisons)


def no_nan(constant):
    raise AssertionError(f"{constant} is not JSON")


def read_json(folder):
    return json.loads((folder / "table.json").read_text(), parse_constant=no_nan)


def test_json_has_the_published_schema(tmp_path):
    write(tmp_path / "new" / "folder")
    document = read_json(tmp_path / "new" / "folder")
    about_the_run = ["machine", "versions", "config", "overrides", "plugins", "inputs", "num_layers"]
    assert list(document) == ["rows", "comparisons", "seeds", *about_the_run]
    row = document["rows"][1]
    assert row["name"] == "router-dpo"
    assert row["n"] == 200
    for score in ("json_match", "ast_match", "agreement", "parse_rate", "name_match", "ratio_function_calls", "partial_match"):
        assert set(row[score]) == {"mean", "low", "high"}
    assert row["ast_match"] == {"mean": 0.542, "low": 0.471, "high": 0.61}
    assert row["mean_pruned_layers"] == 5.5
    assert row["nominal_speedup"] == 0.15
    assert row["measured_speedup"] == {"median": 0.123, "low": 0.11, "high": 0.135}
    assert row["truncated"] == 3
    assert document["rows"][0]["measured_speedup"] is None
    assert document["comparisons"][0]["difference"] == {"mean": -0.03, "low": -0.08, "high": 0.02}
    assert document["comparisons"][0]["p_holm"] == 0.0004
    assert document["machine"] == MACHINE
    assert document["versions"] == VERSIONS


def test_json_has_null_for_nan_and_plain_types_for_the_rest(tmp_path):
    write(tmp_path, [make_row(mean_pruned_layers=float("nan"), n=np.int64(7), truncated=np.int64(2))])
    document = read_json(tmp_path)
    assert document["config"] == {"seed": 1, "path": str(Path("some/where")), "rate": None, "layers": [3]}
    assert document["rows"][0]["mean_pruned_layers"] is None
    assert document["rows"][0]["n"] == 7


def test_a_further_score_is_written_too(tmp_path):
    row = make_row(scores=make_row().scores | {"exact_match": Interval(0.25, 0.2, 0.3)})
    write(tmp_path, [row])
    assert read_json(tmp_path)["rows"][0]["exact_match"]["mean"] == 0.25
    assert "25.0 [20.0, 30.0]" in (tmp_path / "table.md").read_text()


def test_csv_reads_back_with_full_precision(tmp_path):
    third = Interval(1 / 3, 0.1, 0.9)
    write(tmp_path, [ROWS[0], make_row(scores=make_row().scores | {"ast_match": third})])
    with (tmp_path / "table.csv").open(newline="") as file:
        original, router = csv.DictReader(file)
    assert (original["name"], router["name"]) == ("original", "router-dpo")
    assert float(router["ast_match"]) == 1 / 3
    assert (float(router["ast_match_low"]), float(router["ast_match_high"])) == (0.1, 0.9)
    assert float(router["measured_speedup"]) == 0.123
    assert float(router["measured_speedup_high"]) == 0.135
    assert (original["measured_speedup"], original["measured_speedup_low"]) == ("", "")
    assert (router["decode_speedup"], router["truncated"], router["timed"]) == ("", "3", "50")


def markdown_line(folder, *starts):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(folder).splitlines()]
    return next(cells for cells in lines if tuple(cells[: len(starts)]) == starts)


def markdown(folder):
    return (folder / "table.md").read_text()


def test_markdown_shows_percentages_with_one_decimal_and_intervals(tmp_path):
    write(tmp_path)
    expected = ["54.2 [47.1, 61.0]", "81.0 [75.0, 85.8]", "5.5", "15.0", "12.3 [11.0, 13.5]"]
    assert markdown_line(tmp_path, "router-dpo") == ["router-dpo", *expected]
    assert markdown_line(tmp_path, "original")[3:] == ["0.0", "0.0", "–"]
    assert "n = 200" in markdown(tmp_path)
    assert "cpu Model X, cores 4" in markdown(tmp_path)


def test_markdown_shows_partial_match_on_its_own_scale(tmp_path):
    write(tmp_path)
    expected = ["70.0 [65.0, 75.0]", "5.2 [4.1, 6.3]", "3"]
    assert markdown_line(tmp_path, "router-dpo", "200") == ["router-dpo", "200", *expected]


def test_markdown_shows_the_accuracy_ladder_from_the_mildest_step_to_the_strictest(tmp_path):
    write(tmp_path)
    ladder = next(block for block in markdown(tmp_path).split("\n\n") if block.startswith("| Row | Parsed"))
    header, _, original, router = [[cell.strip() for cell in line.strip("|").split("|")] for line in ladder.splitlines()]
    assert header == ["Row", "Parsed, %", "Function name, %", "AST match, %", "JSON match, %"]
    steps = ["98.0 [95.0, 99.0]", "93.0 [88.6, 95.8]", "54.2 [47.1, 61.0]", "50.0 [43.1, 56.9]"]
    assert (original, router) == (["original", *steps], ["router-dpo", *steps])


def test_markdown_shows_times_and_comparisons(tmp_path):
    write(tmp_path)
    times = ["20.0 [19.0, 21.0]", "–", "2.34 [2.10, 2.60]", "7.3 [7.0, 7.5]"]
    assert markdown_line(tmp_path, "router-dpo", "50")[2:] == times
    compared = ["AST match", "-3.0 [-8.0, 2.0]", "[-9.0, 3.0]", "9 of 200", "15 of 200", "0.307", "< 0.001"]
    assert markdown_line(tmp_path, "router-dpo", "original")[2:] == compared


def test_markdown_leaves_out_the_sections_that_have_nothing_to_show(tmp_path):
    write(tmp_path, [make_row(timed=0)], comparisons=())
    assert "**Time**" not in markdown(tmp_path)
    assert "**Comparisons**" not in markdown(tmp_path)


def test_markdown_keeps_a_bar_in_a_name_out_of_the_grid_and_has_no_minus_zero(tmp_path):
    write(tmp_path, [make_row("a|b", nominal_speedup=-0.0001)])
    assert "| a\\|b |" in markdown(tmp_path)
    assert "-0.0 " not in markdown(tmp_path)


def test_every_line_of_a_markdown_grid_has_as_many_cells_as_its_header(tmp_path):
    write(tmp_path)
    for block in markdown(tmp_path).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("broken", ["table.json", "table.csv", "table.md"])
def test_tables_stay_as_they_were_when_writing_one_of_them_fails(tmp_path, monkeypatch, broken):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_text = Path.write_text

    def full_disk(self, *args, **kwargs):
        if self.name == broken:
            write_text(self, "half a ta")
            raise OSError("No space left on device")
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, [make_row("other")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tables_stay_as_they_were_when_rendering_one_fails(tmp_path, monkeypatch):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise RuntimeError("no Markdown today")

    monkeypatch.setattr(table_module, "_markdown", fail)
    with pytest.raises(RuntimeError):
        write(tmp_path, [make_row("other")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_row_without_one_of_the_scores_is_refused():
    scores = {name: value for name, value in make_row().scores.items() if name != "parse_rate"}
    with pytest.raises(ValueError, match=r"'router-ipo'.*lacks the scores parse_rate"):
        make_row("router-ipo", scores=scores)


def test_terminal_table_fits_80_columns_and_shows_the_main_numbers():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table([*ROWS, make_row("router-conditional-bernoulli")]))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for expected in ("original", "router-dpo", "54.2", "[47.1, 61.0]", "[75.0, 85.8]", "12.3", "[11.0, 13.5]", "n = 200"):
        assert expected in text
    first_column = "".join(line[:14].strip() for line in text.splitlines())
    assert "router-conditional-bernoulli" in first_column


def test_machine_and_versions_are_json_and_say_what_ran():
    machine, found = describe_machine(), versions()
    assert json.loads(json.dumps([machine, found])) == [machine, found]
    assert set(machine) == {"cpu", "cores", "threads", "memory_gib", "platform", "accelerator"}
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert set(found) == {"python", "torch", "transformers", "lightning", "hydra-core", "dynprune"}
    assert found["torch"]


def test_a_lossless_row_says_what_its_drafts_did(tmp_path):
    drafts = Lossless(tokens=400, proposed=500, accepted=250, passes=160, draft_passes=80, near_ties=2, unexplained=0)
    write(tmp_path, [*ROWS, make_row("lossless-lookup", lossless=drafts)])
    text = (tmp_path / "table.md").read_text()
    # By hand: 250 of 400, 250 of 500, 400 / 160, 80 / 160.
    assert "| lossless-lookup | 62.5 | 50.0 | 2.50 | 0.50 | 2 of 200 | 0 of 200 |" in text
    assert text.count("**Lossless rows**") == 1
    assert [row["lossless"] for row in read_json(tmp_path)["rows"]] == [None, None, vars(drafts)]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["lossless_accepted"] for line in lines] == ["", "", "250"]
    write(tmp_path)
    assert "Lossless" not in (tmp_path / "table.md").read_text()
    assert "lossless" not in (tmp_path / "table.csv").read_text()
