"""Every function that writes leaves the old files or the new ones, whatever stops it, and says what the disk said."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import prisma_sae
import pytest
import torch
from coders import D_IN, D_SAE, standard
from models import build
from prisma_lens import TunedLens
from prisma_sae import CoderFacts, SparseCoder

from prisma_core import ActivationCache, LoadError, Result
from prisma_core.files import checkpoint
from prisma_core.plugin import locked, settled, write_text

# -------------------------------------------------------------------- files that may be stopped


class Writer(NamedTuple):
    """A function that writes something of a seed to a path, and one that says of which seed it is."""

    write: Callable[[int, Path], object]
    read: Callable[[Path], int]


def result(seed: int) -> Result:
    return Result(torch.full((400,), float(seed)), ("unit",), technique=str(seed), unit="u")


def cache(seed: int) -> ActivationCache:
    model = build(seed=0)
    return model.run_with_cache(torch.full((1, 3, *model.spec.image_size), float(seed)), names="z")[1]


def seed_of_result(folder: Path) -> int:
    made = Result.load(folder / "x.safetensors")
    seeds = {int(made.values[0]), int(made.technique)}
    assert len(seeds) == 1, "a mixture"
    return seeds.pop()


def seed_of_text(folder: Path) -> int:
    (seed,) = set((folder / "x.txt").read_text())
    return int(seed)


def seed_of_cache(folder: Path) -> int:
    z = ActivationCache.load(folder / "x.safetensors", build(seed=0))["z", 0]
    return next(seed for seed in (0, 1) if torch.equal(z, cache(seed)["z", 0]))


def lens(seed: int) -> TunedLens:
    made = TunedLens({"d_model": 24, "num_hidden_layers": 2, "bias": True, "unembed_hash": str(seed)})
    torch.nn.init.constant_(made.layer_translators[1].bias, seed)
    return made


def seed_of_lens(folder: Path) -> int:
    made = TunedLens.load(folder)
    seeds = {int(made.config["unembed_hash"]), int(made.layer_translators[1].bias[0])}
    assert len(seeds) == 1, "a mixture"
    return seeds.pop()


def sparse_coder(seed: int) -> SparseCoder:
    facts = CoderFacts(kind="standard", d_in=D_IN, d_sae=D_SAE, d_out=D_IN, more={"seed": seed})
    return SparseCoder(facts, {**standard(), "b_enc": torch.full((D_SAE,), float(seed))})


def seed_of_coder(folder: Path) -> int:
    made = prisma_sae.read(folder)
    seeds = {made.facts.more["seed"], int(made.b_enc[0])}
    assert len(seeds) == 1, "a mixture"
    return seeds.pop()


WRITERS: dict[str, Writer] = {
    "a result": Writer(lambda seed, at: result(seed).save(at / "x.safetensors"), seed_of_result),
    "a cache": Writer(lambda seed, at: cache(seed).save(at / "x.safetensors"), seed_of_cache),
    "a tuned lens": Writer(lambda seed, at: lens(seed).save(at), seed_of_lens),
    "a lens in another form": Writer(lambda seed, at: lens(seed).save(at, safetensors=bool(seed)), seed_of_lens),
    "a sparse coder": Writer(lambda seed, at: prisma_sae.save(sparse_coder(seed), at), seed_of_coder),
    "a text": Writer(lambda seed, at: write_text(at / "x.txt", str(seed) * 9000), seed_of_text),
}


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, in_float64: None) -> Writer:
    return WRITERS[request.param]


STEPS = ("replace", "fsync", "mkdir", "unlink")


def stopped_at(n: int, patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    """Stop whatever writes at its n-th step on the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                stop()
            return function(*given, **options)

        return call

    for name in STEPS:
        patch.setattr(os, name, counted(getattr(os, name)))


def full() -> None:
    raise OSError(28, "No space left on device")


