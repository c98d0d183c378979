"""``open_clip:`` references: tags, files, folders, TinyCLIP's checkpoints, tokenizers, a hub that does not answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from prisma_conformance.randomise import randomise
from safetensors.torch import save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import LoadError, UnknownName
from prisma_core.transformer import HookedDual

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")

from huggingface_hub import constants  # noqa: E402
from prisma_clip import tinyclip  # noqa: E402
from prisma_clip.canonical.towers import DualAdapter  # noqa: E402

logits = DualAdapter().call
from prisma_clip.building import preprocess  # noqa: E402
from prisma_clip.source import OpenClipSource, as_trained  # noqa: E402
from prisma_clip.texts import Tokenizer  # noqa: E402

NAME = "ViT-B-32"
TAG = "laion2b_s34b_b79k"
SMALL: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"width": 128, "layers": 1, "head_width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"width": 64, "heads": 1, "layers": 2, "context_length": 9, "vocab_size": 50},
}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def upstream() -> Any:
    model = open_clip.create_model(NAME, load_weights=False, **SMALL).eval()
    return randomise(model, torch.Generator().manual_seed(2))


@torch.no_grad()
def equal(model: Any, upstream: Any) -> bool:
    return torch.allclose(model(IMAGE, TOKENS), logits(upstream, IMAGE, TOKENS), atol=1e-5)


def with_eps(upstream: Any) -> Any:
    """Give norms the eps that a checkpoint cannot tell: open_clip's own."""
    for part in upstream.modules():
        if isinstance(vars(part).get("eps"), float):
            part.eps = 1e-5
    return upstream


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_local_checkpoint_is_loaded_as_it_is(
    upstream: Any, tmp_path: Path, suffix: str, prefix: str, no_network: None
) -> None:
    path = tmp_path / f"mine.{suffix}"
    state = {prefix + name: tensor.contiguous() for name, tensor in upstream.state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, path)
    model = prisma.load(f"open_clip:{NAME}@{path}", **SMALL)
    assert equal(model, with_eps(upstream))
    assert model.vision.preprocess is model.preprocess is not None


def test_tensors_that_do_not_fit_are_named(upstream: Any, tmp_path: Path) -> None:
    state = dict(upstream.state_dict())
    state["extra.weight"] = state.pop("ln_final.bias")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"missing ln_final\.bias.*extra extra\.weight"):
        prisma.load(f"open_clip:{NAME}@{tmp_path / 'model.pt'}", **SMALL)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": Trap()}, tmp_path / "model.pt")
    for name in (NAME, "TinyCLIP-ViT-39M-16-Text-19M"):
        with pytest.raises(LoadError):
            prisma.load(f"open_clip:{name}@{tmp_path / 'model.pt'}", **SMALL)
    assert not (tmp_path / "sprung").exists()


def test_unknown_names_and_tags_suggest_the_nearest(no_network: None) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean ViT-B-32"):
        prisma.load("open_clip:ViT-B-33")
    with pytest.raises(UnknownName, match=r"no tag 'openia'\. Did you mean openai"):
        prisma.load("open_clip:ViT-B-32@openia")
    with pytest.raises(LoadError, match="No file at"):
        prisma.load("open_clip:ViT-B-32@nowhere/model.pt")
    with pytest.raises(LoadError, match=r"Its tags: openai.*pretrained=False"):
        prisma.load("open_clip:ViT-B-32")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://nowhere.invalid"])
