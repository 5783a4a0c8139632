# %% [markdown]
# # Pasture biomass from a photograph: inference
#
# Each photograph shows a 70 x 30 cm quadrat of pasture from above. From it we predict five dry masses in grams: green
# grass, dead matter, clover, GDM (green dry matter: grass and clover) and the total. This notebook turns trained
# weights into `submission.csv`, without a network.
#
# **How to run it.** Attach two inputs, the competition `csiro-biomass` and a dataset with the weights (a flat folder
# of `*.safetensors` with a `manifest.json`), choose a T4 GPU, turn the internet off, and run all cells. On another
# computer, set the environment variable `BIOMASS_INPUT` to the folder that holds both. Nothing else is needed: the
# library travels inside this notebook.
#
# **The method.**
#
# 1. The photograph, twice as wide as high, is cut into a left and a right half, and each is made smaller to a square.
# 2. One image network looks at both halves. What it makes of them goes to small heads: in the reference model,
#    `two_stream`, two feature vectors side by side; in `dinov2_tiled`, tiles of each half modulated by the other
#    half; in `dense`, a density for each piece of the picture, added up.
# 3. Only some of the five masses are learned, the others follow: in the reference *Total*, *GDM* and *Green* are
#    learned, *Dead* = Total - GDM and *Clover* = GDM - Green, cut off at zero. Three numbers can be learned better
#    than five that have to agree with each other.
# 4. Several networks vote, one for each fold of the cross-validation. Each had its own visits (dates) held out in
#    training, so they err in different ways.
# 5. Each network sees each photograph in several views, as it is and flipped. A quadrat has no up and no left. The
#    halves are flipped one by one and keep their places, as in training. Which views, the manifest says.
# 6. The prediction is the weighted mean over networks and views. If the manifest has a projection, it is then moved
#    to the nearest masses that balance.

# %%
import os
import platform
import sys
import time
from contextlib import contextmanager
from pathlib import Path

START = time.monotonic()
HOURS = 8  # of the nine that a kernel may run; then the submission is written with what is there
os.environ["HF_HUB_OFFLINE"] = "1"  # a look-up of weights would wait for a network that is not there
sys.path.insert(0, os.getcwd())

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timm
import torch

versions = {"python": platform.python_version()}
for module in (torch, timm, np, pd, cv2):
    versions[module.__name__] = module.__version__
print("  ".join(f"{name} {version}" for name, version in versions.items()))
for number in range(torch.cuda.device_count()):
    print(f"GPU {number}: {torch.cuda.get_device_name(number)}")

# %% [markdown]
# ## The library
#
# The next cells write the modules that inference needs into a folder beside this notebook. They are the text of
# `biomass_lib` as it was used in training, so photographs are decoded, halved and resized by the same code here and
# there. Read them in this order: `targets` (the five masses), `images` with `artefacts` (from a file to two halves),
# `tables` (the competition's tables), `backbones`, `heads` and `models` (the network), `predict` (views, devices,
# means, the time), `submit` (weights, checks, the submission), and what may come after it: `adapt` (with `ridge`) and
# `post`. `files` (reading and writing) and `device` (GPUs) serve them all.

# %%
Path("biomass_lib").mkdir(exist_ok=True)

# %% tags=["modules"]
# The builder puts the modules here; run from the repository, this template uses the installed library instead.

# %%
from biomass_lib.adapt import adapt_submission
from biomass_lib.device import pick_devices
from biomass_lib.files import read_json
from biomass_lib.images import read_photo
from biomass_lib.post import post_submission
from biomass_lib.submit import find_inputs, make_submission, read_manifest
from biomass_lib.tables import read_test
from biomass_lib.targets import TARGETS

# %% [markdown]
# ## The inputs
#
# Kaggle mounts inputs in more than one way, so we do not rely on a path: data and weights are found by what is in
# them. There must be exactly one of each, else the notebook stops here and prints what it has found; the same thing
# attached twice counts once, and what cannot be read is passed over and named. Every weights file must have the size
# and the sha256 that the manifest says; half an upload does not get further than this cell.

