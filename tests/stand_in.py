"A stand-in for a training: what a finished cell leaves behind, without torch; for tests of who trains what, and when."

import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd

from biomass_lib.claims import Cell, cell_folder, claim
from biomass_lib.config import CELL_PARAMETERS, MACHINE_PARAMETERS, Config, config_to_yaml
from biomass_lib.files import write_csv, write_file, write_json
from biomass_lib.targets import TARGETS

# the cell that papermill runs: parameters of the file and of the sweep are globals by then
SOURCE = """
import sys
sys.path.insert(0, {tests!r})
from stand_in import train_cell
from biomass_lib.config import Config
train_cell(Config.from_dict({{name: globals()[name] for name in Config().to_dict() if name in globals()}}), {pause})
"""


def write_notebook(path: Path, pause: float = 0.0) -> None:
    "Write a training notebook that pauses in place of training."
    sources = {
        "parameters": "fold = 0\nseed = 0",
        "training": SOURCE.format(tests=str(Path(__file__).parent), pause=pause),
    }
    cell = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [cell | {"id": tag, "metadata": {"tags": [tag]}, "source": text} for tag, text in sources.items()]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def oof_of(config: Config) -> pd.DataFrame:
    "Make up predictions, best at dropout 0.3."
    table = pd.DataFrame({"image_id": [f"ID{config.fold}{n}" for n in range(6)], "fold": config.fold, "State": "Tas"})
    table["Sampling_Date"] = [f"2015-0{1 + number // 2}-01" for number in range(6)]
    for name in TARGETS:
        table[name] = np.arange(6.0) * 10
        error_g = (5 + 20 * abs(config.dropout - 0.3)) * (1 - 2 * (table.index % 2)) + config.seed
        table[f"{name}_pred"] = table[name] + error_g
    return table


def train_cell(config: Config, pause: float = 0.0) -> Path:
    "Leave behind what a training does, and note in the file `begun` that it began; again: although it was done."
    run_dir = Path(config.runs_dir) / config.experiment
    folder = cell_folder(run_dir, Cell.of(config))
    lease = claim(folder)
    with open(os.environ.get("BEGUN", "begun"), "a") as begun:
        words = (config.experiment, config.fold, config.seed, "again" if (folder / "done.json").exists() else "fresh")
        begun.write(" ".join(map(str, words)) + "\n")
    if Path("broken").is_file() and f"{config.dropout} {config.fold}" in Path("broken").read_text():
        raise ValueError("photograph 7 is damaged")
    own = tuple({*MACHINE_PARAMETERS, *CELL_PARAMETERS} - {"data_dir", "runs_dir"})
    write_file(run_dir / "params.yaml", config_to_yaml(config, without=own))
    planned = [(f"ID{fold}{number}", fold) for fold in range(config.n_folds) for number in range(6)]
    write_csv(pd.DataFrame(planned, columns=["image_id", "fold"]), run_dir / "folds.csv")
    time.sleep(pause)
    write_csv(oof_of(config), folder / "oof.csv")
    done = {"fold": config.fold, "seed": config.seed, "kept": "last", "score": 0.5, "epoch": 3, "seconds": 2.0}
    lease.check()
    write_json(done, folder / "done.json")
    lease.release()
    return folder
