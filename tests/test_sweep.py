"Sweeps: every cell once and with the bytes of a lone command, whoever is killed; TPE's memory lost and made anew."

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import stand_in
import yaml
from mounting import mounts
from patience import PATIENCE, wait_until

from biomass_lib import sweep as sweep_module
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.files import read_json
from biomass_lib.runs import job_line
from biomass_lib.supervise import descendants
from biomass_lib.sweep import plan_sweep

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SWEEP = "import sys; from biomass_lib.sweep import sweep_main; sweep_main(sys.argv[1:])"
GRID = ("p.yaml", "-s", "dropout=.2,.3")


def write_params(home: Path, **values) -> None:
    (home / "p.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    "A folder as a person has it, with a training notebook that only pretends."
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("")
    write_params(tmp_path, data_dir="data", experiment="many", n_folds=2)
    stand_in.write_notebook(tmp_path / "stand_in.ipynb")
    return tmp_path


def started(home: Path, *words: str) -> subprocess.Popen:
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", SWEEP, *words]
    return subprocess.Popen(command, cwd=home, env=given, start_new_session=True, **pipes)


def sweep(home: Path, *words: str) -> tuple[int, str]:
    "Exit status and output of the command with the notebook that pretends."
    process = started(home, *words, "--notebook", "stand_in.ipynb")
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def begun(home: Path) -> list[list[str]]:
    "What was begun, in order: setting, fold, seed, and whether it was done before."
    return [line.split() for line in (home / "begun").read_text().splitlines()]


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_others_go_on(home: Path):
    (home / "broken").write_text("0.3 1")
    status, said = sweep(home, *GRID, "--jobs", "2")
    assert status == 1, said
    assert "dropout=0.3 fold 1 FAILED (exit status 1): ValueError: photograph 7 is damaged" in said
    assert "failed: dropout=0.3 fold 1; the same command tries them again" in said
    assert [fold for _, fold, *_ in begun(home)] == ["0", "0", "1", "1"], "fold-major"
    index = pd.read_csv(home / "runs/many/sweep.csv")
    assert index["done"].tolist() == [2, 1] and index["planned"].tolist() == [2, 2]
    assert (home / "runs/many" / index["folder"][1] / "fold0/done.json").is_file()
    (home / "broken").unlink()
    status, said = sweep(home, *GRID)
    assert status == 0, said
    assert len(begun(home)) == 5 and begun(home)[-1][:2] == [index["folder"][1], "1"]
    assert "dropout=0.3 fold 1: score 0.500, epoch 3, 2 s [4 of 4 cells, about 0 s left]" in said
    assert "best of 2 with 2 of 2 cells: dropout=0.3 " in said and "runs/many/sweep.csv" in said
    assert read_json(home / "runs/many/sweep.json")["base"] == index["folder"][1], "the file's own dropout"


@pytest.mark.slow
def test_two_drivers_train_every_cell_once(home: Path):
    stand_in.write_notebook(home / "stand_in.ipynb", pause=0.5)
    words = (*GRID, "--folds", "0", "--notebook", "stand_in.ipynb")
    drivers = [started(home, *words) for _ in range(2)]
    said = [driver.communicate(timeout=PATIENCE)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    assert len(begun(home)) == 2 and len({words[0] for words in begun(home)}) == 2
    assert all("2 of 2 cells; all settings" in text for text in said), said


def test_mistakes_stop_before_any_work(home: Path):
    for words, message in [
        (("-s", "dropuot=.1"), "unknown parameter dropuot"),
        (("-s", "dropout=.1,two"), "dropout must be float"),
        (("-s", "dropout=.1", "-p", "data_dir", "nowhere"), "has no train.csv"),
        (("-s", "swa_epochs=1,99"), "swa_epochs = 99 must be at most stage2_epochs (with swa_epochs=99)"),
    ]:
        with pytest.raises(SystemExit) as end, contextlib.chdir(home):
            sweep_module.sweep_main(["p.yaml", *words])
        assert message in str(end.value)
    assert not (home / "runs").exists()


SMALL = (
    'mkdir -p runs; mount -t tmpfs -o size="$0" none runs; eval "$1"; shift; "$@" || echo status $?; cp -r runs seen'
)


def swept_on(home: Path, size: str, before: str = "true") -> str:
    "What the command prints whose runs lie on a small disk; the folder seen shows what it leaves there."
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SWEEP, *GRID, "--folds", "0", "--notebook", "stand_in.ipynb"]
    small = ["unshare", "-rm", "bash", "-c", SMALL, size, before, *command]
    return subprocess.run(small, cwd=home, env=given, stdout=-1, stderr=-2, text=True, timeout=PATIENCE).stdout


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="no user namespaces here, so no small disk can be mounted")
def test_a_full_and_a_read_only_disk_are_a_line(home: Path):
    said = swept_on(home, "1m", "mount -o remount,ro runs")
    assert said == "biomass_sweep: Read-only file system: runs/many\nstatus 1\n"
    said = swept_on(home, "40k")
    lines = [line for line in said.splitlines() if "FAILED" in line]
    assert lines and all("is full (" in line and "make room and try again" in line for line in lines), said
    assert "status 1" in said and "Traceback" not in said, said
    shutil.rmtree(home / "runs", ignore_errors=True)
    shutil.copytree(home / "seen", home / "runs")  # as if room had been made
    status, said = sweep(home, *GRID, "--folds", "0")
    assert status == 0 and "2 of 2 cells" in said, said


