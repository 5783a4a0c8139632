"""Measure the shape of the code: names, cells, functions, docstrings, layers.

`make shape` prints it, and test_shape.py holds the limits.

Usage: python tests/shape.py [REPOSITORY ...]  (several checkouts are shown side by side)
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parent.parent
SCREEN, COLUMNS = 44, 120
WORD = re.compile(r"[A-Za-z_]\w*")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def modules(root: Path) -> dict[str, ast.Module]:
    "Parse the exported library: module name -> tree."
    paths = sorted((root / "biomass_lib").glob("[!_]*.py"))
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def numbers(root: Path) -> dict[str, int]:
    "Read which number each module's notebook has: module name -> number."
    paths = (root / "notebooks").glob("[0-9][0-9]_*.ipynb")
    return {path.stem[3:]: int(path.stem[:2]) for path in paths}


def code_cells(path: Path) -> list[str]:
    "Read the code cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def export_cells(root: Path) -> list[tuple[str, str]]:
    "Read the exported cells that define something, without their directives: (notebook, text)."
    cells = []
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        for source in code_cells(path):
            if re.match(r"#\s*\|\s*exporti?\b", source):
                body = re.sub(r"\A(#\s*\|.*\n)+", "", source).strip()
                if definitions(ast.parse(body)):
                    cells.append((path.stem, body))
    return cells


def several_public(cells: list[tuple[str, str]]) -> list[str]:
    "List the cells with more than one public definition."
    defined = [(notebook, public_definitions(ast.parse(body))) for notebook, body in cells]
    return [f"{notebook}: {', '.join(node.name for node in nodes)}" for notebook, nodes in defined if len(nodes) > 1]


def long_cells(cells: list[tuple[str, str]]) -> dict[str, int]:
    "List the cells longer than a screen: notebook and first definition -> lines."
    sizes = {f"{name}: {definitions(ast.parse(body))[0].name}": body.count("\n") + 1 for name, body in cells}
    return {name: size for name, size in sizes.items() if size > SCREEN}


def definitions(tree: ast.Module) -> list[Definition]:
    "List the functions and classes at the top level."
    return [node for node in tree.body if isinstance(node, Definition)]


def public_definitions(tree: ast.Module) -> list[Definition]:
    "List the functions and classes at the top level without a leading underscore."
    return [node for node in definitions(tree) if not node.name.startswith("_")]


def names(tree: ast.Module) -> set[str]:
    "List all names a module defines at its top level: functions, classes, constants."
    defined = {node.name for node in definitions(tree)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        defined |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {name for name in defined if not name.startswith("__")}


def public(tree: ast.Module) -> set[str]:
    "List the names of a module without a leading underscore."
    return {name for name in names(tree) if not name.startswith("_")}


def words_elsewhere(root: Path, module: str) -> set[str]:
    "List every word of code outside a module and its notebook: other modules, workflows, tests, kernels, settings."
    paths = [path for path in (root / "biomass_lib").glob("[!_]*.py") if path.stem != module]
    paths += [path for path in (root / "tests").glob("*.py") if path.name not in ("shape.py", "test_shape.py")]
    paths += [*(root / "kaggle").glob("*/*.py"), root / "settings.ini"]
    text = [path.read_text(encoding="utf-8") for path in paths]
    for path in (root / "notebooks").glob("*.ipynb"):
        if not re.match(r"\d\d_", path.name):
            text += code_cells(path)
    return set(WORD.findall("\n".join(text)))


def imports(tree: ast.Module) -> set[str]:
    "List the modules of this library that a module imports, also inside functions."
    others = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("biomass_lib")):
            name = (node.module or "").removeprefix("biomass_lib").strip(".")
            others |= {name.split(".")[0]} if name else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("biomass_lib.")}
    return others


def in_circles(graph: dict[str, set[str]]) -> list[str]:
    "List the modules that import themselves, directly or through others."
    reached = {module: set(others) for module, others in graph.items()}
    for _ in graph:
        for module, others in reached.items():
            reached[module] = others.union(*(reached.get(other, set()) for other in others))
    return sorted(module for module, others in reached.items() if module in others)


def floors(graph: dict[str, set[str]]) -> int:
    "Measure the longest chain of imports, in modules."
    depth: dict[str, int] = {}

    def height(module: str) -> int:
        if module not in depth:
            depth[module] = 0
            depth[module] = 1 + max((height(other) for other in graph.get(module, ())), default=0)
        return depth[module]

    return max(height(module) for module in graph)


def upward(graph: dict[str, set[str]], number: dict[str, int]) -> list[str]:
    "List the imports of a module whose number is not lower."
    arrows = [(module, other) for module in sorted(graph) for other in sorted(graph[module])]
    return [f"{module} -> {other}" for module, other in arrows if number[other] >= number[module]]


def spread(values: list[int]) -> str:
    "Write median, ninetieth percentile and maximum."
    return f"{median(values):.0f} / {quantiles(values, n=10)[-1]:.0f} / {max(values)}"


def lines(node: ast.AST) -> int:
    "Count the lines of a definition, its decorators included."
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.end_lineno - first + 1


def parameters(function: Function) -> list[ast.arg]:
    "List the parameters of a function that a caller gives."
    every = function.args
    args = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
    return [arg for arg in args if arg is not None and arg.arg not in ("self", "cls")]


def sources(root: Path) -> list[Path]:
    "List the files of Python that a person reads as such."
    return [*(root / "biomass_lib").glob("[!_]*.py"), *(root / "tests").glob("*.py"), *(root / "kaggle").glob("*/*.py")]


def wide_lines(root: Path) -> list[str]:
    "List the lines over 120 columns; the list of names that nbdev writes isn't ours."
    wide = []
    for path in sorted(sources(root)):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS and not line.startswith("__all__"):
                wide.append(f"{path.relative_to(root)}:{number}: {len(line)} columns")
    return wide


def share(part: list, whole: list) -> str:
    "Write a share in percent."
    return f"{len(part) / len(whole):.0%}"


def names_in_numbers(root: Path, trees: dict[str, ast.Module]) -> dict[str, str]:
    "Count names, and those that only their own module uses."
    defined = {module: {node.name for node in public_definitions(tree)} for module, tree in trees.items()}
    constants = {module: public(tree) - defined[module] for module, tree in trees.items()}
    elsewhere = {module: words_elsewhere(root, module) for module in trees}
    home = [sum(len(names[module] - elsewhere[module]) for module in trees) for names in (defined, constants)]
    return {
        "modules": str(len(trees)),
        "public functions and classes": str(sum(map(len, defined.values()))),
        "... used only in their own file": str(home[0]),
        "public constants": str(sum(map(len, constants.values()))),
        "... used only in their own file, too": str(home[1]),
    }


def cells_in_numbers(root: Path) -> dict[str, str]:
    "Measure the exported cells that define something."
    cells = export_cells(root)
    return {
        "export cells with definitions": str(len(cells)),
        "lines of an export cell, median / p90 / max": spread([body.count("\n") + 1 for _, body in cells]),
        f"export cells over {SCREEN} lines": str(len(long_cells(cells))),
        "export cells with several public definitions": str(len(several_public(cells))),
    }


def functions_in_numbers(root: Path, trees: dict[str, ast.Module]) -> dict[str, str]:
    "Measure functions, docstrings, annotations and lines."
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    documented = [node for tree in trees.values() for node in public_definitions(tree)]
    args = [arg for function in functions for arg in parameters(function)]
    with_docstring = [node for node in documented if ast.get_docstring(node) is not None]
    return {
        "lines of a function, median / p90 / max": spread([lines(function) for function in functions]),
        "public definitions with a docstring": share(with_docstring, documented),
        "annotated parameters": share([arg for arg in args if arg.annotation is not None], args),
        f"lines over {COLUMNS} columns": str(len(wide_lines(root))),
    }


def layers_in_numbers(root: Path, trees: dict[str, ast.Module]) -> dict[str, str]:
    "Measure layers, imports and the longest module."
    graph, number = {module: imports(tree) for module, tree in trees.items()}, numbers(root)
    layers = Counter(number[module] // 10 for module in trees if module in number)
    paths = {module: root / "biomass_lib" / f"{module}.py" for module in trees}
    sizes = {module: path.read_text(encoding="utf-8").count("\n") for module, path in paths.items()}
    longest = max(sizes, key=sizes.get)
    return {
        "modules per layer": " ".join(f"{layer}x:{count}" for layer, count in sorted(layers.items())),
        "floors of imports": str(floors(graph)),
        "longest module, lines": f"{longest} {sizes[longest]}",
        "modules in a circle of imports": str(len(in_circles(graph))),
        "upward imports": str(len(upward(graph, number))),
    }


def shape(root: Path) -> dict[str, str]:
    "Measure one checkout."
    trees = modules(root)
    parts = names_in_numbers(root, trees) | cells_in_numbers(root) | functions_in_numbers(root, trees)
    return parts | layers_in_numbers(root, trees)


def main() -> None:
    "Print checkouts side by side."
    tables = [shape(Path(argument).resolve()) for argument in sys.argv[1:] or [ROOT]]
    widths = [max(map(len, table.values())) for table in tables]
    for name in tables[0]:
        cells = [table[name].rjust(width) for table, width in zip(tables, widths, strict=True)]
        print(f"{name:<{max(map(len, tables[0]))}}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
