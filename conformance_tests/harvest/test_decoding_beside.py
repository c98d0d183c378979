"""Without processes, a thread decodes the next batch beside the pass; data are read where the caller is."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from prisma_harvest import Pass
from torch import Tensor

from prisma_core import HookedViT, InputError


class Owned:
    """A data set that belongs to the thread that made it, as a connection of sqlite does."""

    def __init__(self, n: int):
        self.n, self.last, self.owner = n, n, threading.get_ident()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Image.Image:
        assert threading.get_ident() == self.owner
        if index == self.last:
            raise KeyError("no such row")
        return Image.new("RGB", (6, 6), (index, 0, 0))


def test_the_next_batch_is_decoded_by_a_thread_and_read_by_the_caller(model: HookedViT) -> None:
    threads = set[int]()
    ready = [threading.Event() for _ in range(4)]

    def prepare(image: Image.Image) -> Tensor:
        threads.add(threading.get_ident())
        ready[image.getpixel((0, 0))[0] // 2].set()
        return torch.zeros(3, 6, 6)

    run = Pass(model, Owned(8), ("resid_post", 1), batch=2, workers=0, preprocess=prepare)
    threads.clear()
    for number, batch in enumerate(run.batches()):
        assert [line["source"] for line in batch.lines] == [2 * number, 2 * number + 1]
        assert all(event.wait(10) for event in ready[number : number + 2])  # the next one, too, before it is asked for
    assert threads
    assert threading.get_ident() not in threads


def test_whole_batches_come_before_the_error_of_the_one_behind(model: HookedViT) -> None:
    data = Owned(9)
    batches = Pass(model, data, ("resid_post", 1), batch=2, workers=0).run()
    data.last = 5  # the sample for the fingerprint could be read
    assert [next(batches)[0].start for _ in range(2)] == [0, 2]
    with pytest.raises(InputError, match=r"Image 5 .*raised KeyError: 'no such row'"):
        next(batches)


def test_whole_batches_come_before_the_error_of_a_stream(model: HookedViT) -> None:
    """A stream that raises is at its end: there is no image to skip, and the error is its own."""

    def stream() -> Iterator[Image.Image]:
        data = Owned(9)
        return (data[index] for index in range(10))

    batches = Pass(model, stream(), ("resid_post", 1), batch=2, workers=0).run()
    assert [next(batches)[0].start for _ in range(4)] == [0, 2, 4, 6]
    with pytest.raises(KeyError, match="no such row"):
        next(batches)
