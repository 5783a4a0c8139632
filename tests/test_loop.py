"Trainings that go on after what is rare: another precision, a kill between two files, a layer that torch cannot do."

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from biomass_lib import logs, loop, train
from biomass_lib.claims import Cell, describe_done, read_done
from biomass_lib.config import Config, smoke_config
from biomass_lib.dataset import HalvesDataset, make_loader
from biomass_lib.demo import render_dataset
from biomass_lib.evaluate import read_oof
from biomass_lib.files import write_csv
from biomass_lib.intervals import conformal_intervals, masses_of, scores
from biomass_lib.models import create_model, load_model
from biomass_lib.runs import make_report
from biomass_lib.submit import load_ensemble
from biomass_lib.tables import TRAIN_COLUMNS, read_text_csv, read_train
from biomass_lib.targets import TARGETS
from biomass_lib.weights import assemble_weights


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=1, workers=1)
    config, _ = smoke_config(Config(dropout=0.0, backbone="test_vit"), home / "demo")
    return dataclasses.replace(config, cache_dir=str(home / "cache"), keep="best")  # the harder way to end


class Killed(BaseException):
    "Stand for SIGKILL: nothing catches it."


def killed_fold(config: Config, monkeypatch: pytest.MonkeyPatch, epoch: int = 2, **given) -> Path:
    "Train a fold that dies before the validation of an epoch; return its folder."
    validate, calls = loop.validate, []

    def validate_then_die(*args):
        calls.append(1)
        if len(calls) == epoch:
            raise Killed
        return validate(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "validate", validate_then_die)
        train.train_fold(config, **given)
    return Path(config.runs_dir) / config.experiment / f"fold{config.fold}"


def test_spreads_reach_the_table_and_its_intervals(settings, tmp_path, monkeypatch):
    "The likelihood trains mean and sd; a killed training goes on to the same ones."
    parts = {"aux": ("spread", "height"), "aux_weight": 1.0, "loss": "nll", "swa_epochs": 0}
    config = dataclasses.replace(settings, runs_dir=str(tmp_path / "whole"), **parts)
    for fold in range(config.n_folds):
        train.train_fold(dataclasses.replace(config, fold=fold))
    oof = read_oof(tmp_path / "whole" / config.experiment)
    sd_N5 = oof[[f"{name}_sd" for name in TARGETS]].to_numpy()
    assert (sd_N5 > 0).all() and np.ptp(sd_N5[:, -1]) > 0
    low_N5, high_N5 = conformal_intervals(oof)
    ratio_N = (high_N5[:, -1] - oof["Dry_Total_g_pred"]) / sd_N5[:, -1]
    assert ratio_N.groupby(oof["fold"]).agg(np.ptp).max() < 1e-6, "a fold has one factor"
    killed = dataclasses.replace(config, runs_dir=str(tmp_path / "killed"), fold=0)
    folder = killed_fold(killed, monkeypatch, epoch=2)
    train.train_fold(killed)
    whole = tmp_path / "whole" / config.experiment / "fold0/oof.csv"
    assert (folder / "oof.csv").read_bytes() == whole.read_bytes()


def test_weights_and_their_facts_arrive_together(settings, tmp_path, monkeypatch):
    config, replace = dataclasses.replace(settings, runs_dir=str(tmp_path)), loop.replace_atomically

    def replace_then_die(*args) -> None:
        replace(*args)
        raise Killed

    for _ in range(2):  # one file a life
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(loop, "replace_atomically", replace_then_die)
            train.train_fold(config)
    train.train_fold(config)
    fold = tmp_path / config.experiment / "fold0"
    assert {"weights.safetensors", "weights.json", "done.json"} <= {path.name for path in fold.iterdir()}
    assert not list(fold.glob("best*")) and load_model(fold / "weights.safetensors")


