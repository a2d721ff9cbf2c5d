"""The report as one page that stands by itself: no scripts, no fonts and no pictures from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO

import yaml
from PIL import Image

from hasten.measure.report import Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #6b7177; --line: #e3e6e9; --mark: #d1495b }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #17191c; --faint: #9aa0a6; --line: #33373c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem } h1 b { color: var(--mark) }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p, figcaption { color: var(--faint); margin: .3rem 0 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: pre } th { font-weight: 600 }
figure { margin: 0 } img { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
pre { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .9rem }
"""


def html(report: Report, pictures: Mapping[str, Image.Image]) -> str:
    """One HTML page: headline, table, `pictures` (by caption, as PNG data URIs) and recipe. All text is escaped."""
    q = report.quality
    speed, sure = f"{report.end_to_end.median:.2f}x", f"{q.value:.2f} ({q.low:.2f}-{q.high:.2f}, 95 %)"
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("", "untouched", "recipe", "gain"))
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in report.rows())
    figures = "".join(_figure(caption, picture) for caption, picture in pictures.items())
    recipe = escape(yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"hasten: {speed} on {report.pipeline}")}</title><style>{_STYLE}</style></head>
<body>
<h1><b>{speed}</b> as fast at quality {escape(sure)}</h1>
<p>{escape(report.footnote())}</p>
<h2>Gained and paid</h2>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table></div>
<p>Quality is 1 where the pictures can't be told from a second untouched run with other seeds, and 0 where they are no
nearer to it than pictures of other prompts.</p>
{figures}<h2>Recipe</h2>
<pre>{recipe}</pre>
</body></html>
"""


def _figure(caption: str, picture: Image.Image) -> str:
    text = escape(caption)
    return f'<h2>{text}</h2>\n<figure><img alt="{text}" src="{_data_uri(picture)}"></figure>\n'


def _data_uri(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
