"""The rules of the house, read from the source: sizes, who imports whom, and the map in the documentation.

A checker that cannot fail checks nothing, so each is also given a small package that breaks its rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import architecture
from tests.architecture import Module, read_package

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_sg"

#: Folders and modules, lowest layer first; those in one row are peers. An entry such as "batch.context" takes one
#: module out of its folder. A module may import what is in its row or below.
LAYERS = (
    (
        *("errors", "which_lightning", "lightning_api", "mixture", "arguments", "_compat"),
        *("profiling", "rng", "files", "plain", "words", "objects", "subclasses", "precision"),
    ),
    ("gradient_flow",),
    ("batch", "boundary", "time_boundary"),
    ("passes",),
    ("replicas",),
    ("predictors", "rules", "options"),
    ("partition",),
    ("finite",),
    ("training",),
    ("crossings",),
    ("recurrent", "inputs", "blackbox"),
    (
        *("settings", "ownership", "automatic", "session", "each_crossing", "context_log", "runtime", "metrics_log"),
        *(
            "watched",
            "clipping",
            "optimizer_advice",
            "settings_log",
            "run_summary",
            "step_clock",
            "past_log",
            "times_log",
            "summary_picture",
        ),
    ),
    ("stage_randomness",),
    ("decoupling",),
    ("transport", "checkpoint"),
    ("distributed",),
    ("callback",),
    ("strategy",),
    ("tools",),
    ("cli",),
    ("__init__", "__main__"),
)
UPWARD_IMPORTS = 1  # a higher layer may be imported this often, in all

#: Lightning under all its names; which of them is used is decided in one place.
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

MODULE_LINES = 450
PARAMETERS = 8
RECORD_FIELDS = 15  # of a dataclass, which is made by name and has no code that could get long
CHANGING_ATTRIBUTES = 15
ATTRIBUTES = 20
#: What users construct: their options are listed one by one.
LONG_SIGNATURES = ("SyntheticGradients.__init__", "SyntheticGradientStrategy.__init__")


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_package(ROOT / PACKAGE)


def assert_none(violations: list[str], allowed: int = 0) -> None:
    if len(violations) > allowed:
        pytest.fail("\n".join(violations), pytrace=False)


def test_no_module_is_long(modules: dict[str, Module]) -> None:
    assert_none(architecture.long_modules(modules, MODULE_LINES))


def test_no_function_has_many_parameters(modules: dict[str, Module]) -> None:
    assert_none(architecture.long_signatures(modules, PARAMETERS, LONG_SIGNATURES))


def test_no_dataclass_has_many_fields(modules: dict[str, Module]) -> None:
    assert_none(architecture.long_records(modules, RECORD_FIELDS))


def test_no_class_has_many_attributes(modules: dict[str, Module]) -> None:
    assert_none(architecture.large_classes(modules, CHANGING_ATTRIBUTES, ATTRIBUTES))


def test_no_modules_import_each_other(modules: dict[str, Module]) -> None:
    assert_none(architecture.circles(architecture.imports(modules)))


def test_no_folders_import_each_other(modules: dict[str, Module]) -> None:
    assert_none(architecture.circles(architecture.folder_imports(modules)))


def test_every_module_is_in_a_layer(modules: dict[str, Module]) -> None:
    assert_none(architecture.unlayered(modules, LAYERS))


def test_imports_run_downwards(modules: dict[str, Module]) -> None:
    assert_none(architecture.upward_imports(modules, LAYERS), UPWARD_IMPORTS)


def test_nothing_but_the_facade_and_the_command_line_imports_tools(modules: dict[str, Module]) -> None:
    assert_none(architecture.imported_from_outside(modules, "tools", ("__init__", "cli.commands")))


def test_one_module_imports_lightning(modules: dict[str, Module]) -> None:
    assert_none(architecture.imported_directly(modules, LIGHTNING, ("lightning_api",)))


def test_the_map_in_the_documentation_is_that_of_the_source(modules: dict[str, Module]) -> None:
    page = (ROOT / "docs" / "development.md").read_text()
    drawn = architecture.drawn_map(modules, LAYERS)
    if drawn not in page:
        pytest.fail(f"The map in docs/development.md is out of date. It should be:\n\n{drawn}", pytrace=False)


# The checkers themselves


def package(folder: Path, files: dict[str, str]) -> dict[str, Module]:
    """A package ``house`` of these files, read."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return read_package(folder / "house")


