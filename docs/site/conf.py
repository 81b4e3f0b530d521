"""The site: README, docs/, the notebooks with their stored outputs, claims, and the public names.

`make site` runs ``sphinx-build -c docs/site . build/site``: the pages are read from where they
stand, nothing is executed, and `pages.py` writes those that nobody has written by hand.
"""

import os
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import pages

project = "rotlib"
author = "the rotlib developers"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = [
    *("README.md", "SECURITY.md", "docs/**.md", "notebooks/*.ipynb"),
    *("results/*/README.md", "figures/90_report_gpu_*.md", ".github/**.md"),
]
nb_execution_mode = "off"
myst_heading_anchors = 4
default_role = "code"
autodoc_typehints = "none"
# a notebook may begin with a second heading, and some tables are reached by links alone
suppress_warnings = ["myst.header", "toc.not_included"]
html_theme = "sphinx_book_theme"
html_title = "rotlib"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
# where the repository is on the web: then a notebook's page opens it in Binder or Colab as well
if repository := os.environ.get("ROTLIB_REPOSITORY"):
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
html_static_path = ["static"]
html_css_files = ["phone.css"]
html_context = {"default_mode": "auto"}  # dark or light, as the reader has it
html_show_sourcelink = False


def _with_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += pages.contents()


def _index(app: Sphinx, error: Exception | None) -> None:
    """A server looks for this name."""
    if error is None:
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    pages.write()
    app.connect("source-read", _with_contents)
    app.connect("build-finished", _index)
