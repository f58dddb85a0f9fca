"""Model directories that are damaged, crafted or of another kind: one message each, before anything is loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from recon.models.loading import ModelSource
from recon.models.offload.opening import open_offloaded
from recon.models.weight_files import weight_places
from tests.support.families import tiny

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with an index."""
    path = tmp_path_factory.mktemp("models") / "shards"
    tiny("llama").save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "shards"))


def opened(directory: Path, offload: str) -> Any:
    source = ModelSource(str(directory))
    return source.model() if offload == "none" else open_offloaded(source, "disk", torch.device("cpu"))


def index_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / INDEX).read_text())


def shard_of(directory: Path) -> Path:
    return directory / index_of(directory)["weight_map"][WEIGHT]


def place(directory: Path, name: str) -> None:
    """Let the index say that `WEIGHT` is in the file `name`."""
    index = index_of(directory)
    index["weight_map"][WEIGHT] = name
    (directory / INDEX).write_text(json.dumps(index))


def moved_out(directory: Path) -> Path:
    """The file with `WEIGHT`, outside the directory."""
    return shard_of(directory).rename(directory.parent / "outside.safetensors")


def parent(directory: Path) -> None:
    moved_out(directory)
    place(directory, "../outside.safetensors")


def parent_and_back(directory: Path) -> None:
    place(directory, f"../{directory.name}/{shard_of(directory).name}")


def absolute(directory: Path) -> None:
    place(directory, str(moved_out(directory)))


def link(directory: Path) -> None:
    shard = shard_of(directory)
    shard.symlink_to(moved_out(directory))


def linked_folder(directory: Path) -> None:
    shutil.copy(shard_of(directory), directory.parent / "outside.safetensors")
    (directory / "sub").symlink_to(directory.parent)
    place(directory, "sub/outside.safetensors")


def no_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"metadata": {}}')


def list_for_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": ["a"]}')


def numbers_in_map(directory: Path) -> None:
    place(directory, 3)  # pyright: ignore[reportArgumentType]


def no_json(directory: Path) -> None:
    (directory / INDEX).write_text("{")


def bytes_for_index(directory: Path) -> None:
    (directory / INDEX).write_bytes(bytes(range(200, 256)))


def missing_shard(directory: Path) -> None:
    shard_of(directory).unlink()


def truncated(directory: Path) -> None:
    shard = shard_of(directory)
    shard.write_bytes(shard.read_bytes()[:-10])


def truncated_in_header(directory: Path) -> None:
    shard = shard_of(directory)
    shard.write_bytes(shard.read_bytes()[:20])


def garbage(directory: Path) -> None:
    shard_of(directory).write_bytes(b"\xff" * 4000)


def empty(directory: Path) -> None:
    shard_of(directory).write_bytes(b"")


def without_tensor(directory: Path) -> None:
    shard = shard_of(directory)
    tensors = load_file(shard)
    save_file({f"other.{key}": value for key, value in tensors.items()}, shard)


def eight_bits(directory: Path) -> None:
    shard = shard_of(directory)
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(shard).items()}, shard)


