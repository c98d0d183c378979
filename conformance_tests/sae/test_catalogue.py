"""The catalogue: what it lists, what it binds a file to, and what it says where a file is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coders import D_IN, D_SAE, class_of, standard
from PIL import Image
from prisma_sae import CoderFacts, SparseCoder, catalogue, load, published, read, save
from prisma_sae.formats import FORMATS
from prisma_sae.published import Entry, entry
from prisma_toy import sample_scene

import prisma_core as prisma
from prisma_core import LoadError, UnknownName
from prisma_core.cli.app import main
from prisma_core.plugin import Preprocess

TRAINS = "needs pip install 'prisma-interp[sae-train]'"


def test_the_82_coders_of_vit_prisma_are_there_with_their_figures() -> None:
    lines = [each for each in catalogue() if each.source == "ViT-Prisma docs/sae_table.md"]
    kinds = [(each.model.partition(":")[2].partition("/")[0], each.kind, each.tokens) for each in lines]
    assert len(lines) == 82
    assert kinds.count(("facebook", "standard", "all")) == 12
    assert kinds.count(("hf-hub:laion", "standard", "all")) == 24
    assert kinds.count(("hf-hub:laion", "topk", "cls")) == kinds.count(("hf-hub:laion", "standard", "cls")) == 12
    assert (
        kinds.count(("hf-hub:laion", "standard", "patches")) == kinds.count(("hf-hub:laion", "transcoder", "all")) == 11
    )
    assert all("explained_variance" in each.figures and "l0" in each.figures for each in lines)
    one = entry("clip-b32-all-9-mlp-out")
    assert one.repository.endswith("sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-9-hook_mlp_out-l1-1e-05")
    assert (one.hook, one.tokens, one.d_sae) == ("blocks.9.hook_mlp_out", "all", 49152)
    figures = {"l0": 856.68, "l0_cls": 1076.0, "explained_variance": 0.976, "loss_recovered_no_scale": 1.0028}
    assert {name: one.figures[name] for name in figures} == figures
    dino = entry("dino-b16-all-3-resid-post")
    assert (dino.figures["loss_zero"], dino.figures["loss_spliced"]) == (7.2068, 1.961913)
    across = entry("clip-b32-transcoder-4")
    assert (across.hook, across.hook_out) == ("blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out")
    assert (across.k, across.figures["l0_cls"]) == (512, 29)


def test_every_line_names_a_known_format_and_has_a_place() -> None:
    names = [each.name for each in catalogue()]
    assert len(names) == len(set(names)) > 100
    for each in catalogue():
        assert each.format in FORMATS
        assert each.hook.startswith(("blocks.", "hook_"))
        assert (each.hook_out is not None) == (each.kind == "transcoder")
        assert each.files or each.note or not each.repository


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A line of the catalogue whose coder is small, and a maker of its file."""
    line = entry("clip-b32-cls-3-resid-post").model_copy(update={"d_in": D_IN, "d_sae": D_SAE})
    monkeypatch.setattr(published, "catalogue", lambda: (line,))

    def made(**fields: Any) -> tuple[Entry, Path]:
        about = {
            "hook_point_layer": 3,
            "layer_subtype": "hook_resid_post",
            "cls_token_only": True,
            "activation_fn_str": "relu",
            "normalize_activations": "layer_norm",
        } | fields
        with class_of("vit_prisma.sae.config.VisionModelSAERunnerConfig", **about) as config:
            torch.save({"cfg": config, "state_dict": standard()}, tmp_path / "weights.pt")
        return line, tmp_path / "weights.pt"

    return made