def test_a_module_may_be_as_long_as_the_limit_and_no_longer(tmp_path: Path) -> None:
    tree = package(tmp_path, {"short.py": "x = 1\n" * 3, "long.py": "x = 1\n" * 4})
    (violation,) = architecture.long_modules(tree, 3)
    assert violation.startswith("house/long.py has 4 lines, more than 3")


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        pytest.param("def f(a, b): ...", 0, id="at the limit"),
        pytest.param("def f(a, b, c): ...", 1, id="a function"),
        pytest.param("async def f(a, b, c): ...", 1, id="a coroutine"),
        pytest.param("def f(a, /, b, *, c): ...", 1, id="all kinds of parameters"),
        pytest.param("def f(a, *b, **c): ...", 1, id="the rest of the arguments"),
        pytest.param("def f():\n def g(a, b, c): ...", 1, id="a function in a function"),
        pytest.param("if True:\n def f(a, b, c): ...", 1, id="under a condition"),
        pytest.param("class C:\n def f(self, a, b): ...", 0, id="self is not counted"),
        pytest.param("class C:\n @classmethod\n def f(cls, a, b): ...", 0, id="nor is cls"),
        pytest.param("class C:\n @staticmethod\n def f(a, b, c): ...", 1, id="a static method"),
        pytest.param("class C:\n def f(self, a, b, c): ...", 1, id="a method"),
        pytest.param("class Free:\n def f(self, a, b, c): ...", 0, id="exempt"),
    ],
)
def test_parameters_are_counted(tmp_path: Path, source: str, counts: int) -> None:
    assert len(architecture.long_signatures(package(tmp_path, {"a.py": source}), 2, ["Free.f"])) == counts


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        pytest.param("a: int; b: int = 0", 0, id="at the limit"),
        pytest.param("a: int; b: int = 0; c: int = field()", 1, id="a large record"),
        pytest.param("a: int; b: int; C: ClassVar[int] = 1", 0, id="a constant"),
    ],
)
@pytest.mark.parametrize("decorator", ["@dataclass", "@dataclass(frozen=True)", "@dataclasses.dataclass"])
def test_fields_are_counted(tmp_path: Path, decorator: str, body: str, counts: int) -> None:
    tree = package(tmp_path, {"a.py": f"{decorator}\nclass C:\n {body}"})
    assert len(architecture.long_records(tree, 2)) == counts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("class C:\n def __init__(self): self.a = self.b = self.c = 1", [], id="in __init__, at the limit"),
        pytest.param(
            "class C:\n def __init__(self): self.a = self.b = self.c = self.d = 1",
            ["has 4 attributes"],
            id="in __init__",
        ),
        pytest.param("class C:\n def f(self): self.a, self.b = 1, 2", ["assigns 2"], id="a tuple"),
        pytest.param("class C:\n def f(self):\n  self.a: int = 1\n  self.b += 1", ["assigns 2"], id="other statements"),
        pytest.param("class C:\n def f(self):\n  self.a = 1\n  self.a = 2", [], id="one attribute twice"),
        pytest.param("class C:\n def f(self, o):\n  self.a = 1\n  o.b = o.c = self.d.e = 2", [], id="of other objects"),
        pytest.param("@dataclass\nclass C:\n a: int; b: int; c: int; d: int", ["has 4 attributes"], id="fields"),
        pytest.param("class C:\n a: int; b: int; c: int; d: int", [], id="a class's own"),
    ],
)
def test_attributes_are_counted(tmp_path: Path, source: str, expected: list[str]) -> None:
    violations = architecture.large_classes(package(tmp_path, {"a.py": source}), 1, 3)
    assert len(violations) == len(expected)
    assert all(text in violation for text, violation in zip(expected, violations))


@pytest.mark.parametrize(
    "line",
    [
        "import house.b",
        "from house import b",
        "from house.b import x",
        "from . import b",
        "from .b import x",
        "if TYPE_CHECKING:\n from house.b import x",
        "def f():\n import house.b",
    ],
)
def test_two_modules_that_import_each_other_are_found(tmp_path: Path, line: str) -> None:
    tree = package(tmp_path, {"a.py": line, "b.py": "from house.c import x", "c.py": "from house import a"})
    (violation,) = architecture.circles(architecture.imports(tree))
    assert violation.startswith("house.a and house.b and house.c import each other")


