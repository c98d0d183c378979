"""The overview: the sections that fit a model, with the numbers that the model gives."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import models
import numpy as np
import prisma_lens
import prisma_view
import pytest
import torch
from prisma_toy import draw_motions, draw_scenes, reconstructions, sample_scene
from prisma_view.insides import principal_colours

import prisma_core as prisma
from prisma_core import InputError
from prisma_core.cli.app import main

WORDS = ["a cat", "a <b>dog</b>", "a fox"]


def titles(page: Any) -> list[str]:
    return [section.title for section in page.sections]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def test_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs scikit-learn")
    grid = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10)
    colours, share = principal_colours(grid)
    fitted = decomposition.PCA(3, svd_solver="full").fit(grid.flatten(0, 1).numpy())
    theirs = fitted.transform(grid.flatten(0, 1).numpy())
    signs = np.sign(np.take_along_axis(fitted.components_, np.abs(fitted.components_).argmax(1)[:, None], 1))[:, 0]
    theirs = theirs * signs
    theirs = (theirs - theirs.min(0)) / (theirs.max(0) - theirs.min(0))
    np.testing.assert_allclose(colours.flatten(0, 1), theirs, atol=1e-4)
    assert share == pytest.approx(fitted.explained_variance_ratio_.sum(), abs=1e-5)


def test_few_channels_and_equal_patches_have_colours_too() -> None:
    colours, _ = principal_colours(torch.randn(2, 3, 1))
    assert colours.shape == (2, 3, 3)
    assert (colours[..., 1:] == 0).all()
    assert torch.isfinite(principal_colours(torch.ones(2, 3, 5))[0]).all()


def test_a_classifier_has_guesses_lens_attribution_and_components(image: torch.Tensor) -> None:
    model = models.build(registers=1)
    page = prisma_view.overview(model, image)
    assert titles(page) == [
        "Best guesses", "What patches say", "What each layer adds", "Patches by their principal components",
        "Where heads look",
    ]  # fmt: skip
    assert set(page.why) == {"Reconstruction by layer", "Reconstruction along training", "Feature maps"}
    logits = model(image)[0].detach()
    order = logits.argsort(descending=True)[:5].tolist()
    (bars,) = page.sections[0].figures
    assert list(bars.chart.labels[1]) == [models.LABELS[i] for i in order]
    np.testing.assert_allclose(bars.chart.values[0, 0], logits.softmax(-1)[order], rtol=1e-5)
    (layers,) = page.sections[2].figures
    assert layers.chart.values[0, 0, -1] == pytest.approx(float(logits[order[0]]), abs=1e-4)
    assert page.sections[1].figures[0].chart.panels == tuple(f"class {models.LABELS[i]}" for i in order)


def test_a_model_without_a_head_has_components_alone(image: torch.Tensor) -> None:
    page = prisma_view.overview(models.build(n_classes=None), image)
    assert titles(page) == ["Patches by their principal components", "Where heads look"]
    assert "no classification head" in page.why["Best guesses"]
    assert "names no classes" in page.lead


def test_heads_are_drawn_from_the_class_token_over_the_image(image: torch.Tensor) -> None:
    model = models.build(registers=1)
    page = prisma_view.overview(model, image)
    _, cache = model.run_with_cache(image, names="hook_pattern")
    for layer, figure in enumerate(page.sections[-1].figures):
        pattern = cache["pattern", layer][0].detach()
        np.testing.assert_allclose(
            figure.chart.values, pattern[:, 0, model.layout.n_prefix :].unflatten(-1, (2, 3)), rtol=1e-6
        )
        assert figure.chart.image is not None
    without = prisma_view.overview(models.build(cls=0, pool="avg"), image)
    assert "on average over tokens" in without.sections[-1].words


def test_a_masked_autoencoder_fills_in_by_layer_and_along_training() -> None:
    model = prisma.load("toy:mae-scenes")
    image = draw_scenes(1, seed=1, size=48).image
    page = prisma_view.overview(model, (image - 0.5) / 0.5)
    assert titles(page)[:2] == ["Reconstruction by layer", "Reconstruction along training"]
    assert "[64, 108] numbers" in page.why["Best guesses"]
    order = torch.rand(64, generator=torch.Generator().manual_seed(0)).argsort()
    theirs = reconstructions(image, (order < round(0.6 * 64))[None])
    (along,) = page.sections[1].figures
    assert along.chart.labels[1] == tuple(f"step {step}" for step in theirs.names("checkpoint"))
    np.testing.assert_allclose(along.chart.values[0, 0], theirs.tensors["error"], rtol=1e-4)
    (by_layer,) = page.sections[0].figures
    assert by_layer.chart.values[0, 0, -1] == pytest.approx(along.chart.values[0, 0, -1], rel=1e-4)
    assert by_layer.chart.values[0, 0, -1] < by_layer.chart.values[0, 0, 0]
    assert [words for _, words in page.sections[0].images][::4] == ["what the model sees", "the image"]


def test_an_autoencoder_with_a_decoder_of_its_own_fills_in_what_it_hides() -> None:
    kinds: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'prisma-interp[hf]'")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    decoder = {f"decoder_{name}": size for name, size in (sizes | {"num_hidden_layers": 2}).items()}
    config = kinds.ViTMAEConfig(image_size=16, patch_size=4, initializer_range=0.3, **sizes, **decoder)
    torch.manual_seed(0)
    upstream: Any = kinds.ViTMAEForPreTraining(config).eval()
    x = torch.rand(1, 3, 16, 16)
    page = prisma_view.overview(prisma.adapt(upstream), x)
    assert titles(page)[0] == "Reconstruction by layer"
    assert "ViTMAEForPreTraining" in page.title
    (errors,) = page.sections[0].figures
    assert errors.chart.labels[1] == ("encoder 0", "encoder 1", "encoder 2", "decoder 0", "decoder 1")

    def error(n_encoder: int, n_decoder: int) -> float:
        """The same without the later layers, by upstream's own modules."""
        cut = copy.deepcopy(upstream)
        cut.vit.layers, cut.decoder.decoder_layers = cut.vit.layers[:n_encoder], cut.decoder.decoder_layers[:n_decoder]
        torch.manual_seed(0)
        with torch.no_grad():
            out = cut(x)
        filled = cut.patchify(cut.unpatchify(out.logits).clamp(0, 1))
        return float((((filled - cut.patchify(x)) ** 2).mean(-1) * out.mask).sum() / out.mask.sum())

    expected = [error(1, 2), error(2, 2), error(3, 2), error(3, 1), error(3, 2)]
    np.testing.assert_allclose(errors.chart.values[0, 0], expected, rtol=1e-4)
    assert len({round(each, 4) for each in expected}) == 4
    relative = kinds.ViTMAEConfig(image_size=16, patch_size=4, norm_pix_loss=True, **sizes, **decoder)
    page = prisma_view.overview(prisma.adapt(kinds.ViTMAEForPreTraining(relative)), x)
    assert "does not make the pixels" in page.why["Reconstruction by layer"]


