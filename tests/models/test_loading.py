import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recon.models.loading import BUNDLED, ModelSource, directory_digest

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with a model and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    random().model().save_pretrained(path)
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def random(**options) -> ModelSource:
    return ModelSource("random", shape=options.pop("shape", SHAPE), **options)


def weights(source: ModelSource) -> dict[str, torch.Tensor]:
    return dict(source.model().state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- random ------------------------------------------------------------------------------------------------


def test_random_weights_are_the_seeds():
    assert same(weights(random()), weights(random()))
    assert not same(weights(random()), weights(random(seed=1)))


def test_random_model_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random(seed=7).model()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert same(weights(random()), weights(random()))


def test_random_shape_is_not_used_up():
    shape = dict(SHAPE)
    source = random(shape=shape)
    source.model()
    source.model()
    assert shape == SHAPE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "random"}, "model.shape belongs to model.name: random, and to it only, got 'random' without one"),
        ({"shape": SHAPE}, "belongs to model.name: random, and to it only, got 'bundled' with one"),
        (
            {"name": "random", "shape": {"hidden_size": 8}},
            "needs a model_type, for example llama, got only hidden_size",
        ),
        ({"dtype": "float64"}, "model.dtype must be float32, bfloat16, float16 or auto, got 'float64'"),
        ({"dtype": "int8"}, "model.dtype must be"),
        ({"seed": -1}, "model.seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "model.seed must be from 0 to 9223372036854775807, got 9223372036854775808"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ModelSource(**options)


@pytest.mark.parametrize(
    "shape",
    [{"model_type": "nonsense"}, {"model_type": "t5"}, {**SHAPE, "hidden_size": 15}, {**SHAPE, "hidden_size": "x"}],
)
def test_shape_that_is_no_causal_language_model(shape):
    with pytest.raises(
        ValueError,
        match=r"model.shape needs the configuration of a causal language model, got one that makes none: .+; correct",
    ):
        random(shape=shape).model()


# --- directories -------------------------------------------------------------------------------------------


def test_directory_gives_back_what_was_saved(saved):
    source = ModelSource(str(saved))
    model = source.model()
    assert same(dict(model.state_dict()), weights(random()))
    assert not model.training
    assert model.config.use_cache is False
    assert source.load_tokenizer().convert_tokens_to_ids("b") == 1


@pytest.mark.parametrize("name", ["tiny", "./tiny", "../models/tiny", "~/tiny"])
def test_ways_to_write_a_path(directory, monkeypatch, name):
    models_directory = directory.parent / "models"
    models_directory.mkdir()
    shutil.copytree(directory, models_directory / "tiny")
    monkeypatch.chdir(models_directory)
    monkeypatch.setenv("HOME", str(models_directory))
    ModelSource(name).model()


def test_directory_wins_over_the_hub(directory, monkeypatch):
    (directory.parent / "facebook").mkdir()
    shutil.copytree(directory, directory.parent / "facebook" / "opt-125m")
    monkeypatch.chdir(directory.parent)
    assert ModelSource("facebook/opt-125m").model().config.model_type == "llama"
    assert "files" in ModelSource("facebook/opt-125m").identity()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_of_weights_but_not_of_positions(saved, dtype, expected):
    for source in (ModelSource(str(saved), dtype=dtype), random(dtype=dtype)):
        model = source.model(torch.device("cpu"))
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        # rotary frequencies are rounded to 8 bits otherwise: another model
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
        assert torch.get_default_dtype() == torch.float32


def test_auto_is_the_stored_precision(directory):
    random(dtype="bfloat16").model().save_pretrained(directory)
    assert ModelSource(str(directory), dtype="auto").model().dtype == torch.bfloat16
    assert random(dtype="auto").model().dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no/such/model", "does not exist"),
        ("./nothing", "does not exist"),
        ("../nothing", "does not exist"),
        ("/nothing", "does not exist"),
        ("~/nothing", "does not exist"),
        ("", "does not exist"),
        ("file", "is a file"),
    ],
)
@pytest.mark.parametrize("use", ["model", "load_tokenizer", "identity"])
def test_path_that_is_no_directory(tmp_path, monkeypatch, name, what, use):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    cure = f"model.name needs `bundled`, a directory in Hugging Face format or a hub name, got '{name}', which {what}"
    with pytest.raises(ValueError, match=cure):
        getattr(ModelSource(name), use)()


def corrupt_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_model_type(path: Path) -> None:
    (path / "config.json").write_text("{}")


def unknown_model_type(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "nonsense"}')


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def weights_of_other_sizes(path: Path) -> None:
    change_config(path, intermediate_size=48)


