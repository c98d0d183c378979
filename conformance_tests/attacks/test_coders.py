"""Files of sparse coders that run code, or claim more than they hold. They pickle whole objects."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import class_of, standard
from hostile import RunsCommand, pickled, state_of, truncate
from prisma_sae import read
from safetensors.torch import save_file

from prisma_core import LoadError
from prisma_core.plugin import SavedObject, read_objects

KNOWN = "overcomplete.planted.SAE"
CONFIG = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
HEADER = json.dumps({"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {}}}}).encode() + b"\n"


def as_saev(path: Path) -> Path:
    path.write_bytes(HEADER + path.read_bytes())
    return path


def as_plain(path: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        data = archive.read("archive/data.pkl")
    (plain := path.with_suffix(".pkl.gz")).write_bytes(gzip.compress(data))
    return plain


# How a pickle's instructions reach a reader of coders, and the format that reads them.
WAYS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "overcomplete": (lambda path: path, "overcomplete"),
    "patch_sae": (lambda path: path, "patch_sae"),
    "msae": (lambda path: path, "msae"),
    "vit_prisma": (lambda path: path, "vit_prisma"),
    "gzipped": (as_plain, "vit_prisma"),
    "saev": (as_saev, "saev"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "instructions",
    [
        b"cposix\nmkdir\n(V{mark}\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93V{mark}\n\x85R.",
        b"(V{mark}\niposix\nmkdir\n.",
        b"(cposix\nmkdir\nV{mark}\no.",
        b"cbuiltins\neval\n(V__import__('os').mkdir('{mark}')\ntR.",
    ],
    ids=["reduce", "by name", "inst", "obj", "eval"],
)
def test_a_coder_runs_no_command(instructions: bytes, way: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    instructions = instructions.replace(b"{mark}", str(mark).encode())
    pickle.loads(instructions)
    assert mark.exists()  # by itself
    mark.rmdir()
    make, form = WAYS[way]
    path = make(pickled(tmp_path / "weights.pt", instructions))
    with pytest.raises(LoadError, match=r"wants to run (posix\.mkdir|builtins\.eval)|does not write.*(INST|OBJ)"):
        read(path, form)
    with pytest.raises(LoadError):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("way", ["overcomplete", "vit_prisma", "gzipped"])
def test_a_command_inside_a_class_that_is_known(way: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "weights.pt"
    with class_of(KNOWN if way == "overcomplete" else CONFIG, note=RunsCommand(mark)) as known:
        torch.save(known if way == "overcomplete" else {"cfg": known, "state_dict": standard()}, path)
        if way == "gzipped":
            path = tmp_path / "weights.pkl.gz"
            path.write_bytes(gzip.compress(pickle.dumps({"cfg": known, "state_dict": standard()})))
    with pytest.raises(LoadError, match=r"(posix|nt)\.mkdir: refused"):
        read(path)
    assert not mark.exists()


def test_a_class_that_is_known_is_neither_imported_nor_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a format knows by how they begin may be anybody's: a module on the path, a function of torch's."""
    (tmp_path / "overcomplete").mkdir()
    (tmp_path / "overcomplete" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "overcomplete", raising=False)
    for name in (b"overcomplete\nrun", b"torch.nn.init\nzeros_", b"functools\npartial"):
        read_objects(pickled(tmp_path / "sae.pt", b"c" + name + b"\n)R."), lambda name: True)
        with pytest.raises(LoadError):
            read(tmp_path / "sae.pt", "overcomplete")
    assert not (tmp_path / "ran").exists()


def test_what_an_object_is_built_of_changes_no_other(tmp_path: Path) -> None:
    """BUILD gives attributes to the object before it, in two parts where it has slots; names of methods are names."""
    state = b"}Vget\nI7\ns}V__class__\nI8\ns\x86b"
    made = read_objects(pickled(tmp_path / "sae.pt", b"ca.b\nC\n)\x81" + state + b"."), lambda name: name == "a.b.C")
    assert isinstance(made, SavedObject)
    assert (made.path, made.name, made.attributes) == ("a.b.C", "C", {"get": 7, "__class__": 8})
    assert made.get("get") == 7


