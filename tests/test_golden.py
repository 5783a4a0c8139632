"""Seeded losses and scores of a tiny training of each kind of model, compared with stored ones.

A change of numbers must be meant. When it is, write them anew: python tests/test_golden.py --refresh"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4
LOGGED = ("train/loss", "val/loss", "val/score")
KINDS = {
    "two_stream": {"backbone": "test_resnet", "fuse": "concat"},
    "dinov2_tiled": {"backbone": "test_vit", "aux": "height", "fuse": "concat"},
    "dense": {"backbone": "test_vit", "targets": "components", "loss_over": "all"},
}
# code paths of processors that know less than this one
LIMITED = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "compatible": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}


def draw_data(folder: Path) -> Path:
    "Make twelve photographs of whole numbers, as PNG and of the size the model sees: no decoder or resizer differs."
    import cv2
    import numpy as np
    import pandas as pd

    from biomass_lib.files import write_csv
    from biomass_lib.tables import wide_to_long
    from biomass_lib.targets import TARGETS, primary_to_all

    rows, rng = [], np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for number in range(12):
        total, gdm, green = 20 + 5 * number, 12 + 3 * (number % 5), 6 + 2 * (number % 3)
        photo_HW3 = rng.integers(0, 40, (64, 128, 3), dtype=np.uint8)
        photo_HW3 += np.array([2 * green, 60 + total, 5 * gdm], dtype=np.uint8)
        path = f"train/P{number:02}.png"
        cv2.imwrite(str(folder / path), photo_HW3)
        mass_5 = primary_to_all(np.array([[total, gdm, green]], dtype=float))[0]
        facts = {"image_id": f"P{number:02}", "image_path": path, "Sampling_Date": f"2015/{1 + number // 3}/1"}
        facts |= {"State": ("Tas", "Vic")[number % 2], "Species": "Ryegrass"}
        facts |= {"Pre_GSHH_NDVI": 0.4 + number / 50, "Height_Ave_cm": 3.0 + number}
        rows.append(facts | dict(zip(TARGETS, mass_5, strict=True)))
    table = pd.DataFrame(rows)
    table["Sampling_Date"] = pd.to_datetime(table["Sampling_Date"])
    write_csv(wide_to_long(table), folder / "train.csv")
    return folder


def train_all(**changes) -> dict[str, dict[str, list[float]]]:  # kind -> logged name -> a value an epoch
    "Train each kind of model for three epochs, in float32 and in this process."
    import pandas as pd

    from biomass_lib.config import Config
    from biomass_lib.train import train_fold

    with tempfile.TemporaryDirectory() as place:
        data = draw_data(Path(place) / "data")
        shared = {"data_dir": str(data), "runs_dir": f"{place}/runs", "cache_dir": "", "workers": 0, "n_folds": 2}
        shared |= {"pretrained": False, "img_size": 64, "batch_size": 3, "amp": "off"}
        shared |= {"stage1_epochs": 1, "stage2_epochs": 2, "stage1_lr": 1e-2, "stage2_lr": 3e-3}
        shared |= {"head_lr": 0.0, "bank": 0}  # as when the numbers were stored
        curves = {}
        for kind, own in KINDS.items():
            config = Config(**(shared | {"model": kind, "experiment": kind} | own | changes))
            metrics = pd.read_csv(train_fold(config) / "metrics.csv")
            curves[kind] = {name: metrics[name].round(7).tolist() for name in LOGGED}
    return curves


def trained(environment: dict[str, str], *changes: str) -> dict[str, dict[str, list[float]]]:
    "The curves of a fresh process with one thread."
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    given |= {"TQDM_DISABLE": "1"} | environment
    done = subprocess.run([sys.executable, __file__, *changes], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def differences(found: dict, golden: dict) -> dict[str, float]:  # kind -> largest difference
    "How far curves are from the stored ones."
    return {
        kind: max(
            abs(a - b) / max(1.0, abs(b))
            for name in LOGGED
            for a, b in zip(found[kind][name], golden[kind][name], strict=True)
        )
        for kind in KINDS
    }


@pytest.mark.parametrize("path", ["all", "avx2", pytest.param("compatible", marks=pytest.mark.slow)])
def test_the_numbers_are_the_stored_ones(path: str):
    found = differences(trained(LIMITED.get(path, {})), json.loads(GOLDEN.read_text()))
    assert max(found.values()) < TOLERANCE, f"{found}: if the change is meant, python tests/test_golden.py --refresh"


@pytest.mark.parametrize(
    "change",
    [
        ("stage1_lr", 1.1e-2),
        pytest.param(("stage2_lr", 3.3e-3), marks=pytest.mark.slow),
        pytest.param(("loss_beta_g", 11.0), marks=pytest.mark.slow),
        pytest.param(("seed", 1), marks=pytest.mark.slow),
    ],
    ids=lambda change: change[0],
)
def test_a_small_change_is_noticed(change: tuple):
    "A rate 10 % too high, say, for each kind of model."
    found = differences(trained({}, json.dumps(dict([change]))), json.loads(GOLDEN.read_text()))
    assert min(found.values()) > 3 * TOLERANCE, found


if __name__ == "__main__":
    if sys.argv[1:] == ["--refresh"]:
        GOLDEN.write_text(json.dumps(trained({}), indent=1) + "\n")
    else:
        print(json.dumps(train_all(**(json.loads(sys.argv[1]) if sys.argv[1:] else {}))))
