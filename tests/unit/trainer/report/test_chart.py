"""Charts place their lines, ticks and labels at the right positions."""

from __future__ import annotations

from finetune_trainer.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    MAX_TABLE_ROWS,
    RIGHT,
    TOP,
    WIDTH,
    AttemptLine,
    ChartData,
    Drawing,
    Series,
    draw_chart,
)


def make_drawing(*series: Series, starts_at_zero: bool = False, attempts: tuple[AttemptLine, ...] = ()) -> Drawing:
    drawing = draw_chart(ChartData("Loss", "nats", series, starts_at_zero=starts_at_zero, attempts=attempts))
    assert drawing is not None
    return drawing


def test_a_line_covers_the_plot() -> None:
    drawing = make_drawing(Series("loss", [(0.0, 0.0), (50.0, 5.0), (100.0, 10.0)]))
    bottom, left, right = HEIGHT - BOTTOM, LEFT, WIDTH - RIGHT
    top = round(bottom - 10 / 10.5 * (bottom - TOP), 1)
    assert drawing.lines[0].path == f"M{left:g} {bottom:g}L{(left + right) / 2:g} {(bottom + top) / 2:g}L{right:g} {top:g}"
    assert [tick.label for tick in drawing.y_ticks] == ["0", "2.5", "5", "7.5", "10"]
    x_ticks = [(tick.label, tick.position) for tick in drawing.x_ticks]
    assert x_ticks == [("0", 52.0), ("20", 122.8), ("40", 193.6), ("60", 264.4), ("80", 335.2), ("100", 406.0)]


def test_a_gap_is_not_bridged_and_a_single_value_is_a_point() -> None:
    line = make_drawing(Series("loss", [(1.0, 3.0), (2.0, None), (3.0, 2.0), (4.0, 1.0)])).lines[0]
    assert line.path.count("M") == 1 and line.path.count("L") == 1
    assert [x for x, _ in line.dots] == [LEFT]


def test_long_series_are_reduced_and_keep_their_peak() -> None:
    step_values = [(float(step), 1.0) for step in range(10_000)]
    step_values[7777] = (7777.0, 9.0)
    drawing = make_drawing(Series("norm", step_values), starts_at_zero=True)
    points = drawing.lines[0].path.removeprefix("M").split("L")
    assert len(points) <= MAX_POINTS
    assert min(float(point.split()[1]) for point in points) == round(HEIGHT - BOTTOM - 9 / 9.45 * (HEIGHT - BOTTOM - TOP), 1)
    assert len(drawing.rows) <= MAX_TABLE_ROWS and ["7777", "9"] in drawing.rows and drawing.is_table_reduced


def test_attempts_are_vertical_lines_and_labels_do_not_overlap() -> None:
    attempts = (AttemptLine(50, "attempt 2"), AttemptLine(52, "attempt 3"), AttemptLine(90, "attempt 4"), AttemptLine(500, "attempt 5"))
    drawing = make_drawing(Series("loss", [(0.0, 1.0), (100.0, 2.0)]), attempts=attempts)
    assert [(marker.x, marker.label, marker.title) for marker in drawing.markers] == [
        (229.0, "attempt 2", "attempt 2"), (236.1, "", "attempt 3"), (370.6, "attempt 4", "attempt 4"),
    ]  # fmt: skip


def test_a_constant_series_lies_in_the_middle() -> None:
    drawing = make_drawing(Series("rate", [(1.0, 2.0), (2.0, 2.0)]))
    assert drawing.lines[0].path == f"M52 {(HEIGHT - BOTTOM + TOP) / 2:g}L406 {(HEIGHT - BOTTOM + TOP) / 2:g}"


def test_table_and_summary_contain_the_values_of_the_chart() -> None:
    drawing = make_drawing(Series("a", [(1.0, 0.5), (2.0, None)]), Series("b", [(2.0, 7.0)], is_dashed=True))
    assert (drawing.columns, drawing.rows, drawing.is_table_reduced) == (["step", "a", "b"], [["1", "0.5", ""], ["2", "", "7"]], False)
    assert drawing.summary == (
        "a: first 0.5, last 0.5, lowest 0.5 at step 1, highest 0.5 at step 1; b: first 7, last 7, lowest 7 at step 2, highest 7 at step 2"
    )


def test_a_chart_without_values_is_not_drawn() -> None:
    assert draw_chart(ChartData("Loss", "", [Series("loss", [(1.0, None)])], "nothing was logged")) is None
