"""References that no source takes, and options that no source takes: errors that suggest the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

import prisma_core as prisma
from prisma_core import HookedViT, InputError, LoadError, UnknownName


@pytest.mark.parametrize("reference", ["", ":", "timm:", ":vit_base_patch16_224", "vit_base_patch16_224", "/etc"])
def test_text_without_a_source_is_an_error_with_the_form_of_a_reference(reference: str) -> None:
    with pytest.raises(UnknownName, match="SOURCE:MODEL"):
        prisma.load(reference)


def test_a_folder_without_its_source_is_suggested(vit: HookedViT, tmp_path: Path) -> None:
    prisma.save(vit, tmp_path)
    with pytest.raises(UnknownName, match=f"file:{tmp_path}"):
        prisma.load(str(tmp_path))


def test_an_unknown_device_is_named(vit: HookedViT, tmp_path: Path) -> None:
    reference = f"file:{prisma.save(vit, tmp_path)}"
    for device in ("abacus", 10**6, -1, True):
        with pytest.raises(InputError, match=f"{device!r}; there is cpu"):
            prisma.load(reference, device=device)
    assert next(prisma.load(reference, device="meta").parameters()).is_meta


def test_the_path_of_a_folder_is_a_reference(vit: HookedViT, tmp_path: Path) -> None:
    folder = prisma.save(vit, tmp_path / "model")
    assert prisma.load(folder).spec == prisma.outline(folder).spec == vit.spec
    with pytest.raises(LoadError, match=r"no spec\.json"):
        prisma.load(tmp_path / "nothing")
    with pytest.raises(UnknownName, match=r"is a file.*timm:vit_base_patch16_224@.*model\.safetensors"):
        prisma.load(folder / "model.safetensors")


def test_an_unknown_option_is_named(vit: HookedViT, tmp_path: Path) -> None:
    reference = f"file:{prisma.save(vit, tmp_path)}"
    with pytest.raises(InputError, match=r"file:.*'pretraned'"):
        prisma.load(reference, pretraned=False)
