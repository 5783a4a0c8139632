"Mistakes and habits of people at a terminal, with the real commands: one line, the usual status, nothing left behind."

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE, wait_until

from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.supervise import descendants

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TRAIN = (sys.executable, "-m", "biomass_lib.train")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    render_dataset(folder / "demo", n_train=12, n_test=2, seed=0)
    config, _ = smoke_config(Config(), "demo")
    text = yaml.safe_dump({k: v for k, v in config.to_dict().items() if k != "exclude"})
    (folder / "p.yaml").write_text(text)
    (folder / "tilde.yaml").write_text(text.replace("runs_dir: runs", "runs_dir: ~/my_runs"))
    (folder / "latin.yaml").write_bytes('data_dir: "Müller"\n'.encode("latin-1"))
    (folder / "file").touch()
    (folder / "user").mkdir()
    return folder


def heed_interrupts() -> None:
    "Tests in the background of a shell were started with SIGINT ignored, and so would their commands be."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def started(home: Path, *command: str, **environment: str) -> subprocess.Popen:
    program = [str(BIN / command[0]), *command[1:]] if command[0].startswith("biomass_") else list(command)
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(home / "user")} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=home, env=given, start_new_session=True, preexec_fn=heed_interrupts, **pipes)


MISTAKES = {
    "a file for a folder": (("biomass_folds", "p.yaml", "-p", "runs_dir", "file"), "Not a directory: file/smoke"),
    "a long name": (("biomass_folds", "p.yaml", "-p", "experiment", "e" * 300), "at most 100 characters"),
    "a fold too many": ((*TRAIN, "p.yaml", "-p", "fold", "9"), "parameter fold = 9 must be from 0 to"),
    "no such file": ((*TRAIN, "nowhere.yaml"), "parameter file nowhere.yaml does not exist"),
    "latin-1": (("biomass_folds", "latin.yaml"), "latin.yaml is not UTF-8 text"),
    "fewer than no workers": (("biomass_demo", "--out", "d", "--workers", "-2"), "workers = -2 must be 0"),
    "a folder for a file": (("biomass_audit", "demo", "--no-pixels", "--csv", "demo"), "--csv demo is a folder"),
    "half a job": (("biomass_folds", "p.yaml", "--jobs", "1.5"), "must be at least 1, or auto"),
}


def test_a_mistake_is_one_line(home: Path):
    before = sorted(path.name for path in home.iterdir())
    running = {name: started(home, *command) for name, (command, _) in MISTAKES.items()}
    for name, process in running.items():
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and len(err.strip().splitlines()) == 1, (name, err)
        assert MISTAKES[name][1] in err, name
    assert sorted(path.name for path in home.iterdir()) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(home: Path, unbuffered: str):
    process = started(home, "biomass_audit", "demo", "--no-pixels", PYTHONUNBUFFERED=unbuffered)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def spawned(pid: int) -> list[int]:
    "List the worker processes that a process has spawned; they may still import."
    found = []
    for each in descendants(pid):
        with contextlib.suppress(OSError):  # it has just ended
            if b"multiprocessing.spawn" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
    return found


@pytest.mark.parametrize("moment", ["workers start", "a photograph is drawn"])
def test_ctrl_c_in_the_renderer_is_quiet(home: Path, moment: str):
    process = started(home, "biomass_demo", "--out", moment, "--n-train", "2000", "--workers", "2")
    if moment == "workers start":
        wait_until(lambda: len(spawned(process.pid)) == 2, "both workers", process)
    else:
        wait_until(lambda: list((home / moment).rglob("*.jpg")), "the first photograph", process)
    workers = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "")
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the end of the workers")


def test_a_tilde_is_the_home(home: Path):
    process = started(home, *TRAIN, "tilde.yaml")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert (home / "user/my_runs/smoke/fold0/done.json").is_file() and "fold0: score " in out
    assert not (home / "~").exists()
