"""What a terminal shows of a comparison of runs."""

import pytest
from rich.console import Console
from written_runs import write_run

from dynprune.evaluation.comparison_output import render_comparison
from dynprune.evaluation.run_comparison import compare_runs


def test_brackets_of_a_setting_are_shown(tmp_path, capsys):
    kinds = ("a", "/b")
    runs = [write_run(tmp_path / f"{i}", [f"only=[{kinds[i]}]"], {"original": [1], "router-dpo": [i]}) for i in range(2)]
    Console(width=120).print(render_comparison(compare_runs(runs)))
    said = capsys.readouterr().out
    assert "only=[a]" in said
    assert "only=[/b]" in said


@pytest.mark.parametrize("settings", [2, 6])
def test_the_terminal_shows_the_surest_differences_between_settings(tmp_path, capsys, settings):
    # Of twenty queries each setting answers three more than the one before.
    right = [[int(query < 3 * number) for query in range(20)] for number in range(settings)]
    runs = [
        write_run(tmp_path / f"{i}", [f"method=m{i}"], {"original": [1] * 20, "router-dpo": right[i]}) for i in range(settings)
    ]
    comparison = compare_runs(runs)
    Console(width=120).print(render_comparison(comparison))
    said = capsys.readouterr().out
    table = said.partition("Differences")[2]
    pairs = settings * (settings - 1) // 2
    assert ("the 12 surest of 15" in table) == (pairs > 12)
    first = next(line for line in table.splitlines() if "router-dpo" in line)
    # McNemar by hand: all of the n discordant pairs fall one way, which has probability 2 / 2^n.
    better = 3 * (settings - 1)
    assert f"m{settings - 1}" in first
    assert f"{5 * better}.0" in first
    p = 2 / 2**better
    assert ("< 0.001" if p < 0.001 else f"{p:.3f}") in first