# %%
data_dir, weights_dir = find_inputs(os.environ.get("BIOMASS_INPUT", "/kaggle/input"))
manifest = read_manifest(weights_dir)
test = read_test(data_dir)
print(f"data {data_dir}: {test['image_id'].nunique()} photographs")
print(f"weights {weights_dir}: {manifest.get('experiment', 'unnamed')}, {len(manifest['models'])} models")
print(f"views {', '.join(manifest['views'])}; {'with' if manifest['projection'] else 'without'} a projection")
models = pd.DataFrame(manifest["models"])
for name in ("name", "backbone", "targets", "img_size", "clean"):
    models[name] = [spec[name] for spec in models["spec"]]
models.drop(columns=["spec", "sha256", "joined_sha256"], errors="ignore")

# %% [markdown]
# ## The devices
#
# That a GPU is listed does not mean that this torch can use it, so each has to do one small multiplication. Those
# that can share the photographs. If none can, we say so and go on with the CPU; if the last one fails later, the CPU
# takes over.

# %%
devices = pick_devices()
for device in devices:
    print(f"{device}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{os.cpu_count()} cores'}")

# %% [markdown]
# ## The submission
#
# Threads decode the photographs ahead of the networks, each once for all models and views. The time is watched: if
# the rest would take longer than there is, views are left out, then models, and it is said. A photograph that cannot
# be read is given the training mean and named; more than one in fifty stop the notebook, and so do predictions that
# are all the same or absurd. The table gets its name only after it has been read back and checked: every id of
# `test.csv` once and in its order, every mass a number and not below zero. A failure stops the notebook. There is no
# placeholder submission: a score made of constants would hide the failure.

# %%
begun = time.monotonic()
submission = make_submission(data_dir, weights_dir, "submission.csv", devices=devices, deadline=START + HOURS * 3600)
seconds = time.monotonic() - begun
print(f"{len(submission)} rows, {seconds:.1f} s, {seconds / max(1, test['image_id'].nunique()):.2f} s a photograph")
submission.head(10)

# %% [markdown]
# ## Adaptation, if the manifest asks for it
#
# The submission above is complete. If the manifest has the key `adapt`, a process of its own now looks at training and
# test photographs together: it reports how unlike they are, predicts States, and may train small heads, or the models
# themselves, that have seen the test photographs with the predictions above as their masses. It gets the minutes that
# the manifest grants and that are left of the hours. If it fails in any way, is killed or late, or its predictions look
# absurd, the submission stays as it is, bit for bit, and a line says why. If all goes well, the plain one is kept as
# `submission_plain.csv`.

# %%
adapted = adapt_submission(data_dir, weights_dir, "submission.csv", deadline=START + HOURS * 3600)
submission = submission if adapted is None else adapted

# %% [markdown]
# ## Post-processing, if the manifest asks for it
#
# The manifest may name switches (`post`), such as less clover. They move masses by fixed rules of public solutions (one
# of them where the State is sure), and what stood here before is kept as `submission_unprocessed.csv`. If a switch
# fails, the submission stays as it is, bit for bit, and a line says why.

# %%
processed = post_submission(manifest.get("post"))
submission = submission if processed is None else processed

# %% [markdown]
# ## Do the numbers make sense?
#
# From here on nothing can change the submission, so nothing may cost it: a picture that fails is said to have failed,
# and no more.


# %%
@contextmanager
def only_a_picture():
    "Say what went wrong, and go on."
    try:
        yield
    except Exception as error:
        print(f"no picture: {type(error).__name__}: {error}")


# %% [markdown]
# The spread of each mass, beside that of the photographs that these networks were trained on, scaled to as many.
# Predictions are less spread than what is measured; but where they lie elsewhere altogether, the photographs are of
# another kind, or the weights are not those that were meant.

