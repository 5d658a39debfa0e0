"""The documentation site: what MkDocs does with links that leave docs/ (`hooks` of mkdocs.yml; `make docs`).

A link is written so that it works on GitHub: relative to the file that it is in. Here README.md becomes the first page,
CONTRIBUTING.md and CHANGELOG.md become pages, and any other file of the repository that a page links to is copied, under
source/. A link to nothing stays as it is, and the strict build refuses it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/, and the files that pages link to."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    texts = {of_repository(page.src_uri): page.content_string for page in files.documentation_pages()}
    linked = {
        target for source, text in texts.items() for link in links(text) if (target := repository_path(source, link))
    }
    for target in sorted(linked):
        uri = of_site(target)
        if uri.startswith("source/") and (ROOT / target).is_file() and files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The same page with its links as the site has them."""
    source, folder = of_repository(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def on_site(link: re.Match) -> str:
        target = repository_path(source, link[0])
        if target is None or not (ROOT / target).is_file():
            return link[0]
        fragment = urlsplit(link[0]).fragment
        return posixpath.relpath(of_site(target), folder or ".") + (f"#{fragment}" if fragment else "")

    parts = CODE.split(markdown)  # every second part is code
    return "".join(part if i % 2 else LINK.sub(on_site, part) for i, part in enumerate(parts))


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures; what stands in code is none."""
    return LINK.findall(CODE.sub("", text))


def repository_path(source: str, link: str) -> str | None:
    """The file of the repository that a link in the file `source` means; None for addresses and places in the same page."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))


def of_repository(uri: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return next((source for source, page in PAGES.items() if page == uri), f"docs/{uri}")


def of_site(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}")
