"""Figures of results and tensors, the attention viewer, and the page of a classifier.

```python
plot(result)                                    # a figure that fits; result.plot() is the same
patches(values, model.layout, image)            # any tensor [... pos] over the image
attention(pattern, model.layout, image)         # what a token attends to, for each head
attention_page(model, "cat.jpg").save("cat.html")  # every layer, head and token
gallery(model, "photos", ("mlp.hook_post", 5), out="gallery")  # top images of every unit
write_page(report(model, "cat.jpg", "dog.jpg"), Path("demo.html"))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prisma_core import hookimpl
from prisma_view import lazy

if TYPE_CHECKING:
    import typer

    from prisma_view.figures import Figure, attention, patches, plot
    from prisma_view.findings import Report, report
    from prisma_view.galleries import Gallery, gallery
    from prisma_view.page import write_page
    from prisma_view.report_images import write_images
    from prisma_view.sections import Overview, overview
    from prisma_view.symbols import symbol
    from prisma_view.viewer import AttentionPage, attention_page
    from prisma_view.words import percent

# fmt: off
__all__ = [
    "plot", "patches", "attention", "Figure", "attention_page", "AttentionPage", "overview", "Overview",
    "gallery", "Gallery", "report", "write_page", "write_images", "Report", "symbol", "percent", "prisma_commands",
]
# fmt: on


def __getattr__(name: str) -> Any:
    return lazy.__getattr__(name)


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    """Add ``prisma demo``, ``prisma attention``, ``prisma report`` and ``prisma gallery``."""
    from prisma_view.command import demo
    from prisma_view.gallery_command import gallery as gallery_command
    from prisma_view.page_commands import attention as attention_command
    from prisma_view.page_commands import report as report_command

    app.command()(demo)
    app.command("attention")(attention_command)
    app.command("report")(report_command)
    app.command("gallery")(gallery_command)
