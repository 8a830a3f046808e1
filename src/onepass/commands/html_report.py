"""A report as one HTML file that needs no other: tables and pictures are inside it."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType

from onepass.core.files import replace_file

MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
pre {{ font: 13px/1.35 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-x: auto; background: #f6f6f4;
padding: .8rem; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass
class Report:
    """Sections in the order in which they were added."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, heading: str, text: str = "") -> None:
        self.parts.append(f"<h2>{html.escape(heading)}</h2>")
        if text:
            self.parts.append(f"<p>{html.escape(text)}</p>")

    def verbatim(self, text: str) -> None:
        """Text whose line breaks and spaces matter."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, *renderables: RenderableType) -> None:
        """What a terminal would show, colours included."""
        console = Console(record=True, width=140, file=io.StringIO(), highlight=False)
        for renderable in renderables:
            console.print(renderable)
        self.parts.append(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))

    def picture(self, path: Path, caption: str) -> None:
        """An SVG or PNG, embedded."""
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"
        self.parts.append(f'<p><img alt="{html.escape(caption)}" src="{source}"></p>')

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        page = PAGE.format(title=html.escape(self.title), body="\n".join(self.parts))
        replace_file(path, page.encode())
