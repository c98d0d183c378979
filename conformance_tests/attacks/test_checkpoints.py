"""Files of ``torch.save`` that run code, or claim more than they hold; what is left behind; and files of every day."""

from __future__ import annotations

import argparse
import collections
import pickle
import struct
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import RunsCommand, pickled, state_of
from torch import nn

from prisma_core import LoadError
from prisma_core.files.checkpoint import read_checkpoint, read_outline, read_states

STATE = {"w": torch.arange(4000.0), "b": torch.ones(3)}
TENSOR = b"\0" * 64

# Instructions that call, and the words in which each is refused: "(cM\nN\n...tR" calls M.N with what stands between.
CALLS: dict[str, tuple[bytes, str]] = {
    "reduce": (b"cposix\nmkdir\n(V{mark}\ntR.", "wants to run posix.mkdir"),
    "reduce by name": (b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93V{mark}\n\x85R.", "wants to run posix.mkdir"),
    "inst": (b"(V{mark}\niposix\nmkdir\n.", "instruction that torch.save does not write.*INST"),
    "obj": (b"(cposix\nmkdir\nV{mark}\no.", "wants to run posix.mkdir"),
    "newobj": (b"cposix\nmkdir\n(V{mark}\nt\x81.", "wants to run posix.mkdir"),
    "newobj_ex": (b"\x80\x04cposix\nmkdir\n(V{mark}\nt}\x92.", "wants to run posix.mkdir"),
    "eval": (b"cbuiltins\neval\n(V__import__('os').mkdir('{mark}')\ntR.", "wants to run builtins.eval"),
    "exec": (b"c__builtin__\nexec\n(Vimport os; os.mkdir('{mark}')\ntR.", "wants to run __builtin__.exec"),
    "getattr": (b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntR.", "wants to run builtins.getattr"),
    "hub": (b"ctorch.hub\nload\n(Vsomeone/model\ntR.", "wants to run torch.hub.load"),
    "a file inside": (b"ctorch.storage\n_load_from_bytes\n(B\x02\0\0\0N.tR.", "wants to run torch.storage._load_from"),
    "an attribute": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "_rebuild_tensor_v2.__globals__"),
    "numpy": (b"cnumpy\nload\n(V{mark}\nN\x88tR.", "without a state dict"),  # it makes nothing
    "what is made": (b"cargparse\nNamespace\n)R)R.", "calls what is no function"),
    "a number": (b"I1\n)R.", "calls what is no function"),
    "a dtype": (b"ctorch\nfloat32\n)R.", "calls what is no function"),
    "an identity": (b"Vos\nQ.", "expected|not a readable checkpoint"),
    "a text's identity": (b"Pposix.mkdir\n.", "instruction that torch.save does not write.*PERSID"),
    "an extension": (b"\x82\x01.", "instruction that torch.save does not write.*EXT1"),
    "a buffer": (b"\x97.", "instruction that torch.save does not write.*NEXT_BUFFER"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_command_is_not_run(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "wicked.pt"
    torch.save({"w": STATE["w"], "x": RunsCommand(mark)}, path, _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=False)
    assert mark.exists()  # by itself
    mark.rmdir()
    for read in (read_checkpoint, read_states, read_outline):
        with pytest.raises(LoadError, match=r"(posix|nt)\.mkdir: refused.*[Ww]here you trust the file"):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_instructions_that_call(kind: str, zipped: bool, tmp_path: Path) -> None:
    data, told = CALLS[kind]
    mark = tmp_path / "ran"
    data = data.replace(b"{mark}", str(mark).encode())
    if zipped:
        path = pickled(tmp_path / "calls.pt", data)
    else:
        (path := tmp_path / "calls.pt").write_bytes(data)
        told = told.replace("without a state dict", "corrupt").replace("expected", "readable")
    if sys.platform != "win32" and kind in ("reduce", "reduce by name", "eval", "exec", "inst", "obj"):
        pickle.loads(data)  # by itself
        assert mark.exists()
        mark.rmdir()
    with pytest.raises(LoadError, match=told):
        read_checkpoint(path)
    assert not mark.exists()


def test_instructions_that_build_change_no_function(tmp_path: Path) -> None:
    """BUILD sets attributes of what stands before it: here of functions of torch's, and of a class."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"argparse\nNamespace"):
        path = pickled(tmp_path / "builds.pt", b"c" + name + b"\n(N}V__defaults__\nI7\nstb.")
        with pytest.raises(LoadError, match="without a state dict"):
            read_checkpoint(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert not hasattr(argparse.Namespace, "__defaults__")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((16, (10**12, 8), (0, 1)), "its tensors claim"),  # 32 TB by strides of 0
        ((16, (2**62, 2**62), (0, 0)), "its tensors claim"),
        ((10**12, (10**12,), (1,)), "a storage is shorter than it says"),
        ((16, (4, 8), (8, 1)), "not a readable checkpoint"),  # past the end
        ((16, (4,), (1,), 10**15), "not a readable checkpoint"),
        ((16, (-1,), (1,)), "its tensors claim axes"),
        ((16, (10**4000,) * 60, (0,) * 60), "its tensors claim axes"),  # their product alone takes minutes
        ((16, (1,) * 65, (1,) * 65), "its tensors claim axes"),
        ((-1, (4,), (1,)), "a storage is shorter than it says"),
    ],
)
def test_tensors_that_claim_more_than_the_file(sizes: Any, told: str, tmp_path: Path) -> None:
    path = pickled(tmp_path / "large.pt", state_of(*sizes), TENSOR)
    with pytest.raises(LoadError, match=told):
        read_checkpoint(path)


def test_a_claim_that_the_file_holds(tmp_path: Path) -> None:
    """The maker is right where the sizes are, so what it makes is refused for its sizes."""
    path = pickled(tmp_path / "small.pt", state_of(16, (2, 3), (8, 1), 1), torch.arange(16.0).numpy().tobytes())
    assert read_checkpoint(path)["w"].tolist() == [[1, 2, 3], [9, 10, 11]]
    assert torch.equal(torch.load(path, weights_only=False)["w"], read_checkpoint(path)["w"])


def test_an_old_file_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    assert data.count(b"M\xa0\x0f") >= 2  # 4000, as the storage's length and the tensor's
    (tmp_path / "old.pt").write_bytes(data.replace(b"M\xa0\x0f", b"J\xff\xff\xff\x7f"))
    with pytest.raises(LoadError, match="its storages claim"):
        read_checkpoint(tmp_path / "old.pt")


def test_hashes_that_never_end(tmp_path: Path) -> None:
    """A tuple of twice the tuple before, a hundred times over, as a key or in a set."""
    nested = b")" + b"q\0h\0\x86" * 100
    for data in (b"}" + nested + b"I1\ns.", b"\x80\x04\x8f(" + nested + b"\x90.", b"\x80\x04(" + nested + b"\x91."):
        with pytest.raises(LoadError, match="without a state dict"):
            read_checkpoint(pickled(tmp_path / "nested.pt", data))


@pytest.mark.parametrize("made", [b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"])
def test_one_list_copied_over_and_over(made: bytes, tmp_path: Path) -> None:
    """40,000 copies of a list of 50,000 pairs, by six bytes each: 16 GB of a file of 0.3 MB."""
    pairs = b"](" + b"I1\nI1\n\x86q\0" + b"h\0" * 50_000 + b"eq\1"
    path = pickled(tmp_path / "copies.pt", b"\x80\x02" + pairs + made + b"q\2" + b"h\2h\1\x85R" * 40_000 + b".")
    with pytest.raises(LoadError, match=r"copies \d+ items: refused"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_says_how_to_read_it(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    torch.jit.save(torch.jit.trace(layer, torch.zeros(1, 3)), tmp_path / "script.pt")
    with pytest.raises(LoadError, match=r"TorchScript archive.*torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        read_checkpoint(tmp_path / "script.pt")
    torch.save(torch.jit.load(tmp_path / "script.pt").state_dict(), tmp_path / "new.pt")
    assert torch.equal(read_checkpoint(tmp_path / "new.pt")["weight"], layer.weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "nested", "meta", "class"])
def test_tensors_of_other_kinds(kind: str, tmp_path: Path) -> None:
    made: dict[str, Callable[[], Any]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: torch.empty(3, device="meta"),
        "class": lambda: nn.Linear(2, 2),
    }
    torch.save({"w": made[kind]()}, tmp_path / "other.pt")
    told = "wants to run torch.nn.modules.linear.Linear" if kind == "class" else "holds a tensor that is"
    with pytest.raises(LoadError, match=told):
        read_checkpoint(tmp_path / "other.pt")


# ------------------------------------------------------------ what is left behind


def test_reading_changes_nothing_global(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1), "best": np.float64(1)}, tmp_path / "trained.pt")
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        mine = torch.serialization.get_safe_globals()
        assert read_checkpoint(tmp_path / "trained.pt").keys() == STATE.keys()
        with pytest.raises(LoadError):
            read_checkpoint(tmp_path)
        assert torch.serialization.get_safe_globals() == mine
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def test_other_threads_read_their_own_files(tmp_path: Path) -> None:
    """Once the user's arrays came back as objects of Prisma's, and one thread's file was refused for another's."""
    torch.save({"model": STATE, "best": np.float64(1), "keys": np.arange(3)}, tmp_path / "trained.pt")
    torch.save({"keys": np.arange(3)}, tmp_path / "mine.pt")
    scalar, rebuild = type(np.float64(1).__reduce__()[0]), np.arange(3).__reduce__()[0]
    assert scalar is not None
    faults: list[str] = []
    mine = [rebuild, np.ndarray, np.dtype, type(np.dtype("int64"))]

    def ours() -> None:
        for _ in range(40):
            try:
                read_checkpoint(tmp_path / "trained.pt")
            except LoadError as error:
                faults.append(str(error))

    def theirs() -> None:
        for _ in range(40):
            if not isinstance(torch.load(tmp_path / "mine.pt", weights_only=True)["keys"], np.ndarray):
                faults.append("the user's array is none")

    with torch.serialization.safe_globals(mine):
        threads = [threading.Thread(target=run) for run in (ours, theirs, ours, theirs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []


# ------------------------------------------------------------ files of honest people

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
KINDS += [torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]


@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_is_what_torch_reads(legacy: bool, tmp_path: Path) -> None:
    drawn = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 9
    kinds = KINDS[: -3 if legacy else None]  # the last ones came later than the old form
    state: dict[str, torch.Tensor] = {str(kind): drawn.abs().to(kind) for kind in kinds}
    state |= {
        "turned": drawn.t(),
        "part": drawn[1::2, 2:],
        "same": drawn,
        "none": torch.zeros(0, 3),
        "one": torch.tensor(3),
    }
    state |= {"wide": torch.tensor([1.0, 2.0])[:, None].expand(2, 7), "parameter": nn.Parameter(drawn[0])}
    torch.save(state, tmp_path / "all.pt", _use_new_zipfile_serialization=not legacy)
    theirs, ours = torch.load(tmp_path / "all.pt", weights_only=True), read_checkpoint(tmp_path / "all.pt")
    assert list(ours) == list(theirs) == list(state)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].to(torch.complex128), tensor.to(torch.complex128))
        assert ours[name].stride() == tensor.stride()
    assert {name: (one.shape, one.dtype) for name, one in read_outline(tmp_path / "all.pt").items()} == {
        name: (one.shape, one.dtype) for name, one in ours.items()
    }


def test_what_training_leaves_beside_the_weights(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    extras = {
        "args": argparse.Namespace(lr=1, out=Path("x")),
        "best": np.float64(0.5),
        "steps": {1, 2},
        "cut": slice(3),
    }
    extras |= {
        "counts": collections.Counter("ab"),
        "rest": collections.defaultdict(list, a=[1]),
        "device": torch.device("cpu"),
    }
    extras |= {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "size": torch.Size([2]), "none": None}
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth.tar"
        torch.save({"state_dict": layer.state_dict(), **extras}, path, _use_new_zipfile_serialization=not legacy)
        assert torch.equal(read_checkpoint(path)["weight"], layer.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.module.{name}",
        lambda name: f"_forward_module.model.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
    ],
)
def test_names_lose_what_training_puts_before_them(wrap: Callable[[str], str], tmp_path: Path) -> None:
    state = {"blocks.0.w": torch.ones(2), "head": torch.zeros(3)}
    torch.save({"state_dict": {wrap(name): x for name, x in state.items()}}, tmp_path / "wrapped.pt")
    assert list(read_checkpoint(tmp_path / "wrapped.pt")) == list(state)
    torch.save(
        {"n_averaged": torch.tensor(3)} | {f"module.{name}": x for name, x in state.items()}, tmp_path / "swa.pt"
    )
    assert list(read_checkpoint(tmp_path / "swa.pt")) == list(state)


def test_a_name_that_only_some_have_stays(tmp_path: Path) -> None:
    torch.save({"model.w": torch.ones(2), "head": torch.zeros(3)}, tmp_path / "some.pt")
    assert list(read_checkpoint(tmp_path / "some.pt")) == ["model.w", "head"]


def test_which_of_several(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "state_dict_ema": {"module.w": torch.zeros(2)}}, tmp_path / "ema.pt"
    )
    with pytest.raises(LoadError, match=r"2 state dicts \(state_dict, state_dict_ema\): give key="):
        read_checkpoint(tmp_path / "ema.pt")
    with pytest.raises(LoadError, match=r"none named 'ema': give key="):
        read_checkpoint(tmp_path / "ema.pt", "ema")
    assert read_checkpoint(tmp_path / "ema.pt", "state_dict_ema")["w"].tolist() == [0, 0]
    torch.save({"w": torch.ones(2)}, tmp_path / "one.pt")
    with pytest.raises(LoadError, match="none named 'ema': leave key= out"):
        read_checkpoint(tmp_path / "one.pt", "ema")


# ------------------------------------------------------------ archives and headers


def test_an_archive_that_holds_a_file_twice_is_refused(tmp_path: Path) -> None:
    """Readers of archives differ in which of the two they take."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(LoadError, match="holds a file twice"):
        read_checkpoint(tmp_path / "a.pt")


def test_an_archive_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    with (tmp_path / "a.pt").open("wb") as file:
        np.savez(file, weight=np.ones(2))
    with pytest.raises(LoadError, match=r"torch.save did not write; it holds weight\.npy"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("n", range(56, 65))
def test_a_header_of_any_length_is_one(n: int, tmp_path: Path) -> None:
    """Its length stands first: of 60, it is the letter that pages of the web begin with."""
    header = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'.ljust(n)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", n) + header + struct.pack("<f", 2.5))
    assert read_checkpoint(tmp_path / "a.safetensors") == {"a": torch.tensor(2.5)}


@pytest.mark.parametrize("key", [("w", 1), b"w", torch.float32, torch.Size([2]), None, 3])
def test_a_tensor_under_a_name_that_is_no_text_is_not_left_out(key: Any, tmp_path: Path) -> None:
    torch.save({**STATE, key: torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match="expected tensors by name"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"model": STATE, key: torch.ones(2)}, tmp_path / "w.pth")
    assert set(read_checkpoint(tmp_path / "w.pth")) == set(STATE)


def test_two_state_dicts_of_one_name(tmp_path: Path) -> None:
    torch.save({1: STATE, "1": STATE}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match="two state dicts of one name"):
        read_checkpoint(tmp_path / "w.pth")


def test_two_models_in_one_archive(tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.save({"w": torch.ones(3)}, tmp_path / f"{name}.pth")
    with zipfile.ZipFile(tmp_path / "one.pth", "a") as whole, zipfile.ZipFile(tmp_path / "two.pth") as other:
        for name in other.namelist():
            whole.writestr(name, other.read(name))
    with pytest.raises(LoadError, match=r"an archive that torch\.save did not write"):
        read_checkpoint(tmp_path / "one.pth")
