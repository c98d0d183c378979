"""A harvest on Ray Data: workers share the shards out, and write them into one folder that all of them see."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from typing import Any, cast

import torch

from prisma_core import InputError, PluginError
from prisma_harvest.folder import Writer
from prisma_harvest.manifest import Manifest
from prisma_harvest.passes import Pass
from prisma_harvest.progress import counting


class ShardWorker:
    """Writes whole shards. Ray makes one in each of its processes, and another where one dies.

    Args:
        run: the pass.
        folder: that of the harvest.
        manifest: its manifest.
        device: where the model runs: a GPU that Ray gave this process, or the CPU.
    """

    def __init__(self, run: Pass, folder: Any, manifest: Manifest, device: str):
        self.run, self.folder, self.manifest = run, folder, manifest
        if device != run.device.type or device == "cuda":
            run.model.to(device)
            run.device = torch.device(device)
        torch.set_num_threads(1)

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Write the shards with these numbers, and return how many images each covers."""
        return {"images": [self._write(int(shard)) for shard in rows["shard"]]}

    def _write(self, shard: int) -> int:
        per = self.manifest.shard // self.manifest.batch
        images = 0
        with Writer(self.folder, self.manifest, stream=False) as writer:
            writer.shard = shard
            for batch, activations in self.run.activations(self.run.batches(shard * per, (shard + 1) * per)):
                writer.add(batch, activations)
                images += batch.size
            writer.flush()
        return images


def connected(run: Pass, address: str) -> Any:
    """Return Ray, connected to a cluster.

    Raises:
        PluginError: Ray is not installed, or the cluster cannot be reached.
        InputError: the data are a stream, which has no parts to share out.
    """
    if run.source.n is None:
        raise InputError("Workers of a cluster share images out by number: give a folder, a list or a data set.")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise PluginError(f"This needs Ray ({error}): pip install 'prisma-interp[scale]'") from error
    if not ray.is_initialized():
        try:
            _reach(address)
            ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise PluginError(f"No Ray cluster at {address!r}: {error}") from error
    return ray


def on_ray(ray: Any, run: Pass, writer: Writer, progress: bool | None) -> None:
    """Write the shards that are not there yet; the lock of the folder stays with the caller."""
    n = cast(int, run.source.n)
    total = -(-n // writer.manifest.shard)
    todo = [shard for shard in range(total) if not writer.shard_path(shard).is_file()]
    writer.shard = total
    if not todo:
        return
    gpu = run.device.type == "cuda"
    resources: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    places = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
    ray.data.DataContext.get_current().enable_progress_bars = False
    run.data = None  # it is open: the source has it
    shards = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo)).map_batches(
        ShardWorker,
        fn_constructor_args=(run, writer.folder.resolve(), writer.manifest, run.device.type),
        batch_size=1,
        concurrency=max(1, min(places, len(todo))),
        **resources,
    )
    with counting("Harvesting", n, n - _images(run, writer, todo), progress) as advance:
        for row in shards.iter_rows():
            advance(int(row["images"]))


def _reach(address: str) -> None:
    """Look whether anybody listens at ``host:port``: Ray itself tries for many minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _images(run: Pass, writer: Writer, shards: list[int]) -> int:
    per = writer.manifest.shard
    return sum(min(per, (run.source.n or 0) - shard * per) for shard in shards)
