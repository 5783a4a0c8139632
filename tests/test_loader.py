"Loading when shared memory is small, when a batch never comes, and when a worker is killed."

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from mounting import mounts
from patience import PATIENCE

from biomass_lib import loop, train
from biomass_lib.config import Config, config_to_yaml, smoke_config
from biomass_lib.dataset import HalvesDataset, make_loader
from biomass_lib.demo import render_dataset
from biomass_lib.tables import read_train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    render_dataset(folder / "demo", n_train=24, n_test=2, seed=0)
    return folder


class Stuck(HalvesDataset):
    "A photograph that takes for ever."

    def __getitem__(self, row: int) -> dict:
        time.sleep(PATIENCE)


class Victim(HalvesDataset):
    "A photograph for which the system finds no memory."

    def __getitem__(self, row: int) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "words"), [(Stuck, "a batch did not come in time"), (Victim, "a worker was killed")])
def test_a_lost_batch_is_an_error_that_says_what_to_do(home: Path, kind: type, words: str):
    loader = make_loader(kind(read_train(home / "demo"), home / "demo", 64), 4, False, workers=1, patience=1)
    with pytest.raises(RuntimeError, match=f"loading: {words}.*set workers to 0"):
        next(iter(loader))


def test_a_worker_killed_between_batches(home: Path, monkeypatch: pytest.MonkeyPatch):
    "Torch raises its error in the middle of whatever the training does then."
    config, _ = smoke_config(Config(runs_dir=str(home / "runs"), experiment="killed", cache_dir=""), home / "demo")
    config, train_step = dataclasses.replace(config, workers=1, bank=0), loop.train_step

    def killing_step(*given) -> torch.Tensor:
        for worker in multiprocessing.active_children():
            worker.kill()
        for _ in range(PATIENCE):
            time.sleep(1)  # ends as soon as the signal of the dead worker arrives
        return train_step(*given)

    monkeypatch.setattr(loop, "train_step", killing_step)
    with pytest.raises(RuntimeError, match="loading: a worker was killed.*set workers to 0"):
        train.train_fold(config)


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="no user namespaces here, so no small /dev/shm can be mounted")
def test_small_shared_memory_is_reported_and_changes_no_number(home: Path):
    "A /dev/shm of 4 MB for batches of 3.1 MB, as docker's 64 MB are for those of the defaults."
    config, _ = smoke_config(Config(cache_dir=""), home / "demo")
    config = dataclasses.replace(config, img_size=256, batch_size=8, workers=2)
    (home / "p.yaml").write_text(config_to_yaml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "biomass_lib.train", "p.yaml", "-p", "experiment"]
    mount = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$0" "$@"'
    outputs = {}
    for name, before in (("enough", []), ("little", ["unshare", "-rm", "bash", "-c", mount])):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": PATIENCE}
        done = subprocess.run([*before, *command, name], cwd=home, env=environment, **pipes)
        assert done.returncode == 0, done.stdout
        outputs[name] = done.stdout
    assert "/dev/shm has 2 MB for batches of 3 MB: the training process loads by itself" in outputs["little"]
    assert "/dev/shm" not in outputs["enough"]
    curves = [pd.read_csv(home / f"runs/{name}/fold0/metrics.csv") for name in outputs]
    assert curves[0].equals(curves[1])