def test_an_unreachable_hub_is_one_error(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built for weights that cannot come")

    monkeypatch.setattr(open_clip, "create_model", never)
    with pytest.raises(LoadError, match="no answer there"):
        prisma.load(f"open_clip:{NAME}@{TAG}")


def test_a_tag_comes_from_the_hub(upstream: Any, loopback: Any) -> None:
    repository = open_clip.get_pretrained_cfg(NAME, TAG)["hf_hub"].rstrip("/")
    path = loopback.repository(repository) / "open_clip_model.safetensors"
    save_file(upstream.state_dict(), path)
    loopback.fault = "corrupt"
    with pytest.raises(LoadError, match="try again"):
        prisma.load(f"open_clip:{NAME}@{TAG}", **SMALL)
    assert equal(prisma.load(f"open_clip:{NAME}@{TAG}", **SMALL), with_eps(upstream))


def test_a_tag_whose_weights_want_another_activation_gets_it() -> None:
    differ = 0
    for name, tag in open_clip.list_pretrained():
        cfg, config = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
        differ += bool(cfg.get("quick_gelu")) != bool(config.get("quick_gelu"))
    assert differ == 28
    small = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": 16}}
    for reference, act in (
        ("ViT-B-32@openai", "quick_gelu"),
        ("ViT-B-32@laion2b_s34b_b79k", "gelu"),
        ("ViT-B-32-quickgelu@openai", "quick_gelu"),
    ):
        model = prisma.load(f"open_clip:{reference}", pretrained=False, **small)
        assert {block.mlp.act for tower in (model.spec.vision, model.spec.text) for block in tower.blocks} == {act}
    chosen = prisma.load("open_clip:ViT-B-32@openai", pretrained=False, quick_gelu=False, **small)
    assert chosen.spec.text.blocks[0].mlp.act == "gelu"
    name, tag = "roberta-ViT-B-32", "laion2b_s12b_b32k"  # whose configuration says quick_gelu, and its weights do not
    assert as_trained(name, tag, {}) == {"quick_gelu": False}
    assert as_trained(name, tag, {"force_quick_gelu": True}) == {}


def test_images_are_prepared_as_the_tag_or_the_user_says(upstream: Any, tmp_path: Path, no_network: None) -> None:
    small = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": 16}}
    name, tag = next((n, t) for n, t in open_clip.list_pretrained() if n == "ViT-B-16-SigLIP")
    theirs = open_clip.get_pretrained_cfg(name, tag)
    assert theirs["mean"] != open_clip.OPENAI_DATASET_MEAN
    text = {**SMALL["text_cfg"], "context_length": 9}
    options = {"embed_dim": 64, "text_cfg": text, "vision_cfg": small["vision_cfg"], "pretrained": False}
    model = prisma.load(f"open_clip:{name}@{tag}", **options)
    assert model.preprocess is not None
    assert (model.preprocess.mean, model.preprocess.resize) == (tuple(theirs["mean"]), theirs["resize_mode"])
    forced = {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    model = prisma.load(f"open_clip:{name}@{tag}", force_preprocess_cfg=forced, **options)
    assert (model.preprocess.mean, model.preprocess.std) == ((0.1, 0.2, 0.3), tuple(theirs["std"]))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(_configured()))
    model = prisma.load(f"open_clip:{tmp_path}", pretrained=False, force_preprocess_cfg=forced)
    assert (model.preprocess.mean, model.preprocess.resize) == ((0.1, 0.2, 0.3), "squash")


# -------------------------------------------------------------------- files with a configuration


def _configured() -> dict[str, Any]:
    return {
        "model_cfg": SMALL,
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"},
    }


def test_a_folder_with_a_configuration(upstream: Any, tmp_path: Path, no_network: None) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(_configured()))
    with pytest.raises(LoadError, match=r"open_clip_model\.safetensors.*pretrained=False"):
        prisma.load(f"open_clip:{tmp_path}")
    save_file(upstream.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = prisma.load(f"open_clip:{tmp_path}")
    assert equal(model, with_eps(upstream))
    assert model.preprocess is not None
    assert (model.preprocess.resize, model.preprocess.std, model.preprocess.size) == ("squash", (0.25,) * 3, (16, 16))


def test_a_configuration_and_a_file(upstream: Any, tmp_path: Path, no_network: None) -> None:
    config, weights = tmp_path / "TinyCLIP-ViT-1M.json", tmp_path / "weights.pt"
    config.write_text(json.dumps(SMALL))
    torch.save({"state_dict": upstream.state_dict()}, weights)
    assert equal(prisma.load(f"open_clip:{config}@{weights}"), with_eps(upstream))
    with pytest.raises(LoadError, match="names no weights"):
        prisma.load(f"open_clip:{config}")
    config.write_text(json.dumps({"width": 3}))
    with pytest.raises(LoadError, match="expected embed_dim, vision_cfg and text_cfg"):
        prisma.load(f"open_clip:{config}@{weights}")
    config.write_text("{")
    with pytest.raises(LoadError, match="no readable JSON"):
        prisma.load(f"open_clip:{config}@{weights}")


# -------------------------------------------------------------------- TinyCLIP


def _bare(name: str) -> str:
    return name


def _apart(name: str) -> str:
    if name.startswith("visual."):
        return f"_image_encoder.{name}"
    return f"_logit_scale.{name}" if name == "logit_scale" else f"_text_encoder.{name}"


def _in_parallel(name: str) -> str:
    wrapper, _, rest = _apart(name).partition(".")
    return f"{wrapper}.module.{rest}"


def _all_in_parallel(name: str) -> str:
    return f"module.{_apart(name)}"


@pytest.mark.parametrize("wrapped", [_apart, _in_parallel, _all_in_parallel])
def test_an_original_tinyclip_checkpoint(
    upstream: Any, tmp_path: Path, wrapped: Callable[[str], str], no_network: None
) -> None:
    state = {wrapped(name): tensor for name, tensor in upstream.state_dict().items()}
    path = tmp_path / "TinyCLIP-ViT-39M-16-Text-19M-YFCC15M.pt"
    torch.save({"epoch": 25, "name": "run", "state_dict": state}, path)
    model = prisma.load(f"open_clip:TinyCLIP-ViT-39M-16-Text-19M@{path}")
    assert isinstance(model, HookedDual)
    assert (model.spec.vision.n_layers, model.spec.text.n_layers) == (1, 2)
    assert model.spec.vision.blocks[0].attn.n_heads == 2, "heads have 64 channels; the shapes say the rest"
    assert model.spec.vision.blocks[0].mlp.act == "gelu"
    assert equal(model, with_eps(upstream))
    assert model.tokens(["a cat"]).shape == (1, 9)


@torch.no_grad()
def test_a_tinyclip_checkpoint_whose_layers_differ_in_heads(upstream: Any, tmp_path: Path, no_network: None) -> None:
    # What was taken out of the checkpoint adds nothing in the full model.
    block = upstream.visual.transformer.resblocks[0]
    block.attn.out_proj.weight[:, 64:] = 0
    block.mlp.c_proj.weight[:, 100:] = 0
    state = dict(upstream.state_dict())
    at = "visual.transformer.resblocks.0"
    for part in ("weight", "bias"):
        whole = state[f"{at}.attn.in_proj_{part}"]
        state[f"{at}.attn.in_proj_{part}"] = whole.unflatten(0, (3, 2, 64))[:, 0].flatten(0, 1)
        state[f"{at}.mlp.c_fc.{part}"] = state[f"{at}.mlp.c_fc.{part}"][:100]
    state[f"{at}.attn.out_proj.weight"] = state[f"{at}.attn.out_proj.weight"][:, :64]
    state[f"{at}.mlp.c_proj.weight"] = state[f"{at}.mlp.c_proj.weight"][:, :100]
    path = tmp_path / "TinyCLIP-auto-ViT-63M-32-Text-31M.pt"
    torch.save({"state_dict": {_all_in_parallel(name): x.clone() for name, x in state.items()}}, path)
    model = prisma.load(f"open_clip:TinyCLIP-auto-ViT-63M-32-Text-31M@{path}")
    assert model.spec.vision.blocks[0].attn.n_heads == 1
    assert model.spec.vision.blocks[0].mlp.d_mlp == 100
    assert equal(model, with_eps(upstream))
    _, cache = model.run_with_cache(IMAGE, TOKENS, names=["vision.pattern"])
    assert cache["vision.blocks.0.attn.hook_pattern"].shape == (2, 1, 5, 5)
    del state[f"{at}.attn.in_proj_weight"]
    torch.save({"state_dict": {_apart(name): x.clone() for name, x in state.items()}}, path)
    with pytest.raises(LoadError, match="without attention"):
        prisma.load(f"open_clip:TinyCLIP-auto-ViT-63M-32-Text-31M@{path}")


def test_a_tinyclip_checkpoint_with_old_keys_needs_its_configuration(upstream: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"state_dict": {f"module.{name}": x for name, x in upstream.state_dict().items()}}, path)
    with pytest.raises(UnknownName, match="no model 'TinyCLIP-ViT-39M-16-Text-19M'"):
        prisma.load(f"open_clip:TinyCLIP-ViT-39M-16-Text-19M@{path}")


