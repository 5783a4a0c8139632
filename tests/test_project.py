"The repository itself: what is built is in step, Makefile and README work in a fresh clone, versions are pinned."

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLONE = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "CI")}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    "Copy the tracked and new files, as a person would have them, into a folder with a space; with this environment."
    copy = tmp_path / "my repository"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    return copy


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    "make with the environment as it is: nothing is installed."
    command = ["make", "--no-print-directory", "--old-file=.venv/.ready", *arguments]
    return subprocess.run(command, cwd=repository, env=CLONE, capture_output=True, text=True, check=False)


def test_untouched_repository_passes_and_says_one_line(repository: Path):
    result = make(repository, "check")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "== compare what is built with the notebooks\n"


@pytest.mark.slow
def test_kernel_is_built_in_a_folder_with_a_space(repository: Path):
    built = repository / "kaggle/inference/inference.ipynb"
    before = built.read_bytes()
    built.unlink()
    result = make(repository, "kernel", "readme")
    assert (result.returncode, result.stderr) == (0, "")
    assert built.read_bytes() == before


def test_recipes_are_quiet_and_quote_the_folder():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    recipes = [(before, line) for before, line in zip(lines, lines[1:], strict=False) if line.startswith("\t")]
    assert len(recipes) > 50
    assert [line for before, line in recipes if not (before.endswith("\\") or line.startswith("\t@"))] == []
    assert [line for _, line in recipes if re.search(r"[$][(](BIN|CURDIR)", re.sub(r'"[^"]*"', "", line))] == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("biomass_lib/targets.py", "np.maximum(total - gdm, 0)", "np.maximum(total - gdm, 1)"),
        pytest.param("kaggle/inference/inference.ipynb", "submission", "Submission", marks=pytest.mark.slow),
        pytest.param("README.md", "make demo", "make Demo", marks=pytest.mark.slow),
    ],
)
def test_hand_edit_is_noticed_and_kept(repository: Path, name: str, old: str, new: str):
    path = repository / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    edited = text.replace(old, new, 1)
    path.write_text(edited, encoding="utf-8")
    result = make(repository, "check")
    assert result.returncode != 0
    assert "out of step with the notebooks" in result.stdout
    assert path.name in result.stdout
    assert path.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize(("name", "least"), [("README.md", 15), ("docs/details.md", 50), ("CONTRIBUTING.md", 1)])
def test_links_lead_somewhere(name: str, least: int):
    path = ROOT / name
    links = re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8"))
    assert len(links) >= least
    assert [link for link in links if not (path.parent / link).is_file()] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def measured(outputs: str, size: str) -> dict[str, list[float]]:
    "Read score, interval, lead and its interval of one size from the printed table of recipe.ipynb."
    table = outputs.partition(f"{size} px  model ")[2].partition(" px  model ")[0]
    names = ("colour and texture ridge", "training mean")
    lines = {"model": table.partition("\n")[0]} | {name: table.partition(name)[2].partition("\n")[0] for name in names}
    numbers = {name: re.findall(r"-?\d\.\d{3}|NaN", line) for name, line in lines.items()}
    assert all(len(found) in (3, 6) for found in numbers.values()), numbers
    return {name: [float(number) for number in found] for name, found in numbers.items()}


def short(number: float, digits: int = 2) -> str:
    return f"{number:.{digits}f}".replace("0.", ".")


def test_readme_quotes_what_was_measured():
    "Scores on real photographs and features stand in the outputs of the notebook that measured them."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "notebooks/recipe.ipynb").read_text(encoding="utf-8"))
    plain = [output.get("data", {}).get("text/plain", "") for c in notebook["cells"] for output in c.get("outputs", ())]
    table = next(text for text in map("".join, plain) if "model, best epoch" in text and "lead of the model" in text)
    scores, leads = (table[: (at := table.rindex("lead of the model"))], table[at:])
    for size, begin in (("224", "| **87 real photographs**"), ("320", "| the same at 320 px")):
        found = measured(scores, size)
        score, low, high = found["model"][:3]
        row = next(line for line in readme.splitlines() if line.startswith(begin))
        assert f"**{short(score, 3)}** (" in row and f"{short(low)} to {short(high)})" in row, row
        assert f"| {short(found['training mean'][0], 3)}" in row, row
        assert f"| {short(found['colour and texture ridge'][0], 3)}" in row, row
        ahead = leads.partition(f"{size} px  model ")[2].partition("colour and texture ridge")[2].partition("\n")[0]
        lead, low, high = (float(number) for number in re.findall(r"-?\d\.\d{3}", ahead))
        assert f"+{short(lead)} ({short(low)} to +{short(high)})" in readme, (size, lead, low, high)
    outputs = "".join(map("".join, plain))
    heads = [float(row) for row in re.findall(r"heads, 20 epochs at 1e-3 \(default\) \d +(0\.\d{3})", outputs)]
    row = next(line for line in readme.splitlines() if line.startswith("| 357 real photographs"))
    assert f"**{short(sum(heads) / len(heads), 3)}**" in row


