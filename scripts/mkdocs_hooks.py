"""Hooks of mkdocs. If a page links to a file outside of `docs/`, the hooks add this file to the documentation site, below `source/`.

Each link therefore works in the repository and on the site, and the site needs no URL of a repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS_FOLDER = ROOT / "docs"
LINK_PATTERN = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
"""A relative link in Markdown. The pattern's groups are `](`, the target, and the closing parenthesis, with the anchor before it if the link has one."""
PROJECT_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md")


def to_site_uri(path: Path) -> str:
    """Return the path of a repository file on the site, relative to the site's root."""
    return path.relative_to(DOCS_FOLDER).as_posix() if path.is_relative_to(DOCS_FOLDER) else f"source/{path.relative_to(ROOT).as_posix()}"


def to_source_path(src_uri: str) -> Path:
    """Return the repository file from which mkdocs creates a page or file of the site."""
    return ROOT / src_uri.removeprefix("source/") if src_uri.startswith("source/") else DOCS_FOLDER / src_uri


def find_linked_paths(page: Path) -> set[Path]:
    """Return the existing files of the repository that a page links to."""
    targets = {Path(os.path.normpath(page.parent / match[2])) for match in LINK_PATTERN.finditer(page.read_text("utf-8"))}
    return {target for target in targets if target.is_file() and target.is_relative_to(ROOT)}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the project, and all files outside of `docs/` that pages link to."""
    unread_pages = [to_source_path(file.src_uri) for file in files if file.src_uri.endswith(".md")] + [ROOT / name for name in PROJECT_PAGES]
    visited_pages: set[Path] = set()
    while unread_pages:
        page = unread_pages.pop()
        if page in visited_pages:
            continue
        visited_pages.add(page)
        uri = to_site_uri(page)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(page)))
        if page.suffix == ".md":
            unread_pages += find_linked_paths(page)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Replace the targets of a page's links with paths on the site. Append the list of decisions to the index page of decisions."""
    folder = to_source_path(page.file.src_uri).parent
    site_folder = Path(page.file.src_uri).parent

    def to_site_link(link_match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link_match[2]))
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link_match[0]
        return link_match[1] + os.path.relpath(to_site_uri(target), site_folder) + link_match[3]

    if page.file.src_uri == "decisions/README.md":
        markdown += "\n" + "\n".join(_list_decisions()) + "\n"
    return LINK_PATTERN.sub(to_site_link, markdown)


def _list_decisions() -> list[str]:
    pages = sorted((DOCS_FOLDER / "decisions").glob("0*.md"), reverse=True)
    return [f"* [{path.name[:4]}: {path.read_text('utf-8').splitlines()[0].lstrip('# ')}]({path.name})" for path in pages]
