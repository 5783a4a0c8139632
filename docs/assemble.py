"""Lay out the site's pages: guides, notebooks without what only nbdev needs, and the API from the modules' own comments.

`make docs` calls this, then Sphinx. Pages keep the links that they have on GitHub; a link that leads nowhere is an error.
"""

import ast
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {  # the first digit of a notebook's number
    "0": "Foundations",
    "1": "Photographs and tables",
    "2": "Models",
    "3": "Training",
    "4": "Prediction",
    "5": "Judging",
    "6": "Many runs",
    "7": "Kaggle",
    "8": "In the field",
}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```[^\n]*)$", re.MULTILINE | re.DOTALL)


def page_path(
    path: str,  # of a file in the repository
) -> str:  # of its page in the site, or of its copy
    "Say where a file of the repository is in the site."
    if path in ("README.md", "notebooks/index.ipynb"):
        return "index.md"
    if path == "CONTRIBUTING.md":
        return "contributing.md"
    if re.fullmatch(r"docs/\w+\.md", path):
        return path.removeprefix("docs/")
    if path == "tests/faults.md":
        return "faults.md"
    return path if re.fullmatch(r"notebooks/\w+\.ipynb", path) else f"files/{path}"


class Site:
    "The folder that Sphinx reads. Files are written only when they change, so that a second build is quick."

    def __init__(
        self,
        folder: Path,
    ):
        self.folder = folder
        self.kept: set[Path] = set()

    def write(
        self,
        name: str,  # below the folder
        data: str | bytes,
    ) -> None:
        "Write a file, unless it has these contents already."
        path, data = self.folder / name, data.encode() if isinstance(data, str) else data
        self.kept.add(path)
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def relink(
        self,
        text: str,  # Markdown
        source: str,  # its file in the repository
    ) -> str:
        "Point relative links at pages of the site, or at copies of other files. Raises ValueError where there is none."
        page = page_path(source)

        def moved(match: re.Match) -> str:
            target = os.path.normpath(os.path.join(os.path.dirname(source), match[2]))
            if not (ROOT / target).is_file():
                raise ValueError(f"{source}: the link {match[2]} leads nowhere")
            place = page_path(target)
            if place.startswith("files/"):
                self.write(place, (ROOT / target).read_bytes())
            return match[1] + os.path.relpath(place, os.path.dirname(page) or ".") + (match[3] or "") + match[4]

        parts = FENCE.split(text)  # code blocks are every second part
        return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))

    def finish(self) -> None:
        "Remove the pages of an earlier build that no file stands for any more."
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.kept:
                path.unlink()


def only_imports(
    code: str,
) -> bool:
    "Whether a cell does nothing but import."
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a magic, for instance
        return False
    return bool(statements) and all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements)


def mostly_imports(
    code: str,
) -> bool:
    "Whether a cell begins with imports and has little else; it is folded."
    lines = code.splitlines()
    return code.startswith(("import ", "from ")) and len(lines) > 8 and not re.search(r"^(def|class) ", code, re.M)


def readable_cells(
    cells: list[dict],  # of a notebook file
) -> list[dict]:
    "Leave out hidden cells and imports, and strip nbdev's directives from the others."
    kept = []
    for cell in cells:
        source = "".join(cell["source"])
        directives = re.findall(r"^#\s*\|\s*(\S+)", source, re.MULTILINE)
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\s*\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")
        removed = "remove" in cell["metadata"].get("tags", ()) and not source.startswith("# ")  # a page needs its title
        hidden = {"hide", "default_exp"} & set(directives) or removed
        if hidden or not source.strip() or cell["cell_type"] == "code" and only_imports(source):
            continue
        metadata = {"tags": ["hide-input"]} if cell["cell_type"] == "code" and mostly_imports(source) else {}
        kept.append(cell | {"source": source, "metadata": metadata})
    return kept


def title_of(
    text: str,  # the first cell of a notebook
) -> tuple[str, str]:
    "Split a title and its `>` subtitle."
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    subtitle = re.search(r"^> (.+(?:\n> .+)*)$", text, re.MULTILINE)
    return title[1] if title else "", subtitle[1].replace("\n> ", " ") if subtitle else ""


def signature(
    node: ast.FunctionDef | ast.ClassDef,
    lines: list[str],  # of the module
) -> str:
    "Quote a function's signature with its comments, or a class with its fields and the signatures of its methods."
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = "\n".join(lines[first - 1 : max(node.body[0].lineno - 1, node.lineno)])
    if isinstance(node, ast.FunctionDef):
        return text
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and (part.name == "__init__" or not part.name.startswith("_")):
            text += "\n\n" + signature(part, lines)
        elif isinstance(part, ast.AnnAssign | ast.Assign):
            text += "\n" + "\n".join(lines[part.lineno - 1 : part.end_lineno])
    return text


def api_page(
    path: Path,  # of a module
) -> str:  # Markdown
    "Write the page of a module: its public names in order, with their docstrings and commented signatures."
    code = path.read_text(encoding="utf-8")
    lines, tree = code.splitlines(), ast.parse(code)
    public = re.search(r"^__all__ = (\[.*?\])", code, re.MULTILINE | re.DOTALL)
    names = ast.literal_eval(public[1]) if public else []
    notebook = re.search(r"File to edit: \.\./(notebooks/\w+\.ipynb)", code)
    page = [f"# {path.stem}", (ast.get_docstring(tree) or "").replace("<", "&lt;") + "."]
    if notebook:
        page.append(f"`from biomass_lib.{path.stem} import ...`, explained in [its notebook](../{notebook[1]}).")
    quote = "```{{code-block}} python\n:class: signature\n\n{}\n```"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            text = (ast.get_docstring(node) or "").replace("<", "&lt;").replace("$", r"\$")
            page += [f"## {node.name}", text, quote.format(signature(node, lines))]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            quoted = "\n".join(lines[node.lineno - 1 : node.end_lineno][:40])
            page += [part for name in sorted(assigned & set(names)) for part in (f"## {name}", quote.format(quoted))]
    return "\n\n".join(page) + "\n"


def fault_list(
    table: str,  # tests/faults.md
) -> str:  # Markdown that a phone can show
    "Turn the rows of the fault table into short entries, grouped by command."
    groups: dict[str, list[str]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 5 or cells[0] == "fault" or set(cells[0]) == {"-"}:
            continue
        fault, command, last, status, left = cells
        group = groups.setdefault(" ".join(command.split()[:2]), [])
        group.append(f"**{fault}** (exit status {status})\n\n```text\n{last}\n```\n\nLeft on Kaggle: {left}.\n")
    return "\n".join(f"### `{command}`\n\n" + "\n".join(entries) for command, entries in groups.items())


def toctree(
    entries: list[str],  # names of pages
    caption: str = "",
) -> str:
    "List pages for the navigation."
    head = [":hidden:", ":maxdepth: 1", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join(["", "```{toctree}", *head, *entries, "```", ""])


def list_page(
    title: str,
    entries: list[tuple[str, str, str]],  # page beside this one, its title, and a sentence
    text: str = "",  # below the title
) -> str:  # Markdown
    "Write a page that lists others, and the navigation to them."
    items = [f"- [{name}]({page})  \n  {sentence}" for page, name, sentence in entries]
    return "\n\n".join(filter(None, [f"# {title}", text, "\n".join(items)])) + toctree([page for page, *_ in entries])


def assemble(
    folder: Path,  # that Sphinx reads
) -> None:
    "Write all pages. Raises ValueError for a link that leads nowhere."
    site = Site(folder)
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.stem == "index":
            continue
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = readable_cells(notebook["cells"])
        source = f"notebooks/{path.name}"
        first = next((cell for cell in cells if cell["cell_type"] == "markdown"), {"source": ""})
        title, subtitle = title_of(first["source"])
        module = re.fullmatch(r"\d+_(\w+)", path.stem)
        for cell in cells:
            if cell["cell_type"] == "markdown":
                cell["source"] = site.relink(cell["source"], source)
        where = f"Notebook `{source}`"
        if module and (ROOT / f"biomass_lib/{module[1]}.py").is_file():
            where += f", module [`biomass_lib.{module[1]}`](../api/{module[1]}.md)"
        first["source"] += f"\n\n{where}."
        site.write(source, json.dumps(notebook | {"cells": cells}, ensure_ascii=False, sort_keys=True))
        group = LAYERS.get(path.stem[0], "More") if module else "Workflows"
        groups.setdefault(group, []).append((path.name, title, subtitle))

    sections = []
    for group in ["Workflows", *LAYERS.values(), "More"]:
        if group in groups:
            sections.append(f"notebooks/{group.lower().replace(' ', '_')}")
            text = (
                "Run these with papermill; as they stand, each is a smoke run of seconds."
                if group == "Workflows"
                else ""
            )
            site.write(f"{sections[-1]}.md", list_page(group, groups[group], text))

    modules = [path for path in sorted((ROOT / "biomass_lib").glob("*.py")) if not path.name.startswith("_")]
    for path in modules:
        site.write(f"api/{path.stem}.md", api_page(path))
    entries = [
        (f"{path.stem}.md", path.stem, (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") + ".")
        for path in modules
    ]
    text = "Every public name, with its signature. The comments beside the parameters give shape, unit and meaning."
    site.write("api/index.md", list_page("API", entries, text))

    faults = fault_list((ROOT / "tests/faults.md").read_text(encoding="utf-8"))
    guides = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    listed = [name for name in re.findall(r"\]\((\w+\.md)\)", guides["index.md"]) if name in guides]
    order = list(dict.fromkeys([*listed, *(name for name in guides if name != "index.md")]))
    for name, text in guides.items():
        text = site.relink(text, f"docs/{name}").replace("<!-- the table of all faults -->", faults)
        if name == "index.md":
            text += toctree(order, "Guides") + toctree(sections, "Notebooks")
            text += toctree(["api/index", "contributing"], "Reference")
        site.write(name, text)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    site.write("contributing.md", site.relink(contributing, "CONTRIBUTING.md"))
    site.finish()


if __name__ == "__main__":
    try:
        assemble(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"docs/assemble.py: {error}")
