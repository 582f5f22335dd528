"""Charts: round ticks, scales, thinned curves, and the position of curves and dots."""

import math
import re

import pytest

from tinybert_jax.report.charts import (
    MAX_DRAWN_POINTS,
    Dot,
    Series,
    line_chart,
    linear_axis,
    log_axis,
    nice_step,
    running_mean,
    scatter_chart,
    thin,
    tick_labels,
    wants_log,
)


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0.13, 0.94, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.871, 0.884, ["0.870", "0.875", "0.880", "0.885"]),
        (0.0, 4321.0, ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
        (0.0, 18_400.0, ["0", "5k", "10k", "15k", "20k"]),
        (0.0, 5e-5, ["0", "1e-5", "2e-5", "3e-5", "4e-5", "5e-5"]),
        (-0.2, 0.7, ["-0.2", "0.0", "0.2", "0.4", "0.6", "0.8"]),
        (0.0, 2.2e6, ["0", "0.5M", "1M", "1.5M", "2M", "2.5M"]),
    ],
)
def test_linear_ticks_are_round_and_enclose_the_data(low, high, labels):
    axis = linear_axis([low, high], 4)
    assert axis.labels == labels
    assert axis.ticks[0] <= low and high <= axis.ticks[-1]


def test_a_nice_step_is_1_2_or_5_times_a_power_of_ten():
    for raw in [10 ** (i / 7 - 5) for i in range(80)]:
        step = nice_step(raw)
        assert raw * (1 - 1e-9) <= step <= 2.5 * raw * (1 + 1e-9)
        assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


@pytest.mark.parametrize("value", [0.0, 0.3, 5e-5, -2.0, 1e9])
def test_a_constant_curve_has_an_axis(value):
    for from_zero in (False, True):
        axis = linear_axis([value, value], 4, from_zero)
        assert axis.low <= value <= axis.high and axis.low < axis.high
    assert "<polyline" in line_chart([Series("x", [(0.0, value), (1.0, value)])], description="x")


def test_an_axis_is_logarithmic_only_for_a_wide_positive_range():
    assert wants_log([0.01, 0.1, 1.0])
    assert not wants_log([0.5, 1.0, 3.0])
    assert not wants_log([0.0, 0.01, 10.0])
    assert not wants_log([1e-9, *[1.0] * 300])  # one outlier
    assert log_axis([0.04, 30.0], 6).labels == ["0.1", "0.3", "1", "3", "10", "30"]
    assert log_axis([1e-8, 1e8], 4).labels == ["1e-8", "1e-4", "1", "10k", "100M"]
    axis = log_axis([0.01, 100.0], 4)
    assert axis.fraction(1.0) == pytest.approx(0.5, abs=0.01)


def test_tick_labels_share_a_unit():
    assert tick_labels([0.0, 1e-5, 1.5e-5]) == ["0", "1e-5", "1.5e-5"]
    assert tick_labels([500.0, 1000.0, 1500.0]) == ["500", "1,000", "1,500"]
    assert tick_labels([0.0, 5e5, 1e6]) == ["0", "0.5M", "1M"]


def test_thinning_keeps_ends_order_and_spikes():
    points = [(float(i), math.sin(i / 900)) for i in range(100_000)]
    points[43_210] = (43_210.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_DRAWN_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert {points[43_210], points[77_777]} <= set(kept)
    assert thin(points[:10]) == points[:10]
    for spike in range(100):
        kept = thin([(float(i), float(i == spike)) for i in range(100)], limit=20)
        assert len(kept) <= 20 and (float(spike), 1.0) in kept


def test_running_mean_keeps_lines_and_averages_noise():
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert running_mean(line, 9)[:46] == line[:46]
    noise = [(float(i), float(i % 2)) for i in range(101)]
    assert running_mean(noise, 5)[50][1] == pytest.approx(0.4)
    assert len(running_mean(noise, 5)) == 101


def test_a_curve_spans_the_frame_from_the_lowest_to_the_highest_point():
    chart = line_chart([Series("x", [(0.0, 0.0), (10.0, 1.0)])], description="rising")
    points = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    x0, y0, x1, y1 = map(float, points.groups())
    assert (x0, x1) == (46, 288) and (y0, y1) == (140, 12)  # the frame's corners, y downwards
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([], description="empty")


def test_dots_and_front_span_the_frame_from_the_lowest_to_the_highest_point():
    dots = [Dot("a", (0.0, 0.0), "student"), Dot("b", (10.0, 1.0), "teacher", False)]
    chart = scatter_chart(dots, [(0.0, 0.0), (10.0, 1.0)], description="x", x_label="x")
    places = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert places == [(56, 354), (586, 14)]  # the frame's corners, y downwards
    assert 'd="M56.0 354.0H586.0V14.0"' in chart
    assert ">a</text>" in chart and ">b</text>" not in chart
    with pytest.raises(ValueError, match="at least one point"):
        scatter_chart([], [], description="empty", x_label="x")