def test_tinyclip_with_convolutions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "TinyCLIP-ResNet-19M-Text-19M.pt"
    torch.save({"state_dict": {"_image_encoder.visual.layer1.0.conv1.weight": torch.zeros(2, 2, 1, 1)}}, path)
    with pytest.raises(LoadError, match="ResNet"):
        prisma.load(f"open_clip:TinyCLIP-ResNet-19M-Text-19M@{path}")


def test_one_tensor_under_two_names_is_refused() -> None:
    with pytest.raises(LoadError, match="twice"):
        tinyclip.unwrapped({"module.logit_scale": torch.ones(()), "_logit_scale.logit_scale": torch.zeros(())})


# -------------------------------------------------------------------- texts and images


@torch.no_grad()
def test_text_in_image_in_chances_out(no_network: None) -> None:
    text = {**SMALL["text_cfg"], "context_length": 77, "vocab_size": 49408}
    model = prisma.load(f"open_clip:{NAME}", pretrained=False, **{**SMALL, "text_cfg": text})
    assert isinstance(model, HookedDual)
    assert torch.equal(model.tokens(["a cat", "two dogs"]), open_clip.get_tokenizer(NAME)(["a cat", "two dogs"]))
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    chances = model.classify(image, ["cat", "dog", "red square"])
    assert chances.shape == (1, 3)
    assert torch.allclose(chances.sum(), torch.ones(()))
    assert torch.allclose(model.encode_image(image, normalize=True).norm(), torch.ones(()))
    assert model.encode_text("a cat").shape == (1, 12)
    pixels: Tensor = model.vision.preprocess(image)
    assert model.vision(pixels).shape == (1, 12)
    assert model.text(model.text.tokens("a cat")).shape == (1, 12)


