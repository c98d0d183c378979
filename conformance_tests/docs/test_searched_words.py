"""The words that people search for stand in the title or the first paragraph of the page that answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ANSWERS = {
    "ablate": "how-to-ablate",
    "activation patching": "how-to-patch",
    "attention rollout": "how-to-attention",
    "causal tracing": "how-to-patch",
    "circuit": "how-to-find-circuits",
    "CLIP zero-shot": "how-to-zero-shot",
    "dataset": "how-to-collect",
    "DINOv2": "how-to-dinov2-attention",
    "embeddings": "how-to-collect",
    "feature visualization": "how-to-find-images",
    "fine-tuned": "how-to-own-model",
    "Grad-CAM": "how-to-grad-cam",
    "heatmap": "how-to-figures",
    "hooks": "concepts",
    "linear probe": "how-to-probe",
    "logit lens": "how-to-lens",
    "notebook": "how-to-figures",
    "nnsight": "coming-from",
    "plot": "how-to-figures",
    "registers": "how-to-registers",
    "SAE": "how-to-sparse",
    "saliency": "how-to-attention",
    "steering": "how-to-steer",
    "TransformerLens": "coming-from",
    "tuned lens": "how-to-lens",
}


@pytest.mark.parametrize("word", ANSWERS)
def test_a_word_that_people_search_for_opens_the_page_that_answers(word: str) -> None:
    text = (DOCS / f"{ANSWERS[word]}.md").read_text(encoding="utf-8")
    paragraphs = [each for each in text.split("\n\n") if not each.startswith(("```", "<!--"))]
    assert re.search(rf"\b{re.escape(word)}", " ".join(paragraphs[:2]), re.IGNORECASE)