def integers(directory: Path) -> None:
    shard = shard_of(directory)
    save_file({key: (100 * value).to(torch.int8) for key, value in load_file(shard).items()}, shard)


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (parent, rf"needs weights within .*shards, got \.\./outside\.safetensors in {INDEX}, which lies at .*; if you"),
        (parent_and_back, rf"needs weights within .*, got \.\./shards/.* in {INDEX}"),
        (absolute, rf"needs weights within .*, got /.*outside\.safetensors in {INDEX}"),
        (link, rf"needs weights within .*, got model-.* in {INDEX}, which lies at .*outside\.safetensors"),
        (linked_folder, rf"needs weights within .*, got sub/outside\.safetensors in {INDEX}"),
        (no_map, rf"needs an index with a weight_map .*, got .*{INDEX}: no weight_map; copy the model again"),
        (list_for_map, rf"needs an index with a weight_map .*, got .*{INDEX}: "),
        (numbers_in_map, rf"needs an index with a weight_map .*, got .*{INDEX}: "),
        (no_json, rf"needs an index with a weight_map .*, got .*{INDEX}: .*; copy the model again"),
        (bytes_for_index, rf"needs an index with a weight_map .*, got .*{INDEX}: .*; copy the model again"),
        (missing_shard, rf"needs all files in .*{INDEX}, got no .*model-.*; copy the model again"),
        (truncated, r"needs whole safetensors files, got .*model-.*, truncated or damaged \(.*; copy the model again"),
        (truncated_in_header, r"needs whole safetensors files, got .*model-.*, truncated or damaged"),
        (garbage, r"needs whole safetensors files, got .*model-.*, truncated or damaged"),
        (empty, r"needs whole safetensors files, got .*model-.*, truncated or damaged"),
        (without_tensor, rf"got .*model-.*, which lacks model.layers.1.mlp.gate_proj.weight .*{INDEX} places it"),
        (eight_bits, r"needs weights in BF16, F16, F32, F64, got F8_E4M3 for .* in .*model-.*: quantised"),
        (integers, r"needs weights in BF16, F16, F32, F64, got I8 for .* in .*model-.*: quantised"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_or_crafted_weights(directory: Path, offload: str, damage: Any, message: str) -> None:
    damage(directory)
    option = "model.name" if offload == "none" else "model.offload: disk"
    with pytest.raises(ValueError, match=rf"^{option} {message}" if message[0] == "n" else message) as caught:
        opened(directory, offload)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_link_out_of_a_directory_with_one_file(tmp_path: Path, offload: str) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(
        ValueError, match=r"needs weights within .*, got model.safetensors in .*, which lies at .*outside"
    ):
        opened(tmp_path / "model", offload)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_links_of_the_hub_cache_are_no_way_out(saved: Path, tmp_path: Path, offload: str) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    shutil.copytree(saved, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    opened(snapshot, offload)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="needs weights within"):
        opened(snapshot, offload)


def test_both_ways_of_loading_read_the_same_file(saved: Path, directory: Path) -> None:
    """A directory may hold a single file and a stale index: then the single file counts, as for transformers."""
    other = tiny("llama")
    torch.nn.init.ones_(other.get_parameter(WEIGHT))
    other.save_pretrained(directory.parent / "other")
    shutil.copy(directory.parent / "other" / "model.safetensors", directory)
    assert set(weight_places(directory, "model.name").values()) == {directory / "model.safetensors"}
    assert opened(directory, "none").get_parameter(WEIGHT).eq(1).all()
    assert (
        open_offloaded(ModelSource(str(directory)), "disk", torch.device("cpu"))
        .state(None, directory)[WEIGHT]
        .eq(1)
        .all()
    )


def test_shapes_of_the_files_are_the_models(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"in the model's own shapes, got \[32, 64\] for .*; correct config.json"):
        opened(directory, "disk")


# --- other kinds of models -----------------------------------------------------------------------------


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (directory / "adapter_model.safetensors").touch()


def gguf(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    (directory / "tiny-q4.gguf").write_bytes(b"GGUF")


def pickles(directory: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {directory / 'ran'}",)

    for file in directory.glob("model*"):
        file.unlink()
    torch.save({"lm_head.weight": Evil()}, directory / "pytorch_model.bin")


def quantised(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    method = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": method}))


def encoder_decoder(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "t5"}')


def decoder_of_an_encoder_decoder(directory: Path) -> None:
    AutoConfig.for_model("bart").save_pretrained(directory)


def no_weights(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adapter, r"needs a whole model, got .*shards, an adapter \(.*merge_and_unload"),
        (gguf, r"needs safetensors files, got .*tiny-q4.gguf, a GGUF file; .*dequantise it: .*gguf_file"),
        (pickles, r"needs safetensors files, got .*pytorch_model.bin, a pickle, which can run code .*save_pretrained"),
        (
            quantised,
            r"needs floating-point weights, got .*shards, quantised \(gptq\); .*dequantize\(\).save_pretrained",
        ),
        (encoder_decoder, r"needs a decoder-only .*, got .*shards, an encoder-decoder \(model_type t5\); choose"),
        (decoder_of_an_encoder_decoder, r"needs a decoder-only .*, an encoder-decoder \(model_type bart\); choose"),
        (no_weights, r"needs a directory with model.safetensors or its parts, got .*shards without them"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_kinds_of_models_are_refused_by_name(directory: Path, make: Any, message: str) -> None:
    make(directory)
    uses = [lambda source: source.model()]
    if make is not no_weights:
        uses += [lambda source: source.skeleton(), lambda source: source.hollow()]
    for use in uses:
        with pytest.raises(ValueError, match=f"^model.name {message}"):
            use(ModelSource(str(directory)))
    assert not (directory / "ran").exists()


def test_gguf_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"model.name needs a model directory .*, got .*tiny.gguf; take the model it was"
    ):
        ModelSource(str(tmp_path / "tiny.gguf")).model()