# ------------------------------------------------------------ claims


TENSOR = b"\0" * 64


@pytest.mark.parametrize("way", ["msae", "vit_prisma", "saev"])
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((16, (10**12, 8), (0, 1)), "its tensors claim"),
        ((10**12, (10**12,), (1,)), "a storage is shorter than it says"),
        ((16, (4, 8), (8, 1)), "not a readable checkpoint"),  # strides past the end
        ((16, (4,), (1,), 10**15), "not a readable checkpoint"),
    ],
)
def test_coders_that_claim_more_than_they_hold(sizes: Any, told: str, way: str, tmp_path: Path) -> None:
    make, form = WAYS[way]
    path = make(pickled(tmp_path / "weights.pt", state_of(*sizes), TENSOR))
    with pytest.raises(LoadError, match=told):
        read(path, form)


def test_storages_inside_a_plain_pickle(tmp_path: Path) -> None:
    """A storage given out a thousand times, and one whose own file lies about its length."""
    data = pickle.dumps({"w": torch.zeros(4000)})
    (path := tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(data, 0))
    assert read_objects(path, lambda name: False)["w"].shape == (4000,)
    torch.save(torch.zeros(4000).untyped_storage(), tmp_path / "storage.pt", _use_new_zipfile_serialization=False)
    stored = (tmp_path / "storage.pt").read_bytes()
    assert stored.count(b"M\x80>") == 1  # 16,000 bytes
    longer = stored.replace(b"M\x80>", b"J\xff\xff\xff\x7f")
    for held, times in ((stored, 1000), (longer, 0)):
        load = b"ctorch.storage\n_load_from_bytes\nq\0B" + len(held).to_bytes(4, "little") + held + b"q\1\x85R"
        path.write_bytes(gzip.compress(b"\x80\x03" + load + b"h\0h\1\x85R" * times + b".", 0))
        with pytest.raises(LoadError, match="its storages claim"):
            read_objects(path, lambda name: False)


def test_a_file_inside_a_file_inside(tmp_path: Path) -> None:
    """A file in a storage's file is refused, so that none goes down for ever."""
    data = b"\x80\x03I1\n."
    for _ in range(3):
        data = b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R."
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(data))
    with pytest.raises(LoadError, match=r"_load_from_bytes: refused"):
        read_objects(tmp_path / "sae.pkl.gz", lambda name: False)


def test_bytes_that_unpack_without_end(tmp_path: Path) -> None:
    (path := tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(b"N" * (1 << 26)))
    with pytest.raises(LoadError, match="unpacks to more than 16 times"):
        read(path)
    with zipfile.ZipFile(tmp_path / "sae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * (1 << 26))
    with pytest.raises(LoadError, match="is compressed"):
        read(tmp_path / "sae.pt")


@pytest.mark.parametrize("way", WAYS)
def test_coders_cut_short(way: str, tmp_path: Path) -> None:
    torch.save({"model": standard(), "state_dict": standard(), "cfg": {}}, tmp_path / "weights.pt")
    make, form = WAYS[way]
    if way == "gzipped":
        (path := tmp_path / "weights.pkl.gz").write_bytes(gzip.compress(pickle.dumps({"state_dict": standard()})))
    else:
        path = make(tmp_path / "weights.pt")
    truncate(path)
    with pytest.raises(LoadError, match=r"weights\..*(truncated|corrupt)"):
        read(path, form)


# ------------------------------------------------------------ nesting


def with_config(fields: bytes, path: Path) -> Path:
    """Write a coder of PatchSAE whose configuration holds what these instructions make."""
    tensors = b"".join(
        b"V" + name.encode() + b"\n" + state_of(4, shape, (1,) * len(shape))[len(b"\x80\x02}Vw\n") : -2]
        for name, shape in {"W_enc": (2, 2), "b_enc": (2,), "W_dec": (2, 2), "b_dec": (2,)}.items()
    )
    config = b"csae_training.config\nConfig\n)\x81}V_\n" + fields + b"sb"
    return pickled(path, b"\x80\x02}(Vcfg\n" + config + b"Vstate_dict\n}(" + tensors + b"uu.", TENSOR)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (b"]" * 100_000 + b"a" * 99_999, "RecursionError"),
        (b"]q\0h\0a", "RecursionError"),  # a list in itself
        (b"]q\0" + b"0](h\0h\0eq\0" * 60, "100,000 values"),  # of two lists of two lists of two ...: 2 to the 60
        (b"ca\nSet\n", "wants to run a.Set"),
    ],
    ids=["deep", "in itself", "doubled", "other"],
)
def test_configurations_that_nest_without_end(fields: bytes, told: str, tmp_path: Path) -> None:
    assert read(with_config(b"I7\n", tmp_path / "good.pt")).facts.more["_"] == 7
    with pytest.raises(LoadError, match=told):
        read(with_config(fields, tmp_path / "nested.pt"))


