"""Pages from templates; everything that a page shows is inside it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled; text is escaped, a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda value: "-" if value is None else f"{value:.1%}"
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3g}"
    return environment.get_template(template).render(**values)


def embedded(png: bytes) -> str:
    """An image as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
