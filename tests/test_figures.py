import itertools
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from dynprune.evaluation.curves import BudgetCurve, BudgetPoint
from dynprune.evaluation.figures import (
    accuracy_speedup,
    budget_curve,
    build_accuracy_speedup,
    build_budget_curve,
    build_layer_counts,
    build_layers_pruned,
    layers_pruned,
)
from dynprune.evaluation.labels import Label, place_labels
from dynprune.evaluation.layer_error import build_layer_error, build_layer_errors_compared, layer_error, layer_errors_compared
from dynprune.evaluation.parts import AdapterPart
from dynprune.evaluation.statistics import Interval, MedianInterval, mean_interval
from dynprune.evaluation.style import row_color
from dynprune.evaluation.table import SCORES, TableRow
from dynprune.evaluation.training_curves import CurveNotes, TrainingCurve, build_training_curves, read_curve


def make_row(name, layers, accuracy, speedup, nominal):
    scores = dict.fromkeys(SCORES, Interval(accuracy, accuracy - 0.06, accuracy + 0.07))
    measured = None if speedup is None else MedianInterval(speedup, speedup - 0.01, speedup + 0.02)
    return TableRow(name, 200, scores, layers, nominal, measured)


SPREAD_ROWS = [
    make_row("original", 0, 0.54, 0.0, 0.0),
    make_row("static-5", 5, 0.27, 0.14, 0.167),
    make_row("static-2", 2, 0.48, 0.055, 0.067),
    make_row("router-fbc", 5.5, 0.41, 0.11, 0.15),
    make_row("router-dpo", 5.5, 0.47, 0.125, 0.15),
]
CLOSE_ROWS = [
    make_row("original", 0, 0.50, 0.0, 0.0),
    make_row("static-2", 1.2, 0.49, 0.010, 0.04),
    make_row("static-3", 1.4, 0.485, 0.012, 0.047),
    make_row("static-5", 1.6, 0.48, 0.014, 0.053),
    make_row("router-fbc", 1.7, 0.485, 0.011, 0.023),
    make_row("router-dpo", 1.8, 0.48, 0.012, 0.027),
    make_row("router-orpo", 1.9, 0.49, 0.013, 0.03),
]
FREQUENCY = {"static-2": [0, 1, 0, 1], "router-dpo": [0.1, 0.5, 0.96, 0]}
FULL = Interval(0.56, 0.51, 0.61)


def make_curve(name, accuracy, cost, measured=0.9):
    points = []
    for layers, share in zip((2, 4, 6, 8), accuracy, strict=True):
        nominal = (layers - cost) / 30
        points.append(
            BudgetPoint(layers, nominal, measured and measured * nominal, (np.arange(200) < 200 * share).astype(float))
        )
    return BudgetCurve(name, points[::-1])


CURVES = [
    make_curve("static", (0.5, 0.44, 0.36, 0.25), 0),
    make_curve("router-fbc", (0.51, 0.46, 0.38, 0.3), 1),
    make_curve("router-dpo", (0.52, 0.48, 0.43, 0.34), 1),
    make_curve("oracle", (0.72, 0.7, 0.66, 0.5), 0, measured=None),
]


def drawn(figure, gid, panel=None):
    """Data of the line with this name, as an array of points."""
    axes = figure.axes if panel is None else [figure.axes[panel]]
    (line,) = [line for ax in axes for line in ax.lines if line.get_gid() == gid]
    return np.column_stack(line.get_data())


def names_drawn(figure):
    return {line.get_gid() for ax in figure.axes for line in ax.lines}


def texts(figure):
    return {text.get_text(): text for ax in figure.axes for text in ax.texts if text.get_text()}


def test_accuracy_figure_draws_each_row_at_its_measured_speedup_and_score():
    figure = build_accuracy_speedup(SPREAD_ROWS)
    for row in SPREAD_ROWS:
        accuracy, speedup = row.scores["ast_match"].mean, row.measured_speedup.median
        np.testing.assert_allclose(drawn(figure, row.name), [[100 * speedup, 100 * accuracy]])


def test_accuracy_figure_draws_both_intervals():
    figure = build_accuracy_speedup(SPREAD_ROWS)
    np.testing.assert_allclose(drawn(figure, "router-dpo/score"), [[12.5, 41], [12.5, 54]])
    np.testing.assert_allclose(drawn(figure, "router-dpo/measured"), [[11.5, 47], [14.5, 47]])


