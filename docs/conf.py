"""The documentation site; `make docs` builds it into docs/_build/html.

The source folder is the root of the repository, so that links between README, RESULTS, guides and notebooks are the
same on the site as in a checkout.
"""

import pathlib
import sys

from sphinx.ext.napoleon import GoogleDocstring

import lowrank_optax

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_extensions"))

project = "lowrank_optax"
author = "The lowrank_optax authors"
copyright = "2026, the lowrank_optax authors"
version = release = lowrank_optax.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "benchmarks/**.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RESULTS.md",
    "tests/README.md",
]
exclude_patterns = ["**/.*", ".*", "build", "dist", "docs/_*", "experiments", "lowrank_optax", "results", "runs"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "names",
]

# Pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4  # the anchors of GitHub
suppress_warnings = ["toc.no_title"]  # benchmarks/results/bench.md is written by a program
nb_execution_mode = "off"  # tests/experiments/test_notebooks.py runs the notebooks
copybutton_prompt_text = ">>> "
math_numfig = False
html_math_renderer = "mathml"

# Reference
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say what an argument is
default_role = "name"  # `fixed_rank` in a docstring
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
# A colon in the first line of "Returns:" or of a property is a colon, with no type before it.
GoogleDocstring._consume_returns_section = lambda self, preprocess_types=False: [
    ("", "", self._dedent(self._consume_to_next_section()))
]
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# References are checked to names of this project, whose site is the only one that a build reads.
nitpick_ignore_regex = [("py:.*", r"(?!lowrank_optax\.)(.|\n)*"), ("py:.*", r"lowrank_optax\.summary\.Row")]

# Theme
html_theme = "sphinx_book_theme"
html_title = "lowrank_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "footer_content_items": ["copyright.html"],
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
