"""Saving is atomic: after a kill, over a full or read-only disk and beside others, a folder holds one whole model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import prisma_core as prisma
from prisma_core import ActivationCache, HookedViT, InputError, LoadError
from prisma_core.files import atomic, checkpoint
from prisma_core.saving import folder as saving
from prisma_core.saving.folder import SPEC, WEIGHTS

OLD, NEW = ("old",) * 7, ("new",) * 7


@pytest.fixture
def old(in_float64: None) -> HookedViT:
    return labelled(0, OLD)


@pytest.fixture
def new(in_float64: None) -> HookedViT:
    return labelled(1, NEW)


def labelled(seed: int, labels: tuple[str, ...]) -> HookedViT:
    model = build(seed=seed)
    model.labels = labels
    return model


def same(one: HookedViT, other: HookedViT) -> bool:
    tensors, others = one.state_dict(), other.state_dict()
    alike = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return alike and one.labels == other.labels


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -------------------------------------------------------------------- kills, readers, writers

PROCESSES = """
import os, random, shutil, signal, sys, tempfile, time
from pathlib import Path

sys.path[:0] = sys.argv[2:3]
import torch
import prisma_core as prisma
from models import build

models = {}
for seed, name in enumerate(("old", "new")):
    models[name] = build(seed=seed)
    models[name].labels = (name,) * 7


def check(folder):
    found = prisma.load(f"file:{folder}")
    true = models[found.labels[0]].state_dict()
    assert all(torch.equal(tensor, true[name]) for name, tensor in found.state_dict().items()), "a mixture"
    return found.labels[0]


def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid):
    return os.waitpid(pid, 0)[1]


def killed_at(n, folder):
    calls = 0

    def counted(function):
        def call(*given, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **options)

        return call

    def work():
        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir", "write"):
            setattr(os, name, counted(getattr(os, name)))
        prisma.save(models["new"], folder)

    return work


def kills(folder):
    outcomes = []
    for n in range(1, 41):
        prisma.save(models["old"], folder)
        status = ended(child(killed_at(n, folder)))
        outcomes.append(check(folder))
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    else:
        raise AssertionError("a save makes more steps than were tried")
    random.seed(0)
    for _ in range(60 - len(outcomes)):
        name = random.choice(list(models))
        pid = child(lambda: [prisma.save(models[name], folder) for _ in range(1000)])
        time.sleep(random.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(ended(pid))
        outcomes.append(check(folder))
    assert {"old", "new"} <= set(outcomes), outcomes
    prisma.save(models["old"], folder)
    assert check(folder) == "old"
    assert sorted(os.listdir(folder)) == ["model.safetensors", "spec.json"], os.listdir(folder)


def readers_and_writers(folder):
    prisma.save(models["old"], folder)
    writers = [child(lambda: [prisma.save(models[name], folder) for name in names * 20]) for names in
               (["old", "new"], ["new", "old"])]
    seen = [check(folder) for _ in range(60)]
    assert [ended(pid) for pid in writers] == [0, 0]
    check(folder)
    assert sorted(os.listdir(folder)) == ["model.safetensors", "spec.json"], os.listdir(folder)


def read_only(folder):
    folder = Path(tempfile.mkdtemp()) / "read_only"  # where whoever is not root may look too
    folder.parent.chmod(0o755)
    prisma.save(models["old"], folder)
    os.chmod(folder, 0o555)

    def work():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        check(folder)
        try:
            prisma.save(models["new"], folder)
        except prisma.LoadError as error:
            assert "cannot be written: Permission denied" in str(error), error
        else:
            raise AssertionError("saved into a folder that is read-only")

    assert ended(child(work)) == 0
    assert check(folder) == "old"
    shutil.rmtree(folder.parent)


for work in (kills, readers_and_writers, read_only):
    work(Path(sys.argv[1]) / work.__name__)
    print(work.__name__, flush=True)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The names of what went well, one a line, of one process that forks: torch is imported once."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork and no kill -9")
    folder = tmp_path_factory.mktemp("processes")
    helpers = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", PROCESSES, str(folder), helpers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("what", ["kills", "readers_and_writers", "read_only"])