def test_float16_goes_on_from_another_precision(settings, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(settings, runs_dir=str(tmp_path))
    killed_fold(config, monkeypatch)
    monkeypatch.setattr(loop, "autocast_dtype", lambda amp, device: torch.float16)
    train.train_fold(config)
    assert "going on from last.ckpt at epoch 2" in capsys.readouterr().out


def test_what_differs_is_refused_by_name(settings, tmp_path, monkeypatch):
    "Other masses, another photograph under the same name, another network: the training was begun with other ones."
    data_dir = shutil.copytree(settings.data_dir, tmp_path / "demo")
    config, table = dataclasses.replace(settings, data_dir=str(data_dir), runs_dir=str(tmp_path)), read_train(data_dir)
    folder, name = killed_fold(config, monkeypatch, table=table), table.image_id[0]
    heavier = table.assign(**{mass: 3 * table[mass] for mass in TARGETS})
    with pytest.raises(ValueError, match=f"begun with other data .{name} Dry_Green_g: .*remove the folder"):
        train.train_fold(config, table=heavier)
    (folder.parent / "data.json").unlink()  # the checkpoint knows, too
    with pytest.raises(ValueError, match="(?s)scale_g: .*Dry_Green_g: .*another experiment name, or remove last.ckpt"):
        train.train_fold(config, table=heavier)
    (folder.parent / "data.json").unlink()

    def wider(config: Config, part: pd.DataFrame):
        return train.build_model(dataclasses.replace(config, hidden_ratio=0.5), part)

    with pytest.raises(
        ValueError, match="begun with .*another model .model hidden_ratio: 0.25 -> 0.5.; go on with those"
    ):
        train.train_fold(config, model_fn=wider)
    (folder.parent / "data.json").unlink()
    photographs = [data_dir / path for path in table.image_path[:2]]
    whole = photographs[0].read_bytes()
    shutil.copyfile(photographs[1], photographs[0])
    with pytest.raises(ValueError, match=f"(trained on|held out) {name} photograph: \\w+ -> \\w+.; go on"):
        train.train_fold(config)
    photographs[0].write_bytes(whole)
    (folder.parent / "data.json").unlink()
    assert (train.train_fold(config) / "done.json").is_file()


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_kept_weights_that_are_no_more_are_refused(settings, tmp_path, monkeypatch, suffix):
    "An emptied file, as after a loss of power; one of an earlier training; none."
    config = dataclasses.replace(settings, runs_dir=str(tmp_path))
    folder = killed_fold(config, monkeypatch)
    best = folder / f"best1{suffix}"
    (folder / f"weights{suffix}").write_bytes(best.read_bytes() + b" ")  # of an earlier training
    whole = best.read_bytes()
    best.write_bytes(b"")
    with pytest.raises(
        ValueError, match=f"best1{suffix} is damaged, or of another .* remove last.ckpt to train .* anew"
    ):
        train.train_fold(config)
    best.unlink()
    with pytest.raises(ValueError, match=f"weights{suffix} is damaged, or of another training"):
        train.train_fold(config)
    (folder / f"weights{suffix}").unlink()
    with pytest.raises(ValueError, match=f"best1{suffix} is missing"):
        train.train_fold(config)
    assert not (folder / "done.json").exists()
    best.write_bytes(whole)
    assert load_model(train.train_fold(config) / "weights.safetensors")


def test_no_done_without_the_kept_weights(settings, tmp_path, monkeypatch):
    config = dataclasses.replace(settings, runs_dir=str(tmp_path))
    save_training, folder = loop.save_training, tmp_path / config.experiment / "fold0"

    def save_then_damage(t: loop.Training) -> None:
        save_training(t)
        if t.progress.epoch > 3:
            t.best_file(t.progress.best_epoch).write_bytes(b"")

    monkeypatch.setattr(loop, "save_training", save_then_damage)
    with pytest.raises(ValueError, match="safetensors is damaged"):
        train.train_fold(config)
    assert not (folder / "done.json").exists()


def test_data_and_runs_by_another_path_are_the_same(settings, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(settings, runs_dir=str(tmp_path / "runs"))
    killed_fold(config, monkeypatch)
    (tmp_path / "elsewhere").symlink_to(settings.data_dir)
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(config, runs_dir="runs", data_dir="elsewhere")
    train.train_fold(moved)
    assert "going on from last.ckpt at epoch 2" in capsys.readouterr().out
    assert (train.train_fold(dataclasses.replace(moved, fold=1)) / "done.json").is_file()
    with pytest.raises(ValueError, match="dropout: .* -> 0.1"):
        train.train_fold(dataclasses.replace(moved, fold=1, dropout=0.1))


def test_a_log_that_fails_at_the_end_ends_nothing(settings, tmp_path, monkeypatch, capsys):
    class Run:
        id = "x"

        def log(self, *given, **named) -> None:
            pass

        @property
        def summary(self):
            raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(logs, "open_wandb", lambda *given: Run())
    config = dataclasses.replace(settings, runs_dir=str(tmp_path), wandb=True, stage2_epochs=0)
    assert (train.train_fold(config) / "done.json").is_file()
    assert "Weights & Biases has failed" in capsys.readouterr().out


def test_weights_go_up_as_an_artifact_when_they_are_wanted(settings, tmp_path, monkeypatch, capsys):
    "The real client, offline: what it would send lies in a file."
    pytest.importorskip("wandb", reason="Weights & Biases is an extra: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for wanted in (False, True):
        changes = {"experiment": f"sends ü {wanted}", "wandb": True, "wandb_weights": wanted, "stage2_epochs": 0}
        folder = train.train_fold(dataclasses.replace(settings, runs_dir=str(tmp_path), **changes))
        (record,) = folder.glob("wandb/offline-run-*/*.wandb")
        assert (b"weights.safetensors" in record.read_bytes()) == wanted
    assert "Weights & Biases" not in capsys.readouterr().out


def test_what_is_kept_is_what_is_named(settings, tmp_path, monkeypatch, capsys):
    "Where the last epochs are averaged, an earlier epoch with a better score is not kept."
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    changes = {"stage1_epochs": 1, "stage2_epochs": 5, "stage2_lr": 3e-2, "swa_epochs": 2, "grad_clip": 0.0}
    folder = train.train_fold(dataclasses.replace(settings, runs_dir=str(tmp_path), **changes))
    history, done = pd.read_csv(folder / "metrics.csv"), json.loads((folder / "done.json").read_text())
    assert done["epoch"] > 4 > history["val/score"].idxmax() and done["score"] < history["val/score"].max()
    assert f"best {done['score']:.3f} (epoch {done['epoch']})" in capsys.readouterr().out.splitlines()[-1]
    figure = logs.plot_history(history, done["epoch"])
    assert figure.axes[1].texts[0].get_text() == f"kept: {done['score']:.3f}"


def test_an_epoch_without_a_step_has_no_loss(settings, tmp_path, monkeypatch):
    forward = loop.MassLoss.forward

    def bad(self, *given):
        loss, parts_3 = forward(self, *given)
        return (loss * np.nan if torch.is_grad_enabled() else loss), parts_3

    monkeypatch.setattr(loop.MassLoss, "forward", bad)
    changes = {"nonfinite": "skip", "stage1_epochs": 1, "stage2_epochs": 1}
    folder = train.train_fold(dataclasses.replace(settings, runs_dir=str(tmp_path), **changes))
    history = pd.read_csv(folder / "metrics.csv")
    assert history[["train/loss", "train/loss_gdm", "train/grad_norm"]].isna().all(axis=None)
    assert (history["train/skipped"] > 0).all() and np.isfinite(history["val/score"]).all()
    assert json.loads((folder / "done.json").read_text())["epoch"] == 1
    logs.plot_history(history, 1).canvas.draw()


def test_cublas_is_told_before_it_is_used(settings, tmp_path, monkeypatch):
    seen, pick_device = [], loop.pick_device
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(
        loop, "pick_device", lambda: (seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")), pick_device())[1]
    )
    model = create_model("two_stream", backbone="test_vit", img_size=64)
    try:
        loop.make_training(model, dataclasses.replace(settings, deterministic=True), tmp_path, 28.0)
    finally:
        loop.set_deterministic(False)
    assert seen == [":4096:8"]


@pytest.mark.parametrize("backbone", ["mobileone_s0", "repvgg_a0"])
def test_thin_strided_shortcuts_are_trained(settings, tmp_path, backbone):
    changes = {"backbone": backbone, "img_size": 96, "runs_dir": str(tmp_path), "experiment": backbone}
    train.train_fold(dataclasses.replace(settings, stage1_epochs=0, stage2_epochs=1, **changes))
    assert (tmp_path / backbone / "fold0" / "done.json").is_file()


def test_dropout_follows_what_it_belongs_to():
    model = create_model("two_stream", backbone="swin_tiny_patch4_window7_224", img_size=64)
    for unfrozen, some, all_of_them in ((0, False, False), (4, True, False), (None, True, True)):
        model.unfreeze(unfrozen)
        model.train()
        on = [module.training for name, module in model.backbone.named_modules() if "drop_path" in name]
        assert (any(on), all(on)) == (some, all_of_them)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "five"}, "loss_over.*two of the five"),
        ({"mix": 0.5, "aux": "height"}, "mix.*0 with aux"),
        ({"swa_epochs": 2, "early_stopping_patience": 1}, "swa_epochs.*may stop before"),
        ({"consistency": 0.1, "targets": "components"}, "consistency.*0 unless targets = five"),
        ({"loss": "eps", "loss_beta_g": 5.0}, "loss_beta_g.*10.0 with loss = eps"),
        ({"halves": "apart"}, "halves.*together unless model = dense"),
        ({"halves": "apart", "model": "dense", "mix": 0.5}, "mix.*0 with halves = apart"),
        ({"backbone_schedule": "rising", "stage2_epochs": 0}, "backbone_schedule.*cosine with stage2_epochs = 0"),
    ],
)
def test_settings_that_contradict_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


