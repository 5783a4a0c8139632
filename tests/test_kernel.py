"""The kernel notebook, rehearsed: an empty folder, no biomass_lib, no network, both of Kaggle's mount layouts."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from kaggle_server import USER, kaggle_site
from patience import PATIENCE

from biomass_lib import kernel
from biomass_lib.client import NotDone, upload_weights
from biomass_lib.demo import render_dataset
from biomass_lib.device import cpu_has_bf16
from biomass_lib.files import file_facts
from biomass_lib.kaggle_rules import fill_user, repo_root
from biomass_lib.models import create_model, load_model, save_weights
from biomass_lib.predict import predict_masses
from biomass_lib.submit import find_inputs, load_ensemble, make_submission, read_manifest, walk_folders
from biomass_lib.targets import TARGETS
from biomass_lib.weights import assemble_weights, weights_main

ROOT = repo_root(Path(__file__).parent)
LAYOUTS = {
    "new": ("competitions/csiro-biomass", "datasets/somebody/csiro-biomass-weights"),
    "old": ("csiro-biomass", "csiro-biomass-weights"),
    "output": ("competitions/csiro-biomass", "notebooks/somebody/csiro-biomass-ensemble/weights"),
    "model": ("competitions/csiro-biomass", "models/somebody/biomass/pytorch/five-folds/3"),
    "old model": ("csiro-biomass", "biomass/pytorch/five-folds/3"),
}

# runs in the bare environment: first proves that it is bare, then executes the notebook over unix sockets
DRIVER = """
import importlib.util, socket, sys
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

