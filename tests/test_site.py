"The site: its pages are laid out from whatever notebooks there are, and nothing in it is loaded from elsewhere."

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "benchmarks.md")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    "The folder that Sphinx reads."
    folder = tmp_path_factory.mktemp("site") / "source"
    subprocess.run([sys.executable, ROOT / "docs/assemble.py", folder], check=True)
    return folder


def test_every_notebook_has_a_page_in_the_navigation(pages: Path):
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"index"}
    assert {path.stem for path in (pages / "notebooks").glob("*.ipynb")} == stems
    listed = re.findall(r"^(\w+)\.ipynb$", "\n".join(path.read_text() for path in pages.glob("notebooks/*.md")), re.M)
    assert sorted(listed) == sorted(stems)


def test_every_page_has_a_title_of_its_own(pages: Path):
    first = [json.loads(path.read_text(encoding="utf-8"))["cells"][0] for path in pages.glob("notebooks/*.ipynb")]
    titles = [re.match("# (.+)", cell["source"]) for cell in first]
    assert all(titles) and len({title[1] for title in titles}) == len(titles)


def test_pages_have_no_directives_and_no_hidden_cells(pages: Path):
    directive = re.compile(r"^#\s*\|.*\n?", re.MULTILINE)
    for path in sorted((pages / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        shown = {cell["source"] for cell in cells if cell["cell_type"] == "code"}
        assert not any(directive.search(source) for source in shown), path.name
        for cell in json.loads((ROOT / "notebooks" / path.name).read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            assert not source.startswith("#| hide") or directive.sub("", source) not in shown, path.name


def test_every_public_name_is_in_the_api(pages: Path):
    for module in sorted((ROOT / "biomass_lib").glob("[!_]*.py")):
        public = re.search(r"^__all__ = \[(.*?)\]", module.read_text(encoding="utf-8"), re.M | re.S)
        names = set(re.findall(r"'(\w+)'", public[1] if public else ""))
        page = (pages / f"api/{module.stem}.md").read_text(encoding="utf-8")
        assert names == set(re.findall(r"^## (\w+)$", page, re.M)), module.name


def test_all_faults_are_on_their_page(pages: Path):
    rows = (ROOT / "tests/faults.md").read_text(encoding="utf-8").count("\n| ") - 2
    assert (pages / "faults.md").read_text(encoding="utf-8").count("(exit status ") == rows > 40


def test_a_link_that_leads_nowhere_is_an_error(pages: Path):
    sys.path.insert(0, str(ROOT / "docs"))
    from assemble import Site

    with pytest.raises(ValueError, match=r"docs/train.md: the link nowhere.md leads nowhere"):
        Site(pages).relink("[a](report.md)\n```\n[b](nothing.md)\n```\n[c](nowhere.md)", "docs/train.md")


@cache
def help_of(command: str, *sub: str) -> str | None:
    "What a command of settings.ini says with --help; None for one that is not there."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    entry = re.search(rf"^{command}=([\w.]+):(\w+)$", settings["DEFAULT"]["console_scripts"], re.MULTILINE)
    if not entry:
        return None
    told, words = io.StringIO(), sys.argv
    sys.argv = [command, *sub, "--help"]  # in this process: eighteen that each import torch take a minute and a half
    try:
        with contextlib.redirect_stdout(told):
            getattr(importlib.import_module(entry[1]), entry[2])()
    except SystemExit as end:
        return told.getvalue() if not end.code else None
    finally:
        sys.argv = words
    return told.getvalue()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guides_name_commands_and_options_that_exist(guide: Path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", guide.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) or [""]
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.M), line
            if words[0].startswith("biomass_"):
                told = help_of(words[0], *(words[1:2] if words[0] == "biomass_kaggle" else []))
                assert told is not None, line
                assert [word for word in words if re.fullmatch(r"--[a-z-]+", word) and word not in told] == [], line
            for name in (word for word in words if word.startswith("notebooks/")):
                assert (ROOT / name).is_file(), line


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx_book_theme") is None, reason="the site's packages are not here: make docs")
def test_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(pages: Path, tmp_path: Path):
    options = ["-qW", "--keep-going", "-c", ROOT / "docs", "-d", tmp_path / "doctrees", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, pages, tmp_path / "html"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    loads = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\s>\"']+")
    for page in (tmp_path / "html").rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name
    for sheet in (tmp_path / "html").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
