"What travels into the field, on real tables where they are at hand. Aggregate figures only."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biomass_lib.features import align_features, read_features
from biomass_lib.field import error_facts, paddock_mean
from biomass_lib.intervals import half_widths, visit_of
from biomass_lib.tables import read_train
from biomass_lib.targets import KG_HA, TARGETS

DATA = Path(__file__).parents[2] / "shared/data"
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
