"""Reads a page of report.py: its tags, texts and links, and checks that it is in order."""
from html.parser import HTMLParser
from pathlib import Path

EMPTY = ("meta",)  # elements that have no end


class Page(HTMLParser):
    """A page: `elements` are (name, attributes) in order, `texts` the text of each section by its id."""

    def __init__(self, file: Path):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str | None, str] = {}
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in EMPTY:
            self.open.append(self.elements[-1])

    def handle_endtag(self, name):
        if name != "wbr":
            while self.open[-1][0] == "wbr":
                self.open.pop()
        assert self.open.pop()[0] == name, (name, self.getpos())

    def handle_data(self, data):
        names = [name for name, _ in self.open]
        if "style" in names:
            return
        section = next((own["id"] for name, own in self.open[::-1] if name == "section" and "id" in own), None)
        self.texts[section] = self.texts.get(section, "") + data + ("" if "wbr" in names else " ")

    def all(self, name: str, **attributes: str) -> list[dict]:
        """The attributes of all elements of a name that have these attributes."""
        return [own for kind, own in self.elements if kind == name
                and all(own.get(key.strip("_")) == value for key, value in attributes.items())]

    def text(self, section: str | None = None) -> str:
        """The words of a section."""
        return " ".join(self.texts.get(section, "").split())


def assert_in_order(page: Page) -> None:
    """Headings by level, tables with headings, pictures with texts, one id each, and nothing that loads or runs."""
    levels = [int(name[1]) for name, _ in page.elements if name in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:])), levels
    assert all(own.get("scope") in ("row", "col") for own in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for own in page.all("svg"):
        assert own.get("aria-label") or own.get("aria-labelledby") or own.get("aria-hidden") == "true", own
    ids = [own["id"] for _, own in page.elements if "id" in own]
    assert len(ids) == len(set(ids))
    wanted = {name for own in page.all("svg") for name in (own.get("aria-labelledby") or "").split()}
    wanted |= {own["href"][1:] for name in ("a", "use") for own in page.all(name)}
    assert wanted <= set(ids), wanted - set(ids)
    for name, own in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form", "img"), name
        assert not [key for key in own if key.startswith("on")], own
        for key in ("src", "href", "xlink:href", "srcset", "style", "action"):
            assert own.get(key, "#").startswith(("#", "data:image/jpeg;base64,")), own
    style = page.source[page.source.index("<style>"):page.source.index("</style>")]
    assert "url(" not in style and "@import" not in style
