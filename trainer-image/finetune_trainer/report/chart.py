"""Computes the positions of lines, ticks and labels of line charts from series of values. The template draws the charts as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune_trainer.report.scale import Point, compute_ticks, format_number, reduce_points, split_into_segments

WIDTH, HEIGHT = 420.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 22.0, 30.0
"""Margins of the plot in pixels: tick labels are in the left and bottom margins, labels of attempts in the top margin."""
MAX_POINTS = 400
"""Maximum number of points of a line. More points than pixels would not be visible."""
MAX_TABLE_ROWS = 40
MIN_LABEL_DISTANCE = 62.0
"""Minimum distance in pixels at which the labels of two attempts do not overlap."""
FREE_SPACE = 0.05
"""Free space above and below the lines, as a share of the range of values."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. A missing value is None."""

    name: str
    points: Sequence[tuple[float, float | None]]
    is_dashed: bool = False
    """Whether the line is dashed and its points are visible. Used for series with few values, such as evaluations."""

    @property
    def measured_points(self) -> list[Point]:
        """The points that have a value."""
        return [point for segment in split_into_segments(self.points) for point in segment]


@dataclass(frozen=True)
class AttemptLine:
    """A vertical line at the step where an attempt began."""

    step: float
    label: str


@dataclass(frozen=True)
class ChartData:
    """The series that a chart shows, with the chart's title and unit. If no series has a value, `reason` is shown instead of the chart."""

    title: str
    unit: str
    series: Sequence[Series]
    reason: str = ""
    """Why there are no values."""
    starts_at_zero: bool = False
    attempts: Sequence[AttemptLine] = ()


@dataclass(frozen=True)
class Tick:
    """A label of an axis and its position in pixels."""

    position: float
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn series: the SVG path of its line, and the points that are drawn as circles."""

    name: str
    number: int
    path: str
    dots: list[Point]
    is_dashed: bool


@dataclass(frozen=True)
class Marker:
    """A drawn vertical line where an attempt began. `label` is empty if it would overlap the previous label."""

    x: float
    label: str
    title: str
    anchor: str


@dataclass(frozen=True)
class Drawing:
    """A chart with all positions in pixels."""

    title: str
    unit: str
    summary: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    markers: list[Marker]
    columns: list[str]
    rows: list[list[str]]
    """Rows of the table of values. The first value of each row is the step."""
    is_table_reduced: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def draw_chart(chart: ChartData) -> Drawing | None:
    """Return the drawing of a chart; None if no series has a value."""
    measured_points = [point for series in chart.series for point in series.measured_points]
    if not measured_points:
        return None
    x_range = _compute_axis_range([x for x, _ in measured_points], 0.0)
    y_range = _compute_axis_range([y for _, y in measured_points] + ([0.0] if chart.starts_at_zero else []), FREE_SPACE)

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    rows, is_reduced = _build_table(chart.series)
    return Drawing(
        chart.title, chart.unit, "; ".join(_describe_series(series) for series in chart.series if series.measured_points),
        [Tick(place((tick, 0.0))[0], format_number(tick)) for tick in compute_ticks(*x_range, whole_numbers_only=True)],
        [Tick(place((0.0, tick))[1], format_number(tick)) for tick in compute_ticks(*y_range)],
        [_draw_line(number, series, place) for number, series in enumerate(chart.series, 1) if series.measured_points],
        _place_markers([(place((line.step, 0.0))[0], line.label) for line in chart.attempts if x_range[0] <= line.step <= x_range[1]]),
        ["step", *(series.name for series in chart.series)], rows, is_reduced,
    )  # fmt: skip


def _compute_axis_range(values: Sequence[float], free_space: float) -> tuple[float, float]:
    """Return the range of an axis, with free space on both sides. If the lowest value is 0, the range begins at 0."""
    low, high = min(values), max(values)
    if low == high:
        space = (abs(low) * 0.1 or 1.0) if free_space else 1.0
        return (low - space if free_space else low), high + space
    margin = free_space * (high - low)
    return (0.0 if low == 0 else low - margin), high + margin


def _draw_line(number: int, series: Series, place: Callable[[Point], Point]) -> Line:
    line_segments = split_into_segments(series.points)
    point_count = sum(map(len, line_segments))
    path, dots = [], []
    for segment in line_segments:
        points = [place(point) for point in reduce_points(segment, max(3, MAX_POINTS * len(segment) // point_count))]
        if len(points) > 1:
            path.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points))
        if len(points) == 1 or (series.is_dashed and point_count <= 60):
            dots += points
    return Line(series.name, number, "".join(path), dots, series.is_dashed)


def _place_markers(positions: Sequence[tuple[float, str]]) -> list[Marker]:
    markers: list[Marker] = []
    last_label_x = float("-inf")
    for x, label in positions:
        is_free = x - last_label_x >= MIN_LABEL_DISTANCE
        last_label_x = x if is_free else last_label_x
        anchor = "start" if x < LEFT + 30 else "end" if x > WIDTH - RIGHT - 30 else "middle"
        markers.append(Marker(x, label if is_free else "", label, anchor))
    return markers


def _describe_series(series: Series) -> str:
    """Return a sentence about the series, for people who cannot see the chart."""
    points = series.measured_points
    lowest, highest = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    return (
        f"{series.name}: first {format_number(points[0][1])}, last {format_number(points[-1][1])}, "
        f"lowest {format_number(lowest[1])} at step {lowest[0]:g}, highest {format_number(highest[1])} at step {highest[0]:g}"
    )


def _build_table(all_series: Sequence[Series]) -> tuple[list[list[str]], bool]:
    """Return the rows of the table of values, and whether rows are left out. Each row has the values of all series at one step.

    A long series is divided into parts of equal length. The table keeps the first and the last value of the series, and the lowest and highest value
    of each part.
    """
    rows_per_series = MAX_TABLE_ROWS // len(all_series)
    kept_steps = {x for series in all_series for x, _ in reduce_points(series.measured_points, rows_per_series)}
    steps_without_value = {x for series in all_series for x, y in series.points if y is None}
    is_reduced = any(len(series.measured_points) > rows_per_series for series in all_series)
    values_by_step = [dict(series.points) for series in all_series]
    steps = sorted(kept_steps if is_reduced else kept_steps | steps_without_value)
    return [[f"{step:g}", *("" if (value := by_step.get(step)) is None else format_number(value) for by_step in values_by_step)] for step in steps], is_reduced
