"""Loading models and tokenizers: bundled, from a directory, from the hub, or random of a given shape."""

from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recon.basics.manifest import require_unchanged
from recon.basics.seeds import isolated_seed
from recon.models.meta import parameters_on_meta
from recon.models.stored import dtype_of
from recon.models.weight_files import directory_digest, refuse_gguf, require_format, require_prunable, weight_places

BUNDLED = Path(__file__).parent / "bundled"

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    ImportError,
    EOFError,
    ArithmeticError,
    AttributeError,
    LookupError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
    UnpicklingError,
)
"""Errors of transformers on a missing, damaged or foreign model."""


@dataclass(frozen=True)
class ModelSource:
    """A model by its source and the precision of its weights.

    Args:
        name: `bundled`, a directory in Hugging Face format, a name on the hub, or `random`. An existing
            directory wins over the hub; `./bundled` and `./random` are directories too.
        shape: For `random`: the model's configuration, `model_type` included.
        dtype: Precision of the weights in memory, in which everything is computed: float32, bfloat16, float16, or
            `auto` for the stored one. A model is written in its stored precision, whatever it was loaded in. If null
            float32 on a CPU, which computes fastest in it, and the stored one on a GPU (see `on`).
        revision: Commit, tag or branch of a hub model.
        tokenizer: Source of the tokenizer, if it is not with the model; for `random` the bundled one by default.
        trust_remote_code: Run code that comes with the model. Off, because it can do anything.
        seed: Decides the weights of a `random` model.
    """

    name: str = "bundled"
    shape: dict[str, Any] | None = None
    dtype: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16", "auto"):
            raise ValueError(f"model.dtype must be float32, bfloat16, float16 or auto, got {self.dtype!r}")
        if (self.name == "random") != (self.shape is not None):
            without = "without" if self.shape is None else "with"
            raise ValueError(
                f"model.shape belongs to model.name: random, and to it only, got {self.name!r} {without} one"
            )
        if self.shape is not None and "model_type" not in self.shape:
            raise ValueError(f"model.shape needs a model_type, for example llama, got only {', '.join(self.shape)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"model.seed must be from 0 to {2**63 - 1}, got {self.seed}")

    @property
    def is_stored(self) -> bool:
        """Whether files hold the weights; those of a random model are made when it is loaded."""
        return self.shape is None

    @property
    def _loaded(self) -> torch.dtype | None:
        """The precision in memory; None for the stored one."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype or "float32")

    def on(self, device: torch.device) -> "ModelSource":
        """Settle a precision that is left open: float32 on a CPU, where it stays open, elsewhere the stored one."""
        return replace(self, dtype="auto") if self.dtype is None and device.type != "cpu" else self

    def at(self, directory: Path) -> "ModelSource":
        """The model that was made from this one and written to `directory`, computed in the same precision.

        In another one their perplexities would differ by more than their weights do.
        """
        return ModelSource(str(directory), dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    def model(self, device: torch.device | None = None) -> PreTrainedModel:
        """Load (or make) the model in evaluation mode, without a cache, on `device` (the CPU if None).

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        if self.shape is not None:
            model = self._random(self.shape)
        else:
            # Other shapes are refused here: the message of transformers leaves their names to its log.
            options = {"dtype": self._loaded or "auto", "weights_only": True, "ignore_mismatched_sizes": True}
            self._config_and_dtype()  # refuses a model by its configuration before its weights are read
            model, loaded = self._load(
                AutoModelForCausalLM, "model.name", self.name, self.revision, output_loading_info=True, **options
            )
            if mismatched := sorted(loaded["mismatched_keys"]):
                name, stored, needed = mismatched[0]
                raise ValueError(
                    f"model.name needs weights in the shapes of its config.json, got {len(mismatched)} others in "
                    f"{self.name}, {list(stored)} for {name} {list(needed)} the first; correct config.json, or copy "
                    f"the model again"
                )
            if missing := sorted(loaded["missing_keys"]):  # transformers fills them with random numbers
                raise ValueError(
                    f"model.name needs a complete causal language model, got {self.name}, which lacks {len(missing)} "
                    f"of {type(model).__name__}'s weights, {missing[0]} the first; copy it again"
                )
        model.config.use_cache = False
        if device is not None:
            nn.Module.to(model, device)
        return model.eval()

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, on the meta device.

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        config, dtype = self._config_and_dtype()
        try:
            return empty(AutoModelForCausalLM, config, dtype, self.trust_remote_code)
        except UNREADABLE as error:
            raise _no_config(f"model.name: {self.name}" if self.shape is None else "model.shape", error) from error

    def hollow(self) -> PreTrainedModel:
        """The model with its buffers, in evaluation mode, without a cache; each parameter is a single NaN, expanded.

        Results computed with such a parameter are NaN. `parameter.data = ...` gives it data, which parameters on the
        meta device refuse.

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        config, dtype = self._config_and_dtype()
        with parameters_on_meta(), isolated_seed(self.seed):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
            for module in model.modules():
                module._is_hf_initialized = False
            model.initialize_weights()  # again, in fp32: so buffers are computed when a model is loaded (GPT-J)
        hollow: dict[int, nn.Parameter] = {}  # tied ones stay tied
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) not in hollow:
                    nan = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
                    hollow[id(parameter)] = nn.Parameter(nan, requires_grad=False)
                setattr(module, name, hollow[id(parameter)])
        model.config.use_cache = False
        return model.eval()

    def files(self) -> Path:
        """The directory with the model's safetensors files; from the hub it is downloaded if it is not in the cache.

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        path = _directory("model.name", self.name)
        if path is not None:
            return path
        _ask_hub_once("model.name", self.name, self.revision)
        patterns = ["*.json", "model*.safetensors"]
        try:
            return Path(snapshot_download(self.name, revision=self.revision or "main", allow_patterns=patterns))
        except UNREADABLE as error:
            raise ValueError(
                f"model.name needs `bundled`, a directory in Hugging Face format or a hub name; there is no directory "
                f"{self.name}, and the files of that hub name could not be downloaded: {_said(error)}"
            ) from error

    def stored_dtype(self) -> torch.dtype:
        """The precision of the source's files, in which a recovered model is written; `dtype` for a random model.

        That is the precision of most weights in its safetensors files; without such files, or if their precision is
        none that recon computes in, the `dtype` of its configuration, float32 by default.

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        if not self.is_stored:
            return self._loaded or torch.float32
        return dtype_of(self.files()) or replace(self, dtype="auto")._config_and_dtype()[1]

    def _config_and_dtype(self) -> tuple[PreTrainedConfig, torch.dtype]:
        if self.shape is not None:
            config = self._config(self.shape)
        else:
            config = self._load(AutoConfig, "model.name", self.name, self.revision)
        return config, self._loaded or config.dtype or torch.float32  # pyright: ignore[reportReturnType]

    def load(self, device: torch.device | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer, which fit together.

        Raises:
            ValueError: If one of them cannot be loaded, or the tokenizer has ids without an embedding.
        """
        model = self.model(device)
        return model, self.tokenizer_for(model)

    def tokenizer_for(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """Load the tokenizer of `model`.

        Raises:
            ValueError: If it cannot be loaded, or has ids without an embedding.
        """
        tokenizer = self.load_tokenizer()
        require_vocabulary(model, tokenizer)
        return tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ValueError: If there is none, with what was tried, or it has no tokens.
        """
        option, name, revision = "model.name", self.name, self.revision
        if self.tokenizer is not None or self.shape is not None:
            option, name, revision = "model.tokenizer", self.tokenizer or "bundled", None
        tokenizer = self._load(AutoTokenizer, option, name, revision)
        _require_tokens(tokenizer, option, name)
        return tokenizer

    def identity(self) -> dict[str, Any]:
        """Identity of weights and tokenizer: a digest of local files, a hub name with its revision, or a shape."""
        other = self._identity_of_tokenizer() | {"dtype": self.dtype or "float32"}
        if self.shape is not None:
            return {"shape": self.shape, "seed": self.seed, **other}
        path = _directory("model.name", self.name)
        if path is None:
            return {"name": self.name, "revision": self.revision or "main", **other}
        require_unchanged(path, "copy it again, or repeat the run that made it")
        return {"files": directory_digest(path), **other}

    def _identity_of_tokenizer(self) -> dict[str, str]:
        """Of one in a directory of its own: its words and its chat template decide what text becomes."""
        path = None if self.tokenizer is None else _directory("model.tokenizer", self.tokenizer)
        return {} if path is None else {"tokenizer": directory_digest(path)}

    def _random(self, shape: dict[str, Any]) -> PreTrainedModel:
        config = self._config(shape)
        try:
            with isolated_seed(self.seed):
                return AutoModelForCausalLM.from_config(config, dtype=self._loaded or torch.float32)
        except UNREADABLE as error:
            raise _no_config("model.shape", error) from error

    def _config(self, shape: dict[str, Any]) -> PreTrainedConfig:
        try:
            return AutoConfig.for_model(**shape)
        except UNREADABLE as error:
            raise _no_config("model.shape", error) from error

    def _load(self, auto: Any, option: str, name: str, revision: str | None, **options: Any) -> Any:
        path = _directory(option, name)
        if path is not None and revision is not None:
            raise ValueError(f"model.revision belongs to names on the hub, got {revision!r} with the directory {path}")
        if path is None:
            _ask_hub_once(option, name, revision)
        elif auto is not AutoTokenizer:
            require_format(path, option)
        if path is not None and auto is AutoModelForCausalLM and not weight_places(path, option):
            raise ValueError(
                f"{option} needs a directory with model.safetensors or its parts, got {path} without them; copy the "
                f"model again"
            )
        try:
            loaded: Any = auto.from_pretrained(
                path or name,
                revision=revision or "main",
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except UNREADABLE as error:
            where = f"the directory {path}" if path else f"there is no directory {name}, and the hub name"
            cure = "copy the model again, or name another one"
            if auto is AutoTokenizer:
                cure = "copy its files again; if it holds no tokenizer, give model.tokenizer"
            raise ValueError(
                f"{option} needs `bundled`, a directory in Hugging Face format or a hub name; "
                f"{where} could not be read as {auto.__name__}: {_said(error)}; {cure}"
            ) from error
        if auto is AutoConfig:
            require_prunable(loaded, path or name, option)
        return loaded


def _no_config(option: str, error: Exception) -> ValueError:
    return ValueError(
        f"{option} needs the configuration of a causal language model, got one that makes none: {_said(error)}; "
        f"correct it"
    )


def empty(kind: Any, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of `config` without weights, on the meta device; `kind` is its class or one of the Auto classes."""
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        return kind(config).to(dtype).eval()


def _said(error: Exception) -> str:
    return shorten(f"{error}", 500) or type(error).__name__


def _require_tokens(tokenizer: PreTrainedTokenizerBase, option: str, name: str) -> None:
    """Check that `tokenizer` has tokens beside the special ones: without its files transformers makes an empty one.

    Raises:
        ValueError: If it has not; all text would become nothing, or unknown tokens.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}  # pyright: ignore
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - special) < 2:  # some empty ones have a word separator
        raise ValueError(
            f"{option} needs a tokenizer with a vocabulary, got {name}, which gives an empty "
            f"{type(tokenizer).__name__} of {len(vocabulary)} special tokens; copy the missing files, such as "
            f"tokenizer.json, or give model.tokenizer"
        )


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every id of `tokenizer` has an embedding in `model`.

    Raises:
        ValueError: If it has not; the model would fail with an index error in its first forward pass.
    """
    embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
    needed = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if needed > embeddings:
        raise ValueError(
            f"the tokenizer's ids need {needed} embeddings, the model has {embeddings}; "
            f"give the model's own tokenizer as model.tokenizer"
        )


def _directory(option: str, name: str) -> Path | None:
    """The directory that `name` is, or None if it can only be a name on the hub."""
    path = BUNDLED if name == "bundled" else Path(name).expanduser()
    if name and path.is_dir():
        return path
    if not name or path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        refuse_gguf(path, option)
        what = "is a file" if name and path.exists() else "does not exist"
        raise ValueError(
            f"{option} needs `bundled`, a directory in Hugging Face format or a hub name, got {name!r}, which {what}; "
            f"correct the path"
        )
    return None


def _ask_hub_once(option: str, name: str, revision: str | None) -> None:
    """Fail at once if the hub cannot be reached; transformers would retry for half a minute to ten minutes.

    Raises:
        ValueError: If the model is not in the cache and no connection can be made.
    """
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except (OSError, ValueError):
        return  # an answer, or offline mode: transformers says what it means
    except Exception as error:  # of the hub's HTTP library, which changes between releases
        raise ValueError(
            f"{option} needs `bundled`, a directory in Hugging Face format or a hub name; there is no directory "
            f"{name}, and the Hugging Face hub cannot be reached ({_said(error)}); correct the path, or download "
            f"the model where there is a network: hf download {name}"
        ) from error
