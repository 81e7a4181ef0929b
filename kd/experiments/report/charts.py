"""Charts as SVG. They take their colours from the page's style sheet, and tell lines apart by dots and dashes, too."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html import Html, tag

WIDTH, HEIGHT = 360, 230           # of a chart with axes, in its own units: a phone shows it in about its true size
LEFT, RIGHT, TOP, BOTTOM = 38, 12, 12, 38
MOST_DOTS = 12                     # on a line; if it has more points, only some get a dot
Point = tuple[float, float]


@dataclass
class Line:
    """A line of a chart. `kind` chooses colour and dots, see style.css: own, base or teacher."""

    name: str
    kind: str
    points: Sequence[Point]
    low: Sequence[float] = ()      # of the band around the points
    high: Sequence[float] = ()
    dashed: bool = False


@dataclass
class Axis:
    """A range of values, and its ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]

    def share(self, value: float) -> float:
        """The place of a value between 0 and 1."""
        return (value - self.low) / (self.high - self.low)


def axis(label: str, values: Sequence[float], start: float | None = None, count: int = 5) -> Axis:
    """An axis with round ticks that holds all values, and `start` if it is given."""
    values = [*values, *([] if start is None else [start])]
    low, high = min(values), max(values)
    step = round_step((high - low or abs(high) or 1) / count)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    high = high if high > low else low + step
    return Axis(label, low, high, [low + i * step for i in range(round((high - low) / step) + 1)])


def round_step(least: float) -> float:
    """The first of 1, 2, 5, 10, ... times a power of ten that is not below `least`."""
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def number(value: float) -> str:
    """A tick as text, without digits that say nothing."""
    return f"{round(value, 6) + 0.0:g}"


def place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def chart(name: str, title: str, text: str, x: Axis, y: Axis, *drawn: Html) -> Html:
    """A chart with axes.

    Args:
        name: an id that no other chart on the page has.
        title, text: what it shows, for those who cannot see it.
        drawn: what `line` and `dots` return.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    grid = [tag("line", x1=LEFT, x2=right, y1=place(down(y, tick)), y2=place(down(y, tick))) for tick in y.ticks]
    labels = [tag("text", number(tick), x=LEFT - 5, y=place(down(y, tick) + 3.5), text_anchor="end")
              for tick in y.ticks]
    labels += [tag("text", number(tick), x=place(across(x, tick)), y=bottom + 14, text_anchor="middle")
               for tick in x.ticks]
    labels += [tag("text", x.label, x=place((LEFT + right) / 2), y=HEIGHT - 6, text_anchor="middle"),
               tag("text", y.label, x=-place_of_middle(bottom), y=10, text_anchor="middle", transform="rotate(-90)")]
    return tag("svg", tag("title", title, id=f"{name}-title"), tag("desc", text, id=f"{name}-text"),
               tag("g", *grid, class_="grid"), tag("g", *labels, class_="labels"), *drawn,
               viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_labelledby=f"{name}-title {name}-text",
               class_="chart")


def place_of_middle(bottom: float) -> float:
    return (TOP + bottom) / 2


def across(x: Axis, value: float) -> float:
    return LEFT + x.share(value) * (WIDTH - RIGHT - LEFT)


def down(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - BOTTOM - TOP)


def line(one: Line, x: Axis, y: Axis) -> Html:
    """A line with its band and dots."""
    points = [(across(x, a), down(y, b)) for a, b in one.points]
    parts = []
    if len(one.low) and len(points) > 1:
        edge = [(a, down(y, high)) for (a, _), high in zip(points, one.high)]
        edge += [(a, down(y, low)) for (a, _), low in reversed(list(zip(points, one.low)))]
        parts.append(tag("path", d=path(edge) + "Z", class_="band"))
    if len(points) > 1:
        parts.append(tag("path", d=path(points), class_="line dashed" if one.dashed else "line"))
    every = max(1, -(-len(points) // MOST_DOTS))
    if one.kind != "teacher":
        parts += [dot(*point, one.kind) for point in points[::-1][::every]]
    return tag("g", *parts, class_=one.kind)


def path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{place(a)} {place(b)}" for a, b in points)


def dot(a: float, b: float, kind: str, size: float = 3.2) -> Html:
    """A circle, or a square for what others are compared with."""
    if kind == "base":
        return tag("rect", x=place(a - size), y=place(b - size), width=2 * size, height=2 * size, class_="dot")
    return tag("circle", cx=place(a), cy=place(b), r=size, class_="dot")


def letters(marks: Sequence[tuple[str, str, Point]], x: Axis, y: Axis) -> Html:
    """Letters at points; each mark is letter, kind and point."""
    drawn = []
    for letter, kind, (a, b) in marks:
        a, b = across(x, a), down(y, b)
        drawn.append(tag("g", dot(a, b, kind, 7.5), tag("text", letter, x=place(a), y=place(b + 3.5),
                                                        text_anchor="middle"), class_=f"{kind} letter"))
    return tag("g", *drawn)


@dataclass
class Mark:
    """A dot on a scale, and the interval around it where it is known. `kind`: own, base, or hollow."""

    value: float
    low: float | None = None
    high: float | None = None
    kind: str = "own"


def strip(marks: Sequence[Mark], scale: Axis, text: str, zero: float | None = 0.0, joined: bool = False) -> Html:
    """Dots with their intervals on a scale as wide as the page allows. `joined` draws a line from dot to dot."""
    height = 12 * len(marks) if not joined else 16
    parts = [] if zero is None else [tag("line", **ends(scale, zero, zero), y1=0, y2=height, class_="zero")]
    if joined:
        parts.append(tag("line", **ends(scale, marks[0].value, marks[-1].value), y1=8, y2=8, class_="change"))
    for i, mark in enumerate(marks):
        middle = 8 if joined else 12 * i + 6
        if mark.low is not None:
            parts.append(tag("line", **ends(scale, mark.low, mark.high), y1=middle, y2=middle,
                             class_=f"reach {mark.kind}"))
        parts.append(tag("circle", cx=percent(scale, mark.value), cy=middle, r=4.5, class_=f"dot {mark.kind}"))
    return tag("svg", *parts, class_="strip", width="100%", height=height, role="img", aria_label=text)


def ends(scale: Axis, low: float, high: float) -> dict[str, str]:
    return {"x1": percent(scale, low), "x2": percent(scale, high)}


def percent(scale: Axis, value: float) -> str:
    return f"{min(1, max(0, scale.share(value))):.2%}"


def ruler(scale: Axis, signed: bool = False) -> Html:
    """The ticks of a scale, below strips."""
    texts = [f"+{number(tick)}" if signed and tick > 0 else number(tick) for tick in scale.ticks]
    ticks = [tag("text", text, x=percent(scale, tick), y=12,
                 text_anchor="start" if i == 0 else "end" if i == len(texts) - 1 else "middle")
             for i, (text, tick) in enumerate(zip(texts, scale.ticks))]
    return tag("svg", *ticks, class_="strip labels", width="100%", height=16, aria_hidden="true")


def bar(value: float, most: float) -> Html:
    """A bar from the middle to the right, or to the left for a negative value, as long as its share of `most`."""
    share = 50 * min(1.0, abs(value) / most) if most else 0
    return tag("svg", tag("rect", x=f"{50 - share if value < 0 else 50:.1f}%", y=1, width=f"{share:.1f}%", height=4,
                          class_="less" if value < 0 else "more"),
               tag("line", x1="50%", x2="50%", y1=0, y2=6, class_="zero"),
               class_="bar", width="100%", height=6, aria_hidden="true")
