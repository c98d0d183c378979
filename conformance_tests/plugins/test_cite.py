"""``prisma cite``: techniques name their sources, models are matched by patterns, and each reference has an entry."""

from __future__ import annotations

import importlib
import json
import re
import sys
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from prisma_core import LoadError, PluginError, UnknownName
from prisma_core.plugin import Host, installed

pytest.importorskip("pybtex", reason="needs pybtex: pip install 'prisma-interp[cite]'")

from prisma_cite import bibtex, cite, citing

ROOT = Path(__file__).parents[2]


def entries() -> dict[str, citing.Entry]:
    return citing._entries(citing._packages())


def test_each_author_and_year_of_a_source_has_its_entry() -> None:
    """``Surname ... 2024`` in the part ``Source:`` of any technique's file."""
    named: dict[str, str] = {}
    for path in sorted((ROOT / "plugins").glob("*/*.py")):
        text = " ".join(path.read_text(encoding="utf-8").partition("\nSource:\n")[2].partition('"""')[0].split())
        for surname, year in re.findall(
            r"\b([A-Z][\w-]+|nostalgebraist)(?:,| et al\.| and)?[^;.(]*?\(?\b((?:19|20)\d\d)\b", text
        ):
            named[f"{path.parent.name}/{path.name}: {surname} {year}"] = text
    assert len(named) > 30
    known = entries().values()
    lacking = [
        place
        for place, text in named.items()
        if not any(citing._names(text, entry) and entry.fields["year"] == place[-4:] for entry in known)
    ]
    assert not lacking


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("textspan", {"gandelsman2024"}),
        ("prisma_lens.second_order", {"gandelsman2025"}),
        ("toy:digits", {"joseph2024", "alpaydin1998"}),
        ("dsprites", {"matthey2017"}),
        ("hf:facebook/vit-mae-base", {"wolf2020", "he2022"}),
        ("prisma", {"joseph2024", "joseph2025", "prisma2026"}),
    ],
)
def test_the_references_of(name: str, keys: set[str]) -> None:
    assert set(cite(name)[name].entries) == keys


def test_a_model_is_cited_by_its_class_and_by_what_its_name_says() -> None:
    pytest.importorskip("timm")
    (cited,) = cite("timm:vit_small_patch14_reg4_dinov2").values()
    assert set(cited.entries) == {"wightman2019", "dosovitskiy2021", "oquab2024", "darcet2024"}
    assert "liu2021" in cite("timm:swin_tiny_patch4_window7_224")["timm:swin_tiny_patch4_window7_224"].entries


def test_years_tell_two_works_of_the_same_authors_apart() -> None:
    known = entries()
    assert citing._names("Gandelsman et al. 2024; others 2025", known["gandelsman2024"])
    assert not citing._names("Gandelsman et al. 2024; others 2025", known["gandelsman2025"])
    assert not citing._names("Efros 2024", known["gandelsman2024"]), "the first author is named"


def test_an_entry_without_author_or_year_is_no_technique_s() -> None:
    from pybtex.database import parse_string

    text = "@misc{a, title={T}, year={2024}} @misc{b, author={Gandelsman, Yossi}, title={T}}"
    read = parse_string(text, "bibtex").entries
    assert not any(citing._names("Gandelsman et al. 2024", each) for each in read.values())


def test_each_pattern_matches_something_that_can_be_loaded() -> None:
    """A class that an adapter takes, or a model that a source lists; names on hubs stand here."""
    timm, open_clip = pytest.importorskip("timm"), pytest.importorskip("open_clip")
    names = [*installed().types(), *(f"timm:{name}" for name in timm.list_pretrained())]
    names += [f"open_clip:{name}@{tag}" for name, tag in open_clip.list_pretrained()]
    names += [info.reference for info in installed().source("toy").models()]
    names += [f"dino:{name}" for name in ("dino_vits16_pretrain.pth", "dinov3_vits16_pretrain_lvd1689m.pth")]
    names += [
        f"hf:{name}"
        for name in ("facebook/vit-mae-base", "facebook/dinov2-with-registers-base", "facebook/dino-vits16")
    ]
    names += [
        "hf:wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
        "hf:google/siglip2-base-patch16-224",
        "hf:facebook/metaclip-b32-400m",
    ]
    names += ["prisma", "digits", "dsprites", "hf:google/vit-base-patch16-224-in21k-imagenet"]
    unmatched = [
        f"{key}: {pattern}"
        for key, entry in entries().items()
        for pattern in citing._patterns(entry)
        if not any(fnmatchcase(name.lower(), pattern.lower()) for name in names)
    ]
    assert not unmatched


def test_entries_are_text_and_bibtex_once_each() -> None:
    from pybtex.database import parse_string

    cited = cite("rollout", "attention_flow")
    assert cited["rollout"].text()[0].startswith("Samira Abnar and Willem Zuidema. Quantifying attention flow")
    assert set(parse_string(bibtex(cited), "bibtex").entries) == {"abnar2020", "joseph2024"}


def test_an_unknown_name_suggests() -> None:
    with pytest.raises(UnknownName, match="rollout"):
        cite("rolout")
    with pytest.raises(UnknownName, match="timm"):
        cite("tim:vit_tiny_patch16_224")


def lacking(name: str) -> None:
    raise PluginError(f"{name} needs a library") if name == "needs_a_library" else AttributeError(name)


def test_another_plugin_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "prisma_of_others"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""A technique.\n\nSource:\n    Nobody 1999.\n"""\ndef gaze() -> None: ...\n__all__ = ["gaze"]\n'
    )
    (package / "references.bib").write_text("@misc{n, author={Nobody, A.}, title={T}, year={1999}, keywords={acme:*}}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(citing, "installed", lambda: Host([EntryPoint("others", "prisma_of_others", "prisma")]))
    assert list(cite("gaze")["gaze"].entries) == ["n"]
    loaded = sys.modules["prisma_of_others"]
    monkeypatch.setattr(loaded, "__all__", ["needs_a_library", "gaze"])
    monkeypatch.setattr(loaded, "__getattr__", lacking, raising=False)
    assert list(cite("gaze")["gaze"].entries) == ["n"], "a name whose library is not installed is passed over"
    (package / "references.bib").write_text("@misc{n, author=")
    with pytest.raises(LoadError, match="prisma_of_others"):
        cite("gaze")


def test_without_pybtex_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybtex.database", None)
    with pytest.raises(LoadError, match=r"prisma-interp\[cite\]"):
        cite("rollout")


def test_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("prisma_core.cli.app").main
    assert main(["cite", "rollout", "toy:digits", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rollout"]["abnar2020"].startswith("Samira Abnar")
    assert set(told["toy:digits"]) == {"alpaydin1998", "joseph2024"}
    assert main(["cite", "textspan", "--bibtex"]) == 0
    assert capsys.readouterr().out.startswith("@article{gandelsman2024,")
    assert main(["cite"]) == 0
    assert "Introducing Prisma" in capsys.readouterr().out
