"What Sphinx needs to know. `make docs` assembles the pages first (assemble.py)."

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "biomass_lib"
author = "the biomass_lib authors"
copyright = "2026, the biomass_lib authors"
extensions = ["myst_nb"]
exclude_patterns = ["files"]

# notebooks as they are stored: nothing is run
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = "Show the imports"
nb_code_prompt_hide = "Hide the imports"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a section may begin at any depth

# nothing is loaded from elsewhere: no fonts, no scripts, and formulas in the browser's own MathML
html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "biomass_lib"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def visit_math(self, node: nodes.math | nodes.math_block) -> None:
    "Write a formula as MathML."
    block = isinstance(node, nodes.math_block)
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
