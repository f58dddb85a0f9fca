"""recon from Python, on a model that is loaded already: the parser and the run of `recon prune` and `recon fit`."""

import argparse
import inspect
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.locks import owned
from recon.basics.run_paths import RunPaths
from recon.cli import plain
from recon.cli.arguments import choose_device, parse
from recon.cli.fit import _cli, execute
from recon.cli.names import resolve_criterion, resolve_pattern
from recon.cli.prune import build_parser
from recon.cli.quiet import unnoticed
from recon.data import TokenSource
from recon.data.texts import Texts
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.models.author import DenseAuthor
from recon.models.live import LiveModel
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import moved_with, prune_to
from recon.pruning.refinement import refined
from recon.pruning.start_weights import Start
from recon.report import Report

T = TypeVar("T")

Text = Sequence[str] | TokenSource
"""Documents, or a data source of recon's."""

Class = Criterion | Pattern | TokenSource
"""An object that stands for a class and its arguments in the options."""

OF_THE_MODEL = ("name", "shape", "dtype", "revision", "tokenizer", "trust_remote_code")
"""Options of a scope that a live model answers."""


class PrunedMasks(Masks):
    """Masks that `prune` chose, with the file that holds them and where they came from.

    The file, and the moved weights beside it, last as long as this object, or stay if they are in a run directory.

    Args:
        file: The masks, as `recon prune` writes them.
        is_temporary: Delete the file's directory with this object.
    """

    def __init__(self, file: Path, is_temporary: bool) -> None:
        super().__init__({})
        self.add(Masks.load(file))
        self.file, self._held = file, self.fingerprint()
        if is_temporary:
            weakref.finalize(self, shutil.rmtree, file.parent, ignore_errors=True)

    @property
    def moved(self) -> Start | None:
        """The weights as the criterion moved them, zero where pruned, read when asked for; None if it moves none."""
        return moved_with(self.file, self)

    @property
    def is_in_file(self) -> bool:
        """Whether these are still the masks in the file."""
        return self.fingerprint() == self._held


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str | Criterion | None = None,
    pattern: str | float | Pattern | None = None,
    *,
    text: Text | None = None,
    validation_text: Sequence[str] | None = None,
    test_text: Sequence[str] | None = None,
    config: str | Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> Masks:
    """Choose the weights of a live model that survive. The model is left as it was.

    The same as `recon prune` without its measurements: give the masks to `recover`, which takes them.

    Args:
        model: A causal language model of transformers, on one device, where pruning computes.
        tokenizer: Its tokenizer.
        criterion: How much a weight matters: a name such as "wanda" or "sparsegpt", or an object of
            `recon.criteria`; that of the command if None.
        pattern: Which zeros are allowed: "2:4", "60%", 0.6, or an object of `recon.patterns`; that of the command
            if None.
        text: Documents for calibration; the source of the configurations if None.
        validation_text: Not used by pruning; as in `recover`, so that calibration documents are the same.
        test_text: As `validation_text`. Splits without documents are carved out of `text`.
        config: Shipped configurations or YAML files, such as "refine/swaps" or "allocations/owl".
        options: Options of `recon prune` by their dotted names, such as {"data.num_sequences": 64}; they beat `config`.
        run_dir: Where the masks stay; with the returned object if None.

    Returns:
        The masks, which know their `file` and, of a criterion that moves weights, have the `moved` ones.

    Raises:
        ValueError: If an option is unknown, the text too short, or model, pattern and options do not fit together.
    """
    paths = RunPaths(Path(mkdtemp(prefix="recon-") if run_dir is None else run_dir))
    live, texts = LiveModel(model, tokenizer, keep_dense=False), _texts(text, validation_text, test_text)
    args = [*_configs(config), "--model.name", live.name, "--model.dtype", live.dtype]
    args += _classes(criterion, pattern) + _source(text, texts, paths)
    args += _options({"device": str(model.device)} | _checked(options))
    args += ["--run_dir", str(paths.path)]
    with unnoticed(), ExitStack() as stack:
        if run_dir is None:
            stack.callback(shutil.rmtree, paths.path, ignore_errors=True)
        parsed, built = _parsed(lambda: parse(build_parser(), args))
        chosen_by = refined(built.criterion, built.refinement)
        if chosen_by is None or built.pattern is None:
            raise ValueError("recon.prune needs a criterion and a pattern, got null")
        data = built.data
        data.source = texts or data.source
        left_out = ("config", "run_dir", "device", "drift", "summary")
        chosen = {key: value for key, value in parsed.as_dict().items() if key not in left_out}
        identity = {"model": live.identity(), "data": data.identity()}
        with owned(paths.path):
            run = RunDirectory(paths.path, {"options": chosen, "versions": versions(), **identity})
            run.sweep()
            if texts is not None:
                texts.write(run.text, run.manifest.writing)
            if not run.has_masks:
                shell, data.tokenizer = live.load(choose_device(parsed.device))
                data.author = DenseAuthor(live, data.tokenizer, versions(), lambda: shell)
                data.require(["train"], shell)
                tokens = data.tokens("train")
                prune_to(run.masks, shell, tokens, chosen_by, built.pattern, built.pruning, run.moved)
        stack.pop_all()  # the file lives as long as the masks
    return PrunedMasks(run.masks, is_temporary=run_dir is None)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    masks: Masks | str | Path | None = None,
    *,
    scope: str = "submodule",
    text: Text | None = None,
    validation_text: Sequence[str] | None = None,
    test_text: Sequence[str] | None = None,
    criterion: str | Criterion | None = None,
    pattern: str | float | Pattern | None = None,
    start: str | None = None,
    baselines: bool = True,
    drift: bool = True,
    config: str | Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> Report:
    """Recover a live model at one scope, in place. The same as `recon fit`, option by option, and the same weights.

    `model` is dense when the call begins and recovered when it returns: the same object with the same parameters,
    dtype, device, mode and `requires_grad`. Gradients are left alone, and are those of the dense weights.

    `baselines` and `drift` compare with the dense model, for which its weights are copied to the host first; a call
    that fails then leaves `model` dense. With both of them False there is no copy, and a call that fails in or after
    training leaves weights that are partly pruned and recovered. Evaluation loads a second copy of the recovered
    model from the run directory, as the command does.

    Progress is logged by `logging.getLogger("recon")`.

    Args:
        model: A causal language model of transformers, on one device, where recovery computes.
        tokenizer: Its tokenizer.
        masks: From `prune`, of your own, or a file; if None the model is pruned by `criterion` and `pattern` first.
        scope: A shipped scope, "matrix", "submodule", "block", "full", "submodule_best", or a YAML file.
        text: Documents for calibration, or a source of `recon.data`; the source of the configurations if None.
        validation_text: Documents for held-out errors and drift; a part of `text` if None.
        test_text: Documents for perplexity; a part of `text` if None.
        criterion: As in `prune`, if there are no masks.
        pattern: As in `prune`, if there are no masks.
        start: Weights to start from: "pruned", "moved" or "exact"; those of the scope if None.
        baselines: Measure dense and pruned perplexity.
        drift: Measure the distance from the dense model.
        config: More shipped configurations or YAML files.
        options: Options of `recon fit` by dotted names, such as {"model.epochs": 2}; they beat configurations.
        run_dir: Place of model, masks, report and logs, from which a killed call goes on; temporary if None.

    Returns:
        The report: `perplexity`, `dense_perplexity`, `peaks`, `seconds`, `drift` and more.

    Raises:
        ValueError: If an option is unknown, the text too short, or model, masks and options do not fit together.
    """
    live = LiveModel(model, tokenizer, keep_dense=baselines or drift)
    with unnoticed(), _directory(run_dir) as paths:
        texts = _texts(text, validation_text, test_text)
        args = _configs([scope if "/" in scope or scope.endswith(".yaml") else f"scopes/{scope}", "cell"])
        args += [*_configs(config), "--model.name", live.name, "--model.dtype", live.dtype]
        args += _place(model) + _classes(criterion, pattern) + _source(text, texts, paths)
        args += _options({"model.start": start} if start else {})
        args += _options({"baselines": baselines, "drift": drift} | _checked(options))
        file, in_memory = _masks(masks)
        args += ["--run_dir", str(paths.path), *([] if file is None else ["--masks", str(file)])]
        cli = _parsed(lambda: _cli(args))
        if (processes := cli.trainer.num_devices * cli.trainer.num_nodes) > 1:
            raise ValueError(
                f"recon.recover runs in this process, got trainer.devices and trainer.num_nodes that make {processes}; "
                f"set both to 1, or save the model and use `recon fit`"
            )
        cli.model.source = live
        if texts is not None:
            cli.datamodule.source = texts
        if in_memory is not None:
            cli.fingerprint["masks"] = in_memory.fingerprint()
        with live.restored_on_failure():
            report = execute(cli, in_memory, texts=texts)
            assert report is not None
            live.take(paths.model)
    return report if run_dir is not None else report.replace(run_dir="")


