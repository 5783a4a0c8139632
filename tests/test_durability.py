"A power cut at any moment of a training, and of assembling weights, leaves nothing that only looks whole."

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biomass_lib.models import create_model, save_weights

ROOT = Path(__file__).parent.parent

# A model of a disk without a battery. It keeps the content that a file had at its last fsync, and the names that a
# folder had at its last fsync. Of what came later a disk may have written names before contents, or neither: we look
# at both extremes after every single operation.
RECORDER = r"""
import os, sys
from pathlib import Path

content, names, events = {}, {}, []
held = []  # open files: their inode numbers are not used again
real = {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink")}

def fsync(fd):
    path = Path(os.readlink(f"/proc/self/fd/{fd}"))
    if path.is_dir():
        if os.environ.get("NO_FOLDER_SYNC"):
            raise OSError(22, "Invalid argument")
        names[path] = {entry.name: entry.inode() for entry in os.scandir(path) if entry.is_file()}
    else:
        held.append(os.dup(fd))
        content[os.fstat(fd).st_ino] = path.read_bytes()
    real["fsync"](fd)
    look("fsync", path)

def operation(name):
    def call(*paths, **options):
        real[name](*paths, **options)
        look(name, *paths)
    return call

def look(what, *paths):
    if FOLDER.parent not in [Path(os.path.abspath(paths[-1])), *Path(os.path.abspath(paths[-1])).parents]:
        return
    events.append((what, *(Path(os.fspath(path)).name for path in paths)))
    if not FOLDER.is_dir():
        return
    live = {entry.name: entry.inode() for entry in os.scandir(FOLDER) if entry.is_file()}
    for view in (names.get(FOLDER, {}), live):
        check({name: content.get(inode, b"") for name, inode in view.items() if not name.startswith(".")}, events)

FOLDER = Path(sys.argv[1]).resolve()
os.fsync = fsync
for name in ("replace", "link", "unlink"):
    setattr(os, name, operation(name))
"""

TRAINING = r"""
import hashlib, json, tempfile
from biomass_lib.checkpoint import load_checkpoint

def check(view, events):
    if "done.json" in view:
        for name, facts in json.loads(view["done.json"])["files"].items():
            assert hashlib.sha256(view[name]).hexdigest() == facts["sha256"], (name, events[-12:])
    elif "last.ckpt" in view:
        with tempfile.NamedTemporaryFile() as file:
            file.write(view["last.ckpt"])
            file.flush()
            progress = load_checkpoint(file.name)["progress"]
        for suffix, digest in progress["best_sha256"].items():
            names = (f"best{progress['best_epoch']}{suffix}", f"weights{suffix}")
            hashes = [hashlib.sha256(view[name]).hexdigest() for name in names if name in view]
            assert digest in hashes, (suffix, events[-12:])
    for name, data in view.items():
        assert data, (f"{name} is there, its content is not", events[-12:])

from biomass_lib import train
train.train_main(sys.argv[2:])
print(json.dumps(events))
"""


