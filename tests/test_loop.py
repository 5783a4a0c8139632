"Trainings that go on after what is rare: another precision, a kill between two files, a layer that torch cannot do."

import dataclasses
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from biomass_lib import loop, train
from biomass_lib.config import Config, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.models import create_model, load_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("home")
    render_dataset(home / "demo", n_train=12, n_test=2, seed=1, workers=1)
    config, _ = smoke_config(Config(dropout=0.0, backbone="test_vit"), home / "demo")
    return dataclasses.replace(config, cache_dir=str(home / "cache"))


class Killed(BaseException):
    "As SIGKILL: nothing catches it."


def test_weights_and_their_facts_arrive_together(settings, tmp_path, monkeypatch):
    config, replace = dataclasses.replace(settings, runs_dir=str(tmp_path)), Path.replace

    def replace_then_die(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        if path.stem.startswith("best"):
            raise Killed
        return moved

    for _ in range(2):  # one file a life
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", replace_then_die)
            train.train_fold(config)
    train.train_fold(config)
    fold = tmp_path / config.experiment / "fold0"
    assert {"weights.safetensors", "weights.json", "done.json"} <= {path.name for path in fold.iterdir()}
    assert not list(fold.glob("best*")) and load_model(fold / "weights.safetensors")


def test_float16_goes_on_from_another_precision(settings, tmp_path, monkeypatch, capsys):
    config, validate, calls = dataclasses.replace(settings, runs_dir=str(tmp_path)), loop.validate, []

    def validate_then_die(*given):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return validate(*given)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "validate", validate_then_die)
        train.train_fold(config)
    monkeypatch.setattr(loop, "autocast_dtype", lambda amp, device: torch.float16)
    train.train_fold(config)
    assert "going on from last.ckpt at epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("backbone", ["mobileone_s0", "repvgg_a0"])
def test_thin_strided_shortcuts_are_trained(settings, tmp_path, backbone):
    changes = {"backbone": backbone, "img_size": 96, "runs_dir": str(tmp_path), "experiment": backbone}
    train.train_fold(dataclasses.replace(settings, stage1_epochs=0, stage2_epochs=1, **changes))
    assert (tmp_path / backbone / "fold0" / "done.json").is_file()


def test_dropout_follows_what_it_belongs_to():
    model = create_model("two_stream", backbone="swin_tiny_patch4_window7_224", img_size=64)
    for thawed, some, all_of_them in ((0, False, False), (4, True, False), (None, True, True)):
        model.thaw(thawed)
        model.train()
        on = [module.training for name, module in model.backbone.named_modules() if "drop_path" in name]
        assert (any(on), all(on)) == (some, all_of_them)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "five"}, "loss_over.*two of the five"),
        ({"mix": 0.5, "aux": "height"}, "mix.*0 with aux"),
        ({"swa_epochs": 2, "early_stopping_patience": 1}, "swa_epochs.*may stop before"),
    ],
)
def test_settings_that_contradict_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


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
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
