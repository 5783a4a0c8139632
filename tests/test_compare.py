"Comparing runs: numbers by hand, refusals by name, coverage of the corrected gain, the page, the index of runs."

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from patience import PATIENCE

from biomass_lib.claims import Cell, cell_folder
from biomass_lib.compare import (
    chosen_gain,
    compare_main,
    compare_runs,
    describe_comparison,
    list_runs,
    main_effects,
    make_comparison,
    next_commands,
    runs_main,
)
from biomass_lib.config import CELL_PARAMETERS, MACHINE_PARAMETERS, Config, config_from_yaml, config_to_yaml
from biomass_lib.files import read_json, write_csv, write_json
from biomass_lib.folds import assign_folds, write_folds
from biomass_lib.intervals import cluster_sums, made_up_table, made_up_visits, visit_of, with_errors
from biomass_lib.tables import read_train
from biomass_lib.targets import TARGETS, WEIGHTS, weighted_r2

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
RATES, DROPOUTS = (1e-5, 3e-5, 1e-4), (0.2, 0.3)
HOSTILE = "E<meta http-equiv=refresh content=0>**b**$^"


def write_run(run_dir: Path, table: pd.DataFrame, config: Config, sd_g: float, seeds: int = 2) -> Path:
    "Write a run of three folds as training would leave it; predictions are wrong by a normal error."
    rng = np.random.default_rng([int(1e7 * config.stage2_lr), int(100 * config.dropout)])
    write_folds(run_dir / "folds.csv", table, table["fold"].to_numpy())
    write_json({name: {"sha256": name} for name in table["image_id"]}, run_dir / "data.json")
    own = tuple({*MACHINE_PARAMETERS, *CELL_PARAMETERS} - {"data_dir", "runs_dir"})
    (run_dir / "params.yaml").write_text(config_to_yaml(config, without=own), encoding="utf-8")
    for seed in range(seeds):
        oof = with_errors(table, sd_g, rng)
        for fold in range(3):
            folder = cell_folder(run_dir, Cell(fold, seed))
            write_csv(oof[oof["fold"] == fold], folder / "oof.csv")
            curve = pd.DataFrame({"epoch": range(1, 7), "val/score": 0.9 - 0.02 * sd_g - 0.5 / np.arange(1, 7)})
            write_csv(curve, folder / "metrics.csv")
            facts = {"fold": fold, "seed": seed, "epoch": 6, "kept": "last", "seconds": 120.0}
            write_json(facts, folder / "done.json")
    return run_dir


def name_of(rate: float, dropout: float) -> str:
    return f"lr{rate}_{dropout}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Write a sweep of three rates and two dropouts, two seeds; the lowest rate is best."
    sweep = tmp_path_factory.mktemp("home") / "runs/sweep"
    table = made_up_table(np.random.default_rng(0))
    for rate, dropout in itertools.product(RATES, DROPOUTS):
        own = {"experiment": name_of(rate, dropout), "runs_dir": str(sweep), "n_folds": 3}
        config = Config(**own, stage2_lr=rate, dropout=dropout)
        write_run(sweep / config.experiment, table, config, 4 + 2 * RATES.index(rate))
    write_csv(pd.DataFrame({"setting": [1]}), sweep / "sweep.csv")  # a sweep's own tables are no runs
    return sweep


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    "A copy that a test may break."
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def score_by_hand(tables: list[pd.DataFrame]) -> float:
    "The official score of predictions averaged over tables, written anew."
    true_N5 = tables[0][list(TARGETS)].to_numpy()
    pred_N5 = np.mean([table[[f"{name}_pred" for name in TARGETS]].to_numpy() for table in tables], axis=0)
    y, p, w = true_N5.ravel(), pred_N5.ravel(), np.tile(WEIGHTS, len(true_N5))
    mean = (w * y).sum() / w.sum()
    return 1 - (w * (y - p) ** 2).sum() / (w * (y - mean) ** 2).sum()


def tables_of(run: Path, cells: set[tuple[int, int]]) -> list[pd.DataFrame]:
    "One table a seed, of the folds that are wanted."
    seeds = sorted({seed for _, seed in cells})
    read = {cell: pd.read_csv(cell_folder(run, Cell(*cell)) / "oof.csv") for cell in cells}
    return [pd.concat([read[cell] for cell in sorted(cells) if cell[1] == seed]) for seed in seeds]