assert importlib.util.find_spec("biomass_lib") is None, "biomass_lib is installed in this environment"
assert [name for _, name in socket.if_nameindex()] == ["lo"], "the network is not cut off"
notebook = nbformat.read(sys.argv[1], as_version=4)
config = Config({"KernelManager": {"transport": "ipc"}})
place = {"metadata": {"path": "."}}
client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place, config=config)
client.execute()
nbformat.write(notebook, sys.argv[2])
"""


def write_run(
    run_dir: Path,  # to be made
    n_folds: int = 2,  # models
    backbones: tuple[str, ...] = ("test_resnet",),  # taken in turn
    frozen: bool = False,  # all on the same backbone weights
    spread: float = 2.0,  # of the heads' random weights
) -> None:
    "A run folder as training leaves it, with random networks, small unless told otherwise."
    run_dir.mkdir(parents=True)
    ids = [f"ID{k}" for k in range(2 * n_folds)]
    folds = pd.DataFrame({"image_id": ids, "Sampling_Date": "2015-09-04", "fold": np.arange(len(ids)) % n_folds})
    folds.to_csv(run_dir / "folds.csv", index=False)
    (run_dir / "params.yaml").write_text("experiment: tiny\nimg_size: 96\n")
    first = None
    for fold in range(n_folds):
        torch.manual_seed(fold)
        clean = "both" if fold else "none"  # the kernel has to do to each model's photographs what training did
        name = ("two_stream", "dinov2_tiled", "dense")[fold % 3]  # an ensemble may mix them
        backbone = backbones[fold % len(backbones)]
        model = create_model(name, backbone=backbone, img_size=96, mean_g=(26.6, 12.0, 6.7, 33.3, 45.3), clean=clean)
        if frozen:
            first = first or model.backbone.state_dict()
            model.backbone.load_state_dict(first)
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight, std=spread)  # zero at the start: every answer would be the mean
        fold_dir = run_dir / f"fold{fold}"
        fold_dir.mkdir()
        meta = {"fold": fold, "epoch": 1, "score": 0.5, "train_mean_g": [26.6, 12.0, 6.7, 33.3, 45.3]}
        save_weights(model, fold_dir / "weights.safetensors", **meta)
        (fold_dir / "done.json").write_text(json.dumps({"fold": fold, "score": 0.5}))


def write_test_set(
    data_dir: Path,  # to be made, in the competition's format
    photographs: list[Path],  # that are used again and again
    n_photographs: int,  # in the test set
) -> None:
    "test.csv and sample_submission.csv in an order that is nobody's, and hard links for photographs."
    (data_dir / "test").mkdir(parents=True)
    rng = np.random.default_rng(n_photographs)
    rows = []
    for k, number in enumerate(rng.choice(10**9, n_photographs, replace=False)):
        image_id = f"ID{number + 10**9}"
        os.link(photographs[k % len(photographs)], data_dir / "test" / f"{image_id}.jpg")
        rows += [(f"{image_id}__{name}", f"test/{image_id}.jpg", name) for name in TARGETS]
    test = pd.DataFrame(rows, columns=["sample_id", "image_path", "target_name"]).iloc[rng.permutation(len(rows))]
    test.to_csv(data_dir / "test.csv", index=False)
    test[["sample_id"]].assign(target=0.0).to_csv(data_dir / "sample_submission.csv", index=False)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    "A folder with demo photographs, an assembled weights dataset and the kernel as built now."
    folder = tmp_path_factory.mktemp("stage")
    render_dataset(folder / "demo", n_train=8, n_test=2, seed=0, workers=1)
    write_run(folder / "runs" / "tiny")
    assemble_weights(folder / "runs" / "tiny", folder / "weights")
    (folder / "inference.ipynb").write_text(kernel.render_kernel(ROOT), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    "A Python that has our dependencies but not us: a path in a .pth file does not bring the editable install along."
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("unshare -rn is not permitted here, so the network cannot be cut off")
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "venv" / "bin" / "python"


def mount(
    root: Path,  # stands for /kaggle/input
    layout: str,  # new or old
    data_dir: Path,  # competition
    weights_dir: Path,  # dataset
) -> Path:  # root
    "Lay out inputs as Kaggle does, with a stranger's dataset among them."
    data_name, weights_name = LAYOUTS[layout]
    shutil.copytree(data_dir, root / data_name, copy_function=os.link)
    shutil.copytree(weights_dir, root / weights_name)
    stranger = (root / weights_name).parent / "another-dataset"
    stranger.mkdir()
    (stranger / "manifest.json").write_text('{"format": 1, "project": "another"}')
    return root


def rehearse(
    python: Path,  # of the bare environment
    notebook: Path,  # the kernel
    inputs: Path,  # BIOMASS_INPUT
    cwd: Path,  # made here, empty
) -> subprocess.CompletedProcess:
    "Execute the kernel in an empty folder without a network and with next to no environment."
    cwd.mkdir()
    home = Path(tempfile.mkdtemp())  # a short path: sockets have names of a hundred letters at most
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "BIOMASS_INPUT": str(inputs), "CUDA_VISIBLE_DEVICES": ""}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONNOUSERSITE": "1",
        "JUPYTER_RUNTIME_DIR": str(home / "r"),
        "LC_ALL": "C.UTF-8",
    }
    env |= {"PYTHONWARNINGS": "ignore"}
    command = ["unshare", "-rn", str(python), "-c", DRIVER, str(notebook), str(cwd.with_suffix(".ipynb"))]
    try:
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize(("layout", "n_photographs"), [("new", 2), ("old", 2), ("new", 1)])
def test_kernel_gives_the_librarys_submission(stage, bare_python, tmp_path, layout, n_photographs):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), n_photographs)
    inputs = mount(tmp_path / "input", layout, tmp_path / "data", stage / "weights")
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert {path.name for path in (tmp_path / "working").iterdir()} == {"biomass_lib", "submission.csv"}

    make_submission(*find_inputs(inputs), tmp_path / "library.csv", devices=["cpu"])
    ours, theirs = pd.read_csv(tmp_path / "library.csv"), pd.read_csv(tmp_path / "working" / "submission.csv")
    assert list(theirs["sample_id"]) == list(pd.read_csv(tmp_path / "data" / "test.csv")["sample_id"])
    assert list(theirs["sample_id"]) == list(ours["sample_id"])
    np.testing.assert_allclose(theirs["target"], ours["target"], rtol=0, atol=1e-4)
    assert theirs.loc[theirs["sample_id"].str.endswith("Dry_Total_g"), "target"].nunique() > min(1, n_photographs - 1)

    for name in ("__init__", *kernel.MODULES):  # what travelled is what is tested here
        written = tmp_path / "working" / "biomass_lib" / f"{name}.py"
        assert written.read_bytes() == (ROOT / "biomass_lib" / f"{name}.py").read_bytes()


@pytest.fixture(scope="module")
def received(stage, tmp_path_factory):
    "The notebook and the weights as they arrive when a person types the two kaggle commands."
    folder = tmp_path_factory.mktemp("received")
    copy_repository(folder / "repo")
    fill_user(folder / "repo", USER)
    kernel.build_kernel(folder / "repo")
    assemble_weights(stage / "runs" / "tiny", folder / "repo" / "kaggle" / "weights")
    with kaggle_site(folder / "site") as site:
        for command in ("datasets create -p kaggle/weights", "kernels push -p kaggle/inference"):
            ran = site.run(*command.split(), cwd=folder / "repo")
            assert ran.returncode == 0, ran.stdout + ran.stderr
        (folder / "weights").mkdir()
        for name, data in site.datasets[f"{USER}/csiro-biomass-weights"][-1]["files"].items():
            (folder / "weights" / name).write_bytes(data)
        source = json.loads(site.kernel_source(f"{USER}/csiro-biomass-inference"))
    (folder / "inference.ipynb").write_text(json.dumps(source), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hidden_test_set(request, stage, tmp_path_factory):
    "Many small photographs that all differ, in nobody's order, one of them cut off in the middle."
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "photographs").mkdir()
    pictures = [cv2.resize(cv2.imread(str(path)), (400, 200)) for path in sorted(stage.glob("demo/t*/*.jpg"))]
    rng = np.random.default_rng(0)
    for k in range(request.param):
        left, top = rng.integers(0, (100, 50))
        part = cv2.convertScaleAbs(pictures[k % len(pictures)], alpha=rng.uniform(0.7, 1.2))
        cv2.imwrite(str(folder / "photographs" / f"{k:04}.jpg"), part[top : top + 150, left : left + 300])
    write_test_set(folder / "data", sorted(folder.glob("photographs/*.jpg")), request.param)
    cut = sorted(folder.glob("data/test/*.jpg"))[77]
    half = cut.read_bytes()[: cut.stat().st_size // 2]
    cut.unlink()
    cut.write_bytes(half)
    return folder / "data", cut


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "hidden_test_set"), [("new", 840), ("old", 2000)], indirect=["hidden_test_set"])
def test_rehearsal_with_a_hidden_test_set(received, hidden_test_set, bare_python, tmp_path, layout):
    data_dir, cut = hidden_test_set
    inputs = mount(tmp_path / "input", layout, data_dir, received / "weights")
    ran = rehearse(bare_python, received / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = (tmp_path / "working.ipynb").read_text(encoding="utf-8")
    assert f"given the training mean: {cut.name}" in told
    assert ' "no picture: ' not in told and told.count('"image/png"') == 2

    theirs = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert theirs["sample_id"].tolist() == pd.read_csv(data_dir / "test.csv")["sample_id"].tolist()
    assert np.isfinite(theirs["target"]).all() and (theirs["target"] >= 0).all()
    make_submission(data_dir, received / "weights", tmp_path / "library.csv", devices=["cpu"])
    ours = pd.read_csv(tmp_path / "library.csv")
    pd.testing.assert_frame_equal(theirs, ours, check_exact=False, rtol=0, atol=1e-4)

    given = dict(zip(theirs["sample_id"], theirs["target"], strict=True))
    paths = sorted((data_dir / "test").glob("*.jpg"))
    answers = np.array([[given[f"{path.stem}__{name}"] for name in TARGETS] for path in paths])
    np.testing.assert_allclose(answers[paths.index(cut)], [26.6, 12.0, 6.7, 33.3, 45.3], atol=1e-4)
    asked = [k for k in range(0, len(paths), 40) if paths[k] != cut]  # each alone: nothing was mixed up in a batch
    networks, manifest = load_ensemble(received / "weights"), read_manifest(received / "weights")
    for k in asked:
        alone_N5 = predict_masses(networks, [paths[k]], views=tuple(manifest["views"]), device="cpu")
        np.testing.assert_allclose(answers[k], alone_N5[0], atol=2e-3)
    assert len({round(total, 3) for total in answers[asked, -1]}) > 0.9 * len(asked)  # two may agree by chance


@pytest.mark.slow
def test_a_broken_photograph_may_be_on_the_contact_sheet(stage, bare_python, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 50)
    photographs = sorted((tmp_path / "data" / "test").glob("*.jpg"))
    make_submission(tmp_path / "data", stage / "weights", tmp_path / "whole.csv", devices=["cpu"])
    whole = pd.read_csv(tmp_path / "whole.csv").set_index("sample_id")["target"]
    total = whole[whole.index.str.endswith("Dry_Total_g")]
    assert (total > 45.3).all() or (total < 45.3).all()  # so that the training mean is the first or the last of all
    whole_file = photographs[7].read_bytes()
    photographs[7].unlink()
    photographs[7].write_bytes(whole_file[: len(whole_file) // 2])
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", stage / "weights")
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = (tmp_path / "working.ipynb").read_text(encoding="utf-8")
    assert f"given the training mean: {photographs[7].name}" in told
    assert ' "no picture: ' not in told and told.count('"image/png"') == 2


@pytest.mark.skipif("BIOMASS_OLDER" not in os.environ, reason="make versions: 6 GB of downloads, more than CI takes")
def test_older_versions_give_the_same_submission(stage, tmp_path):
    python = Path(os.environ["BIOMASS_OLDER"]).absolute()
    write_run(tmp_path / "runs" / "mixed", 3, ("resnet18", "vit_small_patch14_dinov2", "convnext_atto"))
    assemble_weights(tmp_path / "runs" / "mixed", tmp_path / "weights")
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 10)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", tmp_path / "weights")
    ran = rehearse(python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = json.loads((tmp_path / "working.ipynb").read_text(encoding="utf-8"))["cells"]
    print(next(output["text"] for cell in told for output in cell.get("outputs", ()) if "torch " in str(output)))

    make_submission(*find_inputs(inputs), tmp_path / "library.csv", devices=["cpu"])
    ours, theirs = pd.read_csv(tmp_path / "library.csv"), pd.read_csv(tmp_path / "working" / "submission.csv")
    print(f"largest difference: {(ours['target'] - theirs['target']).abs().max():.2g} g")
    allowed_g = 0.02 if cpu_has_bf16() else 1e-3  # another torch rounds to bfloat16 at other places
    pd.testing.assert_frame_equal(theirs, ours, check_exact=False, rtol=0, atol=allowed_g)
    assert theirs["target"].nunique() > 30  # of 50: the networks do look at the photographs


def test_damaged_weights_stop_the_kernel(stage, bare_python, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 1)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", stage / "weights")
    data_dir, weights_dir = find_inputs(inputs)
    path = weights_dir / "tiny_fold1.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="tiny_fold1.safetensors has another sha256"):
        make_submission(data_dir, weights_dir, tmp_path / "submission.csv", devices=["cpu"])
    assert not (tmp_path / "submission.csv").exists()
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode != 0
    assert "tiny_fold1.safetensors has another sha256" in ran.stderr
    assert not (tmp_path / "working" / "submission.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_five_members_on_one_backbone(stage, bare_python, tmp_path, half, capsys):
    "The kernel joins what they share, predicts what the run folder's models do, and needs the shared file."
    run_dir, weights = tmp_path / "runs" / "frozen", tmp_path / "weights"
    write_run(run_dir, 5, frozen=True)
    weights_main([str(run_dir), "--out", str(weights), "--views", "identity", *["--half"] * half])
    said = re.search(r"all weights: ([\d.]+) MB before sharing, ([\d.]+) MB after", capsys.readouterr().out)
    shared = sorted(weights.glob("shared_*.safetensors"))
    whole = sum(path.stat().st_size for path in run_dir.glob("*/weights.safetensors")) / 1e6
    now = sum(path.stat().st_size for path in weights.glob("*.safetensors")) / 1e6
    assert abs(float(said[2]) - now) < 0.06 and abs(float(said[1]) - whole / (1.95 if half else 1)) < 0.2
    assert len(shared) >= 1 and now < 0.6 * whole
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 3)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", weights)
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    theirs = pd.read_csv(tmp_path / "working" / "submission.csv")
    given = dict(zip(theirs["sample_id"], theirs["target"], strict=True))
    paths = sorted((tmp_path / "data" / "test").glob("*.jpg"))
    models = [load_model(path) for path in sorted(run_dir.glob("*/weights.safetensors"))]
    expected_N5 = predict_masses(models, paths, views=("identity",), device="cpu")
    found_N5 = [[given[f"{path.stem}__{name}"] for name in TARGETS] for path in paths]
    np.testing.assert_allclose(found_N5, expected_N5, atol=1.0 if half else 1e-4)  # bfloat16 where there is any
    data_dir, weights_dir = find_inputs(inputs)
    common = weights_dir / shared[0].name
    for content, words in ((common.read_bytes()[:-1], "bytes, manifest.json says"), (None, "is not there")):
        common.unlink()
        if content:
            common.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{common.name}.*{words}"):
            make_submission(data_dir, weights_dir, tmp_path / "submission.csv", devices=["cpu"])
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "again")
    assert ran.returncode != 0 and f"{common.name} is named in manifest.json but is not there" in ran.stderr
    assert not (tmp_path / "again" / "submission.csv").exists() and not (tmp_path / "submission.csv").exists()


def test_two_data_folders_stop_with_the_tree(stage, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 1)
    inputs = mount(tmp_path / "input", "old", tmp_path / "data", stage / "weights")
    find_inputs(inputs)
    shutil.copytree(tmp_path / "data", inputs / "csiro-biomass-again")
    find_inputs(inputs)  # the same tables: one input that is mounted twice
    with (inputs / "csiro-biomass-again" / "sample_submission.csv").open("a") as file:
        file.write("another,0\n")
    with pytest.raises(ValueError, match="exactly one folder with test.csv") as caught:
        find_inputs(inputs)
    for name in (
        "csiro-biomass-again",
        "csiro-biomass-weights: README.md, manifest.json, tiny_fold0.safetensors",
        "another-dataset",
    ):
        assert name in str(caught.value)
    assert ".jpg" not in str(caught.value)


# runs as a user to whom permissions apply: root may list everything
SEARCHER = """
import os, sys
from biomass_lib.submit import find_inputs
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    os.listdir(sys.argv[1] + "/datasets/closed")
except PermissionError:
    pass
