"Adaptation: whatever happens to its process, the plain submission is the same to the byte; the report sees a shift."

import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from biomass_lib import adapt
from biomass_lib.adapt import adapt_submission, shift_auc, shift_table
from biomass_lib.baselines import colour_statistics
from biomass_lib.demo import SHIFTS, render_dataset
from biomass_lib.files import file_facts, read_json, write_json
from biomass_lib.models import create_model, save_weights
from biomass_lib.submit import make_submission
from biomass_lib.tables import read_test, read_train
from biomass_lib.targets import TARGETS

MEAN_G = (26.6, 12.0, 6.7, 33.3, 45.3)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with data, weights and a plain submission."
    folder = tmp_path_factory.mktemp("stage")
    render_dataset(folder / "data", n_train=12, n_test=6, seed=0, workers=1, shift=("season", "palette"))
    (folder / "weights").mkdir()
    entries = []
    for number, name in enumerate(("two_stream", "dense")):
        torch.manual_seed(number)
        model = create_model(name, backbone="test_resnet", img_size=64, mean_g=MEAN_G)
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight, std=0.3)
        path = folder / "weights" / f"{name}.safetensors"
        save_weights(model, path)
        path.with_suffix(".json").unlink()
        entries.append({"file": path.name, **file_facts(path), "spec": model.spec, "weight": 0.5 + number})
    manifest = {"format": 2, "project": "biomass", "models": entries, "views": ["identity"], "projection": None}
    write_json(manifest | {"train_mean_g": list(MEAN_G)}, folder / "weights" / "manifest.json")
    make_submission(folder / "data", folder / "weights", folder / "plain.csv", devices=["cpu"])
    return folder


def attempt(stage: Path, folder: Path, settings: object, data: Path | None = None, deadline: float = float("inf")):
    "Adapt in a folder with the plain submission; return whether it was replaced, and the file's bytes."
    manifest = read_json(stage / "weights" / "manifest.json") | {"adapt": settings}
    weights = folder / "weights"
    weights.mkdir(parents=True)
    for path in (stage / "weights").glob("*.safetensors"):
        os.link(path, weights / path.name)
    write_json(manifest, weights / "manifest.json")
    (folder / "submission.csv").write_bytes((stage / "plain.csv").read_bytes())
    adapted = adapt_submission(data or stage / "data", weights, folder / "submission.csv", deadline)
    return adapted is not None, (folder / "submission.csv").read_bytes()


def children() -> list[int]:
    "The processes that this one has started."
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(status.parent.name)] if parent == os.getpid() else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "signum", "method"),
    [
        *[(phase, signal.SIGKILL, "pseudo") for phase in ("starting", "features of", "the report", "2 students")],
        *[(phase, signal.SIGKILL, "finetune") for phase in ("2 students", "two_stream.safetensors, epoch 9")],
        ("features of", signal.SIGTERM, "pseudo"),
        ("features of", signal.SIGSEGV, "pseudo"),
    ],
)
def test_a_kill_in_each_phase(stage, tmp_path, monkeypatch, capsys, phase, signum, method):
    before, killed = set(children()), []

    def kill() -> None:
        while not (own := set(children()) - before):
            time.sleep(0.01)
        killed.append(own.pop())
        os.kill(killed[0], signum)

    def heard(*words, **options) -> None:
        if phase in " ".join(map(str, words)) and not killed:
            kill()
        print(*words, **options)

    monkeypatch.setattr(adapt, "print", heard, raising=False)
    if phase == "starting":
        popen = adapt.subprocess.Popen

        def started(*arguments, **options):
            child = popen(*arguments, **options)
            kill()
            return child

        monkeypatch.setattr(adapt.subprocess, "Popen", started)
    replaced, submission = attempt(stage, tmp_path / "here", {"method": method})
    assert (replaced, submission) == (False, (stage / "plain.csv").read_bytes())
    said = capsys.readouterr().out
    assert f"the plain submission stands: RuntimeError: its process ended with status -{int(signum)}" in said
    assert sorted(path.name for path in (tmp_path / "here").glob("*.csv")) == ["submission.csv"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, ""),
        ({"method": "magic"}, "ValueError: adapt: method 'magic' is unknown"),
        ({"share": "much"}, "ValueError: adapt: share = much must be a number"),
        ([1], "ValueError: adapt has '[1]', which is no object"),
        ({"minutes": 1e-9}, "TimeoutError: the prediction has used up the time"),
        ({"minutes": 0.02}, "TimeoutError: its 1 s were over"),
    ],
)
def test_settings_that_change_nothing(stage, tmp_path, capsys, settings, words):
    replaced, submission = attempt(stage, tmp_path / "here", settings)
    assert (replaced, submission) == (False, (stage / "plain.csv").read_bytes())
    said = capsys.readouterr().out
    assert words in said and said.count("stands: ") == bool(words)


