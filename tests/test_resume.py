"A training that is killed again and again ends with the files of one that was not."

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from patience import PATIENCE

from biomass_lib.checkpoint import load_checkpoint
from biomass_lib.config import Config, config_to_yaml, smoke_config
from biomass_lib.demo import render_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SAME = ("metrics.csv", "weights.safetensors", "weights.json", "oof.csv", "oof_best.csv")
# everything at once: mid-epoch checkpoints, averaged weights, dropout, augmentation, summed-up batches, workers
SETTINGS = {"batch_size": 2, "accumulate": 2, "checkpoint_steps": 1, "ema_decay": 0.9, "workers": 2}
SETTINGS |= {"stage1_epochs": 3, "stage2_epochs": 8, "n_folds": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    render_dataset(folder / "demo", n_train=18, n_test=2, seed=0)
    return folder


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
ENVIRONMENT |= {"PYTHONUNBUFFERED": "1"}  # what a killed process said is read, too


def parameters(home: Path, experiment: str, **changes) -> str:
    "Write the parameter file of an experiment; its name."
    config, _ = smoke_config(Config(), home / "demo")
    config = dataclasses.replace(config, **(SETTINGS | {"experiment": experiment} | changes))
    (home / f"{experiment}.yaml").write_text(config_to_yaml(config))
    return f"{experiment}.yaml"


def begun(home: Path, experiment: str, **changes) -> subprocess.Popen:
    "Start a fold of an experiment, as a command would."
    command = [sys.executable, "-m", "biomass_lib.train", parameters(home, experiment, **changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=ENVIRONMENT, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> str:
    "Wait for a process that must end well; what it said."
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


def kill(process: subprocess.Popen) -> str:
    "Process and workers, at once; what it had said."
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate(timeout=PATIENCE)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, bytes]:
    "The files of the fold that nobody killed."
    ended(begun(home, "whole"))
    return contents(home / "runs/whole/fold0")


def same_but_for_the_name(found: dict[str, bytes], whole: dict[str, bytes], experiment: str) -> None:
    for name in SAME:
        assert found[name].replace(experiment.encode(), b"whole") == whole[name], f"{name} differs"


def test_golden_curve(home: Path, whole: dict[str, bytes]):
    "The same seed twice: the same bytes, and nothing of the way there is left behind."
    said = ended(begun(home, "twice"))
    assert "epoch  11/11" in said and "going on" not in said
    same_but_for_the_name(contents(home / "runs/twice/fold0"), whole, "twice")
    names = {path.name for path in (home / "runs/twice/fold0").iterdir()}
    assert names == {*SAME, "speed.csv", "done.json"}


def place_of(folder: Path) -> tuple[int, int] | None:
    "Epoch and next step of a fold's checkpoint."
    state = load_checkpoint(folder / "last.ckpt")
    return (state["progress"]["epoch"], state["progress"]["step"] + 1) if state else None


def begun_at(said: str) -> tuple[int, int] | None:
    "Epoch and step at which a process says that it goes on."
    found = re.findall(r"going on from last\.ckpt at epoch (\d+), step (\d+)", said)
    assert len(found) <= 1, said
    return (int(found[0][0]), int(found[0][1])) if found else None


def killed_until_done(home: Path, experiment: str, kills: int, seed: int, **changes) -> int:
    """Kill a training at random moments, then let it end. Returns how many kills there were.

    Every start goes on just where the checkpoint of the one before was, and never further back."""
    rng, folder, places, ends = np.random.default_rng(seed), home / f"runs/{experiment}/fold0", [None], False
    while not ends:
        ends = len(places) > kills
        process = begun(home, experiment, **changes)
        before = (folder / "last.ckpt").stat().st_mtime_ns if (folder / "last.ckpt").exists() else 0
        while process.poll() is None and not ends:
            checkpoint = folder / "last.ckpt"
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        if not ends:
            time.sleep(rng.uniform(0, 0.5 / kills))
        ends = ends or process.poll() is not None
        said = ended(process) if ends else kill(process)
        assert begun_at(said) == places[-1], f"{said} for a checkpoint at {places[-1]}"
        if not ends:
            is_done = (folder / "done.json").exists()  # only just, and then the next one begins anew
            assert not is_done or (folder / "weights.safetensors").exists()
            places.append(None if is_done else place_of(folder))
            assert is_done or places[-1] > (places[-2] or (1, 1)), places
    return len(places) - 1


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(home: Path, whole: dict[str, bytes], kills: int):
    experiment = f"killed{kills}"
    assert killed_until_done(home, experiment, kills, seed=kills) == kills
    same_but_for_the_name(contents(home / f"runs/{experiment}/fold0"), whole, experiment)


OTHER_SETTINGS = {
    "by_epoch": {"checkpoint_steps": 0, "workers": 0, "stage1_epochs": 6, "early_stopping_patience": 3},
    "stored": {"augment": "none", "stage1_epochs": 8, "stage2_epochs": 2, "swa_epochs": 2, "ema_decay": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_killed_with_other_settings(home: Path, name: str):
    "A checkpoint an epoch, no workers, early stopping; stored features in stage 1, and averages of the last epochs."
    changes = OTHER_SETTINGS[name]
    ended(begun(home, f"calm_{name}", **changes))
    calm = contents(home / f"runs/calm_{name}/fold0")
    assert killed_until_done(home, f"torn_{name}", 3, seed=4, **changes) == 3
    torn = contents(home / f"runs/torn_{name}/fold0")
    for file in SAME:
        assert torn[file].replace(b"torn_", b"calm_") == calm[file], f"{file} differs"


@pytest.mark.slow
def test_killed_while_it_writes_the_checkpoint(home: Path, whole: dict[str, bytes]):
    "The draft is half written when the process dies; the checkpoint before it is used, and the draft goes."
    program = """
import os, signal, sys
from biomass_lib import train
replace, seen = os.replace, []
def dying_replace(draft, path):
    seen.append(path)
    if str(path).endswith("last.ckpt") and sum(str(p).endswith("last.ckpt") for p in seen) == 6:
        os.truncate(draft, os.path.getsize(draft) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(draft, path)
os.replace = dying_replace
train.train_main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, parameters(home, "half")]
    assert subprocess.run(command, cwd=home, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
    folder = home / "runs/half/fold0"
    assert list(folder.glob(".last.ckpt.*.tmp")) and (folder / "last.ckpt").exists()
    said = ended(begun(home, "half"))
    assert "going on from last.ckpt" in said
    same_but_for_the_name(contents(folder), whole, "half")
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_other_parameters_and_damage_are_refused(home: Path):
    process, checkpoint = begun(home, "changed", stage2_epochs=200), home / "runs/changed/fold0/last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill(process)
    (home / "runs/changed/params.yaml").unlink()  # which would refuse them first
    process = begun(home, "changed", stage2_epochs=200, weight_decay=0.5)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "weight_decay: 0.01 -> 0.5" in said and "remove last.ckpt" in said
    (home / "runs/changed/params.yaml").unlink()
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:1000] + b"?" + content[1001:])
    process = begun(home, "changed", stage2_epochs=200)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "last.ckpt is damaged" in said


def test_done_fold_begins_anew(home: Path, whole: dict[str, bytes]):
    said = ended(begun(home, "whole"))
    assert "going on" not in said
    assert contents(home / "runs/whole/fold0") == whole
    assert len(pd.read_csv(home / "runs/whole/fold0/speed.csv")) == 11
