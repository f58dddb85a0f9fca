"""The house: sizes of files and functions, packages, import cycles, and READMEs that name only things that exist."""

import ast
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import grimp
import pytest
import torch
from jaxtyping import TypeCheckError
from jsonargparse import ArgumentParser
from transformers import AutoModelForCausalLM

import recon
from recon.cli import main
from recon.pruning.bits import pack

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("recon", "callbacks") for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PACKAGES = 400, 80, 14
MAX_README_LINES, MAX_README_WORDS = 130, 1500

FOLDERS = sorted(
    {path.parent for top in ("recon", "callbacks", "configs", "launch") for path in (ROOT / top).rglob("*.*")}
    | {ROOT / "tests" / name for name in ("", "support", "golden", "benchmarks")}
)
FOLDERS = [folder for folder in FOLDERS if folder.name != "__pycache__"]
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *(folder / "README.md" for folder in FOLDERS)]
PAGES = [page for page in PAGES if page.exists()]

CONFIG_FOLDERS = "|".join(path.name for path in sorted((ROOT / "configs").iterdir()) if path.is_dir())
FILE = re.compile(r"[\w./-]+\.(py|sh|sbatch|toml|yaml|md|png|svg|txt|json|safetensors)")
WRITTEN_BY_RUNS = {
    *("config.yaml", "fingerprint.json", "manifest.json", "masks.safetensors", "moved.safetensors"),
    *("start.safetensors", "windows.json", "memory.json", "memory.png", "memory.svg", "report.json", "results.json"),
    *("log.txt", "gpu.json", "gpu.md", "rates.json", "recipe.json", "speed.json", "speeds.json", "tasks.json"),
}
OF_THE_READER = re.compile(r"(my|path|runs)/|(mine|it)\.yaml$|config\.json$|out\.json$")
"""Names that stand for a reader's own files."""


def code_lines(page: Path) -> list[str]:
    """The lines of the page's code blocks, which are indented by four spaces."""
    return [line[4:] for line in page.read_text().splitlines() if line.startswith("    ")]


def code(page: Path) -> str:
    """All that is set as code: the blocks and what stands between backticks."""
    return "\n".join(code_lines(page) + re.findall(r"`([^`]+)`", page.read_text()))


def words_of_code(page: Path) -> list[str]:
    return [word.strip("'\"(),;:") for word in code(page).split()]


def commands(page: Path) -> list[str]:
    lines = (line.partition("  #")[0].strip() for line in code_lines(page))
    return [line for line in lines if line.startswith("recon ")]


def is_there(name: str, page: Path) -> bool:
    return (page.parent / name).exists() or (ROOT / name).exists()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function in a file, decorators and docstring included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - first + 1


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = dict(function for path in SOURCES for function in functions(path))
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_recon_is_a_few_packages_and_no_loose_module():
    assert {path.name for path in (ROOT / "recon").glob("*.py")} == {"__init__.py", "__main__.py"}
    packages = [path.name for path in (ROOT / "recon").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(packages) <= MAX_PACKAGES, packages


def test_short_names_import_past_a_directory_of_an_earlier_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Git leaves `recon/criteria/__pycache__` behind, which Python takes for a package."""
    monkeypatch.setattr(recon, "__path__", [*recon.__path__, str(tmp_path)])
    for name, module in recon.FACE.items():
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, f"recon.{name}", raising=False)
        assert import_module(f"recon.{name}") is import_module(module)


def test_no_import_cycle_between_files():
    graph = grimp.build_graph("recon", "callbacks", cache_dir=None)
    assert len(graph.modules) >= len(SOURCES)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_every_folder_has_a_readme():
    assert len(FOLDERS) > 35
    assert [str(folder.relative_to(ROOT)) for folder in FOLDERS if not (folder / "README.md").is_file()] == []


def test_every_file_is_named_in_the_readme_of_its_folder():
    files = [path for path in SOURCES if not path.name.startswith("__")] + sorted((ROOT / "launch").glob("*.*"))
    unnamed = [path for path in files if f"`{path.name}`" not in (path.parent / "README.md").read_text()]
    assert [str(path.relative_to(ROOT)) for path in unnamed if path.name != "README.md"] == []


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    assert len(text.split()) <= MAX_README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_only_what_exists(page: Path):
    missing = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        if not target.startswith("http") and not (goal.exists() and (not anchor or anchor in anchors(goal))):
            missing.append(f"link {target}")
    for word in words_of_code(page):
        if OF_THE_READER.match(word) or OF_THE_READER.search(word):
            continue
        if re.fullmatch(rf"({CONFIG_FOLDERS})/[\w.-]+", word):
            if not ((ROOT / f"configs/{word}.yaml").is_file() or is_there(word, page)):
                missing.append(f"configuration {word}")
        elif FILE.fullmatch(word) and Path(word).name not in WRITTEN_BY_RUNS and not is_there(word, page):
            missing.append(f"file {word}")
        elif re.fullmatch(r"(recon|callbacks)(\.\w+)+", word) and not resolves(word):
            missing.append(f"name {word}")
    assert missing == []


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


class Parsed(BaseException):
    """A parser has accepted the command line; nothing else of the command is to run."""


@pytest.mark.parametrize("page", list(filter(commands, PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    parse = ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    refused = []
    for command in commands(page):
        try:
            main(shlex.split(command)[1:])
        except Parsed:
            continue
        refused.append(f"{command}\n    {capsys.readouterr().err[:300]}")
    assert refused == []


def test_shapes_and_dtypes_are_checked_in_tests():
    with pytest.raises(TypeCheckError, match="keep"):
        pack(torch.ones(3))


@pytest.mark.slow
def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block = next(text for text in (ROOT / "README.md").read_text().split("\n\n") if "import recon\n" in text)
    (tmp_path / "recon").symlink_to(ROOT / "recon")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(dedent(block), "README.md", "exec"), names)
    report = names["report"]
    assert report.dense_perplexity < report.perplexity < report.pruned_perplexity
    assert names["masks"].sparsity == 0.5
    names["masks"].check(AutoModelForCausalLM.from_pretrained("recovered"))