FIVE = {"targets": "five", "loss_over": "all", "consistency": 0.1}
WINNERS = {
    "1st": FIVE | {"loss": "eps", "aux": "five_intervals", "aux_weight": 0.3},
    "5th": FIVE | {"model": "dense", "hidden_ratio": 0.0, "halves": "apart", "backbone_schedule": "rising"},
}
WINNERS["5th"] |= {"unfreeze": "gradual2"}


@pytest.mark.parametrize("name", WINNERS)
def test_parts_of_the_winners_predict_in_the_kernel_what_they_did_in_training(settings, tmp_path, name):
    "Trained in both stages, assembled, checked and loaded as the kernel does it."
    changes = {"keep": "last", "augment": "none", "stage1_epochs": 4, "stage2_epochs": 4, "stage1_lr": 3e-3}
    config = dataclasses.replace(settings, runs_dir=str(tmp_path), **changes, **WINNERS[name])
    folder = train.train_fold(config)
    history = pd.read_csv(folder / "metrics.csv")
    assert history["train/loss"].iloc[-1] < history["train/loss"].iloc[0]
    rates = history.loc[history["stage"] == 2, "train/lr_backbone"]
    assert (rates.diff().dropna() > 0).all() == (config.backbone_schedule == "rising")
    assemble_weights({folder.parent: [Cell(0, config.seed)]}, tmp_path / "weights")
    (model,) = load_ensemble(tmp_path / "weights")
    oof = read_oof(folder.parent)
    table = read_train(config.data_dir).set_index("image_id").loc[oof["image_id"]].reset_index()
    loader = make_loader(HalvesDataset(table, config.data_dir, config.img_size), 4, False)
    with torch.inference_mode():
        mass_N5 = torch.cat([model(batch["halves_2CHW"]) for batch in loader])
    np.testing.assert_allclose(mass_N5, masses_of(oof)[1], atol=0.01)