def code_of_its_own(path: Path) -> None:
    change_config(path, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    (path / "mine.py").write_text(f"open({str(path / 'ran')!r}, 'w')")


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        corrupt_config,
        no_model_type,
        unknown_model_type,
        no_config,
        weights_of_other_sizes,
        code_of_its_own,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_directory_is_one_clear_message(directory, damage):
    damage(directory)
    with pytest.raises(ValueError, match=f"model.name needs .* {directory}( could not be read|, )") as caught:
        ModelSource(str(directory)).model()
    assert len(str(caught.value)) < 900
    assert "\n" not in str(caught.value)
    assert not (directory / "ran").exists()


def test_weights_that_are_missing_are_not_made_up(directory):
    change_config(directory, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 of LlamaForCausalLM's weights, model.layers.2."):
        ModelSource(str(directory)).model()


def test_tied_weights_are_not_missing(directory):
    random(shape={**SHAPE, "tie_word_embeddings": True}).model().save_pretrained(directory)
    model = ModelSource(str(directory)).model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_missing_tokenizer_says_what_to_give(directory, saved):
    for file in directory.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"AutoTokenizer: .*; if it holds no tokenizer, give model.tokenizer"):
        ModelSource(str(directory)).load_tokenizer()
    assert ModelSource(str(directory), tokenizer=str(saved)).load_tokenizer().convert_tokens_to_ids("b") == 1
    with pytest.raises(ValueError, match=r"model.tokenizer needs `bundled`, .* got './nothing', which does not exist"):
        ModelSource(str(directory), tokenizer="./nothing").load_tokenizer()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen2", "gemma2"])
def test_empty_tokenizer_in_place_of_a_missing_one_is_refused(directory, model_type):
    """transformers makes a tokenizer without a vocabulary for these, which reads no text or unknown tokens only."""
    for file in directory.glob("token*"):
        file.unlink()
    change_config(directory, model_type=model_type)
    with pytest.raises(ValueError, match=r"model.name needs a tokenizer .*, got .*tiny, .* an empty \w+"):
        ModelSource(str(directory)).load_tokenizer()
    with pytest.raises(ValueError, match=r"model.tokenizer needs a tokenizer .*, or give model.tokenizer"):
        ModelSource(tokenizer=str(directory)).load_tokenizer()


def test_ids_without_an_embedding_are_refused(directory):
    source = ModelSource(str(directory), tokenizer=str(directory))
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 40, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)  # few tokens, one of them far away
    with pytest.raises(ValueError, match=r"ids need 41 embeddings, the model has 32; give the model's own tokenizer"):
        source.load()


def test_revision_belongs_to_the_hub(directory, saved):
    for use in ("model", "load_tokenizer"):
        with pytest.raises(ValueError, match=r"revision belongs to names on the hub, got .v1. with the directory"):
            getattr(ModelSource(str(directory), revision="v1"), use)()
    ModelSource("owner/model", revision="v1", tokenizer=str(saved)).load_tokenizer()  # the revision of the model only


# --- the hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["model", "load_tokenizer"])
def test_hub_name_in_offline_mode(use):
    with pytest.raises(ValueError, match=r"model.name needs .* there is no directory owner/nothing, and the hub name"):
        getattr(ModelSource("owner/nothing"), use)()


def test_unreachable_hub_is_found_out_at_once(monkeypatch):
    """transformers alone tries for 23 s where the name is not resolved, for minutes where packets are dropped."""
    import socket

    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited to try again"))
    with pytest.raises(ValueError, match=r"no directory owner/nothing, and the Hugging Face hub cannot be reached"):
        ModelSource("owner/nothing").model()


# --- identity ----------------------------------------------------------------------------------------------


def test_identity_follows_the_weights(directory, saved):
    source = ModelSource(str(directory))
    first = source.identity()
    assert first == ModelSource(str(saved)).identity()  # content, not place
    model = source.model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(directory)
    assert source.identity() != first


def test_identity_follows_all_that_decides_the_model(directory):
    identities = [
        ModelSource(str(directory)).identity(),
        ModelSource(str(directory), dtype="bfloat16").identity(),
        ModelSource("owner/model").identity(),
        ModelSource("owner/model", revision="v1").identity(),
        random().identity(),
        random(seed=1).identity(),
        random(shape={**SHAPE, "hidden_size": 32}).identity(),
        random(dtype="bfloat16").identity(),
    ]
    assert len({json.dumps(identity) for identity in identities}) == len(identities)


def test_digest_looks_at_names_and_contents_of_model_files_only(directory):
    first = directory_digest(directory)
    (directory / "README.md").write_text("words")
    (directory / "card.json").write_text("{}")
    assert directory_digest(directory) == first
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    assert directory_digest(directory) != first


def test_bundled_is_in_the_package():
    assert ModelSource().name == "bundled"
    assert BUNDLED.is_dir()
