"The limits of the code: layers point one way, cells fit on a screen, names are few, docstrings say what to do."

import ast
import re
import subprocess
import sys

import pytest
import shape

TREES = shape.modules(shape.ROOT)
GRAPH = {module: shape.imports(tree) for module, tree in TREES.items()}
CELLS = shape.export_cells(shape.ROOT)
MOST_NAMES = 456  # public functions and classes
LONG_CELLS = {
    "05_config: Config": "one line a parameter",
    "34_logs: RunLog": "ten short methods",
}  # notebook and first definition -> why it may be long


def test_every_module_has_a_numbered_notebook():
    assert set(TREES) == set(shape.numbers(shape.ROOT))


def test_imports_point_one_way():
    assert shape.in_circles(GRAPH) == []
    assert shape.upward(GRAPH, shape.numbers(shape.ROOT)) == []


def test_public_names_are_few():
    nodes = [node.name for tree in TREES.values() for node in shape.public_definitions(tree)]
    assert len(nodes) <= MOST_NAMES, "what only its own file uses begins with an underscore"


def test_cells_fit_on_a_screen():
    long = shape.long_cells(CELLS)
    assert {name: lines for name, lines in long.items() if name not in LONG_CELLS} == {}
    assert set(LONG_CELLS) <= set(long), "an exception that isn't needed any more"


def test_a_cell_has_one_public_definition():
    assert shape.several_public(CELLS) == []


def test_lines_have_at_most_120_columns():
    assert shape.wide_lines(shape.ROOT) == []


@pytest.mark.parametrize("module", TREES)
def test_public_definitions_say_what_they_do(module: str):
    "A docstring is an imperative: what it does first, then what it raises."
    docstrings = {node.name: ast.get_docstring(node) or "" for node in shape.public_definitions(TREES[module])}
    assert [name for name, text in docstrings.items() if not text] == []
    wrong = re.compile(r"(Raises|The|Whether|What)\b")
    assert {name: text for name, text in docstrings.items() if wrong.match(text)} == {}


def test_circles_and_upward_imports_are_noticed():
    graph = {"ground": {"roof"}, "wall": {"ground"}, "roof": {"wall"}, "garden": {"ground"}}
    assert shape.in_circles(graph) == ["ground", "roof", "wall"]
    assert shape.upward(graph, {"ground": 0, "wall": 10, "roof": 20, "garden": 30}) == ["ground -> roof"]
    tree = ast.parse("from .wall import Brick\nfrom biomass_lib import roof\nimport biomass_lib.garden\nimport numpy")
    assert shape.imports(tree) == {"wall", "roof", "garden"}


def test_long_and_crowded_cells_are_noticed():
    crowded = ("00_house", "def door(): ...\ndef window(): ...\ndef _hinge(): ...")
    long = ("00_house", "def stairs():\n" + "    step()\n" * shape.SCREEN + "    step()")
    assert shape.several_public([crowded, long]) == ["00_house: door, window"]
    assert shape.long_cells([crowded, long]) == {"00_house: stairs": shape.SCREEN + 2}


def test_two_checkouts_stand_side_by_side():
    command = [sys.executable, shape.__file__, str(shape.ROOT), str(shape.ROOT)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    words = [re.split(r"\s{2,}", line) for line in printed]
    assert len(words) > 15
    assert all(len(line) == 3 and line[1] == line[2] for line in words)
