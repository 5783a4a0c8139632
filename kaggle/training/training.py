# %% [markdown]
# # Pasture biomass from a photograph: training
#
# This notebook trains the networks that the notebook *CSIRO Biomass Inference* predicts with, on Kaggle's GPUs. Its
# output is a run folder: weights, out-of-fold predictions and metrics of each fold.
#
# **How to run it.** From a clone of the repository, `biomass_kaggle train PARAMS --folds 0 1` fills in the parameters,
# pushes this notebook, waits, and fetches the run folder. By hand: attach the competition `csiro-biomass`, choose two
# T4 GPUs, edit the cell below, and run all cells with *Save version*. The internet must be on if timm is to download a
# backbone's weights; or attach a dataset or model that holds them, name the file in `backbone_weights`, and leave it
# off.
#
# **If the hours do not suffice**, the notebook stops itself in time. Attach its output to the next version
# (`biomass_kaggle train` does so) and run it again: what is done is kept, the rest goes on from its last checkpoint.

# %%
import time

START = time.monotonic()

# %% [markdown]
# ## Parameters
#
# `PARAMETERS` are lines of `name: value`, as in the files of `notebooks/params`; what is not there has its default. A
# fold is a number, or `"all"` for a refit on every photograph. `HOURS` are those of this session, of the nine that
# Kaggle gives.

# %% tags=["parameters"]
PARAMETERS = """
experiment: two_stream
"""
FOLDS = [0, 1, 2, 3, 4]
SEEDS = [0]
HOURS = 8.5

# %% [markdown]
# ## The library
#
# The next cells write the modules of `biomass_lib` into a folder beside this notebook, as text that you can read.
# `config` holds the parameters, `train` and `loop` the training, `session` what is peculiar to Kaggle.

# %%
import os
import platform
import sys
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
sys.path.insert(0, os.getcwd())
Path("biomass_lib").mkdir(exist_ok=True)

# %% tags=["modules"]
# The builder puts the modules here; run from the repository, this template uses the installed library instead.

# %%
import albumentations
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timm
import torch

from biomass_lib.session import restore_run, session_config, train_cells

versions = {"python": platform.python_version()}
for module in (torch, timm, albumentations, np, pd, cv2):
    versions[module.__name__] = module.__version__
print("  ".join(f"{name} {version}" for name, version in versions.items()))
for number in range(torch.cuda.device_count()):
    print(f"GPU {number}: {torch.cuda.get_device_name(number)}")

# %% [markdown]
# ## The inputs
#
# The photographs, weights of a backbone and an earlier output of this notebook are found by what is in the folders.

# %%
inputs = os.environ.get("BIOMASS_INPUT", "/kaggle/input")
Path("parameters.yaml").write_text(PARAMETERS, encoding="utf-8")
config = session_config("parameters.yaml", inputs)
earlier = restore_run(config, inputs)
print(f"photographs {config.data_dir}")
print(f"going on with {earlier}" if earlier else "beginning anew")

# %% [markdown]
# ## Training
#
# One process a GPU. What each of them says is in `train.log` in the folder of its fold.

# %%
cells = train_cells(config, FOLDS, SEEDS, until=START + HOURS * 3600)
if config.backbone_weights:
    Path(config.backbone_weights).unlink(missing_ok=True)  # a link; what it leads to need not become output
with pd.option_context("display.max_colwidth", None):
    print(cells.to_string(index=False))

# %% [markdown]
# A notebook that fails leaves no output, so it fails only where there is none.

# %%
if "failed" in set(cells["state"]) and not {"done", "stopped"} & set(cells["state"]):
    raise RuntimeError(f"nothing was trained: {cells['details'][cells['state'] == 'failed'].iloc[0]}")

# %% [markdown]
# ## How it went
#
# The held-out score after each epoch. Every fold holds other visits out, so the curves need not agree.

# %%
histories = {path.parent.name: path for path in sorted(Path(config.experiment).glob("*/metrics.csv"))}
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for name, path in histories.items():
    history = pd.read_csv(path)
    ax.plot(history["epoch"], history["val/score"], marker=".", label=name)
ax.set_xlabel("epoch")
ax.set_ylabel("held-out score")
ax.set_ylim(bottom=-0.2)
if histories:
    ax.legend(frameon=False, fontsize=8)
plt.show()