def copy_of(data: Path, folder: Path) -> Path:
    "Hard links to a data set's files, of which a test may remove some."
    for path in (path for path in data.rglob("*") if path.is_file()):
        (folder / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, folder / path.relative_to(data))
    return folder


def without_train(data: Path) -> str:
    (data / "train.csv").unlink()
    return "train.csv is missing"


def unreadable(data: Path) -> str:
    for path in list((data / "train").iterdir())[:8]:
        path.unlink()
    return "only 4 of 12 training photographs and 6 test ones can be read"


@pytest.mark.parametrize("damage", [without_train, unreadable])
def test_training_photographs_that_are_not_there(stage, tmp_path, capsys, damage):
    data = copy_of(stage / "data", tmp_path / "data")
    words = damage(data)
    assert attempt(stage, tmp_path / "here", {"method": "align"}, data) == (False, (stage / "plain.csv").read_bytes())
    assert words in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["align", "finetune"])
def test_a_full_disk_while_it_writes(stage, tmp_path, monkeypatch, capsys, method):
    monkeypatch.setattr(adapt, "write_csv", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert attempt(stage, tmp_path / "here", {"method": method})[1] == (stage / "plain.csv").read_bytes()
    assert "OSError: [Errno 28] No space left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pseudo", "align", "finetune", "report"])
def test_all_goes_well(stage, tmp_path, capsys, method):
    "One training photograph is cut off in the middle."
    data = copy_of(stage / "data", tmp_path / "data")
    cut = sorted((data / "train").iterdir())[3]
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    replaced, submission = attempt(stage, tmp_path / "here", {"method": method, "share": 0.5}, data)
    plain, folder = (stage / "plain.csv").read_bytes(), tmp_path / "here"
    facts, nearest = read_json(folder / "adapt" / "shift.json"), pd.read_csv(folder / "adapt" / "shift.csv")
    assert 0 <= facts["auc"] <= 1 and len(nearest) == 6 and set(nearest["image_id"]) == set(read_test(data)["image_id"])
    states = pd.read_csv(folder / "adapt" / "state.csv")
    assert set(states["state"]) <= set(read_train(data)["State"]) and 0 <= facts["state"]["right"] <= 1
    assert states["probability"].between(0.25, 1).all() and states["image_id"].tolist() == nearest["image_id"].tolist()
    if method == "report":
        assert (replaced, submission) == (False, plain) and "stands" not in capsys.readouterr().out
        return
    assert replaced and submission != plain and (folder / "submission_plain.csv").read_bytes() == plain
    student = pd.read_csv(folder / "adapt" / "student.csv").set_index("image_id")[list(TARGETS)].stack()
    student.index = [f"{image_id}__{name}" for image_id, name in student.index]
    mixed, before = (
        pd.read_csv(folder / name).set_index("sample_id")["target"]
        for name in ("submission.csv", "submission_plain.csv")
    )
    np.testing.assert_allclose(mixed, 0.5 * before + 0.5 * student[mixed.index], atol=1e-3)
    again = attempt(stage, tmp_path / "again", {"method": method, "share": 0.5}, data)
    assert again == (True, submission)  # deterministic