# %%
parts = submission["sample_id"].str.rpartition("__")
predicted = submission.assign(image_id=parts[0], target_name=parts[2])
predicted = predicted.pivot(index="image_id", columns="target_name", values="target")[list(TARGETS)]
quantiles_g = manifest.get("train_quantiles_g") or [None] * len(TARGETS)
with only_a_picture():
    fig, axes = plt.subplots(1, len(TARGETS), figsize=(12, 2.6), layout="constrained")
    for ax, name, mean_g, seen_g in zip(axes, TARGETS, manifest["train_mean_g"], quantiles_g, strict=True):
        edges = np.linspace(0, max(predicted[name].max(), *(seen_g or [mean_g])), 13)
        ax.hist(predicted[name], bins=edges, color="tab:green", alpha=0.6, label="predicted")
        if seen_g:
            below = np.interp(edges[1:], seen_g, np.linspace(0, 1, len(seen_g)))  # share of the training photographs
            ax.stairs(len(predicted) * np.diff(below, prepend=0), edges, color="black", label="in training")
        ax.axvline(mean_g, color="black", linewidth=1, linestyle="--", label="training mean")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("grams")
    axes[0].set_ylabel("photographs")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    plt.show()
predicted.describe().round(2)

# %% [markdown]
# How unlike training is the test set? This picture is there if `adapt` is on. Features of training and test photographs
# on their two main axes: where orange lies beside blue, the networks have to guess. An AUC near .5 means that a
# classifier can't tell the two sets apart, above .8 that it can.

# %%
shift_file = Path("adapt/shift.json")
with only_a_picture():
    if shift_file.is_file():
        facts, table = read_json(shift_file), pd.read_csv("adapt/shift.csv")
        fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        axes[0].plot(facts["train_x"], facts["train_y"], "o", color="#0072B2", alpha=0.5, markersize=4)
        axes[0].plot(table["x"], table["y"], "^", color="#D55E00", alpha=0.7, markersize=4)
        axes[0].set_title(f"training (o) and test (^): AUC {facts['auc']:.2f}", fontsize=9)
        axes[0].set(xlabel="first axis, sd", ylabel="second axis, sd")
        axes[1].hist(table["distance"], bins=20, color="#D55E00", alpha=0.7)
        axes[1].axvline(1, color="black", linewidth=1)
        axes[1].set_title(f"{facts['outside']:.0%} outside the training range", fontsize=9)
        axes[1].set_xlabel("distance to the nearest training photograph\n(1: the edge of their range)")
        axes[1].set_ylabel("photographs")
        plt.show()
        print(table["nearest_visit"].value_counts().head(8).to_string())

# %% [markdown]
# And a few photographs, from the least to the most total mass predicted. One that cannot be read was given the
# training mean.

# %%
order = predicted["Dry_Total_g"].sort_values().index
shown = order[np.unique(np.linspace(0, len(order) - 1, 8).round().astype(int))]
image_paths = test.drop_duplicates("image_id").set_index("image_id")["image_path"]
n_rows = int(np.ceil(len(shown) / 4))
with only_a_picture():
    fig, axes = plt.subplots(n_rows, 4, figsize=(12, 1.9 * n_rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image_id in zip(axes.flat, shown, strict=False):
        total, green, dead, clover = predicted.loc[
            image_id, ["Dry_Total_g", "Dry_Green_g", "Dry_Dead_g", "Dry_Clover_g"]
        ]
        masses = f"{image_id}: {total:.0f} g\ngreen {green:.0f}, dead {dead:.0f}, clover {clover:.0f}"
        ax.set_title(masses, fontsize=8, parse_math=False)
        try:
            photo_HW3 = read_photo(data_dir / image_paths[image_id])
            ax.imshow(cv2.resize(photo_HW3, (400, 200), interpolation=cv2.INTER_AREA))
        except Exception:  # whatever it is, it is one photograph
            ax.text(0.5, 0.5, "cannot be read", ha="center", va="center", transform=ax.transAxes, fontsize=8)
    plt.show()
