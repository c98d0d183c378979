"""``timm:`` references: names, tags, checkpoints, labels, and a hub that does not answer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import InputError, LoadError, UnknownName, UnsupportedArchitecture

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from huggingface_hub import constants  # noqa: E402
from prisma_timm.source import TimmSource  # noqa: E402

SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}
NAME = "vit_tiny_patch16_224"
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def upstream() -> Any:
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False, **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_random_weights_need_no_network(no_network: None) -> None:
    model = prisma.load(f"timm:{NAME}", pretrained=False, **SMALL)
    assert model(IMAGE).shape == (2, 1000)
    assert model.reference == f"timm:{NAME}"


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_local_checkpoint_is_loaded_as_it_is(
    upstream: Any, tmp_path: Path, suffix: str, wrapped: bool, no_network: None
) -> None:
    path = tmp_path / f"mine@home.{suffix}"
    if suffix == "safetensors":
        save_file(upstream.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": upstream.state_dict()} if wrapped else upstream.state_dict(), path)
    model = prisma.load(f"timm:{NAME}@{path}", **SMALL)
    assert torch.equal(model(IMAGE), upstream(IMAGE))


def test_tensors_that_do_not_fit_are_named(upstream: Any, tmp_path: Path) -> None:
    state = upstream.state_dict()
    state["extra.weight"] = state.pop("norm.bias")
    state["head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "model.safetensors")
    named = r"missing norm\.bias.*extra extra\.weight.*head\.bias has shape \[7\], expected \[1000\]"
    with pytest.raises(LoadError, match=named):
        prisma.load(f"timm:{NAME}@{tmp_path / 'model.safetensors'}", **SMALL)


def test_a_truncated_checkpoint_is_refused(upstream: Any, tmp_path: Path) -> None:
    for suffix in ("safetensors", "pt"):
        path = tmp_path / f"model.{suffix}"
        if suffix == "pt":
            torch.save(upstream.state_dict(), path)
        else:
            save_file(upstream.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(LoadError, match="truncated"):
            prisma.load(f"timm:{NAME}@{path}", **SMALL)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    path = tmp_path / "model.pt"
    torch.save({"state_dict": Trap()}, path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Trap()))
    for file in (path, plain):
        with pytest.raises(LoadError):
            prisma.load(f"timm:{NAME}@{file}", **SMALL)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No file at"):
        prisma.load(f"timm:{NAME}@{tmp_path / 'nothing.pt'}", **SMALL)


def test_unknown_names_and_tags_suggest_the_nearest(no_network: None) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean .*vit_tiny_patch16_224"):
        prisma.load("timm:vit_tiny_patch16_22")
    with pytest.raises(UnknownName, match=r"no tag 'augreg_in21k_ft'.*augreg_in21k_ft_in1k"):
        prisma.load(f"timm:{NAME}.augreg_in21k_ft")


def test_a_model_without_trained_weights_says_so(no_network: None) -> None:
    name = next(name for name in timm.list_models("vit_*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(LoadError, match="pretrained=False"):
        prisma.load(f"timm:{name}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://nowhere.invalid"])
def test_an_unreachable_hub_is_one_error_without_retries(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("timm's own loader was started, which tries again and again")

    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", never)
    with pytest.raises(LoadError, match="no answer there"):
        prisma.load(f"timm:{NAME}")


def test_offline_mode_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match=rf"HF_HUB_OFFLINE.*timm:{NAME}@FILE.*pretrained=False"):
        prisma.load(f"timm:{NAME}")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub cache that holds the weights of one model."""
    repository = timm.get_pretrained_cfg(NAME).hf_hub_id
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return folder / "snapshots" / "abc" / "model.safetensors"


def test_weights_in_the_cache_need_no_network(upstream: Any, cache: Path, no_network: None) -> None:
    save_file(upstream.state_dict(), cache)
    model = prisma.load(f"timm:{NAME}", **SMALL)
    assert torch.equal(model(IMAGE), upstream(IMAGE))


def test_a_broken_file_in_the_cache_is_named(cache: Path, no_network: None) -> None:
    cache.write_bytes(b"not weights")
    with pytest.raises(LoadError, match=r"could not be read from the file .*model\.safetensors"):
        prisma.load(f"timm:{NAME}", **SMALL)


def test_labels_are_those_of_imagenet() -> None:
    labels = prisma.load(f"timm:{NAME}", pretrained=False, **SMALL).labels
    assert labels is not None
    assert len(labels) == 1000
    assert labels[207].startswith("golden retriever")
    many = prisma.load(f"timm:{NAME}", pretrained=False, num_classes=21843, **SMALL).labels
    assert many is not None
    assert len(many) == 21843
    assert prisma.load(f"timm:{NAME}", pretrained=False, num_classes=7, **SMALL).labels is None
    assert prisma.load(f"timm:{NAME}", pretrained=False, num_classes=0, **SMALL).labels is None


def test_preprocessing_fits_the_model_as_it_was_built() -> None:
    model = prisma.load(f"timm:{NAME}", pretrained=False, **SMALL)
    assert model.preprocess is not None
    assert model.preprocess.size == (32, 32)
    assert model(model.preprocess(torch.rand(50, 40, 3))).shape == (1, 1000)


def test_every_model_is_listed_with_its_family_and_tags(no_network: None) -> None:
    infos = {info.reference: info for info in TimmSource().models()}
    assert set(infos) == {f"timm:{name}" for name in timm.list_models()}
    info = infos[f"timm:{NAME}"]
    assert info.family == "vision_transformer"
    assert info.pretrained
    assert "augreg_in21k_ft_in1k" in info.note
    assert infos["timm:deit_tiny_patch16_224"].family == "deit"


def test_every_certified_architecture_is_loadable() -> None:
    """By the classes of timm's modules, without building any; the certificates were made by building each."""
    table = Path(__file__).parents[2] / "docs/conformance/timm.jsonl"
    certificates = [json.loads(line) for line in table.read_text().splitlines()]
    if any(line["version"] != timm.__version__ for line in certificates):
        pytest.skip(f"the certificates are of another timm than {timm.__version__}")
    names = set(TimmSource().loadable(timm.list_models()) or ())
    assert {line["name"] for line in certificates} <= names
    assert not {"resnet18", "gemma4_vit_167m", "mobilenetv3_small_050"} & names
    assert TimmSource().loadable(["resnet18", NAME]) == {NAME}


@pytest.mark.parametrize("name", ["vit_dwee_patch16_reg1_gap_256", "qwen3_vit_88m_merge"])
def test_an_unsupported_architecture_of_an_adapted_module_says_why(name: str, no_network: None) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"differential attention|a projector that merges patches"):
        prisma.load(f"timm:{name}", pretrained=False)


def test_options_of_another_kind_quote_timm(no_network: None) -> None:
    with pytest.raises(InputError, match=rf"timm:{NAME} takes no such options \(embed_dim\): "):
        prisma.load(f"timm:{NAME}", pretrained=False, embed_dim="a")