@pytest.mark.slow
@pytest.mark.parametrize("looks", [0, 8, 9, 60, 92])
def test_a_clock_that_stops_finetuning(stage, tmp_path, looks):
    "Nine batches of features; then 8 x 9 + 4 x 6 a network. The clock jumps after so many looks."
    write_json(
        read_json(stage / "weights" / "manifest.json") | {"adapt": {"method": "finetune"}}, tmp_path / "manifest.json"
    )
    for path in (stage / "weights").glob("*.safetensors"):
        os.link(path, tmp_path / path.name)
    seen, stopped = iter(range(10**6)), "features of two_stream|features of dense|the students"
    with pytest.raises(TimeoutError, match=stopped):
        adapt._run_adaptation(
            stage / "data", tmp_path, stage / "plain.csv", tmp_path, 60, lambda: 61.0 * (next(seen) > looks)
        )
    assert not (tmp_path / "student.csv").exists() and (tmp_path / "shift.json").exists() == (looks > 8)


def test_finetuning_learns_from_both_sets(stage, monkeypatch):
    "Test photographs of another season and palette: errors fall, and what is said about them moves their predictions."
    monkeypatch.setattr(adapt, "_TUNE_RATE", 0.01)
    table, test = read_train(stage / "data"), read_test(stage / "data").drop_duplicates("image_id")
    train, shifted = ([stage / "data" / name for name in each["image_path"]] for each in (table, test))
    measured_N5 = torch.tensor(table[list(TARGETS)].to_numpy()).float()
    (entry,) = (each for each in read_json(stage / "weights/manifest.json")["models"] if "two" in each["file"])
    member = adapt.Member("two_stream", lambda: adapt.load_member(stage / "weights", entry), (64, "none"))

    def tuned(factor: float) -> np.ndarray:
        "Learn the measured masses, and for the shifted photographs a multiple of their mean."
        predicted_M5 = factor * measured_N5.mean(dim=0).expand(len(shifted), 5)
        paths, both_K5 = [*train, *shifted], torch.cat([measured_N5, predicted_M5])
        lessons = [
            adapt._Lesson(paths, both_K5, torch.ones(len(paths)), ("identity", "horizontal")),
            adapt._Lesson(train, measured_N5, torch.ones(len(train)), ("identity", "horizontal")),
        ]
        return adapt._tuned_masses(member, torch.device("cpu"), lessons, paths)

    before_N5 = adapt.predict_ensemble([member], train, ("identity", "horizontal")).mass_N5
    after_K5, more_K5 = tuned(1.0), tuned(3.0)
    errors = [np.abs(each - measured_N5.numpy())[:, -1].mean() for each in (before_N5, after_K5[: len(train)])]
    assert errors[1] < 0.9 * errors[0], errors
    assert (more_K5[len(train) :, -1] > after_K5[len(train) :, -1]).all()
    np.testing.assert_array_equal(after_K5, tuned(1.0))


@pytest.mark.slow
def test_the_report_sees_a_shift(tmp_path):
    "Colour statistics of rendered photographs, four shifts together and none."
    found = {}
    for name, shift in {"none": (), "all": SHIFTS}.items():
        render_dataset(tmp_path / name, n_train=48, n_test=24, seed=1, shift=shift)
        table, test = read_train(tmp_path / name), read_test(tmp_path / name).drop_duplicates("image_id")
        sets = [colour_statistics([tmp_path / name / path for path in each["image_path"]]) for each in (table, test)]
        visit_N = (table["Sampling_Date"].astype(str) + table["State"]).to_numpy(dtype=str)
        found[name] = shift_auc(sets[0], visit_N, sets[1]), shift_table(sets[0], visit_N, sets[1])["outside"].mean()
    print(found)
    assert found["none"][0] < 0.65 and found["all"][0] > 0.8 and found["all"][1] > found["none"][1]