def test_imports_that_lead_nowhere_back_are_no_circle(tmp_path: Path) -> None:
    files = {"a.py": "import torch\nfrom house import b, c", "b.py": "from house.c import x", "c.py": "import os"}
    assert architecture.circles(architecture.imports(package(tmp_path, files))) == []


def test_folders_that_import_each_other_are_found_though_no_modules_do(tmp_path: Path) -> None:
    files = {"a/one.py": "from house.b import one", "b/two.py": "from ..a import two", "a/two.py": "", "b/one.py": ""}
    tree = package(tmp_path, files)
    assert architecture.circles(architecture.imports(tree)) == []
    (violation,) = architecture.circles(architecture.folder_imports(tree))
    assert violation.startswith("a and b import each other")


def test_an_import_of_a_higher_layer_is_found(tmp_path: Path) -> None:
    files = {"low.py": "import house.high.x", "peer.py": "import house.low", "high/x.py": "import house.peer"}
    tree = package(tmp_path, files)
    layers: Any = (("low", "peer"), ("high",), ("__init__",))
    (violation,) = architecture.upward_imports(tree, layers)
    assert violation == "house/low.py imports house.high.x, which is in a higher layer."
    assert architecture.upward_imports(tree, (("high.x",), *layers)) == [
        "house/high/x.py imports house.peer, which is in a higher layer."
    ]


def test_layers_name_every_module_and_nothing_else(tmp_path: Path) -> None:
    tree = package(tmp_path, {"a.py": "", "b/c.py": ""})
    assert architecture.unlayered(tree, (("a", "b"), ("__init__",))) == []
    assert architecture.unlayered(tree, (("b", "d"), ("__init__",))) == [
        "a is in no layer: add it to LAYERS.",
        "LAYERS names d, which does not exist.",
    ]


def test_a_folder_that_only_few_may_import_is_guarded(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from house.tools import draw",
        "core.py": "from house.tools.draw import line",
        "tools/draw.py": "from house.tools import text",
        "tools/text.py": "",
    }
    (violation,) = architecture.imported_from_outside(package(tmp_path, files), "tools", ("__init__",))
    assert violation == "house/core.py imports house.tools.draw; only __init__ may import tools."


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        pytest.param("import outside as o", 1, id="import"),
        pytest.param("import outside.deep.module", 1, id="a module of it"),
        pytest.param("from outside import a", 1, id="from"),
        pytest.param("from outside.deep import a", 1, id="from a module of it"),
        pytest.param("def f():\n from outside import a", 1, id="in a function"),
        pytest.param("if TYPE_CHECKING:\n import outside", 1, id="for type checkers"),
        pytest.param("importlib.import_module('outside.deep')", 1, id="by function"),
        pytest.param("__import__('outside')", 1, id="by built-in function"),
        pytest.param("import outsider", 0, id="a longer name"),
        pytest.param("from . import outside", 0, id="a module of this package"),
        pytest.param("from house.api import outside", 0, id="through the module for it"),
    ],
)
def test_a_package_is_imported_by_one_module_alone(source: str, counts: int, tmp_path: Path) -> None:
    tree = package(tmp_path, {"api.py": "import outside", "user.py": source})
    found = architecture.imported_directly(tree, ("outside",), ("api",))
    assert len(found) == counts
    assert all("house/user.py:" in each and "outside" in each and "api" in each for each in found)


def test_the_map_is_drawn_from_the_highest_layer_down_with_the_first_sentence_of_each_module(tmp_path: Path) -> None:
    files = {
        "__init__.py": '"""The facade. It has more to say."""',
        "low.py": '"""Is low."""',
        "folder/__init__.py": '"""A folder."""',
        "folder/b.py": '"""Goes\nover two lines. And on."""',
    }
    assert architecture.drawn_map(package(tmp_path, files), [["low"], ["folder"], ["__init__"]]).splitlines() == [
        "house/",
        "  __init__.py  The facade",
        "  folder/      A folder",
        "    b.py       Goes over two lines",
        "  low.py       Is low",
    ]
