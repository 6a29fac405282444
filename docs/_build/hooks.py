"""What the site takes from elsewhere in the repository, and its formulas, which become MathML when it is built.

Browsers render MathML themselves, in the colours of the page, so the site needs no script and no font for formulas.
"""

import html
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")  # whose warnings a strict build counts
ROOT = Path(__file__).parents[2]
PAGES = {
    "results.md": "RESULTS.md",
    "costs.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site that are files of the repository, which stay where they are."""

FORMULA = re.compile(r'<(?:span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</(?:span|div)>', re.DOTALL)
"""What pymdownx.arithmatex leaves of $inline$ and $$display$$ formulas."""
CELL = re.compile(r'<div class="[^"]*jp-RenderedMarkdown.*?</div>', re.DOTALL)
"""A Markdown cell of a notebook, whose formulas nbconvert leaves as they are."""
IN_CELL = re.compile(r"<(code|pre)\b.*?</\1>|\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$", re.DOTALL)
"""Code, which is left alone, and formulas of such a cell."""
FETCHED = re.compile(r"(?is)<script\b(?:(?!</script>).)*(?:mathjax|mermaid)(?:(?!</script>).)*</script>")
"""Scripts that nbconvert puts into each notebook, and that would fetch others."""
LINK = re.compile(r'href="(?!\w+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"')
"""A notebook's link to another page, which mkdocs leaves as it is."""


def on_files(files, config):
    """Add pages, and the pictures and tables that RESULTS shows, at the same place relative to it."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(content, page, config, files):
    """Formulas as MathML."""
    if page.file.src_uri.endswith(".ipynb"):
        content = CELL.sub(lambda cell: IN_CELL.sub(_in_cell, cell[0]), FETCHED.sub("", content))
        content = LINK.sub(lambda link: _address(link, page.file, files), content)
    return FORMULA.sub(lambda found: mathml(found[1] or found[2], display=found[1] is None), content)


def _address(link, source, files):
    """Where a notebook's link to a page leads, as mkdocs says it of links in Markdown."""
    path, anchor = posixpath.normpath(posixpath.join(posixpath.dirname(source.src_uri), link[1])), link[2] or ""
    target = files.get_file_from_path(path)
    if target is None:
        log.warning(f"{source.src_uri} contains a link {link[1]!r}, but there is no such page.")
        return link[0]
    return f'href="{target.url_relative_to(source)}{anchor}"'


def _in_cell(found):
    _, display, inline = found.groups()
    return mathml(display or inline, bool(display)) if display or inline else found[0]


def mathml(latex: str, display: bool) -> str:
    """The formula, in which ex, ix and ei are names and not products; latex2mathml raises what it does not know."""
    made = convert(html.unescape(latex).strip(), display="block" if display else "inline")
    made = re.sub(r"<mi>([ei])</mi><mi>([xi])</mi>", r"<mi>\1\2</mi>", made)
    return f'<div class="formula">{made}</div>' if display else made
