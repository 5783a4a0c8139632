"What only a GPU can show, in a process that sees it; skipped where there is none."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)

# trains in each precision, then predicts with two places on the same device
SCRIPT = """
import dataclasses, sys
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.models import load_model
from biomass_lib.device import pick_device
from biomass_lib.predict import Member, input_of, predict_ensemble
from biomass_lib.train import train_fold

home, device, amps = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
assert pick_device().type == device, pick_device()
render_dataset(home / "demo", n_train=12, n_test=4, seed=1, workers=1)
config, _ = smoke_config(Config(dropout=0.0, augment="none", runs_dir=str(home), cache_dir=""), home / "demo")
folds = {amp: train_fold(dataclasses.replace(config, amp=amp, experiment=amp)) for amp in ("off", *amps)}
losses = {amp: pd.read_csv(fold / "metrics.csv")["val/loss"] for amp, fold in folds.items()}
assert all(0 < (losses[amp] - losses["off"]).abs().max() < 0.1 for amp in amps), losses
loads = [partial(load_model, folds[amp] / "weights.safetensors") for amp in folds]
members = [Member(amp, load, input_of(load().spec)) for amp, load in zip(folds, loads)]
paths = sorted((home / "demo" / "test").glob("*.jpg")) * 4
exact_N5 = predict_ensemble(members, paths, devices=[device], amp="off").mass_N5
for amp in amps:
    for keep in (True, False):
        found = predict_ensemble(members, paths, devices=[device, device], batch_size=2, amp=amp, keep=keep)
        assert not found.late and np.abs(found.mass_N5 - exact_N5).max() < 0.5, np.abs(found.mass_N5 - exact_N5).max()
print("as in float32:", *amps)
"""


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU")), "cpu"]
)
def test_lower_precision_trains_and_predicts_as_float32_does(device: str, tmp_path: Path):
    seen = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | seen
    amps = ["bf16"] if device == "cpu" else ["fp16", "auto"]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), device, *amps]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "as in float32" in ran.stdout