def test_numbers_are_those_of_the_predictions(made: Path):
    compared = compare_runs([made], base=name_of(3e-5, 0.3))
    every = set(itertools.product(range(3), range(2)))
    scores = {run.name: score_by_hand(tables_of(run, every)) for run in compared.runs.values()}
    table = compared.table
    assert table["score"].to_dict() == pytest.approx(scores)
    delta = {name: score - scores[compared.base] for name, score in scores.items() if name != compared.base}
    assert table["delta"].drop(compared.base).to_dict() == pytest.approx(delta)
    assert (table["low"] < table["score"]).all() and (table["score"] < table["high"]).all() and table["high"].max() <= 1
    single = [score_by_hand(tables_of(made / compared.best, {(f, seed) for f in range(3)})) for seed in range(2)]
    assert table["seed_sd"][compared.best] == pytest.approx(np.std(single, ddof=1))
    assert (
        (table["cells"] == 6).all() and (table["minutes"] == 2).all() and table["hours"].iloc[0] == pytest.approx(0.2)
    )
    assert compared.best == max(scores, key=scores.get) and compared.gain.naive == pytest.approx(max(delta.values()))

    effects = main_effects(compared).set_index(["parameter", "value"])
    for rate in (1e-5, 1e-4):
        by_hand = np.mean([scores[name_of(rate, d)] - scores[name_of(3e-5, d)] for d in DROPOUTS])
        assert effects.loc[("stage2_lr", str(rate)), "effect"] == pytest.approx(by_hand)
        assert effects.loc[("stage2_lr", str(rate)), "pairs"] == 2
    assert effects.loc[("dropout", "0.2"), "pairs"] == 3 and len(effects) == 3


def test_only_cells_that_all_have_count(sweep: Path):
    (sweep / name_of(1e-4, 0.2) / "fold0_seed1/done.json").unlink()
    (sweep / name_of(1e-5, 0.3) / "fold2/done.json").unlink()
    compared = compare_runs([sweep])
    assert list(map(str, compared.cells)) == ["fold 0", "fold 1", "fold 1 seed 1", "fold 2 seed 1"]
    assert compared.left_out[name_of(3e-5, 0.2)] == ["fold 0 seed 1", "fold 2"]
    assert compared.left_out[name_of(1e-4, 0.2)] == ["fold 2"]
    folds = []
    for cells in ({(0, 0)}, {(1, 0), (1, 1)}, {(2, 1)}):  # each fold with the seeds that are common
        tables = tables_of(sweep / name_of(3e-5, 0.2), cells)
        preds = {name: np.mean([table[name] for table in tables], axis=0) for name in tables[0].filter(like="_pred")}
        folds.append(tables[0].assign(**preds))
    assert compared.table["score"][name_of(3e-5, 0.2)] == pytest.approx(score_by_hand([pd.concat(folds)]))
    assert "since other settings lack them: fold 0 seed 1, fold 2" in describe_comparison(compared)