def test_accuracy_figure_draws_the_nominal_speedup_as_a_companion():
    figure = build_accuracy_speedup(SPREAD_ROWS)
    np.testing.assert_allclose(drawn(figure, "router-dpo/nominal"), [[15, 47]])
    assert "original/nominal" not in names_drawn(figure)


def test_accuracy_figure_joins_the_original_and_the_static_rows_by_pruned_layers():
    figure = build_accuracy_speedup(SPREAD_ROWS)
    np.testing.assert_allclose(drawn(figure, "static/line"), [[0, 54], [5.5, 48], [14, 27]])


def test_accuracy_figure_draws_a_row_that_was_not_timed_hollow_at_its_nominal_speedup():
    figure = build_accuracy_speedup([SPREAD_ROWS[0], make_row("router-dpo", 5.5, 0.47, None, 0.15)])
    np.testing.assert_allclose(drawn(figure, "router-dpo"), [[15, 47]])
    (marker,) = [line for line in figure.axes[0].lines if line.get_gid() == "router-dpo"]
    assert marker.get_markerfacecolor() == "white"
    assert not {"router-dpo/nominal", "router-dpo/measured"} & names_drawn(figure)


def test_accuracy_figure_keeps_partial_match_on_its_own_scale():
    scores = SPREAD_ROWS[0].scores | {"partial_match": Interval(5.2, 4.1, 6.3)}
    figure = build_accuracy_speedup([replace(SPREAD_ROWS[0], scores=scores)], "partial_match")
    np.testing.assert_allclose(drawn(figure, "original/score"), [[0, 4.1], [0, 6.3]])
    assert figure.axes[0].get_ylabel() == "Partial match"


@pytest.mark.parametrize("rows", [SPREAD_ROWS, CLOSE_ROWS, CLOSE_ROWS[::-1]])
def test_labels_cover_neither_each_other_nor_any_marker_and_stay_inside(rows):
    figure = build_accuracy_speedup(rows)
    figure.canvas.draw()
    ax = figure.axes[0]
    boxes = {name: text.get_window_extent() for name, text in texts(figure).items()}
    assert set(boxes) == {row.name for row in rows}
    for first, second in itertools.combinations(boxes.values(), 2):
        assert not first.overlaps(second)
    for row, box in itertools.product(rows, boxes.values()):
        assert not box.contains(*ax.transData.transform(drawn(figure, row.name))[0])
    for box in boxes.values():
        assert ax.get_window_extent().containsx(box.x0)
        assert ax.get_window_extent().containsx(box.x1)
        assert figure.bbox.containsy(box.y0)
        assert figure.bbox.containsy(box.y1)


def test_labels_of_random_crowds_do_not_overlap():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = [
            replace(row, measured_speedup=MedianInterval(x, x - 0.01, x + 0.01))
            for row, x in zip(CLOSE_ROWS, rng.normal(0.05, 0.004, len(CLOSE_ROWS)), strict=True)
        ]
        figure = build_accuracy_speedup(rows)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in texts(figure).values()]
        assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_a_label_stands_beside_its_own_point_where_there_is_room():
    figure = build_accuracy_speedup(SPREAD_ROWS)
    figure.canvas.draw()
    box = texts(figure)["original"].get_window_extent()
    at = figure.axes[0].transData.transform(drawn(figure, "original"))[0]
    nearest = np.clip(at, box.min, box.max)
    assert np.hypot(*(nearest - at)) < 20 * figure.dpi / 72


def label_box(labels, points=()):
    """Place of the first label, in pixels, in axes of 0 to 1, and where data lie in pixels."""
    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    ax = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    place_labels(ax, labels, [], [np.array(point) for point in points], size=10)
    figure.canvas.draw()
    return texts(figure)[labels[0].text].get_window_extent(), ax


def test_a_label_leaves_its_usual_place_to_a_marker_that_stands_there():
    label = Label(0.5, 0.5, "router-dpo", "black")
    free, ax = label_box([label])
    marker = ax.transData.inverted().transform((free.min + free.max) / 2)
    moved, ax = label_box([label], points=[marker])
    assert not moved.contains(*ax.transData.transform(marker))


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_label_of_a_point_in_a_corner_stays_inside_the_axes(corner):
    box, ax = label_box([Label(*corner, "router-dpo", "black")])
    frame = ax.get_window_extent()
    assert (box.min >= frame.min).all()
    assert (box.max <= frame.max).all()


