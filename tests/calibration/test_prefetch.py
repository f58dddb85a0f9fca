from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.calibration.activations import Activations
from recon.calibration.prefetch import Prefetch
from recon.calibration.rows import Rows
from recon.calibration.storage import Storage
from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from tests.support.families import DEPTH, tiny, token_ids

CPU = torch.device("cpu")


def keys(said: list[str], num: int) -> Iterator[int]:
    for key in range(num):
        said.append(f"key {key}")
        yield key


def loader(said: list[str]) -> Any:
    def load(key: int) -> dict[str, Tensor]:
        said.append(f"load {key}")
        return {"one": torch.full((2,), float(key)), "other": torch.full((1,), float(key))}

    return load


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_each_batch_is_loaded_before_the_one_in_front_is_used(num: int) -> None:
    said: list[str] = []
    for key, batch in Prefetch(CPU).batches(keys(said, num), loader(said)):
        said.append(f"use {key}")
        assert all(torch.equal(one, torch.full_like(one, key)) for one in batch.values())
    order = [f"{what} {key}" for key in range(num) for what in ("key", "load")]
    for key in range(num):  # each is used after the next one is loaded
        order.insert(order.index(f"load {min(key + 1, num - 1)}") + 1 + (key == num - 1), f"use {key}")
    assert said == order


def test_nothing_is_loaded_before_it_is_asked_for_nor_after_the_consumer_stops() -> None:
    said: list[str] = []
    batches = Prefetch(CPU).batches(keys(said, 5), loader(said))
    assert said == []
    next(batches)
    del batches
    assert said == ["key 0", "load 0", "key 1", "load 1"]


class Stream:
    """Says what is asked of it."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name, self.device = said, name, torch.device("cuda")

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of NVIDIA's prefetchers: wait for a batch, then begin the next copy, then compute."""
    said: list[str] = []
    computation, copies = Stream(said, "computation"), Stream(said, "copies")

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computation)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(f"kept for {stream.name}"))
    for key, _ in Prefetch(torch.device("cuda")).batches(range(2), loader(said)):
        said.append(f"use {key}")
    load = ["copies waits for computation", "on copies", "load {}", "off copies"]
    ready = ["computation waits for copies", "kept for computation", "kept for computation"]
    expected = [*load, *ready, *load, "use 0", *ready, "use 1"]
    expected[2], expected[9] = "load 0", "load 1"
    assert said == expected


@pytest.mark.parametrize("propagation", ["dense", "recovered_local", "recovered"])
@pytest.mark.parametrize("family", ["llama", "falcon"])  # falcon's blocks do not add attention to what entered them
def test_a_walk_that_loads_ahead_keeps_every_bit(family: str, propagation: Any) -> None:
    """As on a CUDA device, where batches in front are written while those behind are loaded."""
    walks = []
    for ahead in (False, True):
        model = tiny(family)
        replay = Replay(model, Anatomy.of(model))
        walk = Activations(replay, token_ids(5, 12), 2, CPU, propagation, True, storage=Storage("host"))
        walk._prefetch = Prefetch(CPU) if ahead else None
        walks.append((walk, model))
    for index in range(DEPTH):
        kept = []
        for walk, model in walks:
            walk.enter([index])
            walk.pass_attention()
            with torch.no_grad():
                for parameter in Anatomy.of(model).blocks[index].module.parameters():
                    parameter.mul_(0.9)
            loaded = walk.batches(
                Rows.split(torch.arange(5).flip(0), 2, walk.device),
                lambda rows, walk=walk: walk.load(walk.hidden, rows),
            )
            kept.append([walk.hidden, walk.attention, walk.output, *(batch for _, batch in loaded)])
        for one, other in zip(*kept, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def copied(source: Tensor, device: torch.device, rows: slice) -> Tensor:
    return source[rows].to(device, non_blocking=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_beside_the_computation_keep_every_bit() -> None:
    """Matrix products slow enough that a copy which does not wait for them, or they for it, would show."""
    device = torch.device("cuda", 0)
    kept = torch.randn(32, 512, 1024, pin_memory=True)
    weight = torch.randn(1024, 1024, device=device) / 32
    expected = [(kept[row : row + 4].to(device) @ weight @ weight).cpu() for row in range(0, 32, 4)]
    for _ in range(5):
        source = kept.clone().pin_memory()
        slices = (slice(start, start + 4) for start in range(0, 32, 4))
        load = partial(copied, source, device)
        for rows, batch in Prefetch(device).batches(slices, load):
            source[rows] = batch @ weight @ weight
            del batch
        assert torch.equal(source, torch.cat(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_walk_on_a_gpu_keeps_its_bits_wherever_hidden_states_are(place: Any) -> None:
    device = torch.device("cuda", 0)
    walks = []
    for storage in (Storage(), Storage(place)):
        model = tiny("llama").to(device)
        walks.append(
            Activations(Replay(model, Anatomy.of(model)), token_ids(5, 12), 2, device, tap=True, storage=storage)
        )
    for index in range(DEPTH):
        for walk in walks:
            walk.enter([index])
        for name in ("hidden", "attention", "output"):
            one, other = (getattr(walk, name) for walk in walks)
            assert other.device.type == "cpu"
            assert other.is_pinned() == (place == "host")
            assert torch.equal(one.cpu(), other)
            (rows,) = Rows.split(torch.tensor([4, 1]), 2, device)
            assert torch.equal(walks[0].load(one, rows), walks[1].load(other, rows))
