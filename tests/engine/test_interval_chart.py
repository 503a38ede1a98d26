"""Charts of means: well-formed, to scale, and escaped."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from diffdfkd.engine.interval_chart import Mean, interval_curves, interval_dots


def figure(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def circles(figure: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    return [
        (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in figure.iter("circle")
        if circle.attrib["class"] == kind
    ]


def test_curves_over_a_logarithmic_axis() -> None:
    curve = [
        (images, Mean(value, value - 1, value + 1)) for images, value in ((100.0, 70.0), (1000.0, 80.0), (1e4, 90.0))
    ]
    drawn = figure(
        interval_curves("a < b", {"<i>": curve, "b": curve[:2]}, {"floor": Mean(85.0, 84.0, 86.0)}, "images")
    )
    (x0, y0), (x1, y1), (x2, y2) = circles(drawn, "c0")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert len(circles(drawn, "c1")) == 2
    words = "".join(drawn.itertext())
    assert "a < b" in words and "<i>" in words and "floor (level)" in words
    assert [label for label in ("100", "1000", "10000") if label in words] == ["100", "1000", "10000"]
    bars = [line for line in drawn.iter("polyline") if line.attrib.get("opacity")]
    assert len(bars) == 3 * 5


def test_without_an_interval_there_is_no_bar() -> None:
    bare = Mean(1.0, math.nan, math.nan)
    drawn = figure(interval_curves("t", {"a": [(3.0, bare), (30.0, bare)]}, {}, "x"))
    assert len(list(drawn.iter("polyline"))) == 1 and len(circles(drawn, "c0")) == 2
    assert interval_curves("t", {}, {}, "x") == interval_dots("t", {}, "x") == ""


def test_dots_lie_on_one_scale_with_their_runs() -> None:
    rows = {"a": (Mean(70.0, 68.0, 72.0), [69.0, 71.0]), "b & c": (Mean(80.0, math.nan, math.nan), [80.0])}
    drawn = figure(interval_dots("t", rows, "per cent"))
    (a, _), (b, _) = circles(drawn, "c0")
    (low, _), (high, _), _ = circles(drawn, "c1")
    assert (b - a) / 10 == pytest.approx((high - low) / 2, abs=0.1)
    words = list(drawn.itertext())
    assert "70.00 ± 2.00" in words and "80.00" in words and "b & c" in words
