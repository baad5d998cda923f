"""An HTML parser that refuses pages which are broken or would load something."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements balance and that nothing would be loaded; ``links`` are those to pages of runs beside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        for name, value in attributes:
            if (tag, name) == ("a", "href") and value.startswith("data:text/csv;"):
                assert ("download", "answers.csv") in attributes, "to be saved, never opened"
                continue
            if (tag, name) == ("a", "href"):
                assert value.endswith("/report.html") and ":" not in value and not value.startswith(("/", "."))
                self.links.append(value)
                continue
            assert name not in ("src", "href", "srcset", "action", "data", "poster"), (tag, name, value)
            assert name != "xlink:href" or value.startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name, value)
            assert "url(" not in (value or "").replace("url(#", "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.data += data
        elif self.stack and self.stack[-1] == "style":
            assert "@import" not in data and "url(" not in data
        else:
            self.text.append(data)