def test_same_rows_give_the_same_places_for_labels():
    places = [[t.xyann for t in build_accuracy_speedup(CLOSE_ROWS).axes[0].texts] for _ in range(2)]
    assert places[0] == places[1]


def test_a_missing_score_or_no_rows_are_refused():
    with pytest.raises(ValueError, match="no score 'bleu'"):
        build_accuracy_speedup(SPREAD_ROWS, "bleu")
    with pytest.raises(ValueError, match="at least one row"):
        build_accuracy_speedup([])


def test_colours_follow_the_name_and_statics_share_one():
    assert row_color("static-2") == row_color("static-5")
    routers = [f"router-{method}" for method in ("fbc", "dpo", "orpo", "value", "blind")]
    named = [row_color(name) for name in ("original", "static-2", *routers)]
    assert len(set(named)) == 7
    assert row_color("router-ipo") not in named
    (marker,) = [m for m in build_accuracy_speedup(SPREAD_ROWS).axes[0].lines if m.get_gid() == "router-dpo"]
    strip = next(m for m in build_layers_pruned(FREQUENCY).axes[0].collections if m.get_gid() == "router-dpo")
    assert marker.get_markerfacecolor() == row_color("router-dpo")
    assert to_hex(strip.get_cmap()(1.0)).upper() == row_color("router-dpo")


def test_budget_figure_draws_each_method_by_both_speedups():
    figure = build_budget_curve(CURVES, FULL)
    nominal = np.array([1, 3, 5, 7]) / 30
    for panel, speedup in enumerate((nominal, 0.9 * nominal)):
        expected = np.column_stack([100 * speedup, [52, 48, 43, 34]])
        np.testing.assert_allclose(drawn(figure, "router-dpo", panel), expected)
        np.testing.assert_allclose(drawn(figure, "original", panel), [[0, 56]])
        np.testing.assert_allclose(drawn(figure, "original/line", panel)[:, 1], [56, 56])
    assert [ax.get_xlabel() for ax in figure.axes] == ["Nominal speedup, %", "Measured speedup, %"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_budget_figure_draws_several_sets_of_one_size_as_their_mean():
    draws = [BudgetPoint(7, 7 / 30, measured, np.arange(200) < right) for measured, right in ((0.1, 20), (0.2, 60), (0.3, 100))]
    figure = build_budget_curve([BudgetCurve("random", draws)], FULL)
    for panel, speedup in enumerate((700 / 30, 20)):
        np.testing.assert_allclose(drawn(figure, "random", panel), [[speedup, 30]])


def test_budget_figure_has_a_band_from_bound_to_bound_of_every_points_interval():
    figure = build_budget_curve(CURVES, FULL)
    (band,) = [c for c in figure.axes[1].collections if c.get_gid() == "static/band"]
    corners = band.get_paths()[0].vertices
    for layers, share in zip((2, 4, 6, 8), (0.5, 0.44, 0.36, 0.25), strict=True):
        interval = mean_interval(np.arange(200) < 200 * share)
        at = corners[np.isclose(corners[:, 0], 100 * 0.9 * layers / 30), 1]
        assert (at.min(), at.max()) == pytest.approx((100 * interval.low, 100 * interval.high))


def test_budget_figure_leaves_out_what_was_not_timed():
    upper, lower = build_budget_curve(CURVES, FULL).axes
    assert "oracle" in {line.get_gid() for line in upper.lines}
    assert "oracle" not in {line.get_gid() for line in lower.lines}
    assert "oracle" not in {text.get_text() for text in lower.texts}
    (only,) = build_budget_curve(CURVES[3:], FULL).axes
    assert only.get_xlabel() == "Nominal speedup, %"


def test_budget_figure_labels_every_line_without_covering_another_label():
    figure = build_budget_curve(CURVES, FULL)
    figure.canvas.draw()
    for ax, names in zip(figure.axes, ({curve.name for curve in CURVES}, {curve.name for curve in CURVES[:3]}), strict=True):
        boxes = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text()}
        assert set(boxes) == {*names, "original"}
        for first, second in itertools.combinations(boxes.values(), 2):
            assert not first.overlaps(second)
        for box in boxes.values():
            assert ax.get_window_extent().containsx(box.x0)
            assert ax.get_window_extent().containsx(box.x1)


