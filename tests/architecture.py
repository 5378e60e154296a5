"""Reads a package's source without importing it, and checks its size, its records and its imports.

Each checker returns one sentence for each violation, so that an empty list means that the rule holds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: Lowest layer first; the names in one row are peers.
Layers = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Module:
    """One source file.

    Attributes:
        name: The dotted name, ``"package"`` for the facade and ``"package.folder"`` for a folder's ``__init__.py``.
        path: Where the file is, from the folder that holds the package.
        text: The source.
        tree: The source, parsed.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def top(self) -> str:
        """The package's folder or module that this belongs to; ``"__init__"`` for the facade."""
        return within_package(self.name).split(".")[0]


def within_package(name: str) -> str:
    """A dotted name without the package's; ``"__init__"`` for the facade."""
    return name.partition(".")[2] or "__init__"


def read_package(root: Path) -> dict[str, Module]:
    """Parses every module of the package in the folder ``root``, by dotted name."""
    modules = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root.parent)
        parts = path.parent.parts if file.name == "__init__.py" else path.with_suffix("").parts
        text = file.read_text()
        modules[".".join(parts)] = Module(".".join(parts), path, text, ast.parse(text))
    return modules


# Sizes


def long_modules(modules: Mapping[str, Module], limit: int) -> list[str]:
    """Modules of more than ``limit`` lines."""
    lengths = ((module.path, len(module.text.splitlines())) for module in modules.values())
    return [
        f"{path} has {lines} lines, more than {limit}: move one of its concepts to a file of its own."
        for path, lines in lengths
        if lines > limit
    ]


def long_signatures(modules: Mapping[str, Module], limit: int, exempt: Iterable[str] = ()) -> list[str]:
    """Functions of more than ``limit`` parameters, ``self`` and ``cls`` aside; ``exempt`` has ``Class.method``."""
    return [
        f"{module.path}:{function.lineno}: {name} takes {count} parameters, more than {limit}: group what belongs "
        "together in a dataclass."
        for module in modules.values()
        for name, function, is_method in _functions(module.tree)
        if (count := _parameters(function, is_method)) > limit and name not in exempt
    ]


def long_records(modules: Mapping[str, Module], limit: int) -> list[str]:
    """Dataclasses of more than ``limit`` fields."""
    return [
        f"{module.path}:{node.lineno}: the dataclass {name} has {count} fields, more than {limit}: group what belongs "
        "together."
        for module in modules.values()
        for name, node in _classes(module.tree)
        if _is_dataclass(node) and (count := len(_fields(node))) > limit
    ]


def large_classes(modules: Mapping[str, Module], changing_limit: int, limit: int) -> list[str]:
    """Classes that assign too many attributes of ``self``: outside ``__init__``, or in all."""
    found = []
    for module in modules.values():
        for name, node in _classes(module.tree):
            attributes, changing = _attributes(node)
            where = f"{module.path}:{node.lineno}: {name}"
            if len(changing) > changing_limit:
                found.append(
                    f"{where} assigns {len(changing)} attributes outside __init__, more than {changing_limit}: "
                    f"give a part of this state an object of its own. {', '.join(sorted(changing))}"
                )
            if len(attributes) > limit:
                found.append(
                    f"{where} has {len(attributes)} attributes, more than {limit}: split the class. "
                    f"{', '.join(sorted(attributes))}"
                )
    return found


