"""From the competition's photographs to a submission, with ImageNet weights: all a person does, on 87 real ones.

Skipped where they are not at hand. Nothing of them stays: everything is written to pytest's temporary folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from patience import PATIENCE
from test_kernel import bare_python, mount, rehearse, write_test_set  # noqa: F401 (a fixture)

from biomass_lib.kaggle_rules import repo_root
from biomass_lib.kernel import render_kernel
from biomass_lib.targets import TARGETS

pytestmark = pytest.mark.slow

ROOT = repo_root(Path(__file__).parent)
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data/real_photos"
BACKBONE = SHARED / "weights/tf_efficientnet_lite0.safetensors"
BIN = Path(sys.executable).parent
PARAMETERS = {
    "data_dir": str(DATA),
    "experiment": "real",
    "backbone": BACKBONE.stem,
    "backbone_weights": str(BACKBONE),
    "img_size": 192,
    "workers": 0,
    "clean": "both",  # rims, dots and cardboard, in the kernel as in training
    "stage1_epochs": 12,
    "stage2_epochs": 1,
    "amp": "off",
}


def command(home: Path, name: str, *arguments: str) -> str:
    "Run a command in a folder; return its output."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run([BIN / name, *arguments], cwd=home, env=environment, timeout=PATIENCE, check=False, **pipes)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a parameter file, and the photographs and weights at hand."
    photographs = len(list((DATA / "train").glob("*.jpg")))
    if photographs != 87 or not BACKBONE.is_file():
        pytest.skip(f"needs the 87 real photographs in {DATA} ({photographs} there) and {BACKBONE}")
    home = tmp_path_factory.mktemp("real")
    (home / "real.yaml").write_text(yaml.safe_dump(PARAMETERS), encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def run_dir(home: Path) -> Path:
    "Two of the five folds, trained side by side from one cache."
    output = command(home, "biomass_folds", "real.yaml", "--folds", "0", "1", "--jobs", "2")
    assert "fold 0: score" in output and "fold 1: score" in output
    return home / "runs/real"


def test_audit_finds_artefacts_and_no_error(home: Path):
    output = command(home, "biomass_audit", str(DATA), "--csv", "audit.csv")
    assert "errors: 0, warnings: 0" in output
    findings = pd.read_csv(home / "audit.csv")
    counts = findings.loc[findings["check"] == "artefacts", "found"].str.split(", ").explode().value_counts()
    assert counts["flash_dots"] == 2 and counts["cardboard"] == 5 and "date_stamp" not in counts  # as by eye
    assert 15 <= counts["black_rim"] <= 24
    assert set(findings["check"]) == {"artefacts", "zero_green"}  # GDM without green, where clover covers the ground


def test_folds_hold_out_whole_dates(run_dir: Path):
    folds = pd.read_csv(run_dir / "folds.csv")
    assert len(folds) == 87 and folds["image_id"].is_unique
    assert (folds.groupby("Sampling_Date")["fold"].nunique() == 1).all()
    assert set(folds["fold"]) == set(range(5)) and folds["fold"].value_counts().min() >= 10


def test_cache_is_shared_by_the_folds(run_dir: Path, home: Path):
    "Halves of each photograph are decoded once."
    assert len(list(home.glob("cache/192px_both/*.npy"))) == 87


def test_eda_shows_real_data(home: Path, run_dir: Path):
    arguments = ("-p", "data_dir", str(DATA), "-p", "run_dir", str(run_dir), "--no-progress-bar")
    command(home, "papermill", str(ROOT / "notebooks/eda.ipynb"), "eda.ipynb", *arguments)
    text = (home / "eda.ipynb").read_text(encoding="utf-8")
    assert text.count('"image/png"') + text.count('"image/jpeg"') == 8
    assert "22 visits of 1 to 10 photographs" in text and "0 errors, 0 warnings" in text


def test_report_has_a_score_above_the_mean(home: Path, run_dir: Path):
    command(home, "biomass_report", "runs/real")
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    rows, score = report["ladder"], report["score"]
    assert report["kept"] == "last" and score["value"] == report["last_epoch"]["value"] == rows["model"]["score"]
    assert score["low"] < score["value"] < score["high"] and score["value"] > rows["training mean"]["score"]
    photographs = (pd.read_csv(run_dir / "folds.csv")["fold"] < 2).sum()
    interval = f"(95 % {score['low']:.2f} to {score['high']:.2f})"
    assert report["headline"].startswith(f"real: {score['value']:.2f} {interval}, ")
    assert report["data"]["photographs"] == photographs and not report["data"]["demo"]
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 9 and "Traceback" not in html


def test_kernel_predicts_held_out_photographs_as_training_did(
    home: Path,
    run_dir: Path,
    bare_python: Path,  # noqa: F811
):
    "One model without flips in float32, as it was validated, on the photographs of its own fold under other names."
    command(home, "biomass_weights", "runs/real", "--folds", "0", "--views", "identity", "--out", "weights")
    oof = pd.read_csv(run_dir / "fold0/oof.csv", dtype={"image_id": str}).set_index("image_id")
    (home / "held_out").mkdir()
    photographs = [shutil.copy(DATA / "train" / f"{image_id}.jpg", home / "held_out") for image_id in oof.index]
    write_test_set(home / "competition", photographs, len(photographs))
    kernel = json.loads(render_kernel(ROOT))
    calls = [cell for cell in kernel["cells"] if "devices=devices" in "".join(cell["source"])]
    assert len(calls) == 1  # where the processor has bfloat16, it would round to that
    calls[0]["source"] = "".join(calls[0]["source"]).replace("devices=devices", 'devices=devices, amp="off"')
    (home / "inference.ipynb").write_text(json.dumps(kernel), encoding="utf-8")
    inputs = mount(home / "input", "new", home / "competition", home / "weights")
    ran = rehearse(bare_python, home / "inference.ipynb", inputs, home / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]

    submission = pd.read_csv(home / "working/submission.csv")
    assert submission["sample_id"].tolist() == pd.read_csv(home / "competition/test.csv")["sample_id"].tolist()
    masses = submission.set_index("sample_id")["target"]
    own_name = {path.read_bytes(): path.stem for path in map(Path, photographs)}
    for path in (home / "competition/test").glob("*.jpg"):
        predicted_5 = masses[[f"{path.stem}__{name}" for name in TARGETS]]
        known_5 = oof.loc[own_name[path.read_bytes()], [f"{name}_pred" for name in TARGETS]].astype(float)
        np.testing.assert_allclose(predicted_5, known_5, rtol=0, atol=2e-3)
