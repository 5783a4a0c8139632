"biomass_choose on run folders as trainings and the kernel leave them."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stand_in import train_cell

from biomass_lib.choose import choose_main
from biomass_lib.config import Config
from biomass_lib.targets import TARGETS


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "Three runs of two folds, best at dropout 0.3, with their submissions."
    monkeypatch.chdir(tmp_path)
    for number, dropout in enumerate((0.3, 0.2, 0.17)):
        for fold in range(2):
            folder = train_cell(Config(experiment=f"run{number}", dropout=dropout, n_folds=2, fold=fold))
            oof = pd.read_csv(folder / "oof.csv")
            for name in TARGETS:  # errors that no two runs share
                oof[f"{name}_pred"] += np.random.default_rng(number + 10 * fold).normal(0, 2, len(oof))
            oof.to_csv(folder / "oof.csv", index=False)
        rows = [f"ID{k}__{name}" for k in range(40) for name in TARGETS]
        grams = np.arange(200.0) + number
        pd.DataFrame({"sample_id": rows, "target": grams}).to_csv(f"runs/run{number}/submission.csv", index=False)
    return [f"runs/run{number}" for number in range(3)]


def verdict(capsys) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_the_best_and_its_partner(runs, capsys):
    choose_main(runs)
    assert "runs/run0" in verdict(capsys)


def test_a_public_score_is_a_reading(runs, capsys):
    "The poorest run out of fold, far ahead on the board, is one of the two."
    choose_main(
        [*runs, "--public", "runs/run0=.2", "--public", "runs/run1=.2", "--public", "runs/run2=.9", "--sd", ".001"]
    )
    assert "runs/run2" in verdict(capsys)


def test_a_broken_run_is_set_aside_with_a_word(runs, capsys):
    for path in Path(runs[2]).glob("fold*/oof.csv"):
        oof = pd.read_csv(path)
        oof[[f"{name}_pred" for name in TARGETS]] = 1000.0
        oof.to_csv(path, index=False)
    choose_main(runs)
    assert "set aside, more than 0.2 behind the best out of fold: runs/run2" in capsys.readouterr().out


def test_a_mean_of_runs_and_a_submission_elsewhere(runs, capsys):
    Path(runs[2], "submission.csv").rename("fetched.csv")
    choose_main([runs[0], runs[1], "runs/run0+runs/run2", "--submission", "runs/run2=fetched.csv"])
    said = capsys.readouterr().out
    assert "runs/run0+runs/run2" in said and "has no submission.csv" not in said
    choose_main(runs)
    assert "by out-of-fold predictions alone: runs/run2 has no submission.csv" in capsys.readouterr().out


def test_the_visible_test_set_says_nothing(runs, capsys):
    "Kaggle shows one photograph of the test set."
    for run in runs:
        pd.read_csv(f"{run}/submission.csv")[:5].to_csv(f"{run}/submission.csv", index=False)
    choose_main(runs)
    assert "1 test photographs are too few to compare runs on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--public", "runs/other=.7"], "--public runs/other is none of"),
        (["--public", "runs/run0=good"], "is not a score such as 0.61"),
        (["--submission", "runs/run0=nowhere.csv"], "nowhere.csv"),
        (["runs/nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(runs, more, words):
    with pytest.raises(SystemExit) as refused:
        choose_main([*runs, *more])
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1