def test_an_error_at_any_step(writer: Writer, tmp_path: Path) -> None:
    for n in range(1, 40):
        writer.write(0, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(n, patch, full)
            try:
                writer.write(1, tmp_path)
                saved = True
            except LoadError as error:
                saved = "No space left" not in str(error) or "cfg.json" in str(error)  # for SAELens, after a coder
        assert writer.read(tmp_path) == int(saved)  # "What was there before is as it was."
    assert n > 1
    assert saved  # there are no more steps
    writer.write(0, tmp_path)
    assert writer.read(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) <= 3  # nothing is left over


def test_a_disk_without_modes_that_syncs_no_folders(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As disks of a network and of other systems are."""
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    def no_modes(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(Path, "chmod", no_modes)
    for seed in (0, 1):
        writer.write(seed, tmp_path)
        assert writer.read(tmp_path) == seed


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork and no kill -9")


def child(work: Callable[[], object]) -> int:
    """Return the number of a process that does some work and ends."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_step(writer: Writer, tmp_path: Path) -> None:
    def killed(n: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(n, patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            writer.write(1, tmp_path)

    for n in range(1, 40):
        writer.write(0, tmp_path)
        status = os.waitpid(child(partial(killed, n)), 0)[1]
        assert writer.read(tmp_path) in ((0, 1) if os.WIFSIGNALED(status) else (1,))
        if not os.WIFSIGNALED(status):
            break
    assert 1 < n < 39
    writer.write(0, tmp_path)
    assert writer.read(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) <= 3  # what the killed left is removed


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_meanwhile_holds_nothing(tmp_path: Path) -> None:
    """As workers that another thread starts while a model is saved: they live on, and have the lock's handle too."""
    with locked(tmp_path) as held:
        worker = child(lambda: time.sleep(60))
    try:
        with locked(tmp_path, wait=False) as again:
            assert held
            assert again
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_readers_beside_two_writers(writer: Writer, tmp_path: Path) -> None:
    writer.write(0, tmp_path)

    def work(*seeds: int) -> None:
        for seed in seeds * 15:
            writer.write(seed, tmp_path)

    pids = [child(partial(work, *seeds)) for seeds in ((0, 1), (1, 0))]
    assert {writer.read(tmp_path) for _ in range(40)} <= {0, 1}
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert writer.read(tmp_path) in (0, 1)


def test_a_file_that_is_replaced_between_its_header_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = result(0).save(tmp_path / "x.safetensors"), result(1).save(tmp_path / "other.safetensors")
    own = torch.UntypedStorage.from_file

    def opened(*given: Any, **options: Any) -> Any:
        if other.exists():
            os.replace(other, path)
        return own(*given, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(opened))
    assert seed_of_result(tmp_path) == 1  # and no mixture
    assert not other.exists()


def test_a_file_that_goes_between_a_look_and_its_reading(tmp_path: Path) -> None:
    gone = FileNotFoundError(2, "gone", "params.pt")

    def reading(*answers: Any) -> Callable[[], Any]:
        rest = iter(answers)

        def read() -> Any:
            if isinstance(answer := next(rest), Exception):
                raise answer
            return answer

        return read

    assert settled(tmp_path / "head.json", reading(gone, 1)) == 1
    with pytest.raises(LoadError, match=r"No file at params\.pt"):
        settled(tmp_path / "head.json", reading(gone, gone, 1))


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_disk_that_takes_no_more(writer: Writer, tmp_path: Path) -> None:
    """As far as a limit on the length of files goes: what is longer cannot be written."""
    import resource

    writer.write(0, tmp_path)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        with pytest.raises(LoadError, match="cannot be written"):
            writer.write(1, tmp_path)

    assert os.waitpid(child(limited), 0)[1] == 0
    assert writer.read(tmp_path) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("form", ["png", "svg", "pdf", "html"])
def test_a_figure_on_a_disk_that_takes_no_more(form: str, tmp_path: Path) -> None:
    import resource

    path = Result(torch.rand(3, 4), ("layer", "head")).plot().save(tmp_path / f"x.{form}")
    before = path.read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        with pytest.raises(LoadError, match="cannot be written: File too large"):
            Result(torch.rand(3, 4), ("layer", "head")).plot().save(path)

    assert os.waitpid(child(limited), 0)[1] == 0
    assert path.read_bytes() == before


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_that_may_not_be_written(writer: Writer) -> None:
    home = Path(tempfile.mkdtemp())  # where whoever is not root may look too
    home.chmod(0o755)
    writer.write(0, home)
    home.chmod(0o555)

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(LoadError, match="cannot be written: Permission denied"):
            writer.write(1, home)

    try:
        assert os.waitpid(child(unprivileged), 0)[1] == 0
        assert writer.read(home) == 0
    finally:
        home.chmod(0o755)
        shutil.rmtree(home)


def test_a_file_that_is_replaced_while_it_is_read(
    in_float64: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result's labels and a cache's axes are those of its tensors, though the file is another's after its opening."""
    for name in ("a result", "a cache"):
        write = WRITERS[name].write
        write(0, tmp_path)
        opened, left = checkpoint.safe_open, iter([write])

        def replacing(path: Path, form: str, opened: Any = opened, once: Any = left) -> Any:
            file = opened(path, form)
            for write in once:
                write(1, tmp_path)
            return file

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "safe_open", replacing)
            assert WRITERS[name].read(tmp_path) == 1


# -------------------------------------------------------------------- pairs that do not belong together


def test_weights_of_another_coder_or_lens_are_refused(tmp_path: Path) -> None:
    for kind, part in (("a sparse coder", "sae_weights.safetensors"), ("a tuned lens", "params.pt")):
        for seed in (0, 1):
            WRITERS[kind].write(seed, tmp_path / f"{kind}{seed}")
        shutil.copy(tmp_path / f"{kind}1" / part, tmp_path / f"{kind}0" / part)
        with pytest.raises(LoadError, match="holds other weights than"):
            WRITERS[kind].read(tmp_path / f"{kind}0")


def test_a_lens_saved_over_another_form_is_the_one_that_is_read(tmp_path: Path) -> None:
    lens(1).save(tmp_path, safetensors=True)
    lens(0).save(tmp_path)
    assert seed_of_lens(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "params.pt"}
