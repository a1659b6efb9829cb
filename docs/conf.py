"Sphinx settings of the site. `python tools/docs.py` writes the pages that Sphinx reads, and calls it; nothing is loaded from the network."

import re
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.formatters import HtmlFormatter
from sphinx.highlighting import PygmentsBridge
from sphinx.util.logging import getLogger

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
release = version = settings["version"]

extensions = ["myst_nb", "sphinx.ext.viewcode"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
root_doc = "index"
nitpicky = True
smartquotes = False  # `--data` is not a dash
toc_object_entries_show_parents = "hide"
add_module_names = False
python_maximum_signature_line_length = 100
python_trailing_comma_in_multi_line_signatures = False

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables
nb_ipywidgets_js = {}
nb_render_image_options = {"alt": "Picture that the code above draws"}  # fig-alt of a cell takes its place
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

linkcheck_timeout = 15  # of `python tools/docs.py --external`
linkcheck_anchors = False
viewcode_follow_imported_members = False  # imports nothing

templates_path = ["templates"]
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/logo.svg"
html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # a summary is fetched, which a browser refuses for pages opened from a file
html_math_renderer = "mathml"
html_domain_indices = ["py-modindex"]
html_sidebars = {page: [] for page in ("index", "commands", "changelog", "contributing", "genindex", "py-modindex", "search")}
html_theme_options = {
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": project, "alt_text": ""},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "show_toc_level": 2,
    "footer_start": ["about"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"license": settings["license"], "default_mode": "auto"}


class LinesOfCode(HtmlFormatter):
    "Each line of code in a span of its own, so that what does not fit is wrapped below it, indented"

    def wrap(self, source):
        spans = ((i, f'<span class="line">{line.removesuffix(chr(10))}</span>\n' if i else line) for i, line in source)
        return super().wrap(spans)


PygmentsBridge.html_formatter = LinesOfCode


def mathml(visitor, node, block):
    "A formula as MathML, which browsers draw themselves: what Sphinx usually does loads a renderer from the network"
    try:
        text = re.sub(r"\\[bB]igg?(?=[()\[\]|])", "", node.astext().strip())  # brackets grow by themselves
        formula = tex2mathml(text, as_block=block)
        visitor.body.append(f'<div class="math">{formula}</div>' if block else formula)
    except MathError as e:
        getLogger(__name__).warning("%s: %s", node.astext(), e, location=node)
    raise SkipNode


def setup(app):
    app.add_html_math_renderer(
        "mathml", inline_renderers=(lambda v, n: mathml(v, n, False), None), block_renderers=(lambda v, n: mathml(v, n, True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
