"""Settings of the documentation site: `make docs` builds it from the repository's root into build/site.

The root of the repository is the source folder, so that links between docs, results and code hold both on the site and
in the checkout.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

project = "pnc"
author = "the authors of pnc"
html_title = "pnc: partial network cloning"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = [
    *("docs/**", "results/*.md", "results/localize_vit/*.md", "results/part_two_threads/*.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md"),
]
exclude_patterns = ["docs/conf.py"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # results begin with whatever their bench writes

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpick_ignore_regex = [("py:class", ".*")]  # types of attributes: inner classes, and those of other packages

html_theme = "pydata_sphinx_theme"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "pnc"},
    "navbar_end": [],  # no switch: pictures follow the setting of the system, so pages do too
    "navbar_persistent": ["search-button"],
    "show_prev_next": False,
    "footer_start": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["sidebar-nav-bs"], "docs/index": [], "docs/concepts": [], "docs/reference": []}


def _copy_pictures(app: Sphinx, error: Exception | None) -> None:
    """Copy the pictures that pages show by HTML, which Sphinx does not look into; and lead to the first page."""
    if error is not None:
        return
    out, docs = Path(app.outdir), Path(__file__).parent
    for picture in docs.glob("*.svg"):
        shutil.copyfile(picture, out / "docs" / picture.name)
    (out / "index.html").write_text('<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def _keep_colons(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Keep what is before a colon in the docstring of a property, which napoleon would read as its type."""
    if what == "property":
        lines.insert(0, "")


def _add_title(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a title above a page of results that begins without one."""
    if not source[0].startswith("# "):
        source[0] = f"# {page.rpartition('/')[2].replace('_', ' ')}\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    """Connect what the settings cannot say."""
    app.connect("source-read", _add_title)
    app.connect("build-finished", _copy_pictures)
    app.connect("autodoc-process-docstring", _keep_colons, priority=100)  # before napoleon
