import math
import re

import pytest

from jaxalign.pages.charts import Series, line_chart, short, ticks


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 100, 5, [0, 20, 40, 60, 80, 100]),
        (1.3, 3.2, 4, [1, 1.5, 2, 2.5, 3, 3.5]),
        (0, 1e-3, 4, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]),
        (5, 5, 4, [0, 2.5, 5, 7.5, 10]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, count: int, expected: list[float]):
    assert ticks(low, high, count) == pytest.approx(expected)


def test_ticks_of_a_constant_that_is_not_positive():
    assert ticks(0, 0, 4)[0] <= 0 <= ticks(0, 0, 4)[-1]
    assert ticks(-2, -2, 4)[0] <= -2 <= ticks(-2, -2, 4)[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-4, "2e-4"),
        (0.25, "0.25"),
        (1250, "1250"),
        (12500, "12.5k"),
        (3.2e6, "3.2M"),
        (-0.5, "-0.5"),
    ],
)
def test_short_numbers(value: float, text: str):
    assert short(value) == text


def numbers(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", path)]


def test_a_line_goes_from_corner_to_corner():
    chart = line_chart("Loss", [Series("training", "train", [(0, 4.0), (50, 3.0), (100, 2.0)])])
    (line,) = chart.lines
    x0, y0, x1, y1, x2, y2 = numbers(line.path)
    assert (x0, x2) == (chart.left, chart.right)
    assert (y0, y2) == (chart.top, chart.bottom)
    assert (x1, y1) == (pytest.approx((x0 + x2) / 2), pytest.approx((y0 + y2) / 2))
    assert line.last == "2"
    assert [tick.label for tick in chart.y_ticks] == ["2", "2.5", "3", "3.5", "4"]


def test_a_value_that_is_not_a_number_is_a_gap():
    points = [(1, 3.0), (2, None), (3, 2.0), (4, math.inf), (5, 1.0)]
    (line,) = line_chart("Loss", [Series("training", "train", points)]).lines
    assert line.path.count("M") == 3
    assert "nan" not in line.path
    assert "inf" not in line.path


def test_series_share_their_axes_and_dots_say_their_values():
    train, held = (
        Series("training", "train", [(0, 4.0), (10, 1.0)]),
        Series("held out", "eval", [(5, 2.5)], dots=True),
    )
    chart = line_chart("Loss", [train, held])
    ((x, y, text),) = chart.lines[1].dots
    assert (x, y) == (pytest.approx((chart.left + chart.right) / 2), pytest.approx(88.0, abs=8))
    assert text == "held out 2.5 at 5"
    assert chart.lines[0].dots == []


def test_nothing_recorded_is_no_line():
    chart = line_chart("Loss", [Series("training", "train", []), Series("held out", "eval", [(1, None)])])
    assert chart.lines == []
    assert chart.y_ticks == []


def test_zero_is_on_the_axis_when_asked():
    chart = line_chart("Speed", [Series("speed", "train", [(0, 400.0), (9, 410.0)])], zero=True)
    assert chart.y_ticks[0].label == "0"


def test_intervals_are_on_the_axes_and_go_through_their_points():
    run = Series("run", "eval", [(2.0, 5.0)], marks=["run"], bars=[(0.0, 8.0)], spans=[(1.0, 4.0)])
    line = Series("line", "train", [(0.0, 1.0), (1.0, None), (2.0, 4.0)], marks=["a", "b", "c"])
    chart = line_chart("Reward", [line, run], size=(720, 380))
    upright, level = chart.lines[1].bars
    ((x, y, _),) = chart.lines[1].dots
    assert upright == (pytest.approx(x, abs=0.1), chart.bottom, pytest.approx(x, abs=0.1), chart.top)
    assert level[1] == level[3] == pytest.approx(y, abs=0.1)
    assert level[0] == pytest.approx((3 * chart.left + chart.right) / 4, abs=0.1)
    assert level[2] == chart.right == 720 - 12
    assert [(text, anchor) for _, _, text, anchor in chart.lines[0].marks] == [("a", "start"), ("c", "end")]
    assert chart.lines[0].bars == []


def test_a_point_left_of_zero_has_no_tick_outside():
    chart = line_chart("Reward", [Series("run", "eval", [(-0.01, 1.0), (3.0, 2.0)])])
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3"]