def recorded(tmp_path: Path, program: str, *arguments: str, **environment: str) -> list[list[str]]:
    "Run a program under the recorder; what it did to the disk, in order."
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", RECORDER + program, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from biomass_lib.config import Config, config_to_yaml, smoke_config
    from biomass_lib.demo import render_dataset

    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=0)
    config, _ = smoke_config(Config(checkpoint_steps=1, experiment="cut"), "demo")
    (home / "p.yaml").write_text(config_to_yaml(config))
    return home


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_power_cut_at_any_moment_of_a_training(home: Path):
    folder = home / "runs/cut/fold0"
    events = recorded(home, TRAINING, str(folder), "p.yaml")
    places = {
        name: [i for i, event in enumerate(events) if event[0] == "replace" and event[-1] == name]
        for name in (
            "oof.csv",
            "oof_best.csv",
            "metrics.csv",
            "weights.safetensors",
            "weights.json",
            "last.ckpt",
            "done.json",
        )
    }
    assert len(places["metrics.csv"]) == 3 and len(places["last.ckpt"]) >= 3 and len(places["done.json"]) == 1
    end = places["done.json"][0]
    assert all(max(found) < end for name, found in places.items() if name != "done.json")
    assert events[end - 1][0] == "fsync" and "done.json" in events[end - 1][1]  # content, name, folder
    assert events[end + 1] == ["fsync", "fold0"]
    assert events.index(["unlink", "last.ckpt"]) > end + 1
    for name in ("params.yaml", "folds.csv", "data.json"):
        linked = [i for i, event in enumerate(events) if event[0] == "link" and event[-1] == name]
        assert len(linked) == 1 and events[linked[0] - 1][0] == "fsync" and events[linked[0] + 1] == ["fsync", "cut"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_the_model_of_the_disk_notices_a_missing_fsync(home: Path):
    "The check can fail: without bringing contents to the disk it does."
    careless = TRAINING.replace(
        "from biomass_lib import train",
        "from biomass_lib import train, files\nreal['fsync'] = lambda fd: None\nos.fsync = lambda fd: None",
    )
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        RECORDER + careless,
        str(home / "runs/careless/fold0"),
        "p.yaml",
        "-p",
        "experiment",
        "careless",
    ]
    done = subprocess.run(command, cwd=home, env=given, capture_output=True, text=True)
    assert done.returncode != 0 and "is there, its content is not" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_a_share_without_fsync_of_folders_is_no_error(home: Path):
    recorded(
        home,
        TRAINING.replace("def check(view, events):", "def check(view, events):\n    return\n"),
        str(home / "runs/share/fold0"),
        "p.yaml",
        "-p",
        "experiment",
        "share",
        NO_FOLDER_SYNC="1",
    )
    assert (home / "runs/share/fold0/done.json").is_file()


WEIGHTS = r"""
import hashlib, json

def check(view, events):
    if "manifest.json" in view:
        manifest = json.loads(view["manifest.json"])
        for entry in [*manifest["models"], *manifest.get("shared", [])]:
            assert hashlib.sha256(view[entry["file"]]).hexdigest() == entry["sha256"], (entry["file"], events[-12:])
    for name, data in view.items():
        assert data, (f"{name} is there, its content is not", events[-12:])

from biomass_lib.weights import assemble_weights
assemble_weights(sys.argv[2], sys.argv[1])
print(json.dumps(events))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_power_cut_at_any_moment_of_assembling_weights(home: Path):
    for fold in ("0", "1"):
        recorded(
            home, TRAINING, str(home / f"runs/two/fold{fold}"), "p.yaml", "-p", "experiment", "two", "-p", "fold", fold
        )
    events = recorded(home, WEIGHTS, str(home / "weights"), "runs/two")
    names = [event[-1] for event in events if event[0] == "replace"]
    assert names == ["two_fold0.safetensors", "two_fold1.safetensors", "README.md", "manifest.json"]
    manifest = json.loads((home / "weights/manifest.json").read_text())
    assert manifest["format"] == 2 and "shared" not in manifest  # there was nothing to share
    for entry in manifest["models"]:
        assert hashlib.sha256((home / "weights" / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_power_cut_at_any_moment_of_assembling_shared_weights(home: Path):
    run_dir = home / "runs/one_backbone"
    run_dir.mkdir()
    (run_dir / "folds.csv").write_text("image_id,Sampling_Date,fold\na,2015-09-04,0\nb,2015-09-05,1\n")
    (run_dir / "params.yaml").write_text("experiment: one_backbone\nimg_size: 64\n")
    model = create_model("two_stream", backbone="test_resnet", img_size=64)
    for fold in (0, 1):
        torch.nn.init.normal_(model.heads.layers[0][-1].weight)
        save_weights(model, run_dir / f"fold{fold}/weights.safetensors", fold=fold, train_mean_g=[26, 12, 7, 33, 45])
        (run_dir / f"fold{fold}/done.json").write_text("{}")
    events = recorded(home, WEIGHTS, str(home / "shared_weights"), "runs/one_backbone")
    names = [event[-1] for event in events if event[0] == "replace"]
    manifest = json.loads((home / "shared_weights/manifest.json").read_text())
    own = ["one_backbone_fold0.safetensors", "one_backbone_fold1.safetensors"]
    assert names == [manifest["shared"][0]["file"], *own, "README.md", "manifest.json"]
