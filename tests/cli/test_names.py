"""Short names of classes, in options and in files."""

import importlib
import inspect

import pytest
from lightning import LightningDataModule

from recon.basics.refusals import UsageError
from recon.cli.names import CHOICES, resolve, resolve_class, resolve_criterion, resolve_pattern, with_short_paths
from recon.cli.source import full_module

NAMES = ["sparsegpt", "SparseGPT", "sparse_gpt", "recon.criteria.SparseGPT", "recon.pruning.criteria.SparseGPT"]


@pytest.mark.parametrize("text", NAMES)
def test_a_class_has_many_names(text):
    assert resolve_criterion(text) == {"class_path": "recon.criteria.SparseGPT", "init_args": {}}


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("2:4", "NM", {"keep": 2, "of": 4}),
        ("60%", "Unstructured", {"sparsity": 0.6}),
        ("7%", "Unstructured", {"sparsity": 0.07}),
        ("0.6", "Unstructured", {"sparsity": 0.6}),
        (".5", "Unstructured", {"sparsity": 0.5}),
        ("nm", "NM", {}),
        ("unstructured", "Unstructured", {}),
    ],
)
def test_patterns(text, name, arguments):
    assert resolve_pattern(text) == {"class_path": f"recon.patterns.{name}", "init_args": arguments}


@pytest.mark.parametrize("text", ["60", "100%", "1.0"])
def test_a_sparsity_of_one_or_more_is_refused(text):
    with pytest.raises(UsageError, match=f"sparsity from 0 to below 100%.*got {text}"):
        resolve_pattern(text)


@pytest.mark.parametrize(
    ("option", "text", "path"),
    [
        ("model", "submodule", "recon.scopes.SubmoduleDistillation"),
        ("model", "block_distillation", "recon.scopes.BlockDistillation"),
        ("model.solver", "admm", "recon.solvers.ADMMSolver"),
        ("model.solver", "conjugate-gradients", "recon.solvers.ConjugateGradients"),
        ("model.solver", "GradientDescent", "recon.solvers.GradientDescent"),
        ("data.source", "textfiles", "recon.data.TextFiles"),
        ("pruning.allocation", "owl", "recon.allocation.OWL"),
        ("criterion", "my.own.Criterion", "my.own.Criterion"),
    ],
)
def test_other_options(option, text, path):
    assert resolve_class(option, text) == path


@pytest.mark.parametrize(
    ("option", "text", "meant"),
    [
        ("criterion", "sparsegtp", "SparseGPT"),
        ("criterion", "recon.criteria.Wando", "Wanda"),
        ("criterion", "sparse", "SparseFW or SparseGPT"),
        ("criterion", "Criterion", None),
        ("model", "Scope", None),
        ("model", "submodul", "SubmoduleDistillation"),
        ("data.source", "files", "TextFiles"),
        ("pruning.allocation", "errors", "EqualErrors"),
        ("pattern", "Counted", None),
        ("pattern", "2:x", None),
    ],
)
def test_an_unknown_name_is_answered_in_one_line(option, text, meant):
    with pytest.raises(UsageError, match=f"--{option} needs .*, got ") as caught:
        resolve_class(option, text)
    assert "\n" not in str(caught.value)
    if meant is not None:
        assert str(caught.value).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("option", CHOICES)
def test_all_classes_that_can_be_made_are_found_without_an_import(option):
    choice = CHOICES[option]
    module = importlib.import_module(full_module(choice.face))
    exported = {name: one for name, one in vars(module).items() if inspect.isclass(one)}
    bases = tuple(exported[name] for name in choice.bases if name in exported)
    kinds = {name: one for name, one in exported.items() if issubclass(one, bases or LightningDataModule)}
    expected = {name for name, one in kinds.items() if one not in bases and not inspect.isabstract(one)}
    assert set(choice.classes()) == (expected | set(choice.also)) - set(choice.internal)
    assert expected


def test_files_have_short_names_too():
    content = {
        "model": {"class_path": "matrix", "init_args": {"solver": "admm", "lr": 1}},
        "criterion": "wanda",
        "pattern": 0.6,
        "pruning": {"allocation": {"class_path": "owl", "init_args": {"M": 3}}},
        "data": {"source": "standard"},
    }
    assert resolve(content) == {
        "model": {
            "class_path": "recon.scopes.MatrixReconstruction",
            "init_args": {"solver": {"class_path": "recon.solvers.ADMMSolver"}, "lr": 1},
        },
        "criterion": {"class_path": "recon.criteria.Wanda"},
        "pattern": {"class_path": "recon.patterns.Unstructured", "init_args": {"sparsity": 0.6}},
        "pruning": {"allocation": {"class_path": "recon.allocation.OWL", "init_args": {"M": 3}}},
        "data": {"source": {"class_path": "recon.data.StandardLibrary"}},
    }


def test_comparisons_list_them():
    content = {"criteria": ["wanda", "sparsegpt"], "patterns": ["60%", "2:4"], "allocations": [None, "owl"]}
    assert resolve(content) == {
        "criteria": [{"class_path": "recon.criteria.Wanda"}, {"class_path": "recon.criteria.SparseGPT"}],
        "patterns": [
            {"class_path": "recon.patterns.Unstructured", "init_args": {"sparsity": 0.6}},
            {"class_path": "recon.patterns.NM", "init_args": {"keep": 2, "of": 4}},
        ],
        "allocations": [None, {"class_path": "recon.allocation.OWL"}],
    }


def test_one_class_has_one_path_in_a_fingerprint():
    given = {"criterion": {"class_path": "recon.pruning.criteria.Wanda"}, "other": ["recon.scopes.Scope", 1, None]}
    assert with_short_paths(given) == {
        "criterion": {"class_path": "recon.criteria.Wanda"},
        "other": ["recon.scopes.Scope", 1, None],
    }
