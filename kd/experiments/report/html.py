"""Makes HTML. Text is escaped wherever it comes in, so no name from a file can become markup."""
import re
from collections.abc import Sequence
from html import escape

from data.tables import figures

SHORT = 15  # rows of a table that stays on one printed page


class Html(str):
    """Text that is HTML already. All other text is escaped when it becomes part of a page."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: object) -> Html:
    """An element. Attributes that are None are left out; `class_` is `class`, and other underscores are hyphens."""
    said = "".join(f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
                   for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{said}>{join(*children)}</{name}>")


def join(*parts: str | None) -> Html:
    """Texts and elements one after another; None are left out."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def breakable(name: str) -> Html:
    """A name that a narrow column may break after / and _."""
    return Html(re.sub(r"([/_])(?=.)", r"\1<wbr>", escape(name)))


def left_out(*children: str) -> Html:
    """A remark on something that the page does not show."""
    return tag("p", tag("strong", "Left out: "), *children, class_="missing")


def in_code(text: str) -> Html:
    return tag("code", text)


def bullets(items: Sequence[str]) -> Html:
    return tag("ul", *(tag("li", item) for item in items))


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Html:
    """A table in a box of its own, which scrolls if the table is wider. The first cell of a row is its heading."""
    right = figures(rows, len(header)) if rows else [False] * len(header)
    marks = ["number" if number else None for number in right]
    head = tag("tr", *(tag("th", cell, scope="col", class_=mark) for cell, mark in zip(header, marks)))
    body = [tag("tr", tag("th", breakable(row[0]) if not isinstance(row[0], Html) else row[0], scope="row"),
                *(tag("td", cell, class_=mark) for cell, mark in zip(row[1:], marks[1:]))) for row in rows]
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=class_)
    short = " short" if len(rows) <= SHORT else ""
    return tag("div", inner, class_=f"scroll{short}", role="region", tabindex=0, aria_label=caption)