@contextmanager
def _directory(run_dir: str | Path | None) -> Iterator[RunPaths]:
    if run_dir is not None:
        yield RunPaths(Path(run_dir))
        return
    with TemporaryDirectory(prefix="recon-") as temporary:
        yield RunPaths(Path(temporary))


def _parsed(parsing: Callable[[], T]) -> T:
    """What `parsing` returns; errors of the parser as a library raises them."""
    try:
        return parsing()
    except argparse.ArgumentError as error:
        raise ValueError(plain(str(error))) from error


def _configs(names: str | Sequence[str]) -> list[str]:
    return [part for name in ([names] if isinstance(names, str) else names) for part in ("-c", name)]


def _options(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line gives them."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's options, without those that the call itself answers."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in (options or {}).items()}
    taken = {f"model.{name}" for name in OF_THE_MODEL} | {"masks", "run_dir", "windows"}
    if refused := sorted(taken & {name.replace(".init_args", "") for name in options}):
        raise ValueError(
            f"a live model is recovered as a whole and in its own precision, got the options {', '.join(refused)}; "
            f"leave them out, give masks and run_dir as arguments, or save the model and use the command"
        )
    return options


def _place(model: PreTrainedModel) -> list[str]:
    """Options by which the trainer computes where the model is."""
    device = model.device
    if device.type == "cpu":
        return ["--trainer.accelerator=cpu"]
    return [f"--trainer.accelerator={device.type}", f"--trainer.devices=[{device.index or 0}]"]


