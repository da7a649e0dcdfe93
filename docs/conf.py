"""The documentation site: ``python -m sphinx -W -b html docs build/site``, which needs no network.

Pages are Markdown (MyST). Those in ``api/`` name what they document, and autodoc takes the text from
the docstrings. ``api_names.py`` beside this file checks that they name everything that is public.
"""

from __future__ import annotations

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

from jax_ep import __version__  # noqa: E402

project = "jax_ep"
author = "The jax_ep authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "api_names",
    "included",
]
# Templates, from which scripts make the page of the same name.
exclude_patterns = ["*.in.md"]

myst_enable_extensions = ["colon_fence", "substitution"]
myst_substitutions = {"version": __version__}
myst_heading_anchors = 3

# Signatures name the arguments, and the docstrings give shapes and dtypes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
add_module_names = False
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"jax_ep {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
