"The first five minutes: make help, make install, the steps of the demo, and what a missing Python or a full disk says."

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "CI")}


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, env=CLEAN | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    "A folder with a space, the Makefile and what it reads; no environment."
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_help_lists_every_target_and_is_what_make_says(clone: Path):
    shown = run(clone, "make")
    targets = re.search(r"^[.]PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert set(re.findall(r"^  make ([a-z-]+) ", shown.stdout, re.MULTILINE)) == set(targets)
    assert max(map(len, shown.stdout.splitlines())) <= 100
    assert run(clone, "make", "help").stdout == shown.stdout


def test_no_python_an_old_one_and_a_full_disk_say_what_to_do(clone: Path):
    missing = run(clone, "make", "install", "PYTHON=no-such-python")
    assert missing.returncode != 0
    assert "there is no no-such-python here" in missing.stdout
    old = clone / "old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    told = run(clone, "make", "install", "PYTHON=./old")
    assert told.returncode != 0
    assert "./old is Python 3.9.2, and 3.11, 3.12 or 3.13 is needed" in told.stdout
    full = run(clone, "make", "install", f"PYTHON={sys.executable}", "SPACE=9999999")
    assert full.returncode != 0
    assert re.search(r"\d+ GB are free here, and the environment needs up to 9999999", full.stdout)
    assert not (clone / ".venv").exists()


def test_install_merges_notebooks_cell_by_cell_and_changes_only_this_clone(clone: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (clone / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    command = ["make", "--old-file=.venv/.ready", "install"]
    assert run(clone, *command, HOME=str(home)).returncode == 0  # an unpacked archive has no .git
    run(clone, "git", "init", "-q")
    before = {path.name for path in clone.iterdir()}
    for _ in range(2):
        done = run(clone, *command, HOME=str(home))
        assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in clone.iterdir()} == before
    assert list(home.iterdir()) == []
    assert (clone / ".git/info/attributes").read_text().count("*.ipynb merge=nbdev-merge\n") == 1
    driver = run(clone, "git", "config", "--local", "merge.nbdev-merge.driver").stdout.strip()
    assert driver == f'"{clone}/.venv/bin/nbdev_merge" %O %A %B %P'


def test_a_step_is_one_line_and_shows_its_output_when_it_fails(tmp_path: Path):
    step, log = str(ROOT / ".ci/step"), tmp_path / "runs/a log"
    good = run(tmp_path, step, str(log), "1/2", "do it", "sh", "-c", "echo much text")
    assert re.fullmatch(r"\[1/2\] do it: \d+ s\n", good.stdout)
    bad = run(tmp_path, step, str(log), "2/2", "do more", "sh", "-c", "echo the reason >&2; exit 3")
    assert bad.returncode == 3
    assert "[2/2] do more: failed, exit status 3" in bad.stdout
    assert bad.stdout.endswith("the reason\n")
    assert log.read_text() == "== do it\nmuch text\n== do more\nthe reason\n"


def test_the_score_stands_beside_the_baselines(tmp_path: Path):
    (tmp_path / "report.json").write_text('{"headline": "demo: 0.64, 0.05 below the ridge"}', encoding="utf-8")
    rows = "prediction,score,low,high\nmodel,0.64,0.5,0.76\nridge,0.69,0.56,0.77\ntraining mean,0.21,,\n"
    (tmp_path / "scores.csv").write_text(rows, encoding="utf-8")
    shown = run(tmp_path, sys.executable, str(ROOT / ".ci/score.py"), ".", "report.html", "submission.csv").stdout
    lines = [line.strip() for line in shown.splitlines()]
    assert lines[1] == "demo: 0.64, 0.05 below the ridge"
    assert [line.split("  ")[0] for line in lines[3:6]] == ["ridge", "model", "training mean"]
    assert lines[-2:] == ["Look at report.html", "and submission.csv"]
