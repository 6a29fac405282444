"""What the site takes from elsewhere in the repository, and its formulas, which become MathML when it is built.

Browsers render MathML themselves, in the colours of the page, so the site needs no script and no font for formulas.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"results.md": "RESULTS.md", "costs.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository, which stay where they are."""

FORMULA = re.compile(r'<(?:span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</(?:span|div)>', re.DOTALL)
"""What pymdownx.arithmatex leaves of $inline$ and $$display$$ formulas."""
CELL = re.compile(r'<div class="[^"]*jp-RenderedMarkdown.*?</div>', re.DOTALL)
"""A Markdown cell of a notebook, whose formulas nbconvert leaves as they are."""
IN_CELL = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$", re.DOTALL)


def on_files(files, config):
    """Add pages, and the pictures and tables that RESULTS shows, at the same place relative to it."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(content, page, config, files):
    """Formulas as MathML, and wide tables that scroll by themselves."""
    content = FORMULA.sub(lambda found: mathml(found[1] or found[2], display=found[1] is None), content)
    if page.file.src_uri.endswith(".ipynb"):
        content = CELL.sub(lambda cell: IN_CELL.sub(lambda f: mathml(f[1] or f[2], f[1] is not None), cell[0]), content)
    return content


def mathml(latex: str, display: bool) -> str:
    """The formula, in which ex, ix and ei are names and not products; latex2mathml raises what it does not know."""
    made = convert(html.unescape(latex).strip(), display="block" if display else "inline")
    made = re.sub(r"<mi>([ei])</mi><mi>([xi])</mi>", r"<mi>\1\2</mi>", made)
    return f'<div class="formula">{made}</div>' if display else made
