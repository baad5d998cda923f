"""The documentation as a site: `make docs` builds it, and a link that leads nowhere is an error."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
MORE = {
    "README.md": "readme",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
}
MORE |= {"experiments/README.md": "results"}
"""Pages of the repository that are part of the site, by their names in docs/more."""

project, author = "jaxsteer", "the jaxsteer developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
html_theme, html_title = "furo", "jaxsteer"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_default_options = {"members": True, "imported-members": True, "undoc-members": False}
autodoc_typehints, autodoc_member_order = "signature", "groupwise"
autodoc_preserve_defaults = True
suppress_warnings = ["docutils", "autodoc", "misc.highlighting_failure", "ref.python", "myst.header"]
"""What docstrings of dependencies and highlighting of shell output say. Links of pages are not among it."""


def _moved(text: str, place: Path) -> str:
    """Links of a page that stands elsewhere in the site: ``place`` is where it stood, seen from the root."""

    def there(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        whole = (Path("/") / place / path).resolve().relative_to("/").as_posix()
        if whole == "docs/README.md":
            return "](../index.md)"
        if whole in MORE:
            return f"]({MORE[whole]}.md{anchor})"
        if whole.startswith("docs/"):
            return f"](../{whole.removeprefix('docs/')}{anchor})"
        return f"](#{anchor.removeprefix('#')})" if not path else f"]({REPOSITORY}{whole}{anchor})"

    return re.sub(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)", there, text)


REPOSITORY = "https://example.invalid/jaxsteer/"
"""Files that are not part of the site; nothing follows such links."""


def _pages() -> None:
    """Write docs/more, which git ignores."""
    folder = HERE / "more"
    folder.mkdir(exist_ok=True)
    for name, page in MORE.items():
        source = HERE.parent / name
        text = _moved(source.read_text(encoding="utf-8"), Path(name).parent)
        target = folder / f"{page}.md"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def _within(app: object, page: str, source: list[str]) -> None:
    """Links of the pages in docs/ to those of the repository; the first page is docs/README.md."""
    if page.startswith("more/"):
        return
    if page == "index":
        source[0] = (HERE / "README.md").read_text(encoding="utf-8").replace(
            "# Documentation", "# jaxsteer", 1
        ) + source[0]
    for name, other in MORE.items():
        source[0] = source[0].replace(f"](../{name}", f"](more/{other}.md")


def setup(app: object) -> None:
    """Called by Sphinx."""
    _pages()
    app.connect("source-read", _within)  # type: ignore[attr-defined]