def kill_something(driver: subprocess.Popen, rng: random.Random) -> None:
    "Kill the driver, a kernel, or another process of a cell."
    below = descendants(driver.pid)
    kernels = [pid for pid in below if b"ipykernel" in command_line(pid)]
    target = rng.choice([[driver.pid], kernels or [driver.pid], below or [driver.pid]])
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(target), signal.SIGKILL)


def command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def contents(root: Path, *names: str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for name in names for path in sorted(root.rglob(name))}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.slow
def test_killed_at_random_moments(home: Path):
    "KILLS=50 takes ten minutes, and passes too."
    kills = int(os.environ.get("KILLS", 3))
    stand_in.write_notebook(home / "stand_in.ipynb", pause=0.3)
    seeds = [str(seed) for seed in range(max(1, kills // 5))]
    words = (*GRID, "--jobs", "2", "--seeds", *seeds, "--notebook", "stand_in.ipynb")
    rng = random.Random(kills)
    for _ in range(kills):
        driver = started(home, *words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(rng.uniform(4, 10))
        kill_something(driver, rng)
        if rng.random() < 0.5:
            driver.kill()
        driver.communicate(timeout=PATIENCE)
    for _ in range(2):  # a cell whose kernel was killed failed the driver's last run
        driver = started(home, *words)
        said, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    assert {words[3] for words in begun(home)} == {"fresh"}, "no finished cell is begun again"
    cells = len(seeds) * 4
    assert len({tuple(words[:3]) for words in begun(home)}) == cells
    assert len(list((home / "runs").rglob("done.json"))) == cells
    whole = home / "whole"
    (whole / "data").mkdir(parents=True)
    for name in ("data/train.csv", "p.yaml", "stand_in.ipynb"):
        shutil.copy(home / name, whole / name)
    assert sweep(whole, *GRID, "--jobs", "2", "--seeds", *seeds)[0] == 0
    names = ("oof.csv", "sweep.csv", "sweep.json", "params.yaml")
    assert contents(whole / "runs", *names) == contents(home / "runs", *names)


TPE = ("p.yaml", "-s", "dropout=.1:.5", "--folds", "0", "--tpe", "2")


@pytest.mark.slow
def test_tpe_goes_on_after_a_kill_and_without_its_journal(home: Path):
    pytest.importorskip("optuna")
    driver = started(home, *TPE, "--notebook", "stand_in.ipynb")
    wait_until(lambda: (home / "begun").is_file() and len(begun(home)) == 2, "the second setting", driver)
    driver.kill()
    driver.communicate(timeout=PATIENCE)
    status, said = sweep(home, *TPE)
    assert status == 0, said
    table = pd.read_csv(home / "runs/many/sweep.csv")
    assert len(table) == 2 and table["done"].tolist() == [1, 1]
    assert len({words[0] for words in begun(home)}) == 2 and {words[3] for words in begun(home)} == {"fresh"}
    (home / "runs/many/optuna.journal").unlink()
    before = len(begun(home))
    status, said = sweep(home, *TPE)
    assert status == 0 and "lacked 2 finished settings" in said, said
    assert len(begun(home)) == before


class Postgres:
    "A real server of our own, in a folder of its own."

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "pg"
        self.bin = next(
            path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin")) if (path / "initdb").exists()
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://biomass:secret@127.0.0.1:{self.port}/postgres"

    def run(self, *words: str) -> None:
        "Run a program of PostgreSQL, which refuses root."
        person = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            person = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        program = [str(self.bin / words[0]), *words[1:]]
        with open(self.folder / "log", "a") as log:
            options = {"stdout": log, "stderr": log, "cwd": "/", "env": {"PATH": os.environ["PATH"]}}
            ended = subprocess.run(program, **options, **person)
        assert ended.returncode == 0, (self.folder / "log").read_text()[-2000:]

    def make(self) -> None:
        (self.folder / "password").write_text("secret")
        self.folder.chmod(0o777)
        (self.folder / "password").chmod(0o644)
        words = (
            "-U",
            "biomass",
            "-A",
            "scram-sha-256",
            f"--pwfile={self.folder / 'password'}",
            "-N",
            "-E",
            "UTF8",
            "--locale=C",
        )
        self.run("initdb", "-D", str(self.data), *words)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self.run(
            "pg_ctl",
            "-D",
            str(self.data),
            "-o",
            options,
            "-l",
            str(self.folder / "server.log"),
            "-w",
            "-t",
            str(PATIENCE),
            "start",
        )

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "-t", str(PATIENCE), "stop")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("psycopg")
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("postgres")
    for parent in (folder.parent, folder.parent.parent, folder.parent.parent.parent):
        if str(parent) not in ("/", "/tmp") and parent.owner() == pwd.getpwuid(os.getuid()).pw_name:
            parent.chmod(parent.stat().st_mode | 0o011)
    postgres = Postgres(folder)
    postgres.make()
    postgres.start()
    yield postgres
    with contextlib.suppress(AssertionError):
        postgres.stop()


def play(watcher, most: int = 1000) -> None:
    "Finish what TPE asks for, at most some cells."
    while most > 0 and (jobs := watcher.more()):
        for job in jobs:
            setting = next(setting for setting in watcher.sweep.settings if setting.run_dir == job.run_dir)
            config = setting.config
            folder = stand_in.train_cell(config)
            watcher.ended(job, read_json(folder / "done.json"), f"{job}: done")
            most -= 1


@pytest.mark.needs("pg_ctlcluster", package="postgresql")
@pytest.mark.parametrize("away", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_postgresql_goes_away_and_comes_back(home: Path, server: Postgres, away: float, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sweep_module, "_PAUSE", 0.2)

    def watcher(n_trials: int):
        plan = plan_sweep("p.yaml", ["dropout=.1:.5"], folds=[0], tpe=True)
        plan.root.mkdir(parents=True, exist_ok=True)
        return sweep_module._TpeWatcher(plan, n_trials, server.url)

    first = watcher(6)
    play(first, most=2)
    server.stop()
    back = threading.Timer(away, server.start)
    back.start()
    play(first)
    back.join()
    said = capsys.readouterr().out
    assert "does not answer" in said and "answers again" in said and "secret" not in said
    assert len(begun(home)) == 6 and len(first.sweep.settings) == 6
    play(watcher(6))  # nothing is left to do
    assert len(begun(home)) == 6
    server.stop()  # as kill -9, and its disk is lost
    shutil.rmtree(server.data)
    server.make()
    server.start()
    capsys.readouterr()
    play(watcher(7))
    assert "lacked 6 finished settings" in capsys.readouterr().out
    assert len(begun(home)) == 7
    server.stop()
    monkeypatch.setattr(sweep_module, "_PATIENCE", 0.0)
    with pytest.raises(
        ValueError, match=r"--storage postgresql\+psycopg://biomass:\*\*\*@127.0.0.1:\d+/postgres cannot be"
    ):
        watcher(8)


@pytest.mark.slow
def test_cells_have_the_bytes_of_lone_commands(tmp_path: Path):
    "Sixteen trainings of a tiny network, two at a time; four again by their printed lines. WHOLE=1: all forty."
    folds, alone = (5, 40) if os.environ.get("WHOLE") else (2, 4)
    render_dataset(tmp_path / "demo", n_train=12 * folds // 2, n_test=2, seed=0)
    config, _ = smoke_config(Config(experiment="real", cache_dir="cache"), "demo")
    parameters = config.to_dict() | {"stage2_epochs": 1, "n_folds": folds}
    write_params(
        tmp_path, **{name: value for name, value in parameters.items() if name not in ("exclude", "fold", "seed")}
    )
    words = ("p.yaml", "-s", "dropout=.2,.3", "-s", "loss=huber,mse", "--seeds", "0", "1", "--jobs", "2")
    process = started(tmp_path, *words)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    names = ("oof.csv", "metrics.csv", "weights.safetensors")
    swept = contents(tmp_path / "runs", *names)
    assert len(swept) == 8 * folds * 3
    (tmp_path / "runs").rename(tmp_path / "swept")
    with contextlib.chdir(tmp_path):
        plan = plan_sweep("p.yaml", ["dropout=.2,.3", "loss=huber,mse"], seeds=[0, 1])
        jobs = random.Random(0).sample(plan.jobs(plan.settings), alone)
        lines = [job_line(job, ROOT / "notebooks/train_fold.ipynb") for job in jobs]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for line in lines:
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=environment, capture_output=True)
    lone = contents(tmp_path / "runs", *names)
    assert len(lone) == alone * 3
    assert {name: swept[name] == content for name, content in lone.items()} == dict.fromkeys(lone, True)
    assert Counter(Path(name).name for name in lone) == dict.fromkeys(names, alone)
