"Trainings that fork from a warm process: the same files as those of a lone papermill command, and nothing left behind."

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE, wait_until
from test_runs import BIN, NOTEBOOK, TINY

from biomass_lib.demo import render_dataset
from biomass_lib.supervise import descendants

pytestmark = pytest.mark.slow

SAME = ("metrics.csv", "oof.csv", "oof_best.csv", "weights.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("warm")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return home


def start(home: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [BIN / "biomass_folds", "tiny.yaml", "--warm", "--jobs", "2", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=environment, **pipes)


def _lives(pid: int) -> bool:
    "Tell whether a process runs; one that has ended and was not waited for has no command line."
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_files_are_those_of_a_lone_command(home: Path):
    process = start(home, "--seeds", "0", "1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.count(": score") == 4
    lone = home / "runs/lone/fold1_seed1"
    lone.mkdir(parents=True)
    words = ["-f", "tiny.yaml", "-p", "experiment", "lone", "-p", "fold", "1", "-p", "seed", "1", "--no-progress-bar"]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(lone / "train_fold.ipynb"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=home, env=environment, check=True, capture_output=True)
    for name in SAME:
        assert (home / "runs/tiny/fold1_seed1" / name).read_bytes() == (lone / name).read_bytes(), name
    executed = (home / "runs/tiny/fold1_seed1/train_fold.ipynb").read_text(encoding="utf-8")
    assert executed.count('"image/png"') == (lone / "train_fold.ipynb").read_text(encoding="utf-8").count('"image/png"')


def test_a_failed_training_is_named_and_ends_no_other(home: Path):
    process = start(home, "-p", "experiment", "fails", "-p", "backbone", "no_such_network")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    for fold in (0, 1):
        assert f"fold {fold} FAILED" in output
    assert "no_such_network" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_driver_ends(home: Path, number: signal.Signals):
    process = start(home, "-p", "experiment", f"ends{number}", "-p", "stage2_epochs", "1000")
    wait_until((home / f"runs/ends{number}/fold1/last.ckpt").is_file, "a checkpoint", process)
    below = descendants(process.pid)
    assert len(below) >= 4  # supervisor, server, two trainings
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(map(_lives, below)), "the end of all processes")