def refusal(runs: list[Path], **options: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        compare_runs(runs, **options)
    return str(refused.value)


def test_runs_that_cannot_be_paired_are_refused_by_name(sweep: Path, tmp_path: Path):
    first, second = sweep / name_of(1e-5, 0.2), sweep / name_of(3e-5, 0.2)
    table = made_up_table(np.random.default_rng(0))
    config = Config(experiment="other", runs_dir=str(tmp_path), n_folds=3, fold_seed=7)
    other = write_run(tmp_path / "other", table.assign(fold=(table["fold"] + 1) % 3), config, 5)
    message = refusal([first, other])
    assert first.name in message and "other" in message and "other folds (fold_seed: 0 and 7)" in message
    data = read_json(second / "data.json")
    write_json(data | {"ID0007": {"sha256": "another"}}, second / "data.json")
    message = refusal([first, second])
    assert f"{first.name} and {second.name} were trained on other data (1 photographs differ: ID0007)" in message
    write_json(data, second / "data.json")
    assert "is one run: a comparison needs two" in refusal([first])
    assert "is one run" in refusal([first, first, sweep / "." / first.name])
    assert "nowhere does not exist" in refusal([first, tmp_path / "nowhere"])
    assert "has no params.yaml, nor has a folder in it" in refusal([tmp_path / "other/fold0", first])
    assert "base other is not among the runs" in refusal([first, second], base="other")
    for done in second.glob("fold*/done.json"):
        done.unlink()
    assert f"{second.name}: no finished fold" in refusal([first, second])
    assert compare_runs([sweep]).not_begun == [second.name]
    oof = first / "fold1/oof.csv"
    facts = read_json(first / "fold1/done.json") | {"files": {"oof.csv": {"size": 5, "sha256": "0"}}}
    write_json(facts, first / "fold1/done.json")
    assert f"{first}/fold1 is called done, but oof.csv has {oof.stat().st_size} bytes" in refusal([sweep])


def test_cells_in_common_are_needed(sweep: Path):
    for number, (run, folds) in enumerate(((name_of(1e-5, 0.2), "12"), (name_of(3e-5, 0.2), "0"))):
        for fold in folds:
            for done in (sweep / run).glob(f"fold{fold}*/done.json"):
                done.unlink()
        assert number == 1 or len(compare_runs([sweep]).cells) == 2
    message = refusal([sweep / name_of(1e-5, 0.2), sweep / name_of(3e-5, 0.2)])
    assert (
        "no fold and seed is done in all runs" in message and f"{name_of(1e-5, 0.2)}: fold 0, fold 0 seed 1" in message
    )


def test_line_to_type_is_understood(made: Path):
    compared = compare_runs([made])
    refit, weights = next_commands(compared)
    path = re.fullmatch(r"biomass_folds (\S+) --folds all --seeds 0 1", refit).group(1)
    assert config_from_yaml(path) == compared.configs[compared.best]
    assert weights == f"biomass_weights {made / compared.best}"


def test_base_of_a_sweep(sweep: Path):
    assert compare_runs([sweep]).base == name_of(1e-4, 0.2)  # the first name
    write_json({"base": str(sweep / name_of(3e-5, 0.3))}, sweep / "sweep.json")
    assert compare_runs([sweep]).base == name_of(3e-5, 0.3)
    assert compare_runs([sweep], base=str(sweep / name_of(1e-5, 0.3))).base == name_of(1e-5, 0.3)
    write_json({"base": "gone"}, sweep / "sweep.json")
    assert compare_runs([sweep]).base == name_of(1e-4, 0.2)


# The corrected gain, on settings that are equal in truth


def real_predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # true_N5, pred_MN5, visit_N, fold_N
    "Read predictions of 34 models on the competition's photographs; the two broken ones of the 36 are left out."
    data = ROOT.parent / "shared/data"
    if not (data / "oof/ensemble_of_36.npz").is_file() or not (data / "real/train.csv").is_file():
        pytest.skip(f"out-of-fold predictions of real photographs are not in {data}")
    stored = np.load(data / "oof/ensemble_of_36.npz")
    table = read_train(data / "real").set_index("image_id").loc[stored["image_id"]].reset_index()
    true_N5 = table[list(TARGETS)].to_numpy(dtype=float)
    good = [weighted_r2(true_N5, pred_N5) > 0.5 for pred_N5 in stored["pred_M357x5"]]
    assert sum(good) == 34
    return true_N5, stored["pred_M357x5"][good], visit_of(table), assign_folds(table, 5, "date", 0)


def own_noise(kind: str, visit_N: np.ndarray, fold_N: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    "Draw what makes n equal settings differ, relative to the prediction: shared by nobody, by a visit, by a fold."
    own_MN5 = rng.normal(size=(n, len(visit_N), 5))
    if kind == "photographs":
        return 0.12 * own_MN5
    code_N = visit_N if kind == "visits" else fold_N
    shared_MN5 = rng.normal(size=(n, code_N.max() + 1, 5))[:, code_N]
    return 0.05 * own_MN5 + 0.1 * shared_MN5 if kind == "visits" else 0.06 * own_MN5 + 0.06 * shared_MN5


def equal_settings(kind: str, source: str, rng: np.random.Generator, real: tuple | None, n: int = 24) -> tuple:
    "One prediction and n kinds of noise that are equal in distribution; returns sums_MK4, part_K."
    if source == "made up":
        true_N5, pred_N5, visit_N = made_up_visits(30, rng)
        fold_N, pred_MN5 = visit_N % 5, None
    else:
        true_N5, pred_MN5, names_N, fold_N = real
        visit_N, pred_N5 = pd.factorize(names_N)[0], pred_MN5.mean(axis=0)
    if kind == "models":  # in each fold, how another of the real models departs from the mean, or the opposite of that
        pick, sign = rng.integers(len(pred_MN5), size=(n, 5)), rng.choice([-1, 1], size=(n, 5))
        apart_MN5 = pred_MN5 - pred_N5
        photos_N = np.arange(len(fold_N))
        settings_MN5 = pred_N5 + np.stack(
            [sign[m][fold_N][:, None] * apart_MN5[pick[m][fold_N], photos_N] for m in range(n)]
        )
    else:
        settings_MN5 = pred_N5 + own_noise(kind, visit_N, fold_N, rng, n) * np.maximum(pred_N5, 3)
    part_K = pd.Series(fold_N).groupby(visit_N).agg(lambda fold: fold.mode()[0]).to_numpy()
    return np.stack([cluster_sums(true_N5, pred_N5, visit_N) for pred_N5 in settings_MN5]), part_K


def coverage(kind: str, source: str, times: int, draws: int) -> tuple[float, float, float]:
    "Share of intervals that hold zero, mean gain as it looks, mean corrected gain."
    real, rng = real_predictions() if source == "real" else None, np.random.default_rng(1)
    gains = [chosen_gain(*equal_settings(kind, source, rng, real), n=draws) for _ in range(times)]
    held = np.mean([gain.low <= 0 <= gain.high for gain in gains])
    naive, corrected = (float(np.mean([getattr(gain, name) for gain in gains])) for name in ("naive", "gain"))
    print(
        f"{source}, {kind}: {times} x 24 equal settings, covers 0 in {held:.1%}, naive {naive:+.4f}, {corrected=:+.4f}"
    )
    return float(held), naive, corrected


def test_equal_settings_gain_nothing_quick():
    held, naive, corrected = coverage("visits", "made up", 100, 300)
    assert held >= 0.93 and naive > 0.008 and abs(corrected) < 0.003


KINDS = [(kind, source) for source in ("made up", "real") for kind in ("photographs", "visits", "folds")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "source"), [*KINDS, ("models", "real")])
def test_equal_settings_gain_nothing(kind: str, source: str):
    held, naive, corrected = coverage(kind, source, 1000, 1000)
    assert held >= 0.95 and naive > 0.005 and abs(corrected) < naive / 5


def test_same_settings_tie_and_the_base_stays():
    sums_MK4, part_K = equal_settings("visits", "made up", np.random.default_rng(0), None, n=3)
    gain = chosen_gain(np.stack([sums_MK4[2]] * 4), part_K, base=3)
    assert gain[:4] == pytest.approx((0, 0, 0, 0), abs=1e-12) and set(gain.chosen_G) == {3}
    twice = chosen_gain(sums_MK4, part_K, base=1), chosen_gain(sums_MK4, part_K, base=1)
    assert twice[0][:4] == twice[1][:4]


def test_two_visits_have_no_interval():
    sums_MK4, part_K = equal_settings("visits", "made up", np.random.default_rng(0), None, n=3)
    gain = chosen_gain(sums_MK4[:, :2], part_K[:2])
    assert np.isfinite(gain.gain) and np.isnan([gain.low, gain.high]).all()


# The page and the commands


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The page of the sweep, in which a run has a name that is HTML and Markdown."
    home = tmp_path_factory.mktemp("page")
    shutil.copytree(made, home / "sweep")
    (home / "sweep" / name_of(1e-4, 0.3)).rename(home / "sweep" / HOSTILE)
    return make_comparison([home / "sweep"], base=name_of(3e-5, 0.3))


def test_page_is_whole_and_names_stay_text(page: Path):
    html = page.read_text(encoding="utf-8")
    pictures = re.findall(r"<img[^>]*>", html)
    assert len(pictures) == 3 and all('src="data:image/png;base64,' in picture for picture in pictures)
    assert all(len(re.search('alt="([^"]*)"', picture).group(1)) > 20 for picture in pictures)
    assert "<script" not in html and html.count("http-equiv") == 1 + html.count("&lt;meta http-equiv")
    assert "E&lt;meta http-equiv=refresh content=0&gt;**b**$^" in html
    assert "Traceback" not in html and "The photographs themselves are not here" in html and len(html) < 3_000_000
    assert not re.search(r">\s*(nan|NaN|None)\s*<", html)
    facts, table = read_json(page.with_suffix(".json")), pd.read_csv(page.with_suffix(".csv"))
    assert len(table) == facts["settings"] == 6 and facts["base"] == name_of(3e-5, 0.3)
    assert f"<strong>{facts['gain']['gain']:+.3f}</strong>" in html and facts["left_out"] == {}
    assert facts["commands"][0] in html and len(facts["effects"]) == 3


@pytest.mark.needs(*BROWSERS, package="chromium")
def test_browser_shows_the_page_without_complaint(page: Path, tmp_path: Path):
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'a.png'}",
    ]
    pipes = {"capture_output": True, "text": True, "timeout": PATIENCE, "check": False}
    ended = subprocess.run([CHROMIUM, *flags, "--window-size=1000,5000", page.as_uri()], **pipes)
    assert ended.returncode == 0 and (tmp_path / "a.png").is_file(), ended.stderr[-2000:]
    assert [line for line in ended.stderr.splitlines() if "CONSOLE" in line] == []