def test_modules_that_nest_without_end(tmp_path: Path) -> None:
    """A module whose two parts are one module, sixty times over; one in itself; ten thousand, one in the other."""

    def module(parts: bytes) -> bytes:
        return b"ctorch.nn\nM\n)\x81}V_modules\n}(" + parts + b"usb"

    doubled = module(b"")
    for _ in range(60):
        doubled = doubled + b"q\x000" + module(b"Va\nh\0Vb\nh\0")
    itself = b"ctorch.nn\nM\n)\x81q\0}V_modules\n}Va\nh\0ssb"
    deep = b"ctorch.nn\nM\n)\x81}V_modules\n}Va\n" * 10_000 + b"N" + b"ssb" * 10_000
    for name, part in {"doubled": doubled, "itself": itself, "deep": deep}.items():
        parts = b"}(Vdictionary\n" + part + b"Vencoder\nNu"
        whole = b"\x80\x02covercomplete.sae\nSAE\n)\x81}V_modules\n" + parts + b"sb."
        with pytest.raises(LoadError, match="RecursionError" if name == "deep" else "KeyError: 'multiplier'"):
            read(pickled(tmp_path / f"{name}.pt", whole), "overcomplete")


def test_a_count_that_a_coder_claims(tmp_path: Path) -> None:
    """The width is that of the encoder's tensors, and not a number beside them."""
    library = pytest.importorskip(
        "overcomplete.sae", reason="overcomplete is not installed: pip install 'prisma-interp[sae-train]'"
    )
    model = library.BatchTopKSAE(6, 20, top_k=3, device="cpu").train()
    model(torch.randn(8, 6))
    model.nb_concepts = 10**15
    torch.save(model.eval(), tmp_path / "sae.pt")
    assert read(tmp_path / "sae.pt").facts.d_sae == 20


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"model": {"latent_bias": 1, "encoder": None}}, "lacks pre_bias"),
        ({"model": {"latent_bias": torch.ones(3), "pre_bias": torch.ones(3)}}, "lacks encoder"),
        ({"model": {"latent_bias": torch.ones(3), "encoder": "a text", "pre_bias": 1}}, "no whole file of MSAE"),
    ],
)
def test_coders_that_lack_something(saved: Any, told: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "3_3_ReLU.pth")
    with pytest.raises(LoadError, match=told):
        read(tmp_path / "3_3_ReLU.pth")


@pytest.mark.parametrize("head", [b"{", b"{}", b"[" * 100_000, b"{" * (1 << 21), b"[1]\n", b'{"a": NaN'])
def test_a_line_that_is_no_object(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(head)
    with pytest.raises(LoadError, match=r"sae\.pt"):
        read(tmp_path / "sae.pt", "saev")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_numbers_that_are_none(name: str, value: float, tmp_path: Path) -> None:
    tensors = standard() | {"threshold": torch.full_like(standard()["b_enc"], 0.5)}
    tensors[name].view(-1)[3] = value
    config = {"architecture": "jumprelu", "d_in": 6, "d_sae": 20, "metadata": {}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(LoadError, match=rf"NaN or infinite, in {name}"):
        read(tmp_path)