def _functions(tree: ast.AST, prefix: str = "", in_class: bool = False) -> Iterable[tuple[str, Function, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield f"{prefix}{node.name}", node, in_class
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.", in_class=True)
        else:
            yield from _functions(node, prefix, in_class)


def _classes(tree: ast.AST) -> Iterable[tuple[str, ast.ClassDef]]:
    return ((node.name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def _parameters(function: Function, is_method: bool) -> int:
    arguments = function.args
    count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
    count += (arguments.vararg is not None) + (arguments.kwarg is not None)
    bound = is_method and "staticmethod" not in _decorators(function)
    return count - 1 if bound else count


def _decorators(node: Function | ast.ClassDef) -> set[str]:
    calls = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return {ast.unparse(call).rpartition(".")[2] for call in calls}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return "dataclass" in _decorators(node)


def _fields(node: ast.ClassDef) -> set[str]:
    return {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    }


def _attributes(node: ast.ClassDef) -> tuple[set[str], set[str]]:
    """The names of all attributes that a class gives its instances, and of those assigned after ``__init__``."""
    attributes = _fields(node) if _is_dataclass(node) else set()
    changing: set[str] = set()
    for method in (statement for statement in node.body if isinstance(statement, Function)):
        assigned = {
            target.attr
            for target in ast.walk(method)
            if isinstance(target, ast.Attribute)
            and isinstance(target.ctx, ast.Store)
            and isinstance(target.value, ast.Name)
            and target.value.id == "self"
        }
        attributes |= assigned
        if method.name not in ("__init__", "__post_init__"):
            changing |= assigned
    return attributes, changing


# Imports


def imports(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """What each module imports of its own package, wherever in the file: in functions and for types too.

    ``from package.folder import name`` counts as an import of ``package.folder.name`` if that is a module.
    """
    return {name: _imported(module, modules) - {name} for name, module in modules.items()}


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """The groups of names that reach each other, one sentence for each."""
    reached = {name: _reachable(name, graph) for name in graph}
    groups = {
        tuple(sorted({name, *(other for other in reached[name] if name in reached.get(other, ()))}))
        for name in graph
        if name in reached[name]
    }
    return [
        f"{' and '.join(group)} import each other: move what they share to a module below them."
        for group in sorted(groups)
    ]


def folder_imports(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """The graph of :func:`imports` between the package's folders and top modules."""
    graph: dict[str, set[str]] = {module.top: set() for module in modules.values()}
    for name, targets in imports(modules).items():
        graph[modules[name].top] |= {modules[target].top for target in targets} - {modules[name].top}
    return graph


def unlayered(modules: Mapping[str, Module], layers: Layers) -> list[str]:
    """Modules that no layer names, and names in layers that are no module."""
    names = [within_package(name) for name in modules]
    missing = [f"{name} is in no layer: add it to LAYERS." for name in names if _layer(name, layers) is None]
    stale = [
        f"LAYERS names {entry}, which does not exist."
        for entry in (entry for row in layers for entry in row)
        if entry not in names
    ]
    return missing + stale


def upward_imports(modules: Mapping[str, Module], layers: Layers) -> list[str]:
    """Imports of a module in a higher layer."""
    found = []
    for name, targets in imports(modules).items():
        here = _layer(within_package(name), layers)
        for target in sorted(targets):
            there = _layer(within_package(target), layers)
            if here is not None and there is not None and there > here:
                found.append(f"{modules[name].path} imports {target}, which is in a higher layer.")
    return found


def imported_from_outside(modules: Mapping[str, Module], folder: str, allowed: Iterable[str]) -> list[str]:
    """Imports of ``folder`` by modules that are neither in it nor ``allowed``."""
    outside = {name: targets for name, targets in imports(modules).items() if modules[name].top != folder}
    return [
        f"{modules[name].path} imports {target}; only {', '.join(allowed)} may import {folder}."
        for name, targets in outside.items()
        if within_package(name) not in allowed
        for target in sorted(targets)
        if modules[target].top == folder
    ]


def imported_directly(modules: Mapping[str, Module], packages: Iterable[str], allowed: Sequence[str]) -> list[str]:
    """Imports of packages from outside in modules other than ``allowed``, wherever in the module they are."""
    return [
        f"{module.path}:{line} imports {name}; take what it needs from {' or '.join(allowed)}."
        for module in modules.values()
        if within_package(module.name) not in allowed
        for line, name in _outside(module.tree)
        if name.partition(".")[0] in packages
    ]


def _outside(tree: ast.Module) -> Iterable[tuple[int, str]]:
    """Line and name of each absolute import, also of those that are calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def _imported(module: Module, modules: Mapping[str, Module]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & modules.keys()
            if inner - modules.keys():
                found.add(base)
    return found & modules.keys()


def _base(node: ast.ImportFrom, module: Module) -> str:
    """The module that an import names, with the dots of a relative one resolved."""
    if not node.level:
        return node.module or ""
    folder = module.path.parent.parts
    above = folder[: len(folder) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    """What ``start`` imports, directly or not; itself only if it is in a circle."""
    seen: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += graph.get(name, ())
    return seen


def _layer(name: str, layers: Layers) -> int | None:
    """The layer of the entry that names a module or, the nearest first, a folder around it."""
    rows = {entry: index for index, row in enumerate(layers) for entry in row}
    while name:
        if name in rows:
            return rows[name]
        name = name.rpartition(".")[0]
    return None


# The map in the documentation


def drawn_map(modules: Mapping[str, Module], layers: Layers) -> str:
    """The package as a tree, the highest layer first, each module with the first sentence of its docstring."""
    rows: list[tuple[str, str]] = []
    for entry in [entry for row in reversed(layers) for entry in row if "." not in entry]:
        inside = [module for module in modules.values() if module.top == entry]
        for module in sorted(inside, key=lambda module: [(part != "__init__.py", part) for part in module.path.parts]):
            is_folder = module.path.name == "__init__.py" and entry != "__init__"
            label = f"{module.path.parent.name}/" if is_folder else module.path.name
            depth = len(module.path.parts) - (2 if is_folder else 1)
            rows.append(("  " * depth + label, _first_sentence(module)))
    width = max(len(label) for label, _sentence in rows)
    package = next(iter(modules.values())).path.parts[0]
    return "\n".join([f"{package}/", *(f"{label.ljust(width)}  {sentence}".rstrip() for label, sentence in rows)])


def _first_sentence(module: Module) -> str:
    text = " ".join((ast.get_docstring(module.tree) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) |\.$", text)[0].rstrip(".")