def test_checkpointing_is_refused_where_it_changes_the_training(settings, tmp_path):
    config = dataclasses.replace(settings, backbone="test_resnet", grad_checkpointing=True, runs_dir=str(tmp_path))
    with pytest.raises(ValueError, match="grad_checkpointing: test_resnet has batch norms"):
        train.train_fold(config)
    assert any(
        isinstance(module, nn.BatchNorm2d) for module in create_model("two_stream", backbone="test_resnet").modules()
    )


def test_bfloat16_is_trained_with_and_repeats(settings, tmp_path):
    config = dataclasses.replace(settings, backbone="test_resnet", amp="bf16", augment="none", runs_dir=str(tmp_path))
    folds = [train.train_fold(dataclasses.replace(config, experiment=name)) for name in ("once", "twice")]
    once, twice = ((fold / "metrics.csv").read_bytes() for fold in folds)
    assert once == twice
    whole = train.train_fold(dataclasses.replace(config, experiment="whole", amp="off"))
    apart = pd.read_csv(folds[0] / "metrics.csv")["val/loss"] - pd.read_csv(whole / "metrics.csv")["val/loss"]
    assert 0 < apart.abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.needs("g++", package="g++")
def test_compiled_training_is_the_same_training(settings, tmp_path):
    "In both stages, from kept weights that know nothing of it; and the heads' own pooling reads a compiled map."
    for changes in ({}, {"model": "dense"}):
        config = dataclasses.replace(
            settings, backbone="test_resnet", augment="none", runs_dir=str(tmp_path), **changes
        )
        plain = train.train_fold(dataclasses.replace(config, experiment=f"plain{len(changes)}"))
        compiled = train.train_fold(dataclasses.replace(config, experiment=f"compiled{len(changes)}", compile=True))
        losses = [pd.read_csv(folder / "metrics.csv")["val/loss"] for folder in (plain, compiled)]
        assert (losses[0] - losses[1]).abs().max() < 1e-3
        kept = [load_model(folder / "weights.safetensors").state_dict() for folder in (plain, compiled)]
        assert kept[0].keys() == kept[1].keys()


