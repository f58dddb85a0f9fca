"""Masks zero what they say, find what is not zero, and survive the disk."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import recon.pruning.masks
from recon.basics.files import atomic_write, write_json
from recon.pruning.bits import count_bits, pack, unpack
from recon.pruning.masks import Masks, identity_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.up = nn.Linear(5, 7)
        self.down = Conv1D(3, 7)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model()
    nn.init.normal_(model.down.weight)
    return model


@pytest.fixture
def masks() -> Masks:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (7, 5), "down.weight": (7, 3)}
    return Masks({name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()})


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_apply_zeroes_the_pruned_and_nothing_else(model: Model, masks: Masks) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    masks.apply(model)
    for name, parameter in model.named_parameters():
        keep = masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[keep], before[name][keep])
        assert (parameter[~keep] == 0).all()


def test_apply_zeroes_nan_and_infinity(model: Model, masks: Masks) -> None:
    with torch.no_grad():
        model.up.weight.fill_(float("nan"))
        model.down.weight.fill_(float("inf"))
    masks.apply(model)
    assert masks.violations(model) == 0


def test_violations_are_counted_and_named(model: Model, masks: Masks) -> None:
    assert masks.violations(model) == masks.num_pruned
    masks.apply(model)
    assert masks.violations(model) == 0
    masks.check(model)
    with torch.no_grad():
        pruned = (~masks["down.weight"]).nonzero()[:2]
        model.down.weight[tuple(pruned[0])] = 1e-30
        model.down.weight[tuple(pruned[1])] = float("nan")
    assert masks.violations(model) == 2
    num_pruned = int((~masks["down.weight"]).sum())
    with pytest.raises(ValueError, match=f"got 2 of {num_pruned} in `down.weight` that are not"):
        masks.check(model)


def test_densities(masks: Masks) -> None:
    assert masks.densities == pytest.approx({name: float(keep.float().mean()) for name, keep in masks.items()})


def test_counts(masks: Masks) -> None:
    num_pruned = sum(1 for keep in masks.values() for kept in keep.flatten().tolist() if not kept)
    assert masks.num_pruned == num_pruned
    assert masks.sparsity == num_pruned / (35 + 21)
    assert Masks({}).sparsity == 0


def test_tied_parameters_answer_to_every_name(model: Model) -> None:
    keep = torch.rand(9, 5) < 0.5
    masks = Masks({"head.weight": keep})
    masks.apply(model)
    masks.check(model)
    assert (model.embed.weight[~keep] == 0).all()


def test_mapping_and_subset(masks: Masks) -> None:
    assert len(masks) == 2
    assert list(masks) == ["up.weight", "down.weight"]
    assert dict(masks.items()).keys() == dict(masks).keys()
    subset = masks.subset(["down.weight"])
    assert list(subset) == ["down.weight"]
    assert torch.equal(subset["down.weight"], masks["down.weight"])
    with pytest.raises(ValueError, match=r"got `gate.weight` without one"):
        masks.subset(["up.weight", "gate.weight"])


def test_counts_shapes_and_names_need_no_unpacking(
    model: Model, masks: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        raise AssertionError("a mask is unpacked")

    masks.apply(model)
    save_file({name: masks[name].float() for name in masks}, tmp_path / "model.safetensors")
    monkeypatch.setattr(recon.pruning.masks, "unpack", refuse)
    assert "up.weight" in masks
    assert "gate.weight" not in masks
    assert dict(masks.shapes) == {"up.weight": (7, 5), "down.weight": (7, 3)}
    assert masks.subset(["down.weight"]).keys() == {"down.weight"}
    assert masks.num_pruned > 0
    assert 0 < masks.sparsity < 1
    masks.validate_for(model)
    masks.check(model)
    assert masks.violations(model) == 0
    assert masks.violations_in(tmp_path) == 0
    assert masks == Masks.of_packed({name: masks.packed(name) for name in masks}, masks.shapes)
    with pytest.raises(AssertionError, match="is unpacked"):
        masks["up.weight"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 5), (64, 33), (0, 4), (5,), (2, 3, 7)])
def test_bits_are_those_of_the_obvious_way(shape: tuple[int, ...]) -> None:
    keep = torch.rand(shape) < 0.5
    bits = keep.flatten().tolist()
    expected = [sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    packed = pack(keep)
    assert packed.tolist() == expected
    assert count_bits(packed) == sum(bits)
    unpacked = unpack(packed, shape)
    assert torch.equal(unpacked, keep)
    unpacked.logical_not_()  # of its own memory, which may be written
    assert torch.equal(unpack(packed, shape), keep)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as on an accelerator, which numpy does not see
        assert unpack(torch.empty(len(packed), dtype=torch.uint8), shape).shape == shape


def test_only_bool_tensors_are_masks() -> None:
    with pytest.raises(ValueError, match=r"dtype bool, True = kept, got torch.float32 for `w`"):
        Masks({"w": torch.ones(2, 2)})


def test_fingerprint_depends_on_names_shapes_and_bits_only(masks: Masks) -> None:
    fingerprint = masks.fingerprint()
    assert len(fingerprint) == 64
    assert Masks({name: masks[name] for name in reversed(list(masks))}).fingerprint() == fingerprint
    assert Masks({name: keep.T.contiguous().T for name, keep in masks.items()}).fingerprint() == fingerprint
    flipped = {name: keep.clone() for name, keep in masks.items()}
    flipped["up.weight"][6, 4] ^= True
    renamed = {name + "x": keep for name, keep in masks.items()}
    reshaped = {name: keep.reshape(1, -1) for name, keep in masks.items()}
    others = {Masks(other).fingerprint() for other in (flipped, renamed, reshaped)}
    assert len(others | {fingerprint}) == 4


def test_fingerprint_stays_what_it_is() -> None:
    masks = Masks({"w": torch.tensor([[True, False, False], [True, True, True], [False, False, True]])})
    # regenerate: hashlib.sha256(b'["w", [3, 3]]' + bytes([0b00111001, 0b1])).hexdigest()
    assert masks.fingerprint() == "b9e6b652fffbe82b952e8e06f058068c1d713e544289cb92552edd54c45b22a0"


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 5), (64, 33), (0, 4), (5,)])
def test_save_and_load_are_inverse(shape: tuple[int, ...], tmp_path: Path) -> None:
    masks = Masks({"z": torch.rand(shape) < 0.5, "a": torch.rand(2, 2) < 0.5})
    masks.save(tmp_path / "masks.safetensors", {"criterion": "wanda"})
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks
    assert list(loaded) == ["z", "a"]
    assert loaded.fingerprint() == masks.fingerprint()
    assert Masks.read_metadata(tmp_path / "masks.safetensors") == {"criterion": "wanda"}


def test_eight_weights_share_a_byte(tmp_path: Path) -> None:
    Masks({"w": torch.rand(1024, 1024) < 0.5}).save(tmp_path / "m.safetensors")
    assert 2**20 / 8 < (tmp_path / "m.safetensors").stat().st_size < 2**20 / 8 + 1024


def test_a_transposed_mask_keeps_its_order(tmp_path: Path) -> None:
    keep = torch.rand(3, 5) < 0.5
    Masks({"w": keep.T}).save(tmp_path / "m.safetensors")
    assert torch.equal(Masks.load(tmp_path / "m.safetensors")["w"], keep.T)


def test_masks_of_another_model_are_refused(model: Model, masks: Masks) -> None:
    other = Masks({f"blocks.{i}.weight": torch.ones(2, 2, dtype=torch.bool) for i in range(5)})
    message = (
        r"got 5 of 5 that it does not have "
        r"\(`blocks.0.weight`, `blocks.1.weight`, `blocks.2.weight` and 2 more; "
        r"it has `embed.weight`, .*prune it again"
    )
    for use in (other.validate_for, other.apply, other.violations, other.check):
        with pytest.raises(ValueError, match=message):
            use(model)
    with pytest.raises(ValueError, match=r"`down.weight`: mask \(3, 7\), parameter \(7, 3\)"):
        Masks({"up.weight": masks["up.weight"], "down.weight": masks["down.weight"].T}).validate_for(model)
    masks.validate_for(model)


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a safetensors file, but long enough to look at")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    save_file({"w": torch.zeros(2)}, tmp_path / "hf", {"format": "pt"})
    for name in ("text", "weights", "hf"):
        with pytest.raises(ValueError, match=f"{name}` needs to be a mask file of recon"):
            Masks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        Masks.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="needs to be a mask file of recon, got a directory"):
        Masks.load(tmp_path)


def test_a_truncated_file_is_refused(masks: Masks, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    masks.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="needs to be a mask file of recon"):
        Masks.load(path)


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "save_file"])
def test_a_failed_save_leaves_what_was_there(
    step: str, masks: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    masks.subset(["up.weight"]).save(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(recon.pruning.masks if step == "save_file" else os, step.removeprefix("os."), full_disk)
        with pytest.raises(OSError, match=r"could not write `.*m.safetensors` .*No space left .* free space") as raised:
            masks.save(path)
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="could not write"):
            masks.save(tmp_path / "first.safetensors")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX resource limits")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A real failing write, by a limit on the size of files, in a process of its own."""
    code = (
        "import resource, sys, torch; from recon.pruning.masks import Masks\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: Masks({'w': torch.ones(1024, 1024, dtype=torch.bool)}).save(sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "could not write" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_whom_the_umask_allows(masks: Masks, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    masks.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "a" / "report.json"
    write_json(path, {"perplexity": 0.1 + 0.2, "name": "é"})
    assert json.loads(path.read_text("utf-8")) == {"perplexity": 0.1 + 0.2, "name": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"perplexity": object()})
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="could not write"):
        write_json(path, {})
    assert json.loads(path.read_text("utf-8"))["name"] == "é"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_write(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not write `.*/file/x`"), atomic_write(tmp_path / "file" / "x"):
        pass


def test_a_file_is_identified_by_one_mask_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, path = 2**16, tmp_path / "masks.safetensors"
    masks = Masks({f"{index}": torch.rand(size) < 0.5 for index in range(8)})
    masks.save(path)
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = safe_open(*args, **options)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def metadata(self) -> Any:
            return self.file.metadata()

        def get_tensor(self, name: str) -> torch.Tensor:
            assert sum(one() is not None for one in alive) == 0
            mask = self.file.get_tensor(name)
            alive.append(weakref.ref(mask))
            return mask

    monkeypatch.setattr("recon.pruning.masks.safe_open", Watched)
    tracemalloc.start()
    assert identity_of(path) == masks.fingerprint()
    copied = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(alive) == 8
    assert copied < size // 8  # not one more copy of a mask