def test_a_file_that_is_here_is_bound_to_what_the_catalogue_says(small: Any) -> None:
    line, path = small()
    coder = load(line.name, path=path)
    assert (coder.facts.model, coder.facts.also) == (line.model, line.also)
    assert (coder.facts.hook, coder.facts.tokens) == ("blocks.3.hook_resid_post", "cls")
    assert coder.facts.figures["explained_variance"] == 0.95
    assert torch.equal(coder.W_enc, read(path).W_enc)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hook_point": "blocks.4.hook_resid_post"}, r"blocks\.3.*blocks\.4"),
        ({"cls_token_only": False}, "tokens cls against all"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(small: Any, fields: dict[str, Any], words: str) -> None:
    line, path = small(**fields)
    with pytest.raises(LoadError, match=words):
        load(line.name, path=path)


def test_an_old_file_without_its_place_gets_it_from_the_catalogue(small: Any) -> None:
    line, path = small(layer_subtype=None)
    with pytest.raises(LoadError, match="layer_subtype"):
        read(path)
    assert load(line.name, path=path).facts.hook == "blocks.3.hook_resid_post"


def test_what_needs_a_network_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, names: Any, *, reference: str) -> Path:
        raise LoadError(f"{reference} is out of reach.")

    monkeypatch.setattr(published.hub, "fetch", refuse)
    with pytest.raises(LoadError, match=r"weights\.pt of the repository Prisma-Multimodal/DINO.*path=FILE"):
        load("dino-b16-all-3-resid-post")
    with pytest.raises(LoadError, match=r"file=layer_13/RUN/sae\.pt"):
        load("saev-dinov3-vitl16-13")
    with pytest.raises(UnknownName, match="dino-b16-all-3-resid-post"):
        load("dino-b16-all-3-resid-pre")


def test_activations_of_dinov2_cannot_be_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = entry("saev-dinov2-b14-10").model_copy(update={"d_in": D_IN, "d_sae": D_SAE})
    monkeypatch.setattr(published, "catalogue", lambda: (line,))
    with (tmp_path / "sae.pt").open("wb") as file:
        file.write(b'{"d_vit": 6, "exp_factor": 2}\n')
        torch.save(standard(), file)
    with pytest.raises(LoadError, match="mean="):
        load(line.name, path=tmp_path / "sae.pt")
    coder = load(line.name, path=tmp_path / "sae.pt", mean=torch.ones(D_IN), scale=2.0181241035461426)
    assert coder.facts.normalize == "standardize"


def test_images_of_coders_of_dino_were_cut_and_not_squashed() -> None:
    """ViT-Prisma's own transform, beside what the note of the catalogue makes of a processor that squashes."""
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed: pip install timm")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.Resize(size=224, interpolation=bicubic, max_size=None, antialias=True),
            transforms.CenterCrop(size=(224, 224)),
            transforms.ToTensor(),
            transforms.Normalize(mean=mean, std=std),
        ]
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 71, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((500, 300))
    model = SimpleNamespace(preprocess=Preprocess(size=(224, 224), resize="squash", mean=mean, std=std))
    squashed = model.preprocess(image)[0]
    notes = {each.note for each in catalogue() if each.model == "hf:facebook/dino-vitb16"}
    assert len(notes) == 1
    exec(notes.pop().partition("preprocess does not: ")[2], {"model": model})
    torch.testing.assert_close(model.preprocess(image)[0], theirs(image), rtol=0, atol=1e-5)
    assert (squashed - theirs(image)).abs().mean() > 0.1


# -------------------------------------------------------------------- commands


def test_list_shows_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sae", "list", "DINO-B16"])  # in whatever case
    out = capsys.readouterr().out
    assert out.count("\n") == 13
    assert "dino-b16-all-8-resid-post" in out
    main(["sae", "list", "transcoder-4", "--json"])
    (line,) = json.loads(capsys.readouterr().out)
    assert (line["name"], line["k"]) == ("clip-b32-transcoder-4", 512)


def test_load_shows_facts_and_writes_the_coder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(load("scenes-3l"), tmp_path / "in")
    main(["sae", "load", str(source), "--json", "--out", str(tmp_path / "out")])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["tokens"]) == ("toy:scenes-3l", "patches")
    assert torch.equal(read(tmp_path / "out").W_dec, load("scenes-3l").W_dec)
    assert main(["sae", "load", "scenes-3"]) == 1
    assert "scenes-3l" in capsys.readouterr().err


def test_eval_puts_measures_beside_figures_and_refuses_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sae", "eval", "scenes-3l", "-n", "4", "--json"])
    measures = json.loads(capsys.readouterr().out)
    assert measures["l0"]["here"] == pytest.approx(8, abs=0.5)
    assert measures["explained_variance_total"]["here"] > 0.5
    assert measures["explained_variance"]["published"] == load("scenes-3l").facts.figures["explained_variance"]
    assert main(["sae", "eval", "scenes-3l", "--model", "toy:dsprites-attn-1l"]) == 1
    assert "toy:scenes-3l" in capsys.readouterr().err