def _classes(criterion: str | Criterion | None, pattern: str | float | Pattern | None) -> list[str]:
    """Options for criterion and pattern, given as names, numbers or objects."""
    options: dict[str, Any] = {}
    if criterion is not None:
        options["criterion"] = resolve_criterion(criterion) if isinstance(criterion, str) else _spec(criterion)
    if pattern is not None:
        named = isinstance(pattern, str | float | int)
        options["pattern"] = resolve_pattern(str(pattern)) if named else _spec(pattern)
    return _options(options)


def _texts(text: Text | None, validation: Sequence[str] | None, test: Sequence[str] | None) -> Texts | None:
    if text is None or isinstance(text, TokenSource):
        if validation is not None or test is not None:
            raise ValueError(
                "validation_text and test_text go with text as a list of strings; a data source has splits of its own"
            )
        return None
    return Texts(text, validation, test)


def _source(text: Text | None, texts: Texts | None, paths: RunPaths) -> list[str]:
    """The option for the data source: of documents in memory, the files that the run directory has of them."""
    if texts is not None:
        spec = {"class_path": "recon.data.TextFiles", "init_args": texts.files(paths.text)}
        return _options({"data.source": spec})
    return _options({"data.source": _spec(text)}) if isinstance(text, TokenSource) else []


def _spec(instance: Class) -> dict[str, Any]:
    """Class and arguments of an object that has its arguments as attributes.

    Raises:
        ValueError: If it has not.
    """
    kind = type(instance)
    names = [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]
    if missing := [name for name in names if not hasattr(instance, name)]:
        raise ValueError(
            f"an object in the options needs its arguments as attributes, {kind.__name__} lacks {', '.join(missing)}; "
            f"keep them there, or give class_path and init_args in `options`"
        )
    arguments = {name: _plain(getattr(instance, name)) for name in names}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _plain(value: Any) -> Any:
    """An argument as JSON has it; a source within a source as class and arguments."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return _spec(value) if isinstance(value, TokenSource) else str(value) if isinstance(value, Path) else value


def _masks(masks: Masks | str | Path | None) -> tuple[Path | None, Masks | None]:
    """The file of the masks, or the masks if no file holds them."""
    if isinstance(masks, PrunedMasks) and masks.is_in_file:
        return masks.file, None
    return (None, masks) if isinstance(masks, Masks) else (None if masks is None else Path(masks), None)