def test_a_video_is_shown_frame_by_frame() -> None:
    model = prisma.load("toy:motion")
    frames = draw_motions(1, seed=3).video[0, :, 0]
    video = (frames * 255).round().to(torch.uint8).numpy()
    page = prisma_view.overview(model, list(video))
    assert titles(page)[-1] == "Where heads look"
    lens = page.sections[1].figures[0].chart
    assert lens.values.shape == (5, 4, 16)
    assert lens.image.width == 4 * lens.image.height  # four frames that patches have, of eight that the model takes
    best = model.labels.index(lens.panels[0].removeprefix("class "))
    read = prisma_lens.logit_lens(model, model.preprocess(list(video)), [best]).values[-1, 0, :, 0]
    np.testing.assert_allclose(lens.values[0][:, 8:12], model.layout.grid(read, 0)[2], rtol=1e-4)


def test_a_dual_encoder_is_held_against_words(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs open_clip: pip install 'prisma-interp[clip]'")
    vision = {"width": 32, "layers": 2, "head_width": 16, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    clip = prisma.load("open_clip:ViT-B-32", pretrained=False, embed_dim=16, vision_cfg=vision)
    image = torch.randn(1, 3, 32, 32)
    page = prisma_view.overview(clip, image, WORDS, trained=False)
    chances = clip.classify(image, WORDS, template="{}")[0].detach()
    (bars,) = page.sections[0].figures
    drawn = dict(zip(bars.chart.labels[1], bars.chart.values[0, 0], strict=True))
    assert drawn == pytest.approx(dict(zip(WORDS, chances.tolist(), strict=True)), abs=1e-5)
    text = page.save(tmp_path / "page.html").read_text("utf-8")
    assert "untrained weights" in text
    assert "a <b>dog" not in text
    assert text.count("plotly.js v") == 1
    with pytest.raises(InputError, match="words="):
        prisma_view.overview(clip, image)
    with pytest.raises(InputError, match="no words"):
        prisma_view.overview(clip.vision, image, WORDS)


def test_a_hooked_upstream_shows_its_feature_maps() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    torch.manual_seed(0)
    model = prisma.adapt(timm.create_model("test_convnext").eval())
    x = torch.randn(1, 3, 64, 64)
    page = prisma_view.overview(model, x)
    assert titles(page) == ["Best guesses", "Patches by their principal components", "Feature maps"]
    assert len(page.sections[1].images) == 3
    figure = page.sections[2].figures[-1]
    _, cache = model.run_with_cache(x, names=figure.chart.title.split(",")[0])
    ((name, activation),) = cache.items()
    axes = model.hook_points()[name].axes.split()
    channels = next(at for at, axis in enumerate(axes) if axis not in ("batch", "row", "column"))
    np.testing.assert_allclose(figure.chart.values[0], activation.detach().norm(dim=channels)[0], rtol=1e-5)


def test_attention_within_windows_is_the_mean_over_windows() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
    torch.manual_seed(0)
    model = prisma.adapt(timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval())
    x = torch.randn(1, 3, 56, 56)
    page = prisma_view.overview(model, x)
    section = next(each for each in page.sections if each.title == "Where heads look")
    assert "token of their window" in section.words
    assert "the mean over all of them" in section.words
    _, cache = model.run_with_cache(x, names="hook_pattern")
    first = next(iter(cache.values()))
    np.testing.assert_allclose(section.figures[0].chart.values, first[0].detach().mean(0), rtol=1e-5)


def test_a_text_tower_is_told_where_its_page_is(image: torch.Tensor) -> None:
    with pytest.raises(InputError, match="attention --text"):
        prisma_view.overview(prisma.load("toy:clip-scenes").text, image)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report.html"
    assert main(["report", "toy:scenes-3l", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text("utf-8")
    assert len(re.findall(r'id="figure-\d"', text)) == 6
    assert not re.search(r"""<(?:img|script)[^>]*src=["'](?!data:)""", text.split("<script>")[0])
    assert main(["report", "toy:scenes-3l", "--words", "a, b", "--out", str(out)]) != 0
    assert "no words" in capsys.readouterr().err


@pytest.mark.parametrize("reference", ["toy:motion", "toy:mae-scenes"])
def test_the_commands_take_models_that_are_no_classifiers_of_images(reference: str, tmp_path: Path) -> None:
    assert main(["demo", "--model", reference, "--out", str(tmp_path), "--no-open"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert main(["report", reference, "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text("utf-8") == (tmp_path / "index.html").read_text("utf-8")


def test_a_demo_of_a_dual_encoder_takes_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["demo", "--model", "toy:clip-scenes", "--out", str(tmp_path / "out"), "--no-open"]
    assert main(given) != 0
    assert "--words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*given, "--words", "a red circle, a blue star"]) == 0
    assert "a blue star" in (tmp_path / "out" / "index.html").read_text("utf-8")
    assert main([*given, "--words", "a red circle", "--other", "nowhere.png"]) != 0


def test_files_are_read_in_the_dtype_that_pixels_meet_first() -> None:
    model: Any = prisma.load("toy:scenes-3l").to(torch.bfloat16)
    model.embed.prefix.data = model.embed.prefix.data.float()  # the first parameter is not what pixels meet
    scene = sample_scene(0).image
    assert model.input_like.dtype == torch.bfloat16
    assert prisma_lens.logit_lens(model, scene).values.isfinite().all()
    assert prisma_view.overview(model, scene).sections
    assert prisma_view.attention_page(model, scene)


def test_frames_side_by_side_have_a_line_between_them() -> None:
    from prisma_view.panels import enlarged

    image = np.asarray(enlarged(torch.zeros(3, 4, 4, 3)))
    lit = np.flatnonzero(image[0, :, 0])
    assert set(lit) == {edge + off for edge in (288, 576) for off in (-2, -1, 0, 1)}
    assert not np.asarray(enlarged(torch.zeros(4, 4, 3))).any()