def test_a_budget_figure_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one curve"):
        build_budget_curve([], FULL)


def test_layer_error_figure_draws_every_layers_errors_on_log_scales():
    mse, relative = [1e-3, 5e-1, 2e-2, 4e-2, 3e-3, 1e-3], [0.1, 0.9, 0.3, 0.4, 0.2, 0.1]
    upper, lower = build_layer_error(mse, relative).axes
    for ax, expected in ((upper, relative), (lower, mse)):
        (points,) = [c for c in ax.collections if c.get_gid() == "errors"]
        np.testing.assert_allclose(points.get_offsets(), np.column_stack([range(6), expected]))
        assert ax.get_yscale() == "log"
        assert {text.get_text() for text in ax.texts} == {"1", "2", "3", "4"}


def test_layer_error_figure_takes_a_layer_that_is_reproduced_exactly():
    upper, _ = build_layer_error([0.0, 1e-2], [0.0, 0.0]).axes
    assert upper.get_ylim()[0] > 0


@pytest.mark.parametrize(("mse", "relative"), [([1.0], [1.0, 2.0]), ([], []), ([float("nan")], [1.0]), ([-1.0], [1.0])])
def test_layer_errors_that_cannot_be_drawn_are_refused(mse, relative):
    with pytest.raises(ValueError, match="figure of layer errors"):
        build_layer_error(mse, relative)


def test_errors_of_several_settings_stand_in_one_figure():
    parts = {"fit=ridge": AdapterPart((1e-3, 0.5, 0.0), (0.1, 0.9, 0.0)), "fit=distil": AdapterPart((2e-3, 0.4), (0.2, 0.8))}
    figure = build_layer_errors_compared(parts)
    upper, lower = figure.axes
    for ax, measure in ((upper, "relative_error"), (lower, "mse")):
        assert ax.get_yscale() == "log"
        lines = {line.get_label(): line.get_ydata() for line in ax.lines if line.get_gid() == "errors"}
        assert list(lines) == list(parts)
        # What is reproduced exactly has no place on a log scale.
        np.testing.assert_array_equal(lines["fit=ridge"], [*getattr(parts["fit=ridge"], measure)[:2], np.nan])
        np.testing.assert_array_equal(lines["fit=distil"], getattr(parts["fit=distil"], measure))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(parts)


def test_layers_figure_draws_a_strip_of_shares_for_each_row():
    figure = build_layers_pruned(FREQUENCY)
    strips = {mesh.get_gid(): mesh for mesh in figure.axes[0].collections}
    assert list(strips) == ["static-2", "router-dpo"]
    for name, share in FREQUENCY.items():
        np.testing.assert_allclose(np.ravel(strips[name].get_array()), share)
        assert strips[name].get_clim() == (0, 1)


def test_layers_figure_writes_names_shares_and_mean_layers():
    assert {"static-2", "router-dpo", "10", "50", "96", "2.0", "1.6"} <= set(texts(build_layers_pruned(FREQUENCY)))


def test_long_row_names_stay_inside_the_layers_figure():
    figure = build_layers_pruned({"router-conditional-bernoulli-frozen": [0.5] * 30})
    figure.canvas.draw()
    box = texts(figure)["router-conditional-bernoulli-frozen"].get_window_extent()
    assert box.x0 > 0
    assert box.x1 < figure.axes[0].get_window_extent().x0


@pytest.mark.parametrize("frequency", [{"a": [0.1, 0.2], "b": [0.1]}, {"a": [0.1, 1.2]}])
def test_frequencies_that_are_no_shares_of_the_same_layers_are_refused(frequency):
    with pytest.raises(ValueError, match="for each of the 2 layers"):
        build_layers_pruned(frequency)


