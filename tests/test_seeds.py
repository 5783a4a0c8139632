"Folds, seeds and refits in one run folder: trained, pooled, reported, uploaded; runs of earlier versions."

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from patience import PATIENCE

from biomass_lib import kernel, loop
from biomass_lib.claims import Cell, find_cells, read_done
from biomass_lib.config import Config, config_to_yaml, read_yaml, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.evaluate import missing_cells, missing_folds, read_oof, seed_scores
from biomass_lib.files import read_json, write_json
from biomass_lib.intervals import masses_of
from biomass_lib.models import load_model
from biomass_lib.predict import predict_masses
from biomass_lib.report import headline, judge_run, list_warnings
from biomass_lib.runs import folds_main, make_report
from biomass_lib.tables import read_test
from biomass_lib.targets import TARGETS, weighted_r2
from biomass_lib.train import open_run, train_fold
from biomass_lib.weights import assemble_weights, weights_main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PREDICTED = [f"{name}_pred" for name in TARGETS]
CELLS = [(fold, seed) for fold in (0, 1, "all") for seed in (0, 1)]


def command(home: Path, *words: str, **environment: str) -> tuple[int, str]:
    "Exit status and all output of a command typed in `home`."
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run([BIN / words[0], *words[1:]], cwd=home, env=given, timeout=PATIENCE, check=False, **pipes)
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    config, _ = smoke_config(Config(cache_dir=str(home / "cache"), runs_dir=str(home / "runs")), home / "demo")
    config = dataclasses.replace(config, experiment="tiny", stage2_epochs=1)
    (home / "tiny.yaml").write_text(config_to_yaml(config, without=("fold", "seed")))
    return config


@pytest.fixture(scope="module")
def run_dir(settings: Config) -> Path:
    "Two folds with two seeds and two refits, the last of them by the command."
    for fold, seed in CELLS[:-1]:
        train_fold(dataclasses.replace(settings, fold=fold, seed=seed))
    home = Path(settings.runs_dir).parent
    status, said = command(home, "biomass_folds", "tiny.yaml", "--folds", "all", "1", "0", "--seeds", "1", "0")
    assert status == 0, said
    lines = [line.partition(":")[0] for line in said.splitlines()]
    assert lines == ["fold 0", "fold 0 seed 1", "fold 1", "fold 1 seed 1", "all", "all seed 1"], said
    assert said.count("(done before)") == 5
    assert "all seed 1: refit on all 12 photographs, epoch 2, " in said
    return home / "runs/tiny"


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    "A copy that a test may break."
    return Path(shutil.copytree(run_dir, tmp_path / "tiny"))


def test_each_training_has_its_folder(run_dir: Path):
    names = ["fold0", "fold0_seed1", "fold1", "fold1_seed1", "all", "all_seed1"]
    assert [folder.name for folder in find_cells(run_dir).values()] == names
    assert not {"fold", "seed"} & set(read_yaml(run_dir / "params.yaml"))
    for (fold, seed), name in zip(CELLS, names, strict=True):
        done, files = read_done(run_dir / name), {path.name for path in (run_dir / name).iterdir()}
        assert (done["fold"], done["seed"], done["kept"], done["epoch"]) == (fold, seed, "last", 2)
        tables = {"oof.csv", "oof_best.csv"} if fold != "all" else set()
        assert {file for file in files if file.startswith("oof")} == tables
        assert set(done["files"]) == {"metrics.csv", "weights.safetensors", "weights.json"} | tables
        assert (done["n_train"], done["n_valid"]) == (12, 0) if fold == "all" else done["n_valid"] > 0
        assert (done["score"] is None) == (fold == "all")


def test_seeds_are_pooled_by_their_mean(run_dir: Path):
    oof = read_oof(run_dir).set_index("image_id")
    by_hand = [pd.read_csv(run_dir / f"fold{fold}{seed}/oof.csv") for fold in (0, 1) for seed in ("", "_seed1")]
    mean = pd.concat(by_hand).groupby("image_id")[PREDICTED].mean()
    pd.testing.assert_frame_equal(oof[PREDICTED].sort_index(), mean, rtol=1e-12)
    apart = (by_hand[0][PREDICTED] - by_hand[1][PREDICTED]).abs().to_numpy().max()
    assert len(oof) == 12 and apart > 1e-3, "the seeds are two trainings"
    table = pd.concat([by_hand[1], by_hand[3]])
    assert seed_scores(run_dir)[1] == pytest.approx(weighted_r2(table[list(TARGETS)], table[PREDICTED]))
    for fold in (0, 1):  # what was kept is what was loaded: the last epoch
        assert read_done(run_dir / f"fold{fold}")["score"] == read_done(run_dir / f"fold{fold}")["last_score"]


