"""What every HTML report has to be: well-formed, self-contained, without scripts, and made for small screens too."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = frozenset(["meta", "br", "hr", "img", "input", "link"])
FETCHES = frozenset(["src", "srcset", "data", "poster", "background", "action", "formaction", "ping", "xlink:href"])
FORBIDDEN = frozenset(
    ["script", "iframe", "object", "embed", "link", "img", "image", "use", "form", "base", "video", "audio", "source"]
)


class Reader(HTMLParser):
    """Reads a document strictly: every element is closed, in order, and nothing in it leads out by itself."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.metas: list[dict[str, str | None]] = []
        self.charts = 0
        self.texts: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert tag not in FORBIDDEN, f"<{tag}>"
        assert len(names) == len(set(names)), f"<{tag}> says something twice: {names}"
        assert not [name for name in names if name in FETCHES or name.startswith("on")], f"<{tag} {names}>"
        if tag == "meta":
            self.metas.append(dict(attributes))
        if tag == "a":
            self.links.append(str(dict(attributes)["href"]))
        else:
            assert "href" not in names, f"<{tag} href>"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg":
            self.charts += 1

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(text)
        else:
            assert "url(" not in text and "@import" not in text
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def checked(document: str) -> Reader:
    """The document, read. Fails for one that fetches, runs anything, or is not for phones."""
    assert document.startswith("<!doctype html>")
    found = Reader(document)
    metas = {str(meta.get("name") or meta.get("http-equiv")): str(meta.get("content")) for meta in found.metas}
    assert "width=device-width" in metas["viewport"]
    assert metas["Content-Security-Policy"].startswith("default-src 'none'")
    assert all(re.match(r"https?://", link) for link in found.links), found.links
    return found
