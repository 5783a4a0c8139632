"Two processes train a fold as one would with twice the batch, also when they are killed and begun again."

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from patience import PATIENCE
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from biomass_lib import loop, train
from biomass_lib.config import Config, config_to_yaml, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.models import load_model
from biomass_lib.parallel import launch, world
from biomass_lib.supervise import descendants

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
UNEVEN = 0  # the fold with 15 photographs to train on and 9 held out
ONE_LEFT = 2  # the fold with 17: a last batch of one photograph, for two processes
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    render_dataset(folder / "demo", n_train=24, n_test=2, seed=1)
    return folder


def trained(home: Path, launcher: list[str], experiment: str, fold: int, **changes) -> tuple[int, str, Path]:
    "Train a fold with neither a full last batch nor an even number held out; return status, output and folder."
    config, _ = smoke_config(Config(dropout=0.0, backbone="test_vit"), home / "demo")
    config = dataclasses.replace(config, experiment=experiment, n_folds=3, stage2_epochs=4, **changes)
    (home / f"{experiment}.yaml").write_text(config_to_yaml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [*launcher, "-m", "biomass_lib.train", f"{experiment}.yaml", "-p", "fold", str(fold)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr, home / "runs" / experiment / f"fold{fold}"


@pytest.mark.parametrize(
    ("fold", "changes"),
    [
        pytest.param(UNEVEN, {}, id="plain", marks=pytest.mark.slow),
        pytest.param(UNEVEN, {"accumulate": 2, "ema_decay": 0.9}, id="accumulate"),
        pytest.param(UNEVEN, {"augment": "none"}, id="stored", marks=pytest.mark.slow),
        pytest.param(ONE_LEFT, {"aux": "height"}, id="one left"),
        pytest.param(ONE_LEFT, {"augment": "none", "accumulate": 2}, id="one left, stored", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(home: Path, fold: int, changes: dict):
    name = "_".join([str(fold), *changes])
    status, said, one = trained(home, [sys.executable], f"one_{name}", fold, batch_size=4, **changes)
    assert status == 0, said
    status, said, two = trained(home, TORCHRUN, f"two_{name}", fold, batch_size=2, **changes)
    assert status == 0, said
    curves = [pd.read_csv(folder / "metrics.csv") for folder in (one, two)]
    assert len(curves[0]) == 5
    ids = [pd.read_csv(folder / "oof.csv").image_id.tolist() for folder in (one, two)]
    assert ids[0] == ids[1] and len(set(ids[0])) % 2 == 1  # no held-out photograph is lost or there twice
    assert (24 - len(ids[0])) % 4 == (3 if fold == UNEVEN else 1)  # the last batch is shared two to one, or one to none
    np.testing.assert_allclose(curves[1].to_numpy(), curves[0].to_numpy(), rtol=2e-3, atol=2e-4)
    masses = [pd.read_csv(folder / "oof.csv").filter(like="_pred").to_numpy() for folder in (one, two)]
    np.testing.assert_allclose(masses[1], masses[0], rtol=1e-3, atol=0.02)  # grams
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_a_mistake_ends_both(home: Path):
    status, said, folder = trained(home, TORCHRUN, "wrong", UNEVEN, backbone_weights="nowhere.safetensors")
    assert status != 0 and "nowhere.safetensors does not exist" in said
    assert not (folder / "done.json").exists()


def fold_of(home: Path, experiment: str, **changes) -> Config:
    "A fold with everything that a process could keep to itself: batch statistics, dropout, an uneven last batch."
    config, _ = smoke_config(Config(backbone="test_resnet", cache_dir=str(home / "cache")), home / "demo")
    settings = {"experiment": experiment, "runs_dir": str(home / "runs"), "n_folds": 3, "fold": UNEVEN, "workers": 0}
    settings |= {"batch_size": 2, "stage1_epochs": 1, "stage2_epochs": 3, "stage2_lr": 3e-3, "checkpoint_steps": 1}
    settings |= {"keep": "best"}  # whose weights must survive
    return dataclasses.replace(config, **(settings | changes))


def killed(config: Config, step: int) -> None:
    "A fold whose process 1 is killed before its step number so and so."
    train_step, steps = loop.train_step, []

    def counted(*given):
        steps.append(1)
        if len(steps) == step and world()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*given)

    loop.train_step = counted
    train.train_fold(config)


def late(config: Config) -> None:
    "A fold that one process has done before the other looks at the checkpoint."
    resume_training = loop.resume_training

    def slow(*given):
        time.sleep(3 * world()[0])
        return resume_training(*given)

    loop.resume_training = slow
    train.train_fold(config)


def ended_early(config: Config) -> None:
    "A fold that dies between its last checkpoint and done.json."
    train.save_fold = lambda *given: sys.exit("the power is gone")
    train.train_fold(config)


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    "Two processes that nobody killed."
    return train.launch_fold(fold_of(home, "whole"), processes=2)


@pytest.mark.slow
def test_a_dead_process_ends_the_other_and_both_go_on(home: Path, whole: Path):
    with pytest.raises(ChildFailedError, match="rank +: 1"):
        launch(killed, fold_of(home, "killed"), 11, processes=2)  # after an uneven batch, in the middle of an epoch
    folder = home / f"runs/killed/fold{UNEVEN}"
    assert (folder / "last.ckpt").exists() and not (folder / "done.json").exists()
    with pytest.raises(ValueError, match="processes: 2 -> 1"):
        train.train_fold(fold_of(home, "killed"))
    best = next(folder.glob("best*.safetensors"))
    weights = best.read_bytes()
    best.write_bytes(b"")
    with pytest.raises(ChildFailedError, match=f"{best.name} is damaged"):  # in the words of the one that looks
        train.launch_fold(fold_of(home, "killed"), processes=2)
    best.write_bytes(weights)
    assert train.launch_fold(fold_of(home, "killed"), processes=2) == folder
    for name in ("metrics.csv", "oof.csv", "oof_last.csv", "weights.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def test_predictions_are_those_of_the_saved_weights(home: Path):
    config = fold_of(home, "statistics", stage1_epochs=0, ema_decay=0.9)
    folder = train.launch_fold(config, processes=2)
    model, fold = load_model(folder / "weights.safetensors"), train.prepare_fold(config)
    with torch.inference_mode():
        again_N5 = torch.cat([model(batch["halves_2CHW"]) for batch in fold.valid_loader]).numpy()
    oof = pd.read_csv(folder / "oof.csv")
    np.testing.assert_allclose(oof.filter(like="_pred").to_numpy(), again_N5, atol=1e-3)


@pytest.mark.slow
def test_one_is_done_before_the_other_has_begun(home: Path):
    config = fold_of(home, "late", stage2_epochs=1)
    with pytest.raises(ChildFailedError):
        launch(ended_early, config, processes=2)
    launch(late, config, processes=2)
    assert (home / f"runs/late/fold{UNEVEN}/done.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes with their parent")
def test_killed_launcher_leaves_no_process(home: Path):
    config = fold_of(home, "orphans", stage2_epochs=5000)
    (home / "orphans.yaml").write_text(config_to_yaml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    command = [*TORCHRUN, "-m", "biomass_lib.train", "orphans.yaml"]
    launcher = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = home / f"runs/orphans/fold{UNEVEN}/last.ckpt"
    while not checkpoint.exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    workers = [pid for pid in descendants(launcher.pid) if Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    while any(Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        time.sleep(0.05)  # a test that hangs here has found orphans