def test_a_seed_that_some_folds_lack(copy: Path):
    (copy / "fold1_seed1/done.json").unlink()
    assert (missing_cells(copy), missing_folds(copy), list(seed_scores(copy))) == ([Cell(1, 1)], [], [0])
    with pytest.warns(UserWarning, match="not done: fold 1 seed 1; means are over fewer seeds there"):
        oof = read_oof(copy)
    alone = read_oof(copy, seeds=[0])
    assert (masses_of(oof)[1] == masses_of(alone)[1]).all(axis=1).tolist() == (oof["fold"] == 1).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = judge_run(copy)
    assert any(line.startswith("fold 1 seed 1: not done") for line in list_warnings(judged))


def test_a_killed_refit_resumes(settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    config = dataclasses.replace(settings, fold="all", stage2_epochs=3, runs_dir=str(tmp_path), experiment="whole")
    whole = train_fold(config)
    save = loop.save_training

    def save_and_die(t) -> None:
        save(t)
        if t.progress.epoch == 3:
            raise KeyboardInterrupt

    torn = dataclasses.replace(config, experiment="torn")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_training", save_and_die)
        train_fold(torn)
    assert (tmp_path / "torn/all/last.ckpt").is_file() and read_done(tmp_path / "torn/all") is None
    again = train_fold(torn)
    assert "going on from last.ckpt at epoch 3" in capsys.readouterr().out
    assert (again / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, two = (load_model(folder / "weights.safetensors").state_dict() for folder in (whole, again))
    assert all((one[name] == two[name]).all() for name in one)
    facts = read_json(again / "weights.json")
    assert (facts["fold"], facts["score"], facts["epoch"]) == ("all", None, 4)


def test_report_and_card_lead_with_the_number_to_quote(run_dir: Path, tmp_path: Path, capsys):
    home = run_dir.parent.parent
    status, said = command(home, "biomass_report", "runs/tiny")
    assert status == 0, said
    judged = judge_run(run_dir)
    assert said.splitlines()[0] == headline(judged)
    report = read_json(run_dir / "report.json")
    assert report["headline"] == headline(judged) and report["refits"] == [0, 1] and set(report["seeds"]) == {"0", "1"}
    assert report["score"]["value"] == pytest.approx(weighted_r2(*masses_of(read_oof(run_dir, "last"))))
    best = weighted_r2(*masses_of(read_oof(run_dir, "best")))
    assert report["best_epoch"] == pytest.approx({"value": best, "optimism": best - report["score"]["value"]})
    assert [(model["fold"], model["seed"]) for model in report["models"]] == CELLS[:4]
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert f">{headline(judged).split(',')[0]}" in html and "Each seed by itself" in html and "Warning" not in html
    weights_main([str(run_dir), "--out", str(tmp_path / "weights")])
    line = "tiny: 6 networks with equal weights: fold 0, fold 0 seed 1, fold 1, fold 1 seed 1, all, all seed 1"
    assert line in capsys.readouterr().out
    card = (tmp_path / "weights/README.md").read_text(encoding="utf-8")
    assert card.splitlines()[2].startswith("**tiny") and report["verdict"] in card
    assert "2 of 6 are refits" in card and "Refits on every photograph have no score of their own" in card
    manifest = read_json(tmp_path / "weights/manifest.json")
    assert manifest["runs"]["tiny"]["score"] == report["score"]["value"]
    weights_main([str(run_dir), "--out", str(tmp_path / "refits"), "--folds", "all"])
    card = (tmp_path / "refits/README.md").read_text(encoding="utf-8")
    assert report["verdict"] in card and "2 of 2 are refits" in card


def test_kernel_predicts_the_mean(run_dir: Path, tmp_path: Path):
    "Folds, seeds and refits together go through the kernel, as any ensemble."
    weights = tmp_path / "weights"
    manifest = assemble_weights(run_dir, weights)
    names = ["fold0", "fold0_seed1", "fold1", "fold1_seed1", "all", "all_seed1"]
    assert [entry["file"] for entry in manifest["models"]] == [f"tiny_{name}.safetensors" for name in names]
    assert [(entry["fold"], entry["seed"]) for entry in manifest["models"]] == CELLS
    assert {entry["weight"] for entry in manifest["models"]} == {1 / 6}
    inputs, working = tmp_path / "input", tmp_path / "working"
    working.mkdir()
    shutil.copytree(run_dir.parent.parent / "demo", inputs / "competitions/csiro-biomass")
    shutil.copytree(weights, inputs / "datasets/you/csiro-biomass-weights")
    (tmp_path / "inference.ipynb").write_text(kernel.render_kernel(ROOT), encoding="utf-8")
    words = ("--no-progress-bar", "--kernel", "python3", str(tmp_path / "inference.ipynb"), "out.ipynb")
    status, said = command(working, "papermill", *words, BIOMASS_INPUT=str(inputs))
    assert status == 0, said
    submission = pd.read_csv(working / "submission.csv").set_index("sample_id")["target"]
    test = read_test(inputs / "competitions/csiro-biomass")
    models = [load_model(run_dir / name / "weights.safetensors") for name in names]
    paths = [inputs / "competitions/csiro-biomass" / path for path in test["image_path"]]
    mass_N5 = predict_masses(models, paths, views=tuple(manifest["views"]))
    found = [[submission[f"{image_id}__{name}"] for name in TARGETS] for image_id in test["image_id"]]
    np.testing.assert_allclose(found, mass_N5, atol=1e-3)


def test_a_run_of_an_earlier_version(settings: Config, run_dir: Path, tmp_path: Path):
    "Its seed stands in params.yaml, its folders have none in their names, and it kept the best epochs."
    old = tmp_path / "old"
    shutil.copytree(run_dir, old, ignore=shutil.ignore_patterns("*_seed1", "all", "report*", "*.log"))
    newer = ("head_lr", "bank", "keep")
    then = settings.to_dict() | {"experiment": "old", "seed": 3, "head_lr": 0.0, "bank": 0}
    (old / "params.yaml").write_text(
        yaml.safe_dump({name: value for name, value in then.items() if name not in (*newer, "fold")})
    )
    for fold in (0, 1):
        folder = old / f"fold{fold}"
        (folder / "oof.csv").rename(folder / "oof_last.csv")
        (folder / "oof_best.csv").rename(folder / "oof.csv")
        done = read_json(folder / "done.json")
        done |= {"epoch": done["best_epoch"], "score": done["best_score"]}
        write_json(
            {k: v for k, v in done.items() if k not in ("seed", "kept", "best_epoch", "best_score", "files")},
            folder / "done.json",
        )
        facts = read_json(folder / "weights.json")
        write_json(facts | {"params": facts["params"] | {"seed": 3}}, folder / "weights.json")
    assert list(find_cells(old)) == [Cell(0, 3), Cell(1, 3)]
    assert (masses_of(read_oof(old))[1] == masses_of(read_oof(old, "best"))[1]).all()
    assert (masses_of(read_oof(old, "last"))[1] == masses_of(read_oof(run_dir, "last", seeds=[0]))[1]).all()
    judged = judge_run(old)
    assert judged.kept_best and judged.epoch == "last" and judged.config.keep == "best"
    assert any("the saved weights are those of each fold's best epoch" in line for line in list_warnings(judged))
    manifest = assemble_weights(old, tmp_path / "weights")
    assert [(entry["file"], entry["seed"]) for entry in manifest["models"]] == [
        ("old_fold0.safetensors", 3),
        ("old_fold1.safetensors", 3),
    ]
    config = Config.from_dict(then | {"runs_dir": str(tmp_path), "keep": "best"})
    assert open_run(config) == old
    assert train_fold(config).name == "fold0"
    assert train_fold(dataclasses.replace(config, seed=0)).name == "fold0_seed0"
    with pytest.raises(ValueError, match="begun with other parameters .keep: best -> last"):
        open_run(dataclasses.replace(config, keep="last"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--folds", "2"), r"folds \[2\] do not exist: n_folds = 2, so they are 0 to 1, or all"),
        (("--seeds", "0", "-p", "seed", "1"), "parameter seed = 1 contradicts --seeds"),
        (("--folds", "all", "-p", "keep", "best"), "keep = 'best' must be last with fold = all"),
        (("-p", "fold", "all"), "choose with --folds"),
    ],
)
def test_mistakes_are_refused_before_any_work(settings: Config, words: tuple[str, ...], message: str):
    parameters = Path(settings.runs_dir).parent / "tiny.yaml"
    with pytest.raises(SystemExit, match=message):
        folds_main([str(parameters), "-p", "experiment", "mistake", *words])
    assert not (Path(settings.runs_dir) / "mistake").exists()


def test_refits_alone(copy: Path, tmp_path: Path):
    for folder in copy.glob("fold*/"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="a refit has no held-out photographs to be judged by"):
        make_report(copy)
    with pytest.raises(FileNotFoundError, match="has no finished fold"):
        read_oof(copy)
    with pytest.raises(ValueError, match="fold0, fold1 of 2 folds not done"):
        assemble_weights(copy, tmp_path / "weights")
    weights_main([str(copy), "--folds", "all", "--seeds", "1", "--out", str(tmp_path / "weights")])
    assert [path.name for path in (tmp_path / "weights").glob("*.safetensors")] == ["tiny_all_seed1.safetensors"]
    with pytest.raises(SystemExit, match="all_seed7 of 2 folds not done"):
        weights_main([str(copy), "--folds", "all", "--seeds", "7", "--out", str(tmp_path / "weights")])
