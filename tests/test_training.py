"""Training on Kaggle from end to end: pushed by `biomass_kaggle train` to the loopback server, run as received without
a network and with local weights, cut off after one fold, pushed again, fetched, judged, turned into a submission."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from kaggle_server import USER, KaggleSite, kaggle_site
from patience import wait_until
from safetensors.torch import save_file
from test_kernel import bare_python, copy_repository, mount, rehearse  # noqa: F401 (a fixture)

from biomass_lib import client, kernel
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.files import read_json
from biomass_lib.kaggle_rules import fill_user
from biomass_lib.models import create_model
from biomass_lib.runs import make_report
from biomass_lib.submit import find_inputs
from biomass_lib.weights import weights_main

TRAINING = f"{USER}/csiro-biomass-training-tiny"
EPOCHS = 40  # of stage 2, so that the second fold is under way for a while


class Sessions:
    "Run what is pushed as Kaggle does, in a folder of its own, and make its files the kernel's output."

    def __init__(self, site: KaggleSite, folder: Path, python: Path):
        self.site, self.folder, self.python, self.cut = site, folder, python, False
        self.run_kaggle = client.run_kaggle

    def __call__(self, *args: str, **options) -> client.Reply:
        reply = self.run_kaggle(*args, **options)
        if args[:2] == ("kernels", "push") and "successfully pushed" in reply.text:
            self.execute(len(self.site.kernels[TRAINING]))
        return reply

    def execute(self, version: int) -> None:
        inputs, working = self.folder / f"input{version}", self.folder / f"working{version}"
        shutil.copytree(self.folder / "demo", inputs / "competitions" / "csiro-biomass")
        shutil.copytree(self.folder / "backbone", inputs / "datasets" / USER / "backbone")
        if TRAINING in self.site.kernels[TRAINING][-1].get("kernelDataSources", []):
            for name, data in self.site.outputs.items():
                path = inputs / "notebooks" / TRAINING / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        notebook = self.folder / f"received{version}.ipynb"
        notebook.write_text(self.site.kernel_source(TRAINING), encoding="utf-8")
        if self.cut:
            threading.Thread(target=self.interrupt, args=(working,), daemon=True).start()
        ran = rehearse(self.python, notebook, inputs, working)
        assert ran.returncode == 0, ran.stderr[-4000:]
        files = [path for path in working.rglob("*") if path.is_file() and not path.is_symlink()]
        self.site.outputs = {path.relative_to(working).as_posix(): path.read_bytes() for path in files}
        self.site.kernel_states = ("COMPLETE",)
        shutil.rmtree(inputs)  # at home there is no such folder

    def interrupt(self, working: Path) -> None:
        "Press the button as soon as the second fold has a checkpoint."
        wait_until((working / "tiny/fold1/last.ckpt").is_file, "a checkpoint of fold 1")
        for process in Path("/proc").glob("[0-9]*"):
            try:
                here = Path(os.readlink(process / "cwd")) == working
                if here and b"ipykernel_launcher" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGINT)
            except OSError:  # it has ended, or is not ours
                continue


@pytest.fixture
def sessions(tmp_path, bare_python, monkeypatch):  # noqa: F811
    "A checkout with a parameter file, photographs, weights of a backbone, and a Kaggle that runs what it gets."
    render_dataset(tmp_path / "demo", n_train=12, n_test=2, seed=0, workers=1)
    torch.manual_seed(0)
    network = create_model("two_stream", backbone="test_resnet", img_size=64)
    (tmp_path / "backbone").mkdir()
    save_file(network.backbone.state_dict(), tmp_path / "backbone" / "tiny.safetensors")
    repo = copy_repository(tmp_path / "repo")
    fill_user(repo, USER)
    for kind in ("inference", "training"):
        kernel.build_kernel(repo, kind)
    small = smoke_config(Config(experiment="tiny", stage2_epochs=EPOCHS), "data")[0].to_dict()
    small |= {"backbone_weights": "/home/me/weights/tiny.safetensors", "pretrained": True}
    changed = {name: value for name, value in small.items() if value != Config().to_dict()[name]}
    (repo / "tiny.yaml").write_text(yaml.safe_dump(changed))
    monkeypatch.chdir(repo)
    with kaggle_site(tmp_path / "site") as site:
        for name in list(os.environ):
            if name.startswith("KAGGLE") or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name in ("KAGGLE_API_ENVIRONMENT", "KAGGLE_USERNAME", "KAGGLE_KEY", "http_proxy", "HTTP_PROXY", "HOME"):
            monkeypatch.setenv(name, site.environment[name])
        monkeypatch.setenv("no_proxy", "")
        sessions = Sessions(site, tmp_path, bare_python)
        monkeypatch.setattr(client, "run_kaggle", sessions)
        yield sessions


@pytest.mark.slow
def test_two_sessions_and_a_submission(sessions, tmp_path, capsys):
    command = ["train", "tiny.yaml", "--folds", "0", "1", "--every", "0.05"]
    sessions.cut = True
    with pytest.raises(SystemExit) as left:
        client.client_main(command)
    said = str(left.value)
    assert "fold 1 stopped after epoch" in said and f"of {EPOCHS + 1}, to go on from its checkpoint" in said
    assert f"Left on Kaggle: the output of {TRAINING}, fetched to runs/tiny. To do: the same command again" in said
    run_dir = Path("runs/tiny")
    first = read_json(run_dir / "fold0" / "done.json")
    assert (run_dir / "fold1" / "last.ckpt").is_file() and not (run_dir / "fold1" / "lease.json").exists()
    assert not sessions.site.kernels[TRAINING][0].get("kernelDataSources")

    sessions.cut = False
    client.client_main(command)
    assert "runs/tiny: 2 trainings, all done, as their done.json say" in capsys.readouterr().out
    assert sessions.site.kernels[TRAINING][1]["kernelDataSources"] == [TRAINING]
    assert read_json(run_dir / "fold0" / "done.json") == first  # not trained again
    assert "going on from last.ckpt at epoch" in (run_dir / "fold1" / "train.log").read_text()
    assert pd.read_csv(run_dir / "fold1" / "metrics.csv")["epoch"].tolist() == list(range(1, EPOCHS + 2))
    assert not list(run_dir.rglob("tiny.safetensors"))  # what the link led to stays an input

    make_report(run_dir, data_dir=tmp_path / "demo")
    assert (run_dir / "report.html").stat().st_size > 10_000
    weights_main([str(run_dir), "--out", str(tmp_path / "weights")])
    inputs = mount(tmp_path / "input", "output", tmp_path / "demo", tmp_path / "weights")
    notebook = Path("kaggle/inference/inference.ipynb").absolute()
    ran = rehearse(sessions.python, notebook, inputs, tmp_path / "working")
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert len(pd.read_csv(tmp_path / "working" / "submission.csv")) == 10


@pytest.mark.parametrize("layout", ["output", "model", "old model"])
def test_weights_are_found_wherever_they_are_mounted(tmp_path, layout):
    "The output of a kernel and Kaggle Models, whose folders are the deepest of all."
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "manifest.json").write_text(json.dumps({"project": "biomass", "format": 2}))
    (tmp_path / "data").mkdir()
    for name in ("test.csv", "sample_submission.csv"):
        (tmp_path / "data" / name).write_text("sample_id\n")
    inputs = mount(tmp_path / "input", layout, tmp_path / "data", tmp_path / "weights")
    data_dir, weights_dir = find_inputs(inputs)
    assert data_dir.name == "csiro-biomass" and (weights_dir / "manifest.json").is_file()