def test_train_writes_a_coder_that_eval_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("overcomplete.sae", reason=TRAINS)
    out = str(tmp_path / "coder")
    options = ["--hook", "blocks.0.hook_mlp_out", "--tokens", "patches", "--d-sae", "64", "--k", "4"]
    main(["sae", "train", "toy:scenes-3l", *options, "--steps", "3", "--batch", "256", "--out", out])
    coder = read(out)
    assert (coder.facts.model, coder.facts.hook, coder.facts.tokens) == (
        "toy:scenes-3l",
        "blocks.0.hook_mlp_out",
        "patches",
    )
    assert coder.facts.weights == load("scenes-3l").facts.weights
    capsys.readouterr()
    main(["sae", "eval", out, "-n", "2", "--json"])
    assert "l0" in json.loads(capsys.readouterr().out)
    assert main(["sae", "train", "toy:scenes-3l", *options, "--tokens", "odd"]) == 1
    assert "'odd'" in capsys.readouterr().err


def test_a_folder_without_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("overcomplete.sae", reason=TRAINS)
    place = ["--hook", "blocks.0.hook_resid_post", "--out", str(tmp_path / "new")]
    assert main(["sae", "train", "toy:scenes-3l", str(tmp_path), *place]) == 1
    assert f"Error: There are no images in {tmp_path}." in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "new").exists()


def drawn_into(folder: Path, *classes: str) -> Path:
    for at, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        sample_scene(at).image.save(folder / name / "0.PNG")
        sample_scene(at + 9).image.save(folder / name / "1.jpg")
    (folder / ".DS_Store").write_bytes(b"no image")
    (folder / "labels.txt").write_text("no image")
    return folder


def test_folders_name_the_classes_of_a_pair_of_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses stand beside those that were published for CLIP: with its scale, and without."""
    model = prisma.load("toy:clip-scenes")
    d, hook = model.vision.spec.d_model, "blocks.1.hook_resid_post"
    facts = CoderFacts(kind="standard", d_in=d, d_sae=9, d_out=d, hook=hook, model="toy:clip-scenes", tokens="all")
    drawn = torch.Generator().manual_seed(0)
    tensors = {"W_enc": torch.randn(d, 9, generator=drawn), "b_enc": torch.zeros(9), "W_dec": torch.zeros(9, d)}
    coder = save(SparseCoder(facts, tensors | {"b_dec": torch.zeros(d)}), tmp_path / "coder")
    folder = drawn_into(tmp_path / "classes", "blue square", "red circle/more")
    command = ["sae", "eval", str(coder), str(folder), "--json", "--template", "a {}"]
    assert main(command) == 0
    measures = json.loads(capsys.readouterr().out)
    files = sorted(folder.rglob("*/*.*"))
    labels = torch.tensor([0, 0, 1, 1])
    texts = model.tokens(["a blue square", "a red circle"])
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(model.preprocess(files), texts), labels)
    assert measures["loss"]["here"] == pytest.approx(want.item(), rel=1e-4)
    assert measures["loss_no_scale"]["here"] != pytest.approx(want.item(), rel=1e-2)
    assert main([*command[:-1], "no place"]) == 1
    assert "'no place'" in capsys.readouterr().err


def test_folders_that_name_no_class_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = drawn_into(tmp_path / "classes", "some", "other")
    assert main(["sae", "eval", "scenes-3l", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert "loss" not in json.loads(said.out)
    assert "no class of this model: other" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "scenes-3l", "--batch", "0"], "--batch"),
        (["eval", "scenes-3l", "-n", "0"], "-n"),
        (["train", "toy:scenes-3l", "--hook", "hook_embed", "--steps", "0"], "--steps"),
        (["train", "toy:scenes-3l", "--hook", "hook_embed", "--kind", "odd"], "kind: Input should be 'topk'"),
        (
            ["train", "toy:scenes-3l", "--hook", "hook_embed", "--lr", "-1"],
            "lr: Input should be greater than 0, not -1",
        ),
    ],
)
def test_options_that_no_command_can_follow(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "train":
        pytest.importorskip("overcomplete.sae", reason=TRAINS)
    assert main(["sae", *words]) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "bug" not in error
    assert "pydantic" not in error