def test_mistakes_are_a_line(made: Path, tmp_path: Path):
    for arguments in ([str(tmp_path)], [str(made), "--base", "no"], [str(made), "--data-dir", str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            compare_main(arguments)
        assert str(stopped.value).startswith("biomass_compare: ") and "\n" not in str(stopped.value)
    assert not (made / "compare.ipynb").exists()


def test_workflow_notebook_holds_no_logic():
    sources = ["".join(cell["source"]) for cell in read_json(ROOT / "notebooks/compare.ipynb")["cells"]]
    assert not [source for source in sources if re.search(r"^(def|class) |^# *\| *hide", source, re.MULTILINE)]


def contents(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_index_lists_runs_and_changes_nothing(sweep: Path, capsys: pytest.CaptureFixture):
    done, half, held, stopped, broken = (sweep / name_of(*own) for own in list(itertools.product(RATES, DROPOUTS))[:5])
    (half / "fold1/done.json").unlink()
    (held / "fold2/done.json").unlink()
    (held / "fold2/lease.json").write_text("{}", encoding="utf-8")
    (stopped / "fold0/done.json").unlink()
    (stopped / "fold0/lease.json").write_text("{}", encoding="utf-8")
    os.utime(stopped / "fold0/lease.json", (0, 0))
    (broken / "params.yaml").write_text("stage2_lr: [", encoding="utf-8")
    (done / "all").mkdir()
    write_json({"fold": "all", "seed": 0}, done / "all/done.json")
    before = contents(sweep.parent)
    table = list_runs(sweep.parent)
    runs_main([str(sweep.parent)])
    assert contents(sweep.parent) == before
    state = table["state"]
    assert state[f"sweep/{done.name}"] == "6/6 + 1 all" and state[f"sweep/{half.name}"] == "5/6"
    assert state[f"sweep/{held.name}"] == "5/6, training fold 2"
    assert state[f"sweep/{stopped.name}"] == "5/6, stopped fold 0"
    assert "damaged" in state[f"sweep/{broken.name}"] and "params.yaml" in state[f"sweep/{broken.name}"]
    score = score_by_hand(tables_of(done, set(itertools.product(range(3), range(2)))))
    assert table["score"][f"sweep/{done.name}"] == pytest.approx(score)
    size = sum(path.stat().st_size for path in done.rglob("*") if path.is_file())
    assert table["MB"][f"sweep/{done.name}"] == pytest.approx(size / 1e6)
    assert {"stage2_lr", "dropout"} <= set(table.columns) and len(table) == 6
    assert "6 runs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no runs"):
        runs_main([str(sweep / "nothing")])
