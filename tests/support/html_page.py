"""Parses an HTML page into elements, and fails if the page is not well-formed."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID_ELEMENTS = {"meta", "link", "br", "hr", "img", "wbr"}


@dataclass
class Element:
    """One element of a page. `text` is the text of the element without the text of its child elements."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find_all(self, tag: str, **attributes: str) -> list[Element]:
        """Return all descendants with this tag and these attributes."""
        matching_children = [child for child in self.children if child.tag == tag and attributes.items() <= child.attributes.items()]
        return matching_children + [element for child in self.children for element in child.find_all(tag, **attributes)]

    @property
    def full_text(self) -> str:
        """The text of the element and of all its descendants, with single spaces."""
        return " ".join(" ".join([self.text, *(child.full_text for child in self.children)]).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open_elements = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open_elements[-1].children.append(element)
        if tag not in VOID_ELEMENTS:
            self.open_elements.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open_elements[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_elements[-1].tag == tag, f"</{tag}> closes <{self.open_elements[-1].tag}>"
        self.open_elements.pop()

    def handle_data(self, data: str) -> None:
        self.open_elements[-1].text += data


def parse_page(text: str) -> Element:
    """Parse a page. Errors: AssertionError if an element is not closed, or if elements are closed in the wrong order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open_elements) == 1, f"<{reader.open_elements[-1].tag}> is not closed"
    return reader.open_elements[0]


def read_table(page: Element, caption: str) -> list[list[str]]:
    """Return the rows of the table with this caption, first the header row."""
    region = next(element for element in page.find_all("div", role="region") if element.attributes["aria-label"] == caption)
    return [[cell.full_text for cell in row.children] for row in region.find_all("tr")]
