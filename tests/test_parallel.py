"Two processes train a fold as one would with twice the batch."

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biomass_lib.config import Config, config_to_yaml, smoke_config
from biomass_lib.demo import render_dataset

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    render_dataset(folder / "demo", n_train=20, n_test=2, seed=1)
    return folder


def trained(home: Path, launcher: list[str], experiment: str, **changes) -> tuple[int, str, Path]:
    "Exit status, output and folder of a fold."
    config, _ = smoke_config(Config(dropout=0.0, backbone="test_vit"), home / "demo")
    config = dataclasses.replace(config, experiment=experiment, n_folds=3, stage2_epochs=4, **changes)
    (home / f"{experiment}.yaml").write_text(config_to_yaml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [*launcher, "-m", "biomass_lib.train", f"{experiment}.yaml"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr, home / "runs" / experiment / "fold0"


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "ema_decay": 0.9}, {"augment": "none"}], ids=["plain", "accumulate", "stored"]
)
def test_two_processes_are_one_with_twice_the_batch(home: Path, changes: dict):
    name = "_".join(changes) or "plain"
    status, said, one = trained(home, [sys.executable], f"one_{name}", batch_size=4, **changes)
    assert status == 0, said
    status, said, two = trained(home, TORCHRUN, f"two_{name}", batch_size=2, **changes)
    assert status == 0, said
    curves = [pd.read_csv(folder / "metrics.csv") for folder in (one, two)]
    assert len(curves[0]) == 5
    left_out = {len(pd.read_csv(folder / "oof.csv")) for folder in (one, two)}
    assert len(left_out) == 1  # no held-out photograph is lost or there twice
    np.testing.assert_allclose(curves[1].to_numpy(), curves[0].to_numpy(), rtol=2e-3, atol=2e-4)
    masses = [pd.read_csv(folder / "oof.csv").filter(like="_pred").to_numpy() for folder in (one, two)]
    np.testing.assert_allclose(masses[1], masses[0], rtol=1e-3, atol=0.02)  # grams
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_a_mistake_ends_both(home: Path):
    status, said, folder = trained(home, TORCHRUN, "wrong", backbone_weights="nowhere.safetensors")
    assert status != 0 and "nowhere.safetensors does not exist" in said
    assert not (folder / "done.json").exists()
