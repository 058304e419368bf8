"""Sphinx configuration: make docs."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from pyrx._version import __version__  # noqa: E402

project = "pyrx"
author = "pyrx authors"
release = version = __version__
html_title = f"pyrx {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "results",
]
exclude_patterns = ["_build", "_ext", "_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# docstrings write `code` with single backticks; docstrings.py turns public names into links
default_role = "literal"
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]

# nothing is downloaded, so what other projects document is not linked
nitpick_ignore_regex = [("py:.*", r"(?!pyrx\b).*")]

html_theme = "furo"
html_theme_options = {"sidebar_hide_name": False}
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pyrx.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
