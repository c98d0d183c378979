"""Whole pages as text: made from a template, written to a file, or shown in a notebook in a frame of their own."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import jinja2

from prisma_core.plugin import write_text


def rendered(template: str, **values: Any) -> str:
    """Return a template of ``templates/`` filled in: what is no ``safe`` markup is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prisma_view"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def saved(path: str | Path, html: str) -> Path:
    """Write a page, and the folders above it, and return its path."""
    return write_text(Path(path), html)


def framed(html: str, title: str, height: int) -> str:
    """Return a page in a frame that keeps its styles and scripts to itself, ``height`` lines high."""
    style = f"width:100%;height:{height}rem;border:0"
    return f'<iframe title="{escape(title)}" style="{style}" srcdoc="{escape(html)}"></iframe>'