@pytest.mark.parametrize(
    ("draw", "height"),
    [
        (lambda path: accuracy_speedup(SPREAD_ROWS, path), (800, 1200)),
        (lambda path: budget_curve(CURVES, FULL, path), (1400, 1700)),
        (lambda path: layer_error([0.1, 0.2], [0.3, 0.4], path), (800, 1200)),
        (lambda path: layer_errors_compared({"a": AdapterPart((0.1, 0.2), (0.3, 0.4))}, path), (900, 1200)),
        (lambda path: layers_pruned(FREQUENCY, path), (300, 600)),
    ],
)
def test_files_are_pngs_of_twice_the_width_of_a_readme(tmp_path, draw, height):
    path = tmp_path / "new" / "figure.png"
    draw(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    assert pixels.shape[1] == 1600
    assert height[0] <= pixels.shape[0] <= height[1]
    assert pixels[..., :3].std() > 0.01
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_an_existing_figure_stays_when_drawing_over_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    layers_pruned(FREQUENCY, path)
    before = path.read_bytes()

    def full_disk(self, target, **kwargs):
        target.write_bytes(b"half a pic")
        raise OSError("No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        layers_pruned({"router-dpo": [0.2]}, path)
    assert path.read_bytes() == before


def test_drawing_changes_no_global_state_of_matplotlib(tmp_path):
    settings = dict(matplotlib.rcParams)
    accuracy_speedup(SPREAD_ROWS, tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.pyplot.get_fignums() == []


def test_the_strip_of_a_row_says_how_often_it_prunes_so_many_layers():
    figure = build_layer_counts({"router-dpo": [0, 2, 2, 3], "oracle-0": [5, 5, 5, 5]})
    strips = {mesh.get_gid(): mesh.get_array().ravel() for mesh in figure.axes[0].collections}
    np.testing.assert_allclose(strips["router-dpo"], [0.25, 0, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(strips["oracle-0"], [0, 0, 0, 0, 0, 1])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"1.8", "5.0"} <= set(texts)


@pytest.mark.parametrize("counts", [{}, {"router-dpo": []}])
def test_numbers_of_pruned_layers_need_rows_and_queries(counts):
    with pytest.raises(ValueError, match="needs at least one row, and each row at least one query"):
        build_layer_counts(counts)


def test_training_curves_have_a_panel_for_each_method_and_one_for_the_order():
    curve = TrainingCurve([0, 1], [0.7, 0.6], [0.69, 0.68], [0.5, 0.6])
    figure = build_training_curves({"dpo": [curve, curve], "fbc": [curve]})
    dpo, fbc, order = figure.axes
    assert [len(ax.lines) for ax in (dpo, fbc)] == [4, 2]
    # A line for each seed, and the level of guessing.
    assert [list(line.get_ydata()) for line in order.lines[:3]] == [[50, 60]] * 3
    assert to_hex(dpo.lines[0].get_color()) == to_hex(row_color("router-dpo@0.1"))


def test_settings_of_one_method_have_colours_of_their_own():
    curve = TrainingCurve([0, 1], [2.0, 1.0], [2.5, 1.5], [0.5, 0.75])
    figure = build_training_curves({f"dpo lr={rate}": [curve] for rate in range(8)})
    *_, order = figure.axes
    lines = [line for line in order.lines if len(line.get_xdata()) == 2 and line.get_alpha() == 0.8]
    assert len({line.get_color() for line in lines}) == 8


def test_training_curves_need_a_router():
    with pytest.raises(ValueError, match="at least one router"):
        build_training_curves({})


def test_a_curve_is_noted_epoch_by_epoch_and_comes_back_from_a_checkpoint(tmp_path):
    def trainer(epoch=0, function="fit", sanity_checking=False, **metrics):
        state = SimpleNamespace(fn=function)
        return SimpleNamespace(current_epoch=epoch, state=state, sanity_checking=sanity_checking, callback_metrics=metrics)

    def step(notes, loss):
        notes.on_train_batch_end(trainer(**{"train/loss": torch.tensor(loss)}), None, None, None, 0)

    def validation(notes, epoch, loss, order, **state):
        metrics = {"validation/loss": torch.tensor(loss), "validation/rewards/accuracies": torch.tensor(order)}
        notes.on_validation_end(trainer(epoch, **state, **metrics), None)

    before = CurveNotes()
    validation(before, 0, 9.0, 0.0, sanity_checking=True)
    step(before, 0.75)
    step(before, 0.5)
    validation(before, 0, 0.625, 0.5)
    step(before, 0.5)
    after, state = CurveNotes(), before.state_dict()
    # What is made after the checkpoint is no part of it.
    step(before, 7.0)
    after.load_state_dict(state)
    step(after, 0.25)
    validation(after, 1, 0.25, 0.75)
    # The best checkpoint is validated once more.
    validation(after, 2, 0.25, 0.75, function="validate")
    after.write(tmp_path / "curve.csv")
    assert read_curve(tmp_path / "curve.csv") == TrainingCurve([0, 1], [0.625, 0.375], [0.625, 0.25], [0.5, 0.75])
