"One writer for each fold: two drivers, a driver that is killed, a holder that is stopped and wakes up."

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE, wait_until

from biomass_lib.claims import LEASE, SILENT_SECONDS, read_done, read_lease
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOK = ROOT / "notebooks/train_fold.ipynb"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    "Data, a parameter file, and a training notebook that counts its beginnings."
    render_dataset(tmp_path / "demo", n_train=12, n_test=2, seed=0)
    config, _ = smoke_config(Config(n_folds=3, experiment="shared"), "demo")
    parameters = config.to_dict() | {"stage1_epochs": 1, "stage2_epochs": 3}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({k: v for k, v in parameters.items() if k != "exclude"}))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    place = next(cell for cell in notebook["cells"] if "run_fold(config, fold" in "".join(cell["source"]))
    count = f"with open({str(tmp_path / 'begun')!r}, 'a') as begun:\n    begun.write(f'{{config.fold}}\\n')\n"
    place["source"] = [count, *place["source"]]
    (tmp_path / "train_fold.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def heed_signals() -> None:
    "Tests under nohup or in the background were started with these signals ignored, and so would their commands be."
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)


def started(home: Path, *command: str, **environment: str) -> subprocess.Popen:
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=given, start_new_session=True, preexec_fn=heed_signals, **pipes)


def folds_command(home: Path, *options: str) -> list[str]:
    return [str(BIN / "biomass_folds"), "p.yaml", "--notebook", str(home / "train_fold.ipynb"), *options]


@pytest.mark.slow
def test_two_drivers_train_every_fold_once(home: Path):
    drivers = [started(home, *folds_command(home)) for _ in range(2)]
    said = [driver.communicate(timeout=PATIENCE)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    assert sorted((home / "begun").read_text().split()) == ["0", "1", "2"], said
    for fold in range(3):
        assert all(f"fold {fold}: score" in text for text in said), said
        assert read_done(home / f"runs/shared/fold{fold}")["fold"] == fold
        assert read_lease(home / f"runs/shared/fold{fold}") is None
    assert not list((home / "runs").rglob("*.tmp"))


def processes_with(mark: str) -> list[str]:
    "Command lines of all processes that have a mark in their environment."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes() and (path.parent / "cmdline").read_bytes():
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_killed_driver_leaves_no_orphan(home: Path, number: int):
    mark, metrics = uuid.uuid4().hex, home / "runs/shared/fold0/metrics.csv"
    options = ("--folds", "0", "-p", "stage2_epochs", "5000", "-p", "workers", "1")
    driver = started(home, *folds_command(home, *options), MARK=mark)
    wait_until(metrics.is_file, "the first epoch", driver)
    assert any("ipykernel" in line for line in processes_with(mark))
    driver.send_signal(number)
    driver.wait()
    wait_until(lambda: not processes_with(mark), "the end of all its processes")
    again = started(home, *folds_command(home, *options), MARK=mark)  # the holder is known to be dead: no waiting
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size, "another epoch", again)
    assert (home / "begun").read_text().split() == ["0", "0"]
    again.kill()
    again.wait()
    wait_until(lambda: not processes_with(mark), "the end of all its processes")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LEASE}


@pytest.mark.slow
def test_a_stopped_holder_that_wakes_up_writes_nothing(home: Path):
    folder = home / "runs/shared/fold1"
    command = [sys.executable, "-m", "biomass_lib.train", "p.yaml", "-p", "fold", "1", "-p", "stage2_epochs"]
    first = started(home, *command, "30")
    wait_until((folder / "last.ckpt").is_file, "a checkpoint", first)
    os.killpg(first.pid, signal.SIGSTOP)
    second = started(home, *command, "30")
    refused, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 1 and f"is being trained by box {os.uname().nodename}, process {first.pid}" in refused
    assert "last sign of life" in refused and f"remove runs/shared/fold1/{LEASE}" in refused
    assert not (folder / "done.json").exists()
    os.utime(folder / LEASE, (0, time.time() - SILENT_SECONDS - 60))  # six minutes later
    third = started(home, *command, "30")
    said, _ = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0 and "going on from last.ckpt" in said, said
    before = contents(folder)
    assert read_done(folder)["fold"] == 1
    os.killpg(first.pid, signal.SIGCONT)
    said, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode != 0 and "nothing more is written" in said, said
    assert contents(folder) == before


@pytest.mark.slow
def test_papermill_by_hand_is_refused_too(home: Path):
    command = [str(BIN / "papermill"), "--no-progress-bar", str(NOTEBOOK), "out.ipynb", "-f", "p.yaml", "-p"]
    holder = started(home, sys.executable, "-m", "biomass_lib.train", "p.yaml", "-p", "stage2_epochs", "5000")
    wait_until((home / "runs/shared/fold0/last.ckpt").is_file, "a checkpoint", holder)
    process = started(home, *command, "stage2_epochs", "5000")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and f"process {holder.pid}" in said, said
    assert holder.poll() is None
    os.killpg(holder.pid, signal.SIGKILL)
    holder.communicate()
