"""``hf:`` references: folders, classes, parts, files that are broken, and a hub that does not answer."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise
from safetensors.torch import load_file, save_file

import prisma_core as prisma
from prisma_core import InputError, LoadError, UnknownName, UnsupportedArchitecture

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from huggingface_hub import constants  # noqa: E402

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
NAMES = ("cat", "dog", "owl")
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**given: Any) -> Any:
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    config = transformers.ViTConfig(**{**SMALL, "image_size": 32, "patch_size": 8, **labels, **given})
    return randomise(transformers.ViTForImageClassification(config), torch.Generator().manual_seed(1)).eval()


@pytest.fixture
def upstream(tmp_path: Path) -> Any:
    model = small()
    for part in model.modules():
        if "eps" in vars(part):
            part.eps = model.config.layer_norm_eps  # a file holds one for all
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(tmp_path)
    return model


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hosted" in request.fixturenames:
        return

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_folder_comes_as_it_is_without_network(upstream: Any, tmp_path: Path) -> None:
    model = prisma.load(f"hf:{tmp_path}")
    with torch.no_grad():
        assert torch.equal(model(IMAGE), upstream(IMAGE).logits)
    assert model.labels == NAMES
    assert model.reference == f"hf:{tmp_path}"
    assert model.preprocess is not None
    assert (model.preprocess.size, model.preprocess.interpolation) == ((32, 32), "bicubic")


def test_a_relative_folder(upstream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    with torch.no_grad():
        assert torch.equal(prisma.load(f"hf:./{tmp_path.name}")(IMAGE), upstream(IMAGE).logits)


def test_pickled_weights_are_read_without_running_them(upstream: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    torch.save(upstream.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        assert torch.equal(prisma.load(f"hf:{tmp_path}")(IMAGE), upstream(IMAGE).logits)

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"vit.layernorm.bias": Harm()}, file)
    with pytest.raises(LoadError):
        prisma.load(f"hf:{tmp_path}")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_and_corrupt_files_are_refused(upstream: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "model.safetensors"
    if suffix == "bin":
        path.unlink()
        path = tmp_path / "pytorch_model.bin"
        torch.save(upstream.state_dict(), path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"nothing of the kind", b""):
        path.write_bytes(broken)
        with pytest.raises(LoadError, match="could not be read"):
            prisma.load(f"hf:{tmp_path}")
    path.write_bytes(whole)
    assert prisma.load(f"hf:{tmp_path}")(IMAGE).shape == (2, 3)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(upstream: Any, tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if change == "missing":
        del state["vit.layernorm.bias"]
    elif change == "extra":
        state["vit.layernorm.gain"] = torch.zeros(24)
    else:
        state["classifier.weight"] = torch.zeros(5, 24)
    save_file(state, path, metadata={"format": "pt"})
    named = {
        "missing": r"missing vit\.layernorm\.bias",
        "extra": r"extra vit\.layernorm\.gain",
        "shape": r"classifier\.weight has shape \[5, 24\], expected \[3, 24\]",
    }
    with pytest.raises(LoadError, match=named[change]):
        prisma.load(f"hf:{tmp_path}")


def test_without_weights_the_configuration_is_enough(upstream: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        prisma.load(f"hf:{tmp_path}")
    model = prisma.load(f"hf:{tmp_path}", pretrained=False, num_hidden_layers=1)
    assert (model.spec.n_layers, model.spec.n_classes) == (1, 3)
    with pytest.raises(InputError, match="takes no option 'colour'"):
        prisma.load(f"hf:{tmp_path}", pretrained=False, colour="red")


def test_another_class_leaves_out_what_it_has_no_place_for(upstream: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"missing pooler\.dense\.bias"):
        prisma.load(f"hf:{tmp_path}", architecture="ViTModel")
    model = prisma.load(f"hf:{tmp_path}", architecture="ViTModel", add_pooling_layer=False)
    with torch.no_grad():
        assert torch.equal(model(IMAGE), upstream.vit(IMAGE).last_hidden_state)
    with pytest.raises(UnknownName, match="Did you mean"):
        prisma.load(f"hf:{tmp_path}", architecture="ViTModle")


def test_a_part_of_a_larger_model(tmp_path: Path) -> None:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = transformers.BlipConfig(vision_config=vision, text_config={**SMALL, "vocab_size": 20}, projection_dim=8)
    whole = transformers.BlipForImageTextRetrieval(config).eval()
    whole.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture):
        prisma.load(f"hf:{tmp_path}")
    model = prisma.load(f"hf:{tmp_path}", part="vision_model")
    with torch.no_grad():
        assert torch.allclose(model(IMAGE), whole.vision_model(IMAGE).last_hidden_state, atol=1e-5)
    with pytest.raises(UnknownName, match="vision_model"):
        prisma.load(f"hf:{tmp_path}", part="vision_modle")


def test_a_class_has_a_case_and_no_weights() -> None:
    with pytest.raises(LoadError, match="pretrained=False"):
        prisma.load("hf:ViTModel")
    model = prisma.load("hf:ViTModel", pretrained=False, **SMALL, image_size=32, patch_size=8)
    assert model(IMAGE).shape == (2, 17, 24)
    assert prisma.check("hf:ViTModel", checks="weights.roundtrip").passed


def test_no_code_of_the_models_own_runs_unasked(upstream: Any, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "of_its_own", "architectures": ["OwnModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LoadError, match="trust_remote_code"):
        prisma.load(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="ViTModel"):
        prisma.load("hf:ViTModle")
    with pytest.raises(LoadError, match="is not there"):
        prisma.load("hf:./nowhere")
    with pytest.raises(LoadError, match=r"holds no config\.json"):
        prisma.load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="could not be read"):
        prisma.load(f"hf:{tmp_path}")


def test_an_unreachable_hub_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[object] = []

    def unknown(*args: object, **kwargs: object) -> None:
        tries.append(args)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        LoadError, match=r"hf:nobody/nothing@v2 is at http://hub\.invalid, and not in the cache: no answer"
    ):
        prisma.load("hf:nobody/nothing@v2")
    assert len(tries) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE.*hf:FOLDER"):
        prisma.load("hf:nobody/nothing")


# -------------------------------------------------------------------- from a hub on this machine

HUB_ID = "someone/small-vit"


@pytest.fixture
def hosted(loopback: Any) -> Any:
    """A model whose files, as save_pretrained writes them, are on the hub, its weights in several of them."""
    model = small()
    for part in model.modules():
        if "eps" in vars(part):
            part.eps = model.config.layer_norm_eps
    folder = loopback.repository(HUB_ID)
    model.save_pretrained(folder, max_shard_size="20KB")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def test_a_name_comes_from_the_hub_once(hosted: Any, loopback: Any) -> None:
    for _ in range(2):
        model = prisma.load(f"hf:{HUB_ID}")
        with torch.no_grad():
            assert torch.equal(model(IMAGE), hosted(IMAGE).logits)
        assert model.preprocess is not None
        asked = len(loopback.asked)
    prisma.load(f"hf:{HUB_ID}@main")
    assert len(loopback.asked) == asked


def test_without_weights_none_are_sent(hosted: Any, loopback: Any) -> None:
    assert prisma.load(f"hf:{HUB_ID}", pretrained=False).spec.n_classes == 3
    assert not any("safetensors" in line for line in loopback.asked)


def test_a_corrupted_download_is_an_error_and_the_next_try_succeeds(hosted: Any, loopback: Any) -> None:
    loopback.fault = "corrupt"
    with pytest.raises(LoadError, match="came corrupted"):
        prisma.load(f"hf:{HUB_ID}")
    with torch.no_grad():
        assert torch.equal(prisma.load(f"hf:{HUB_ID}")(IMAGE), hosted(IMAGE).logits)


def test_a_download_that_breaks_off_is_an_error_and_the_next_try_succeeds(
    hosted: Any, loopback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library waits between its own tries
    loopback.fault, loopback.faults = "break off", 1000
    with pytest.raises(LoadError, match="broke off"):
        prisma.load(f"hf:{HUB_ID}")
    loopback.fault = None
    with torch.no_grad():
        assert torch.equal(prisma.load(f"hf:{HUB_ID}")(IMAGE), hosted(IMAGE).logits)


def test_a_name_that_the_hub_does_not_know(hosted: Any) -> None:
    with pytest.raises(UnknownName, match="no such repository"):
        prisma.load("hf:someone/else")


def test_a_misspelt_option_is_refused_with_the_nearest(upstream: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'num_hiden_layers'\. Did you mean num_hidden_layers"):
        prisma.load("hf:ViTModel", pretrained=False, num_hiden_layers=2)
    with pytest.raises(InputError, match=r"vision_config takes no 'num_hiden_layers'\. Did you mean num_hidden_layers"):
        prisma.load("hf:CLIPModel", pretrained=False, vision_config={"num_hiden_layers": 2})
    for pretrained in (True, False):
        with pytest.raises(InputError, match=r"no option 'num_labls'.*Did you mean num_labels"):
            prisma.load(f"hf:{tmp_path}", pretrained=pretrained, num_labls=3)
    given = {**SMALL, "image_size": 32, "patch_size": 8}
    assert prisma.load("hf:ViTForImageClassification", pretrained=False, num_labels=5, **given).spec.n_classes == 5
    with pytest.raises(LoadError, match="hidden_size"):
        prisma.load("hf:ViTModel", pretrained=False, hidden_size="wide")


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_class_that_cannot_be_made_of_the_configuration(upstream: Any, tmp_path: Path, pretrained: bool) -> None:
    with pytest.raises(LoadError, match=r"has a ViTConfig\. BeitModel takes a BeitConfig, and cannot be made"):
        prisma.load(f"hf:{tmp_path}", architecture="BeitModel", pretrained=pretrained)
    for wrong in ("ViTConfig", "set_seed"):
        with pytest.raises(LoadError, match=f"{wrong} of transformers is no class of models"):
            prisma.load(f"hf:{tmp_path}", architecture=wrong, pretrained=pretrained)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(LoadError, match=r"has a ViTConfig\. BertModel takes a BertConfig"):
        prisma.load(f"hf:{tmp_path}", pretrained=pretrained)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": "ViTForImageClassification"}))
    assert prisma.load(f"hf:{tmp_path}", pretrained=pretrained).spec.n_classes == 3


def test_a_pooler_that_the_file_lacks_is_left_out_on_request(upstream: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="add_pooling_layer=False"):
        prisma.load(f"hf:{tmp_path}", architecture="ViTModel")


def test_transformers_is_quiet_during_a_load_alone(
    upstream: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    prisma.load(f"hf:{tmp_path}")
    with pytest.raises(LoadError):
        prisma.load(f"hf:{tmp_path}", architecture="ViTModel")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    written = capfd.readouterr()
    assert "Loading weights" not in written.err
    assert "LOAD REPORT" not in written.err + written.out


def test_a_reference_that_is_no_text() -> None:
    with pytest.raises(InputError, match="got None"):
        prisma.load(None)  # type: ignore[arg-type]
