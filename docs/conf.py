"""Settings of the documentation site, which ``make docs`` builds."""

import re

import lightning_sg

project = "lightning-sg"
author = copyright = "The authors of lightning-sg"
release = version = lightning_sg.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
suppress_warnings = ["toc.not_included"]  # decisions are linked from their own page, not from the menu
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "**/outputs", "**/lightning_logs"]

# Links between pages work on the site as they do in the repository.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]

# Tutorials are executed whenever the site is built, and an error in one is an error of the build.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "lightning-sg"
html_static_path = ["_static"]
html_css_files = ["site.css"]

_NAMES = "|".join(sorted(lightning_sg.__all__, key=len, reverse=True))
_LITERAL = re.compile(rf"``({_NAMES})``")
#: A link to a file of the repository that is not a page.
_OUTSIDE = re.compile(
    r"\[([^]]*)\]\((?:\.\./)+((?:tests|examples|benchmarks|configs)[^)#]*|CONTRIBUTING\.md)(?:#[^)]*)?\)"
)


def _link_names(app, what, name, obj, options, lines):
    """Docstrings name public classes in plain literals, which terminals show as they are; here they are links."""
    lines[:] = [_LITERAL.sub(r":py:obj:`~lightning_sg.\1`", line) for line in lines]


def _name_files(app, page, source):
    """A link to a file of the repository becomes its path."""
    source[0] = _OUTSIDE.sub(r"`\2`", source[0])


def setup(app):
    """Hooks into Sphinx."""
    app.connect("autodoc-process-docstring", _link_names)
    app.connect("source-read", _name_files)
