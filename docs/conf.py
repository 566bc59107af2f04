"""Settings of Sphinx. The documentation is built, offline, by

    python -m sphinx -W --keep-going -b html docs docs/_build

What pages hold that is not written in them (every field of the configuration, CONTRIBUTING, notebooks) is in pages.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

import mimic_video  # noqa: E402

project = "mimic-video in JAX"
author = "the contributors"
release = version = mimic_video.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "pages"]
exclude_patterns = ["_build", "jupyter_execute"]  # the latter is written by myst-nb, beside _build
suppress_warnings = ["misc.highlighting_failure"]  # cells with commands of several lines; tests read the Python of pages

html_theme = "furo"
html_title = f"{project} {release}"
highlight_language = "text"

myst_heading_anchors = 4  # the anchors that GitHub gives to headings
nb_execution_mode = "off"  # notebooks need accelerators, and hours

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