def test_a_fold_without_a_score_of_its_own(settings, tmp_path, capsys):
    "A held-out visit of bare quadrats: trained, kept by its loss, judged with the others."
    data = tmp_path / "bare"
    shutil.copytree(settings.data_dir, data)
    table = read_text_csv(data / "train.csv", TRAIN_COLUMNS)
    config = dataclasses.replace(settings, data_dir=str(data), runs_dir=str(tmp_path / "runs"), cache_dir="", n_folds=3)
    fold_N = train.prepare_fold(config).fold_N
    held = set(train.prepare_fold(config).table["image_id"][fold_N == 0])
    table.loc[table["sample_id"].str.partition("__")[0].isin(held), "target"] = "0"
    write_csv(table, data / "train.csv")
    folders = [train.train_fold(dataclasses.replace(config, fold=fold)) for fold in (0, 1, 2)]
    assert "its own score is not defined" in capsys.readouterr().out
    done = [read_done(folder) for folder in folders]
    assert done[0]["score"] is None and done[0]["last_score"] is None and done[1]["score"] is not None
    history = pd.read_csv(folders[0] / "metrics.csv").set_index("epoch")
    assert history["val/score"].isna().all() and done[0]["best_epoch"] == history["val/loss"].idxmin()
    assert json.loads((folders[0] / "weights.json").read_text())["score"] is None
    assert np.isfinite(scores(*masses_of(read_oof(folders[0].parent)))["score"])
    manifest = assemble_weights(folders[0].parent, tmp_path / "weights")
    assert [entry["score"] is None for entry in manifest["models"]] == [True, False, False]
    assert describe_done(read_done(folders[0])).startswith("score not defined, epoch ")
    assert np.isfinite(make_report(folders[0].parent).loc["model", "score"])