def test_outputs_name_no_place_on_a_machine():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            told = [output for output in cell.get("outputs", ()) if not str(output.get("data", "")).count("image/png")]
            assert not re.search(r"/(tmp|root|home|work|Users)/", json.dumps(told)), f"{path.name}: {told}"


def code_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_readme_makes_a_folder_before_papermill_writes_there():
    "papermill makes no folders; a fresh clone has no runs/."
    outputs = 0
    for block in code_blocks():
        made = set()
        for line in block.splitlines():
            for folder in re.findall(r"mkdir -p (\S+)", line):
                made |= {folder, *map(str, Path(folder).parents)}
            for output in re.findall(r"papermill \S+[.]ipynb (\S+[.]ipynb)", line):
                outputs += 1
                assert str(Path(output).parent) in made, line
    assert outputs >= 2


def test_notebooks_run_without_a_word_of_their_kernels(tmp_path: Path):
    "In an environment of `make install`, that is; stderr is not thrown away, kernels are told what to log."
    if not (Path(sys.prefix) / "etc/ipython/ipython_kernel_config.py").is_file():
        pytest.skip("this environment was not made by make install")
    cells = [
        {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "1 + 1"}
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "in.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--kernel", "python3"]
    quiet = ["--no-progress-bar", "--log-level", "ERROR"]
    ran = subprocess.run([*command, *quiet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["index.ipynb", "00_targets.ipynb"])
def test_nbdev_reads_notebooks_without_a_warning(name: str):
    "nbdev takes a list in a title's cell for YAML."
    command = [str(Path(sys.executable).with_name("nbdev_test")), "--path", f"notebooks/{name}", "--n_workers", "0"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "Success.", "")


def test_no_notebook_cell_is_left_out_by_a_flag():
    "`make test` runs whole notebooks: a cell that needs data looks for them itself, and says so."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    flag = re.compile(rf"^\s*#\s*\|\s*({'|'.join(settings['DEFAULT']['tst_flags'].split())})\b", re.MULTILINE)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell["cell_type"] != "code" or not flag.search("".join(cell["source"])), path.name


def distribution(requirement: str) -> str:
    "The normalized name of a requirement."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def test_every_requirement_has_a_tested_version():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+( ; sys_platform == \"linux\")?", pin)] == []
    wanted = [
        line.strip()
        for name, value in settings["DEFAULT"].items()
        if name.endswith("requirements")
        for line in value.splitlines()
        if line.strip()
    ]
    assert len(wanted) > 30
    assert {distribution(line) for line in [*wanted, "pip", "setuptools", "wheel"]} <= set(map(distribution, pins))


def test_ci_fails_where_a_person_only_skips(tmp_path: Path):
    shutil.copy2(ROOT / "tests/conftest.py", tmp_path)
    test = 'import pytest\n@pytest.mark.needs("no-such-program", package="such")\ndef test_it(): pass\n'
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "."]
    for environment, status in ((CLONE, 0), (CLONE | {"CI": "true"}, 1)):
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == status
        assert "no no-such-program here: apt-get install such" in ran.stdout


def test_ci_installs_what_tests_need():
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_[!p]*.py")))
    packages = set(re.findall(r'mark\.needs\(.*package="([^"]+)"\)', tests))
    listed = re.search(r'^needs="\n(.*?)^"', (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {line.split()[1] for line in listed.group(1).splitlines()} == packages
