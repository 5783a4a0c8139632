"What travels into the field, on real tables where they are at hand. Aggregate figures only."

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.cbook import get_sample_data
from patience import PATIENCE
from sklearn.datasets import load_sample_images
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biomass_lib.evaluate import read_oof
from biomass_lib.features import align_features, read_features
from biomass_lib.field import error_facts, look_distance, look_facts, look_features, paddock_mean
from biomass_lib.intervals import half_widths, masses_of, visit_of
from biomass_lib.photos import open_weights, predict_photos
from biomass_lib.predict import photo_batches
from biomass_lib.tables import read_train
from biomass_lib.targets import KG_HA, TARGETS

DATA = Path(__file__).parents[2] / "shared/data"
PHOTOS = DATA / "real_photos"
BACKBONE = DATA.parent / "weights/tf_efficientnet_lite0.safetensors"
FEATURES = DATA / "features/dinov2_vits14_cls_350x700.npy"


@pytest.fixture(scope="module")
def oof() -> pd.DataFrame:
    "A ridge on frozen features, each visit predicted by a model that has not seen it."
    if not FEATURES.is_file() or not (DATA / "real/train.csv").is_file():
        pytest.skip(f"the real tables and features are not in {DATA}")
    table = read_train(DATA / "real")
    features_ND, true_N5 = align_features(read_features(FEATURES), table), table[list(TARGETS)].to_numpy()
    pred_N5, fold_N = np.zeros_like(true_N5), np.zeros(len(table), dtype=int)
    for fold, (learn, held) in enumerate(GroupKFold(10).split(features_ND, true_N5, visit_of(table))):
        model = make_pipeline(StandardScaler(), Ridge(300)).fit(features_ND[learn], true_N5[learn])
        pred_N5[held], fold_N[held] = np.clip(model.predict(features_ND[held]), 0, None), fold
    return table.assign(fold=fold_N, **{f"{name}_pred": pred_N5[:, n] for n, name in enumerate(TARGETS)})


def test_intervals_hold_for_visits_that_are_left_out(oof: pd.DataFrame) -> None:
    "Widths and shared errors come from the other visits; 30 visits leave room for chance."
    visit_N, photos, paddocks = visit_of(oof), [], []
    for visit in np.unique(visit_N):
        part, facts = oof[visit_N == visit], error_facts(oof[visit_N != visit])
        true_N, pred_N = part["Dry_Total_g"].to_numpy(), part["Dry_Total_g_pred"].to_numpy()
        pred_N5 = part[[f"{name}_pred" for name in TARGETS]].to_numpy()
        photos += (np.abs(true_N - pred_N) <= half_widths(facts, pred_N5)[:, -1]).tolist()
        found = paddock_mean(pred_N, facts["paddock"])
        paddocks.append(found["low"] <= true_N.mean() * KG_HA <= found["high"])
    assert 0.82 <= np.mean(photos) <= 0.98, np.mean(photos)
    assert np.mean(paddocks) >= 0.8, np.mean(paddocks)


@pytest.fixture(scope="module")
def ridge_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Five folds of ridges on a frozen network, on the real photographs."
    count = len(list((PHOTOS / "train").glob("*.jpg")))
    if count != 87 or not BACKBONE.is_file():
        pytest.skip(f"needs the 87 real photographs in {PHOTOS} ({count} there) and {BACKBONE}")
    home = tmp_path_factory.mktemp("ridge")
    settings = {"data_dir": str(PHOTOS), "experiment": "ridge", "model": "frozen_ridge", "img_size": 224}
    settings |= {"backbone": BACKBONE.stem, "backbone_weights": str(BACKBONE), "workers": 0, "amp": "off"}
    (home / "ridge.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    folds = [Path(sys.executable).parent / "biomass_folds", "ridge.yaml", "--jobs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(folds, cwd=home, env=environment, timeout=PATIENCE, check=True)
    return home / "runs/ridge"


@pytest.mark.slow
def test_held_out_photographs_get_the_masses_of_the_run(ridge_dir: Path) -> None:
    "All 87, each by the model that has not seen it."
    oof, apart_g = read_oof(ridge_dir), []
    assert len(oof) == 87
    for fold, part in oof.groupby("fold"):
        paths = [PHOTOS / "train" / f"{name}.jpg" for name in part["image_id"]]
        weights = ridge_dir / f"fold{fold}/weights.safetensors"
        again = predict_photos(weights, paths, ("identity",), amp="off", devices=["cpu"])
        apart_g.append(np.abs(again[list(TARGETS)].to_numpy() - masses_of(part)[1]).max())
    print(f"held out: at most {max(apart_g):.2g} g apart")
    assert max(apart_g) < 0.01


def features_of(model: torch.nn.Module, paths: list[Path], size: tuple[int, str]) -> np.ndarray:
    "What the network sees of photographs, in their order."
    return np.concatenate([look_features(model, batch.halves[size]) for batch in photo_batches(paths, (size,), 8, 1)])


@pytest.mark.slow
def test_unlike_notices_other_pictures_and_few_new_visits(ridge_dir: Path, tmp_path: Path) -> None:
    "The look of four folds, against the visits of the fifth, and against a palace, a flower and a portrait."
    member = open_weights(ridge_dir)[0][0]
    oof, model = read_oof(ridge_dir), member.load()  # its network is frozen: the same in all folds
    features_ND = features_of(model, [PHOTOS / "train" / f"{name}.jpg" for name in oof["image_id"]], member.input)
    portrait_HW3 = cv2.imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))[..., ::-1]
    others = [tmp_path / f"{number}.jpg" for number in range(6)]
    for number, picture_HW3 in enumerate([*load_sample_images().images, portrait_HW3]):
        for side, part_HW3 in enumerate((picture_HW3[:320], picture_HW3[-320:])):
            cv2.imwrite(str(others[2 * number + side]), cv2.resize(part_HW3[..., ::-1], (2000, 1000)))
    other_MD, fold_N, distance_N, caught = features_of(model, others, member.input), oof["fold"].to_numpy(), [], []
    for fold in np.unique(fold_N):
        learn_N = fold_N != fold
        facts = look_facts(features_ND[learn_N], fold_N[learn_N])
        distance_N.append(pd.Series(look_distance(facts, features_ND[~learn_N]), visit_of(oof)[~learn_N]))
        caught += (look_distance(facts, other_MD) > 1).tolist()
    alarms_N = pd.concat(distance_N) > 1
    visits = alarms_N.groupby(level=0).any()
    print(f"alarms: {alarms_N.sum()} of {len(alarms_N)} photographs, {visits.sum()} of {len(visits)} visits")
    print(f"noticed: {sum(caught)} of {len(caught)}")
    assert alarms_N.mean() <= 0.2, alarms_N.mean()
    assert np.mean(caught) >= 0.75, caught
