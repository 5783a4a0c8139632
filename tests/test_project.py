"`make check` must notice every hand edit of something that is built."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    "A copy of the tracked and new files, as a person would have it, that uses this environment."
    copy = tmp_path / "repository"
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
    (copy / ".venv").mkdir()
    (copy / ".venv/.ready").touch()  # the environment of this test is passed as BIN
    return copy


def check(repository: Path) -> subprocess.CompletedProcess:
    command = ["make", "check", f"BIN={BIN}"]
    return subprocess.run(
        command,
        cwd=repository,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "MAKEFLAGS"},
    )


def test_untouched_repository_passes(repository: Path):
    result = check(repository)
    assert result.returncode == 0, result.stdout + result.stderr


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
    result = check(repository)
    assert result.returncode != 0
    assert "out of step with the notebooks" in result.stdout
    assert path.name in result.stdout
    assert path.read_text(encoding="utf-8") == edited


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_outputs_name_no_place_on_a_machine():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            told = [output for output in cell.get("outputs", ()) if not str(output.get("data", "")).count("image/png")]
            assert not re.search(r"/(tmp|root|home|work|Users)/", json.dumps(told)), f"{path.name}: {told}"