else:
    sys.exit("permissions do not apply here")
print(*find_inputs(sys.argv[1]))
"""


def put_everything_in_the_way(inputs: Path) -> None:
    "What may lie beside our inputs, at the same level as they and further down."
    beside = inputs / "datasets"
    for name in ("closed", "unreadable", "deep", "pipe", "gone", "large"):
        (beside / name).mkdir(parents=True)
    (beside / "unreadable" / "manifest.json").write_text("{}")
    (beside / "deep" / "manifest.json").write_text('{"a": ' * 100_000)
    os.mkfifo(beside / "pipe" / "manifest.json")
    os.mkfifo(beside / "pipe" / "test.csv")
    os.mkfifo(beside / "pipe" / "sample_submission.csv")
    with (beside / "large" / "manifest.json").open("wb") as file:
        file.truncate(11_000_000)
    (beside / "itself").symlink_to("itself")
    (beside / "above").symlink_to(inputs)
    (beside / "nowhere").symlink_to(beside / "is" / "not" / "there")
    os.mkdir(os.fsencode(beside) + b"/no utf-8 \xff")
    (beside / "unreadable" / "manifest.json").chmod(0)
    (beside / "closed").chmod(0)


def test_what_lies_beside_the_inputs_is_passed_over_and_named(stage):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        write_test_set(Path(folder) / "data", sorted(stage.glob("demo/t*/*.jpg")), 1)
        inputs = mount(Path(folder) / "input", "new", Path(folder) / "data", stage / "weights")
        put_everything_in_the_way(inputs)
        try:
            ran = subprocess.run(
                [sys.executable, "-c", SEARCHER, str(inputs)], capture_output=True, text=True, timeout=200, cwd=ROOT
            )
        finally:
            (inputs / "datasets" / "closed").chmod(0o755)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1].split() == [str(inputs / name) for name in LAYOUTS["new"]]
        told = "\n".join(line for line in ran.stdout.splitlines() if line.startswith("passed over "))
        for name, why in (
            ("closed", "Permission denied"),
            ("unreadable", "Permission denied"),
            ("deep", "is not JSON"),
            ("pipe", "no regular file"),
            ("large", "has 11000000 bytes, more than"),
            ("itself", "Too many levels of symbolic links"),
            ("nowhere", "No such file"),
        ):
            line = next(
                line for line in told.splitlines() if line.startswith(f"passed over {inputs}/datasets/{name}: ")
            )
            assert why in line


def test_a_folder_that_goes_while_it_is_looked_for(stage, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 1)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", stage / "weights")
    (inputs / "zoo" / "deeper").mkdir(parents=True)
    passed_over = {}
    for folder, _ in walk_folders(inputs, passed_over=passed_over):
        if folder == inputs / "competitions":
            shutil.rmtree(inputs / "zoo")  # between the listing of its parent and its own
    assert passed_over == {inputs / "zoo": "No such file or directory"}


def test_inputs_that_are_mounted_twice_are_one(stage, bare_python, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 1)
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", stage / "weights")
    shutil.copytree(tmp_path / "data", inputs / "csiro-biomass")
    shutil.copytree(stage / "weights", inputs / "csiro-biomass-weights")
    put_everything_in_the_way(inputs)
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = (tmp_path / "working.ipynb").read_text(encoding="utf-8")
    assert "holds the same manifest.json as" in told and "holds the same test.csv and sample_submission.csv as" in told
    assert (tmp_path / "working" / "submission.csv").is_file()


def test_a_damaged_sample_and_names_in_capitals_do_not_stop_the_kernel(stage, bare_python, tmp_path):
    write_test_set(tmp_path / "data", sorted(stage.glob("demo/t*/*.jpg")), 50)
    (tmp_path / "data" / "sample_submission.csv").write_bytes(b"id,target\nA,0\n")
    path = sorted((tmp_path / "data" / "test").glob("*.jpg"))[7]
    path.rename(path.with_suffix(".JPG"))
    inputs = mount(tmp_path / "input", "new", tmp_path / "data", stage / "weights")
    ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = (tmp_path / "working.ipynb").read_text(encoding="utf-8")
    assert "not compared with test.csv, which decides alone" in told
    assert f"{path.stem}.JPG is there: names differ in case only; rename or edit the table" in told
    assert len(pd.read_csv(tmp_path / "working" / "submission.csv")) == 250


def test_an_edited_manifest_removes_nothing(stage, tmp_path):
    weights = tmp_path / "weights"
    assemble_weights(stage / "runs" / "tiny", weights)
    metadata = weights / "dataset-metadata.json"
    shutil.copyfile(ROOT / "kaggle" / "weights" / "dataset-metadata.json", metadata)
    mine = weights / "mine.safetensors"
    mine.write_bytes(b"not of an assembly")
    old = json.loads((weights / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in ((metadata.name, file_facts(metadata)), (mine.name, {})):
        old["models"].append(old["models"][0] | {"file": name} | entry)
        (weights / "manifest.json").write_text(json.dumps(old), encoding="utf-8")
        assemble_weights(stage / "runs" / "tiny", weights)
        assert metadata.is_file() and mine.is_file()


def copy_repository(folder: Path) -> Path:
    "What the builder reads, copied, so that a test may break it."
    for name in (
        "settings.ini",
        "kaggle/inference/inference.py",
        "kaggle/inference/kernel-metadata.json",
        "kaggle/training/training.py",
        "kaggle/training/kernel-metadata.json",
        "kaggle/weights/dataset-metadata.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "biomass_lib", folder / "biomass_lib", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_two_builds_are_equal_and_small(tmp_path):
    copies = [copy_repository(tmp_path / name) for name in ("one", "two")]
    first, second = (kernel.build_kernel(copy).read_bytes() for copy in copies)
    assert first == second == kernel.build_kernel(copies[0]).read_bytes()
    assert len(first) < 900_000
    assert str(tmp_path).encode() not in first
    notebook = json.loads(first)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_tracked_kernel_is_fit_to_be_pushed(tmp_path, capsys):
    copy = copy_repository(tmp_path / "copy")
    for kind in ("inference", "training"):
        name = f"kaggle/{kind}/{kind}.ipynb"
        shutil.copyfile(ROOT / name, copy / name)
        assert kernel.check_kernel(copy, kind) == []
    fill_user(copy, "your-username")  # as it is tracked
    with contextlib.chdir(copy):
        with pytest.raises(SystemExit) as refused:
            kernel.kernel_main(["--check"])
        remedy = "names no owner yet: biomass_kernel --user NAME writes yours"
        assert str(refused.value).splitlines() == [f"{name}-metadata.json {remedy}" for name in ("kernel", "dataset")]
        kernel.kernel_main([])  # a build is not a push
        assert "before a push: kernel-metadata.json names no owner yet" in capsys.readouterr().out
        kernel.kernel_main(["--user", USER])
        kernel.kernel_main(["--check"])
        assert "before a push" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_sources": "your-username/csiro-biomass-weights"}, "dataset_sources must be a list"),
        ({"dataset_sources": ["your-username/csiro-biomass-weights", "x"]}, "dataset_sources must hold strings of the"),
        ({"dataset_sources": ["your-username/csiro-biomass-weights", 7]}, "dataset_sources must hold strings of the"),
        ({"kernel_sources": ["notebook"]}, "owner/slug"),
        ({"model_sources": ["google/gemma"]}, "owner/model/framework/variation/version"),
        ({"model_sources": ["google/gemma/transformers/2b/newest"]}, "owner/model/framework/variation/version"),
        ({"competition_sources": "csiro-biomass"}, "competition_sources must be"),
        ({"keywords": "pasture"}, "keywords must be a list"),
        ({"keywords": [1]}, "keywords must hold strings"),
        ({"enable_tpu": True}, "enable_tpu must be false"),
        ({"enable_tpu": "false"}, "enable_tpu must be false"),
        ({"enable_gpu": "true"}, "enable_gpu must be true"),
        ({"docker_image": 5}, "docker_image must be a string"),
        ({"title": 5}, "title must be a string"),
    ],
)
def test_kernel_metadata_that_kaggle_would_misread(tmp_path, change, words):
    copy = copy_repository(tmp_path / "copy")
    kernel.build_kernel(copy)
    fill_user(copy, "your-username")
    path = copy / "kaggle" / "inference" / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    assert words in "\n".join(kernel.check_kernel(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"licence": "apache-2.0"}, "key 'licence' is unknown to Kaggle"),
        ({"isPrivate": False}, "key 'isPrivate' is unknown to Kaggle"),
        ({"keywords": "pasture"}, "keywords must be a list"),
        ({"licenses": "apache-2.0"}, "licenses must name one of"),
    ],
)
def test_dataset_metadata_that_kaggle_would_misread(stage, tmp_path, change, words):
    copy = copy_repository(tmp_path / "copy")
    kernel.build_kernel(copy)
    path = copy / "kaggle" / "weights" / "dataset-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    assert words in "\n".join(kernel.check_kernel(copy))
    with pytest.raises(ValueError, match=words):
        assemble_weights(stage / "runs" / "tiny", copy / "kaggle" / "weights")


def test_check_reads_the_assembled_weights(stage, tmp_path):
    copy = copy_repository(tmp_path / "copy")
    fill_user(copy, USER)
    weights = copy / "kaggle" / "weights"
    with contextlib.chdir(copy):
        weights_main([str(stage / "runs" / "tiny")])
        kernel.kernel_main([])
        kernel.kernel_main(["--check"])
        (weights / "nested").mkdir()
        with pytest.raises(SystemExit, match="nested/ is a folder"):
            kernel.kernel_main(["--check"])
        (weights / "nested").rmdir()
        path = weights / "tiny_fold1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(SystemExit, match="tiny_fold1.safetensors has another sha256"):
            kernel.kernel_main(["--check"])
        kernel.kernel_main([])  # `make check` builds where the weights are not


def test_a_licence_that_the_dataset_cannot_carry(stage, tmp_path, capsys):
    "The weights come from DINOv3, the metadata says apache-2.0: refused before a push, until it says other."
    copy = copy_repository(tmp_path / "copy")
    fill_user(copy, USER)
    weights = copy / "kaggle" / "weights"
    with contextlib.chdir(copy):
        weights_main([str(stage / "runs" / "tiny")])
        kernel.kernel_main([])
        manifest = json.loads((weights / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["runs"]["tiny"]["licence"] == "apache-2.0"
        origin = {"backbone": "vit_large_patch16_dinov3", "licence": "dinov3-license"}
        manifest["runs"]["tiny"] |= origin
        (weights / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(SystemExit, match="apache-2.0, but the weights come from vit_large_patch16_dinov3"):
            kernel.kernel_main(["--check"])
        with pytest.raises(NotDone, match='"licenses": \\[{"name": "other"}\\].*nothing was sent'):
            upload_weights(weights)
        path = weights / "dataset-metadata.json"
        remedied = {"licenses": [{"name": "other"}], "description": "dinov3-license"}
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | remedied), encoding="utf-8")
        kernel.kernel_main(["--check"])


def test_no_dataset_metadata(stage, tmp_path, capsys):
    copy = copy_repository(tmp_path / "copy")
    (copy / "kaggle" / "weights" / "dataset-metadata.json").unlink()
    remedy = "copy kaggle/weights/dataset-metadata.json there, which git checkout brings back"
    with contextlib.chdir(copy):
        weights_main([str(stage / "runs" / "tiny")])
        assert remedy in capsys.readouterr().out
        with pytest.raises(SystemExit, match=remedy):
            kernel.kernel_main(["--check"])


def test_hand_edit_is_found(tmp_path, capsys):
    copy = copy_repository(tmp_path / "copy")
    kernel.build_kernel(copy, "training")
    built = kernel.build_kernel(copy)
    assert kernel.check_kernel(copy) == []
    text = built.read_text(encoding="utf-8")
    built.write_text(text.replace("HF_HUB_OFFLINE", "HF_HUB_ONLINE"), encoding="utf-8")
    with contextlib.chdir(copy):
        with pytest.raises(SystemExit, match="out of sync"):
            kernel.kernel_main(["--check"])
        kernel.kernel_main([])
    assert built.read_text(encoding="utf-8") == text


def test_a_template_without_a_place_for_modules(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    template = copy / "kaggle" / "inference" / "inference.py"
    template.write_text(template.read_text(encoding="utf-8").replace('tags=["modules"]', ""), encoding="utf-8")
    with pytest.raises(ValueError, match="exactly one cell with tags"):
        kernel.render_kernel(copy)


@pytest.mark.parametrize("name", ["biomass_lib/tables.py", "kaggle/inference/inference.py"])
@pytest.mark.parametrize("line", ["import yaml", "from yaml import safe_load"])
def test_an_import_in_a_function_is_refused(tmp_path, name, line):
    copy = copy_repository(tmp_path / "copy")
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef later():\n    if True:\n        {line}\n")
    with pytest.raises(ValueError, match=f"{name} imports yaml, which the kernel does not have"):
        kernel.render_kernel(copy)


PACKED = [("inference", name) for name in kernel.MODULES] + [("training", name) for name in kernel.TRAINING_MODULES]
IN_THE_IMAGE = {"albumentations", "yaml", "PIL", "tqdm", "sklearn", "scipy", "matplotlib"}


@pytest.mark.parametrize(("kind", "name"), PACKED)
def test_packed_modules_import_only_what_kaggle_has(kind, name):
    allowed = {"numpy", "pandas", "torch", "timm", "cv2", "safetensors"} | set(sys.stdlib_module_names)
    allowed |= {"backbones": {"peft"}, "ridge": {"scipy"}}.get(name, set())  # in a function that only training calls
    allowed |= IN_THE_IMAGE | {"wandb", "pandera"} if kind == "training" else set()  # the two on request only
    packed = kernel.TRAINING_MODULES if kind == "training" else kernel.MODULES
    tree = ast.parse((ROOT / "biomass_lib" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("biomass_lib.")):
            assert node.module.removeprefix("biomass_lib.") in packed  # nbdev leaves imports of several lines
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed


def test_contributing_names_what_travels():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert f"What travels into the kernel ({', '.join(kernel.MODULES)}) needs" in text


def test_weights_command(stage, tmp_path, capsys):
    weights_main([str(stage / "runs" / "tiny"), "--out", str(tmp_path / "weights")])
    assert "tiny_fold1.safetensors" in capsys.readouterr().out
    assert [entry["fold"] for entry in read_manifest(tmp_path / "weights")["models"]] == [0, 1]
    shutil.copytree(stage / "runs" / "tiny", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "fold1" / "done.json").unlink()
    with pytest.raises(SystemExit, match="fold1 of 2 folds not done"):
        weights_main([str(tmp_path / "unfinished"), "--out", str(tmp_path / "weights")])


def killed_at_work(folder: Path) -> threading.Thread:
    "Kill the adaptation's process when it has begun to work in a folder."

    def watch() -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    at_work = Path(os.readlink(process / "cwd")) == folder
                    if at_work and b"_run_adaptation" in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                        return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_adaptation_leaves_the_plain_submission(stage, bare_python, tmp_path):
    "Off, on, and on but killed: the plain submission is the same to the byte, with the network cut."
    submissions, told = {}, {}
    write_run(tmp_path / "runs" / "tiny", spread=0.3)  # near the mean, so that a student doesn't look absurd beside it
    for name, options in {"off": [], "on": ["--adapt", "pseudo"], "killed": ["--adapt", "align"]}.items():
        weights_main([str(tmp_path / "runs" / "tiny"), "--out", str(tmp_path / name / "weights"), *options])
        inputs = mount(tmp_path / name / "input", "new", stage / "demo", tmp_path / name / "weights")
        if name == "killed":
            killer = killed_at_work(tmp_path / name / "working")
        ran = rehearse(bare_python, stage / "inference.ipynb", inputs, tmp_path / name / "working")
        assert ran.returncode == 0, ran.stderr[-4000:]
        cells = json.loads((tmp_path / name / "working.ipynb").read_text(encoding="utf-8"))["cells"]
        told[name] = json.dumps([cell.get("outputs") for cell in cells])
        working = tmp_path / name / "working"
        submissions[name] = {path.name: path.read_bytes() for path in working.glob("*.csv")}
    killer.join()
    plain = submissions["off"]["submission.csv"]
    assert submissions["killed"] == submissions["off"] == {"submission.csv": plain}
    assert "adapt: the plain submission stands: RuntimeError: its process ended with status -9" in told["killed"]
    assert "adapt: " not in told["off"] and not (tmp_path / "off" / "working" / "adapt").exists()
    assert submissions["on"]["submission_plain.csv"] == plain != submissions["on"]["submission.csv"]
    assert told["on"].count('"image/png"') == told["off"].count('"image/png"') + 1  # the report's picture
    assert all("no picture: " not in text for text in told.values())
    mixed, before = (
        pd.read_csv(io.BytesIO(submissions["on"][name])) for name in ("submission.csv", "submission_plain.csv")
    )
    assert mixed["sample_id"].tolist() == before["sample_id"].tolist() and (mixed["target"] >= 0).all()