def test_a_tokenizer_on_the_hub_is_asked_for_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tokenizer = Tokenizer(open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"], "open_clip:ViT-B-16-SigLIP")
    with pytest.raises(LoadError, match=r"the tokenizer of open_clip:ViT-B-16-SigLIP.*Set model\.tokenizer"):
        tokenizer(["a cat"])


@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_prepared_as_open_clip_does(size: tuple[int, int], resize: str, interpolation: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = {"size": size, "resize_mode": resize, "interpolation": interpolation, "mean": (0.4, 0.5, 0.6)}
    config = {**vars(PreprocessCfg()), **cfg, "std": (0.2, 0.3, 0.4)}
    noise = torch.randint(256, (50, 70, 3), generator=torch.Generator().manual_seed(0)).byte()
    image = Image.fromarray(noise.numpy())
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)(image)
    assert torch.allclose(preprocess(config)(image)[0], theirs, atol=1e-5)


def test_every_model_is_listed_without_a_network(no_network: None) -> None:
    listed = {info.reference: info for info in OpenClipSource().models()}
    assert set(listed) == {f"open_clip:{name}" for name in open_clip.list_models()}
    assert "openai" in listed["open_clip:ViT-B-32"].note


def test_what_loads_is_told_from_its_configuration(no_network: None) -> None:
    """The convolutional towers and the texts read with mT5 and NLLB are refused by the adapters."""
    found = set(OpenClipSource().loadable(open_clip.list_models()) or ())
    refused = {"RN50", "convnext_base", "swin_base_patch4_window7_224", "MobileCLIP-S1"}
    refused |= {"mt5-base-ViT-B-32", "nllb-clip-base-siglip"}
    assert not refused & found
    assert {"ViT-B-32", "ViT-B-16-SigLIP", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32", "roberta-ViT-B-32"} <= found


def test_a_folder_that_is_not_there_is_said_to_be_missing(no_network: None) -> None:
    with pytest.raises(LoadError, match="No folder at my/folder"):
        prisma.load("open_clip:my/folder")
