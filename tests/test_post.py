"Post-processing in the kernel, run as Kaggle runs it: switches of the manifest, and the plain submission beside it."

import json

import numpy as np
import pandas as pd
import pytest
from test_kernel import bare_python, mount, rehearse, stage, write_test_set  # noqa: F401 (fixtures)

from biomass_lib.post import post_masses
from biomass_lib.submit import find_inputs, make_submission
from biomass_lib.targets import TARGETS
from biomass_lib.weights import weights_main

SWITCHES = ("clover", "dead", "half")


def masses(path) -> np.ndarray:  # mass_N5, photographs in the order of their ids
    table = pd.read_csv(path)
    parts = table["sample_id"].str.rpartition("__")
    table = table.assign(image=parts[0], mass=parts[2]).pivot(index="image", columns="mass", values="target")
    return table[list(TARGETS)].to_numpy()


@pytest.mark.slow
def test_switches_of_the_manifest(stage, bare_python, tmp_path):  # noqa: F811
    weights_main([str(stage / "runs" / "tiny"), "--out", str(tmp_path / "weights"), "--post", *SWITCHES])
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 6)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", tmp_path / "weights")
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    make_submission(*find_inputs(inputs), tmp_path / "library.csv", devices=["cpu"])
    plain_N5, now_N5 = (
        masses(tmp_path / "working" / f"{name}.csv") for name in ("submission_unprocessed", "submission")
    )
    np.testing.assert_allclose(plain_N5, masses(tmp_path / "library.csv"), rtol=0, atol=1e-4)
    np.testing.assert_allclose(now_N5, post_masses(plain_N5, SWITCHES), rtol=0, atol=1e-9)
    assert np.abs(now_N5 - plain_N5).max() > 0.1
    order = pd.read_csv(tmp_path / "data" / "test.csv")["sample_id"].tolist()
    assert pd.read_csv(tmp_path / "working" / "submission.csv")["sample_id"].tolist() == order

    path = next((tmp_path / "input").rglob("csiro-biomass-weights/manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post": ["clover", "of another version"]}))
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "again")
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert (
        "without post-processing: ValueError: post 'of another version' must be"
        in (tmp_path / "again.ipynb").read_text()
    )
    before = (tmp_path / "working" / "submission_unprocessed.csv").read_bytes()
    assert (tmp_path / "again" / "submission.csv").read_bytes() == before
    assert not (tmp_path / "again" / "submission_unprocessed.csv").exists()


@pytest.mark.slow
def test_states_in_the_kernel(stage, bare_python, tmp_path):  # noqa: F811
    "The adaptation stage predicts States, and where Western Australia is sure, no dead matter is left."
    options = ["--adapt", "report", "--adapt-sure", "0.25", "--post", "state"]  # a State has at least that of four
    weights_main([str(stage / "runs" / "tiny"), "--out", str(tmp_path / "weights"), *options])
    data = tmp_path / "data"
    write_test_set(data, sorted(stage.glob("demo/train/*.jpg")), 8)  # training photographs, so that States are plain
    (data / "train.csv").write_bytes((stage / "demo" / "train.csv").read_bytes())
    (data / "train").symlink_to(stage / "demo" / "train")
    inputs = mount(tmp_path / "input", "new", data, tmp_path / "weights")
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    states = pd.read_csv(tmp_path / "working" / "adapt" / "state.csv").sort_values("image_id")
    west_N = (states["state"] == "WA").to_numpy()
    assert states["sure"].all() and 0 < west_N.sum() < len(west_N)
    plain_N5, now_N5 = (
        masses(tmp_path / "working" / f"{name}.csv") for name in ("submission_unprocessed", "submission")
    )
    np.testing.assert_allclose(now_N5[~west_N], plain_N5[~west_N], rtol=0, atol=1e-9)
    assert (now_N5[west_N, 1] == 0).all() and (plain_N5[west_N, 1] > 0).all()
    np.testing.assert_allclose(now_N5[west_N, 4], plain_N5[west_N, 3], rtol=0, atol=1e-9)
