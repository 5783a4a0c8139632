"Folds and report by real papermill processes: two tiny folds on a few demo photographs."

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from patience import PATIENCE, wait_until

from biomass_lib.demo import render_dataset
from biomass_lib.supervise import descendants

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOK = ROOT / "notebooks/train_fold.ipynb"
TINY = {
    "data_dir": "demo",
    "experiment": "tiny",
    "n_folds": 2,
    "workers": 0,
    "backbone": "test_resnet",
    "pretrained": False,
    "img_size": 64,
    "batch_size": 4,
    "stage1_epochs": 1,
    "stage2_epochs": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder as a person has it: data, a parameter file, and later runs/."
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return home


def heeds_interrupts() -> None:
    "Tests that run in the background of a shell were started with SIGINT ignored, and so would their commands be."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def started(home: Path, name: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([BIN / name, *arguments], cwd=home, env=environment, preexec_fn=heeds_interrupts, **pipes)


def command(home: Path, name: str, *arguments: str) -> tuple[int, str]:
    "Exit status and all output of a command typed in `home`."
    process = started(home, name, *arguments)
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


@pytest.fixture(scope="module")
def run_dir(home: Path) -> Path:
    "Two folds, trained side by side."
    status, output = command(home, "biomass_folds", "tiny.yaml", "--jobs", "2")
    assert status == 0, output
    assert "fold 0: score" in output and "fold 1: score" in output
    return home / "runs/tiny"


def test_folds_leave_their_files(run_dir: Path):
    for fold in (0, 1):
        files = {path.name for path in (run_dir / f"fold{fold}").iterdir()}
        wanted = {"train_fold.ipynb", "metrics.csv", "oof.csv", "weights.safetensors", "weights.json", "done.json"}
        assert wanted <= files
    assert len(pd.read_csv(run_dir / "folds.csv")) == 12


def test_done_folds_are_skipped(home: Path, run_dir: Path):
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("fold*/*")}
    status, output = command(home, "biomass_folds", "tiny.yaml")
    assert status == 0, output
    assert output.count("(done before)") == 2
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("fold*/*")} == before


@pytest.mark.slow
def test_report_has_the_score(home: Path, run_dir: Path):
    status, output = command(home, "biomass_report", "runs/tiny")
    assert status == 0, output
    table = pd.read_csv(run_dir / "scores.csv", index_col=0)
    assert table.index[0] == "model" and {"State mean", "training mean", "ceiling"} <= set(table.index)
    oof = pd.concat(pd.read_csv(path) for path in run_dir.glob("fold*/oof.csv"))
    error = (oof["Dry_Total_g"] - oof["Dry_Total_g_pred"]) ** 2
    spread = (oof["Dry_Total_g"] - oof["Dry_Total_g"].mean()) ** 2
    assert table.loc["model", "Dry_Total_g"] == pytest.approx(1 - error.sum() / spread.sum())
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    score = f"{table.loc['model', 'score']:.3f}"
    assert score in output and f"<strong>{score}</strong>" in html
    assert html.count("data:image/png;base64,") == 9
    assert "Traceback" not in html and "<script" not in html and str(ROOT) not in html
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "no_such", "1"), "unknown parameter no_such"),
        (("-p", "img_size", "big"), "parameter img_size must be int"),
        (("-p", "data_dir", "nowhere"), "data_dir = 'nowhere' has no train.csv"),
    ],
)
def test_mistake_stops_before_any_work(home: Path, arguments: tuple, message: str):
    status, output = command(home, "biomass_folds", "tiny.yaml", "-p", "experiment", "mistake", *arguments)
    assert status == 1
    assert message in output and "Traceback" not in output
    assert not (home / "runs/mistake").exists()


def test_mistake_given_to_papermill_itself(home: Path, tmp_path: Path):
    processes = {}
    for name, value in (("no_such", "1"), ("img_size", "big")):
        options = ["-f", "tiny.yaml", "-p", "experiment", "mistake", "-p", name, value, "--no-progress-bar"]
        processes[name] = started(home, "papermill", str(NOTEBOOK), str(tmp_path / f"{name}.ipynb"), *options)
    for name, process in processes.items():
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "ValueError" in output and name in output
    assert not (home / "runs/mistake").exists()


@pytest.mark.slow
def test_broken_photograph_fails_its_folds_by_name(home: Path, run_dir: Path, tmp_path: Path):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    (copy / "runs/tiny/fold1/done.json").unlink()
    photo = sorted((copy / "demo/train").glob("*.jpg"))[0]
    photo.write_bytes(photo.read_bytes()[:20_000])
    status, output = command(copy, "biomass_folds", "tiny.yaml", "--jobs", "2")
    assert status == 1, output
    assert "fold 0: score" in output and "(done before)" in output
    assert "fold 1 FAILED (exit status 1): ValueError" in output and photo.name in output
    assert "runs/tiny/fold1/train_fold.ipynb" in output and "failed: fold 1;" in output
    assert not (copy / "runs/tiny/fold1/done.json").exists()


def test_interrupt_ends_the_kernels(home: Path):
    process = started(home, "biomass_folds", "tiny.yaml", "-p", "experiment", "ended", "-p", "stage2_epochs", "5000")
    metrics = home / "runs/ended/fold0/metrics.csv"
    wait_until(metrics.is_file, "the first epoch", process)
    kernels = [pid for pid in descendants(process.pid) if pid != process.pid]
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert not (home / "runs/ended/fold0/done.json").exists()
    assert kernels or sys.platform != "linux"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in kernels), "the end of the kernels")
