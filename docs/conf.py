"""Sphinx's settings: pages in Markdown, the API reference from Google-style docstrings."""

import tahf4_compiler
from tahf4_compiler import ops

# An operator is an object that calls its reference; the docstring is the reference's.
for _name in ops.__all__:
    setattr(ops, _name, getattr(getattr(ops, _name), "_init_fn", getattr(ops, _name)))

project = "tahf4"
author = "the tahf4 authors"
copyright = "the tahf4 authors, Apache-2.0"
version = release = tahf4_compiler.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"tahf4 {version}"
html_show_sphinx = False

myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes belong to their class's description: they are no entries of their own
napoleon_custom_sections = [("Class attributes", "Attributes")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
