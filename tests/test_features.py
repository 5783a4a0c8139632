"Frozen features by the command, and features from an npy file on a rendered table and, where it is, on the real one."

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
from patience import PATIENCE
from safetensors.torch import save_file

from biomass_lib.baselines import ridge_oof
from biomass_lib.demo import render_dataset
from biomass_lib.features import (
    align_features,
    extract_features,
    features_main,
    fit_heads,
    judge_features,
    read_features,
)
from biomass_lib.folds import assign_folds
from biomass_lib.tables import read_train
from biomass_lib.targets import TARGETS, primary_to_all, weighted_r2

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from biomass_lib.features import features_main; features_main()"]
REAL = Path(os.environ.get("BIOMASS_DATA", "not given"))  # a folder with the real train.csv
FOLDS = ("--n-folds", "4")
TINY = ("--backbone", "test_resnet", "--random", "--img-size", "64", *FOLDS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "demo"
    render_dataset(folder, n_train=16, n_test=2, seed=0)
    return folder


def command(home: Path, *arguments: str) -> tuple[int, str]:
    "Exit status and all output of the command typed in `home`."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*COMMAND, *arguments], cwd=home, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def random_file(folder: Path, table: pd.DataFrame, width: int = 64) -> Path:
    "Random features of all photographs of a table and of two others, in another order."
    rng = np.random.default_rng(0)
    ids = rng.permutation([*table["image_id"], "unknown1", "unknown2"])
    np.save(folder / "outside.npy", rng.normal(size=(len(ids), width)).astype(np.float32))
    (folder / "outside.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return folder / "outside.npy"


@pytest.fixture(params=["rendered", "real"])
def table(request: pytest.FixtureRequest) -> pd.DataFrame:
    if request.param == "rendered":
        return read_train(request.getfixturevalue("demo"))
    if not (REAL / "train.csv").is_file():
        pytest.skip("the competition's train.csv is not here: set BIOMASS_DATA to the folder that holds it")
    return read_train(REAL)


def test_random_features_from_elsewhere_teach_nothing(table: pd.DataFrame, tmp_path: Path):
    "Every step works on the given table; random numbers must not beat the training mean by more than chance."
    outside = random_file(tmp_path, table)
    features = read_features(outside, tmp_path / "outside.txt")
    assert len(features) == len(table) + 2
    aligned_ND = align_features(features, table)
    row = features.index.get_loc(table["image_id"].iloc[5])
    assert np.array_equal(aligned_ND[5], np.load(outside)[row].astype(float))
    fold_N = assign_folds(table, n_folds=4)
    found = judge_features(features, table, fold_N)
    assert list(found) == ["training mean", "ridge", "heads"]
    assert all(np.isfinite(score) for score in found.values())
    assert max(found["ridge"], found["heads"]) < found["training mean"] + 0.1


def test_telling_features_are_read_in_the_right_order(table: pd.DataFrame, tmp_path: Path):
    "The masses themselves as features: a row given to the wrong photograph would spoil this."
    ids = table["image_id"].sample(frac=1, random_state=0)
    mass_N5 = table[list(TARGETS)].to_numpy()
    np.save(tmp_path / "told.npy", table.set_index("image_id").loc[ids, list(TARGETS)].to_numpy())
    ids.to_csv(tmp_path / "told.csv", index=False)
    features_ND = align_features(read_features(tmp_path / "told.npy"), table)
    assert np.array_equal(features_ND, mass_N5)
    if len(table) > 100:
        fold_N = assign_folds(table)
        assert weighted_r2(mass_N5, ridge_oof(features_ND, mass_N5, fold_N)) > 0.98
        mixed_ND = features_ND @ np.random.default_rng(0).normal(size=(5, 64))
        assert weighted_r2(mass_N5, fit_heads(mixed_ND, mass_N5, fold_N, lr=1e-2, epochs=40)) > 0.8


def test_heads_do_not_see_their_own_fold():
    "Changing the masses of a fold must not change what is predicted for it."
    rng = np.random.default_rng(0)
    features_ND, fold_N = rng.normal(size=(30, 8)), np.arange(30) % 3
    mass_N5 = primary_to_all(np.sort(rng.gamma(3, 9, (30, 3)))[:, ::-1])
    other_N5 = np.where(fold_N[:, None] == 1, 10 * mass_N5, mass_N5)
    first, second = (fit_heads(features_ND, each, fold_N, epochs=3) for each in (mass_N5, other_N5))
    assert np.array_equal(first[fold_N == 1], second[fold_N == 1])
    assert not np.array_equal(first[fold_N != 1], second[fold_N != 1])
    assert np.array_equal(first, fit_heads(features_ND, mass_N5, fold_N, epochs=3))


@pytest.mark.slow
def test_command_extracts_judges_and_brings_in(demo: Path, tmp_path: Path):
    status, said = command(tmp_path, str(demo), *TINY, "--out", "mine.npy", "--ridge", "--heads")
    assert status == 0, said
    assert "16 photographs, 96 features from test_resnet" in said and "4 folds by date: training mean" in said
    scores = said.splitlines()[-1]
    stored = list((tmp_path / "cache/features").glob("*.npy"))
    assert len(stored) == 1 and not list(tmp_path.rglob("*.tmp"))
    before = stored[0].stat().st_mtime_ns
    status, said = command(tmp_path, str(demo), *TINY, "--ridge", "--heads")
    assert (status, said.splitlines()[-1]) == (0, scores) and stored[0].stat().st_mtime_ns == before
    status, said = command(tmp_path, str(demo), "--features", "mine.npy", *FOLDS, "--ridge", "--heads")
    assert (status, said.splitlines()[-1]) == (0, scores)
    assert list(read_features(tmp_path / "mine.npy").index) == list(read_train(demo)["image_id"])


def test_another_photograph_under_the_same_name_is_seen(demo: Path, tmp_path: Path):
    table = read_train(demo)
    copy = tmp_path / "demo"
    (copy / "train").mkdir(parents=True)
    for name in table["image_path"]:
        (copy / name).symlink_to(demo / name)
    options = {"backbone": "test_resnet", "img_size": 64, "pretrained": False, "cache_dir": tmp_path / "cache"}
    before = extract_features(table, copy, **options)
    first, second = (copy / name for name in table["image_path"][:2])
    first.unlink()
    first.symlink_to(second.resolve())
    after = extract_features(table, copy, **options)
    assert np.allclose(after.iloc[0], after.iloc[1]) and not np.allclose(before.iloc[0], after.iloc[0])
    assert np.allclose(before.iloc[1:], after.iloc[1:], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backbone", "no_such_net", "--random", *FOLDS), "'no_such_net' is not a timm"),
        (
            ("--backbone", "test_resnet", "--backbone-weights", "no.safetensors", *FOLDS),
            "no.safetensors does not exist",
        ),
        (("--features", "no.npy", *FOLDS), "no.npy is missing"),
        ((*TINY, "--ridge", "--n-folds", "400"), "n_folds"),
        ((*TINY, "--out", "features.csv"), "must end in .npy"),
        (("--backbone", "test_vit", "--backbone-weights", "resnet.safetensors", *FOLDS), "does not fit test_vit"),
        (("--backbone", "levit_128", "--random", "--img-size", "100", *FOLDS), "the nearest side that it can is 96 px"),
        ((*TINY, "--img-size", "8"), "must be at least 32 pixels"),
    ],
)
def test_mistakes_are_lines(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_resnet").state_dict(), "resnet.safetensors")
    with pytest.raises(SystemExit, match=f"biomass_features: .*{re.escape(message)}") as ended:
        features_main([str(demo), *arguments])
    assert len(ended.value.code.splitlines()) <= (10 if "fit" in message else 1)  # a text: status 1


@pytest.mark.parametrize("dense", [False, True])
def test_patches_that_do_not_divide_the_picture(demo: Path, dense: bool):
    "DINOv2 has patches of 14 pixels."
    table = read_train(demo).head(2)
    options = {"img_size": 100, "pretrained": False, "dense": dense, "cache_dir": ""}
    features = extract_features(table, demo, "vit_small_patch14_dinov2", **options)
    assert features.shape == (2, 768 if dense else 384) and np.isfinite(features.to_numpy()).all()


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path: Path):
    status, said = command(tmp_path, "nowhere", *TINY)
    assert status == 1
    assert "train.csv is missing" in said and "Traceback" not in said


@pytest.mark.slow
def test_two_processes_at_once_leave_one_whole_file(demo: Path, tmp_path: Path):
    arguments = [*COMMAND, str(demo), *TINY, "--ridge"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(arguments, cwd=tmp_path, env=environment, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0] == said[1]
    names = sorted(path.name for path in (tmp_path / "cache/features").iterdir())
    assert [Path(name).suffix for name in names] == [".json", ".npy"]
    assert len(np.load(tmp_path / "cache/features" / names[1])) == 16