def test_a_folder_holds_one_whole_model(processes: str, what: str) -> None:
    assert what in processes.splitlines(), processes


# -------------------------------------------------------------------- disks


def full(*given: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def full_in_rust(*given: Any, **options: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("broken", [full, full_in_rust])
def test_a_full_disk_leaves_the_old_model(
    broken: Callable[..., None], old: HookedViT, new: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prisma.save(old, tmp_path)
    before = listing(tmp_path)
    _, cache = new.run_with_cache(*new.sample_inputs())
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", broken)
        patch.setattr(checkpoint, "save_file", broken)
        with pytest.raises(LoadError, match=r"cannot be written: .*No space left on device"):
            prisma.save(new, tmp_path)
        with pytest.raises(LoadError, match=r"cannot be written: .*No space left on device"):
            cache.save(tmp_path / "cache.safetensors")
    assert same(prisma.load(f"file:{tmp_path}"), old)
    assert listing(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(old: HookedViT, new: HookedViT, small_disk: Path) -> None:
    prisma.save(old, small_disk)
    (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 16384))
    with pytest.raises(LoadError, match="No space left on device"):
        prisma.save(new, small_disk)
    with pytest.raises(LoadError, match="No space left on device"):
        new.run_with_cache(*new.sample_inputs())[1].save(small_disk / "cache.safetensors")
    assert same(prisma.load(f"file:{small_disk}"), old)
    assert listing(small_disk) == ["filler", WEIGHTS, SPEC]


@pytest.mark.parametrize("n", range(1, 30))
def test_an_error_at_any_step_leaves_one_whole_model(
    n: int, old: HookedViT, new: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prisma.save(old, tmp_path)
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return full() if calls == n else function(*given, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            prisma.save(new, tmp_path)
            saved = True
        except LoadError:
            saved = False
    found = prisma.load(f"file:{tmp_path}")
    assert same(found, new if saved else old)
    prisma.save(old, tmp_path)
    assert listing(tmp_path) == [WEIGHTS, SPEC]


# -------------------------------------------------------------------- what is not Prisma's


def test_what_the_user_put_there_stays(old: HookedViT, tmp_path: Path) -> None:
    kept = [tmp_path / "companions" / "my-notes" / "precious.txt", tmp_path / "companions" / "list.txt"]
    kept += [tmp_path / "model-of-mine" / "x", tmp_path / "companions" / "tokenizer" / "mine.json"]
    kept += [tmp_path / f".prisma-{name}" / "x" for name in ("notes", "abcdefgh", "writing-up")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "x").write_text("elsewhere")
    (tmp_path / "companions" / "link").symlink_to(outside)
    (tmp_path / "companions" / "tokenizer-0123456789ab").symlink_to(outside)
    (tmp_path / ".prisma-writing-abcdefgh").symlink_to(outside)
    for _ in range(2):
        prisma.save(old, tmp_path)
    assert all(path.read_text() == "years of work" for path in kept)
    assert (outside / "x").read_text() == "elsewhere"
    assert (tmp_path / "companions" / "link").is_symlink()
    assert same(prisma.load(f"file:{tmp_path}"), old)


def test_links_are_replaced_not_followed(old: HookedViT, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("elsewhere")
    for name in (SPEC, WEIGHTS):
        (tmp_path / "k").mkdir(exist_ok=True)
        (tmp_path / "k" / name).symlink_to(outside)
    prisma.save(old, tmp_path / "k")
    assert outside.read_text() == "elsewhere"
    assert not (tmp_path / "k" / WEIGHTS).is_symlink()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_companions_that_are_no_folder(kind: str, old: HookedViT, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "k").mkdir()
    place = tmp_path / "k" / "companions"
    place.symlink_to(tmp_path / "elsewhere") if kind == "link" else place.write_text("mine")
    with pytest.raises(LoadError, match="companions is no folder but a file or a link"):
        prisma.save(old, tmp_path / "k")
    assert listing(tmp_path / "k") == ["companions"]


@pytest.mark.parametrize("name", [SPEC, WEIGHTS])
def test_a_folder_where_a_file_should_be(name: str, old: HookedViT, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(LoadError, match=f"{name} is a folder, and a file is to be written there"):
        prisma.save(old, tmp_path)


def test_a_path_that_none_is(old: HookedViT, tmp_path: Path) -> None:
    for path in ("k\0", "k" * 300):
        with pytest.raises((LoadError, InputError), match=r"path of a folder|cannot be written"):
            prisma.save(old, tmp_path / path)
        with pytest.raises((LoadError, InputError)):
            prisma.load(f"file:{tmp_path / path}")


# -------------------------------------------------------------------- old folders, other weights, leftovers


def test_a_folder_without_digests_loads_and_may_be_saved_over(old: HookedViT, new: HookedViT, tmp_path: Path) -> None:
    """As it was written before there were any."""
    facts = json.loads((prisma.save(old, tmp_path) / SPEC).read_text())
    del facts["weights"], facts["companions"], facts["spec"]["kind"]
    (tmp_path / SPEC).write_text(json.dumps(facts))
    assert same(prisma.load(f"file:{tmp_path}"), old)
    prisma.save(new, tmp_path)
    assert same(prisma.load(f"file:{tmp_path}"), new)


def test_weights_of_another_model_are_refused(old: HookedViT, new: HookedViT, tmp_path: Path) -> None:
    prisma.save(old, tmp_path / "k")
    prisma.save(new, tmp_path / "l")
    shutil.copy(tmp_path / "l" / WEIGHTS, tmp_path / "k" / WEIGHTS)
    with pytest.raises(LoadError, match=r"holds other weights than spec\.json was written with"):
        prisma.load(f"file:{tmp_path / 'k'}")
    tensors = load_file(tmp_path / "l" / WEIGHTS)
    tensors["head.bias"] = tensors["head.bias"].float()
    save_file(tensors, tmp_path / "l" / WEIGHTS)
    with pytest.raises(LoadError):
        prisma.load(f"file:{tmp_path / 'l'}")


def test_what_lies_beside_its_place_is_found_and_tidied(old: HookedViT, new: HookedViT, tmp_path: Path) -> None:
    """As a kill between the spec and the last move leaves it."""
    sha256 = json.loads((prisma.save(new, tmp_path / "l") / SPEC).read_text())["weights"]["sha256"]
    prisma.save(old, tmp_path / "k")
    shutil.copy(tmp_path / "l" / WEIGHTS, tmp_path / "k" / f"model-{sha256[:12]}.safetensors")
    assert same(prisma.load(f"file:{tmp_path / 'k'}"), old)
    shutil.copy(tmp_path / "l" / SPEC, tmp_path / "k" / SPEC)
    assert same(prisma.load(f"file:{tmp_path / 'k'}"), new)
    prisma.save(old, tmp_path / "k")
    assert listing(tmp_path / "k") == [WEIGHTS, SPEC]


def test_folders_of_the_living_are_left_alone(tmp_path: Path) -> None:
    with atomic.staging(tmp_path) as mine, atomic.staging(tmp_path) as other:
        assert mine.is_dir()
        assert other.is_dir()
    assert listing(tmp_path) == []


def test_a_cache_is_whole_or_not_there(old: HookedViT, image: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.safetensors"
    _, first = old.run_with_cache(image)
    _, second = old.run_with_cache(image + 1)
    first.save(path)
    second.save(path)
    assert torch.equal(ActivationCache.load(path, old)["z", 1], second["z", 1])
    assert listing(path.parent) == ["cache.safetensors"]
