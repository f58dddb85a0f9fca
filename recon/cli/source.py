"""Classes, their parameters and docstrings, read from source text.

The command line answers `--help` and a typo from here: an import of torch and Lightning takes seconds, the text of
their classes milliseconds.
"""

import ast
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import DocstringParam, ParseError
from docstring_parser.google import parse

from recon import FACE

WITHOUT_PARAMETERS = {"ABC", "object", "Generic", "Protocol"}


@dataclass(frozen=True)
class SourceClass:
    """A class as its file defines it.

    Args:
        module: The module of that file.
        node: The definition.
    """

    module: str
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """The class's name."""
        return self.node.name


@dataclass(frozen=True)
class Parameter:
    """A parameter of a class.

    Args:
        name: Of the parameter.
        type: The annotation, as written.
        default: As written; None for a required parameter.
        help: From the docstring.
        module: Where the annotation's names are defined.
    """

    name: str
    type: str
    default: str | None
    help: str
    module: str


def find(dotted: str) -> SourceClass | None:
    """The class at a dotted path such as `recon.criteria.Wanda`; None if no source text defines it."""
    module, _, name = dotted.rpartition(".")
    return find_in(full_module(module), name) if module else None


def full_module(module: str) -> str:
    """`module` with a short face of recon written out: `recon.pruning.criteria` for `recon.criteria`."""
    package, _, face = module.partition(".")
    return FACE.get(face, module) if package == "recon" else module


@cache
def find_in(module: str, name: str) -> SourceClass | None:
    """The class that `module` defines or imports as `name`; None if it does neither."""
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return SourceClass(module, node)
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_in(node.module or "", alias.name)
    return None


@cache
def tree(module: str) -> ast.Module:
    """The parsed source of a module, which is not imported; empty if there is no such file."""
    root, *rest = module.split(".")
    try:
        spec = find_spec(root)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ast.Module([], [])
    stems = [Path(place, *rest) for place in spec.submodule_search_locations or []]
    files = [file for stem in stems for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))]
    if not rest and spec.origin:
        files.append(Path(spec.origin))
    source = next((file for file in files if file.is_file() and file.suffix == ".py"), None)
    return ast.Module([], []) if source is None else ast.parse(source.read_text(encoding="utf-8"))


@cache
def literals(module: str, annotation: str) -> tuple[str, ...]:
    """The values of a `Literal`, or of a module's name for one, null left out; empty for any other type."""
    written = annotation.removesuffix(" | None").removeprefix("Optional[").removesuffix("]")
    if written.startswith("Literal["):
        value = ast.parse(f"{written}]" if written.count("[") > written.count("]") else written, mode="eval").body
        assert isinstance(value, ast.Subscript)
        return tuple(str(one) for one in _as_tuple(ast.literal_eval(value.slice)))
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == written:
            return literals(module, ast.unparse(node.value)) if written.isidentifier() else ()
        if isinstance(node, ast.ImportFrom) and not node.level and any(one.name == written for one in node.names):
            return literals(node.module or "", written)
    return ()


def _as_tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


@cache
def public_classes(module: str) -> list[SourceClass]:
    """The classes of a package's face: those in its `__all__`, or those that the module defines."""
    exported = [
        ast.literal_eval(node.value)
        for node in tree(module).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    defined = [node.name for node in tree(module).body if isinstance(node, ast.ClassDef)]
    found = [find_in(module, name) for name in (exported[0] if exported else defined)]
    return [one for one in found if one is not None]


def descends(of: SourceClass, ancestors: tuple[str, ...]) -> bool:
    """Whether a base class, or one of its own, has one of these names."""
    for base in of.node.bases:
        name = base.attr if isinstance(base, ast.Attribute) else ast.unparse(base).partition("[")[0]
        parent = find_in(of.module, name)
        if name in ancestors or (parent is not None and descends(parent, ancestors)):
            return True
    return False


@cache
def parameters(of: SourceClass) -> dict[str, Parameter] | None:
    """What `__init__` takes, `**options` that go to a base class included; None if a base class is not found."""
    init = next((node for node in of.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if init is None:
        inherited = _inherited(of)
        if not is_dataclass(of) or inherited is None:
            return inherited
        return inherited | _documented(of, _fields(of))
    arguments = init.args.args[1:]
    defaults = [None] * (len(arguments) - len(init.args.defaults)) + [ast.unparse(one) for one in init.args.defaults]
    pairs = list(zip(arguments, defaults, strict=True))
    pairs += [
        (argument, None if default is None else ast.unparse(default))
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    ]
    own = {
        argument.arg: Parameter(
            argument.arg, ast.unparse(argument.annotation) if argument.annotation else "", default, "", of.module
        )
        for argument, default in pairs
    }
    if init.args.kwarg is None:
        return _documented(of, own)
    inherited = _inherited(of)
    if inherited is None:
        return None
    settled = _passed_to_base(init)
    own = {name: _with_help(one, inherited) for name, one in own.items()}
    return _documented(of, own | {name: one for name, one in inherited.items() if name not in {*settled, *own}})


def is_dataclass(of: SourceClass) -> bool:
    """Whether a decorator makes it one."""
    return any(ast.unparse(one).partition("(")[0].endswith("dataclass") for one in of.node.decorator_list)


def _inherited(of: SourceClass) -> dict[str, Parameter] | None:
    for base in of.node.bases:
        name = ast.unparse(base).partition("[")[0]
        if name in WITHOUT_PARAMETERS:
            continue
        parent = find_in(of.module, name)
        return None if parent is None else parameters(parent)
    return {}


def _fields(of: SourceClass) -> dict[str, Parameter]:
    """The fields of a dataclass."""
    found = {}
    for node in of.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if not (annotation := ast.unparse(node.annotation)).startswith("ClassVar"):
            default = None if node.value is None else _default(node.value)
            found[node.target.id] = Parameter(node.target.id, annotation, default, "", of.module)
    return found


def _default(value: ast.expr) -> str:
    """A field's default as written; what a factory makes, where that can be seen."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        made = ast.unparse(value.keywords[0].value) if value.keywords else ""
        return {"list": "[]", "dict": "{}"}.get(made, made.removeprefix("lambda: "))
    return ast.unparse(value)


def _passed_to_base(init: ast.FunctionDef) -> list[str]:
    """Names of the keywords that `super().__init__` is called with."""
    calls = (node for node in ast.walk(init) if isinstance(node, ast.Call))
    return [
        keyword.arg
        for call in calls
        if ast.unparse(call.func) == "super().__init__"
        for keyword in call.keywords
        if keyword.arg is not None
    ]


def _with_help(one: Parameter, inherited: dict[str, Parameter]) -> Parameter:
    return replace(one, help=inherited[one.name].help) if one.name in inherited else one


def _documented(of: SourceClass, found: dict[str, Parameter]) -> dict[str, Parameter]:
    """Parameters with the help of the docstrings of the class and of its `__init__`."""
    inits = [node for node in of.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    texts = [ast.get_docstring(node) or "" for node in (of.node, *inits)]
    docs = {one.arg_name: one.description or "" for text in texts for one in _described(text)}
    docs = {
        name: " ".join(words.split()) for name, words in docs.items() if not (words.startswith("As in") or not words)
    }
    return {name: replace(one, help=docs.get(name, one.help)) for name, one in found.items()}


def _described(text: str) -> list[DocstringParam]:
    """The parameters that a docstring describes; none if it is not in Google style."""
    try:
        return parse(text).params
    except ParseError:
        return []
