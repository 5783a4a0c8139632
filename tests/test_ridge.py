"frozen_ridge: a fold from photographs to weights that come back, in an ensemble, and what its parameters refuse."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from biomass_lib.config import Config, config_from_yaml, smoke_config
from biomass_lib.demo import render_dataset
from biomass_lib.loop import fit_ridges
from biomass_lib.models import create_model, load_model, save_weights
from biomass_lib.predict import predict_masses
from biomass_lib.ridge import solve_ridges
from biomass_lib.submit import load_ensemble
from biomass_lib.tables import read_train
from biomass_lib.targets import TARGETS, weighted_r2
from biomass_lib.train import train_fold
from biomass_lib.weights import assemble_weights

PARAMS = Path(__file__).parent.parent / "notebooks" / "params"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Both folds and a refit of a tiny random network on demo photographs."
    folder = tmp_path_factory.mktemp("ridge")
    render_dataset(folder / "demo", n_train=16, n_test=2, seed=0, workers=1)
    own = {
        "model": "frozen_ridge",
        "backbone": "test_vit",
        "layers": [-1, -2],
        "pools": "mean+gem",
        "scales": [1.0, 0.5],
        "backbone_schedule": "rising",  # of a recipe that other models share
        "layer_decay": 0.8,
    }
    files = {"runs_dir": str(folder / "runs"), "cache_dir": str(folder / "cache")}
    config = smoke_config(Config(**own, **files, experiment="ridge"), folder / "demo")[0]
    folders = [train_fold(Config.from_dict(config.to_dict() | {"fold": fold})) for fold in (0, 1, "all")]
    return folder, config, folders


def test_a_fold_from_end_to_end(trained):
    folder, config, folders = trained
    for out_dir in folders[:2]:
        history = pd.read_csv(out_dir / "metrics.csv")
        assert history["epoch"].tolist() == [1]
        oof = pd.read_csv(out_dir / "oof.csv")
        pred_N5 = oof[[f"{name}_pred" for name in TARGETS]].to_numpy()
        assert weighted_r2(oof[list(TARGETS)].to_numpy(), pred_N5) == pytest.approx(history["val/score"][0], abs=1e-4)
        paths = [folder / "demo" / "train" / f"{name}.jpg" for name in oof["image_id"]]
        again_N5 = predict_masses([load_model(out_dir / "weights.safetensors")], paths, ("identity",), amp="off")
        np.testing.assert_allclose(again_N5, pred_N5, atol=2e-3)
    assert not (folders[2] / "oof.csv").exists()
    assert (folders[2] / "weights.safetensors").is_file()
    assert not (folders[0] / "last.ckpt").exists()


def test_folds_share_features(trained):
    "Two folds and the refit look at each photograph once."
    folder, config, _ = trained
    banks = list((folder / "cache").glob("features_*/*.npy"))
    assert len(banks) == len(read_train(folder / "demo"))


def test_weights_dataset_knows_the_model(trained, tmp_path):
    folder, config, _ = trained
    assemble_weights(folder / "runs" / "ridge", tmp_path / "weights")
    models = load_ensemble(tmp_path / "weights")
    assert {model.spec["layers"] for model in models} == {"-1+-2"}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_learns_a_toy_and_comes_back(backbone: str, tmp_path: Path):
    torch.manual_seed(0)
    bright_B = torch.linspace(40, 220, 20)
    halves_B2CHW = (bright_B.view(-1, 1, 1, 1, 1) + 20 * torch.randn(20, 2, 3, 64, 64)).clamp(0, 255)
    true_N5 = (bright_B[:, None] / torch.tensor([5.0, 12.0, 20.0, 4.0, 3.0])).numpy()
    model = create_model("frozen_ridge", backbone=backbone, img_size=64, layers="-1+-2", scales="1.0+0.5").eval()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    solve_ridges(model, model.features(halves_B2CHW).numpy(), true_N5, np.arange(20) // 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    mass_B5 = model(halves_B2CHW)
    assert weighted_r2(true_N5, mass_B5.numpy()) > 0.9
    save_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(load_model(tmp_path / "weights.safetensors")(halves_B2CHW), mass_B5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(halves_B2CHW), mass_B5, atol=0.05 * float(true_N5.max()), rtol=0.1)


def test_heavy_pictures_end_at_what_was_seen():
    model = create_model("frozen_ridge", backbone="test_resnet", img_size=64).eval()
    rng = np.random.default_rng(0)
    features_N2D = rng.normal(size=(30, 2, sum(model.widths)))
    mass_N5 = np.abs(rng.normal(20, 5, (30, 5)))
    solve_ridges(model, features_N2D, mass_N5, np.arange(30) // 3)
    far_B5 = model.outputs(torch.from_numpy(1e6 * features_N2D).float())["mass_5"]
    assert torch.isfinite(far_B5).all()
    assert far_B5.max() <= 1.5 * mass_N5.max() + 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 4}, "lora_rank = 4 must be 0 with model = frozen_ridge"),
        ({"aux": "height"}, "aux = 'height' must be empty with model = frozen_ridge"),
        ({"targets": "components"}, "targets = 'components' must be primary"),
        ({"unfreeze": "last4"}, "unfreeze = 'last4' must be all with model = frozen_ridge"),
        ({"layers": [0]}, "layers = '0' must be whole numbers counted from the end"),
        ({"layers": "-1+-1"}, "layers = '-1[+]-1' must be whole numbers"),
        ({"scales": [0.0]}, "scales = '0.0' must be shares of img_size"),
        ({"scales": "big"}, "scales = 'big' must be shares of img_size"),
        ({"pools": "median"}, "pools = 'median' must be empty, or some of mean, max, min, gem, cls"),
        ({"pools": "mean+mean"}, "pools = 'mean[+]mean' must be each once"),
        ({"pools": []}, "pools = '' must be each once"),
    ],
)
def test_what_contradicts_is_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Config(model="frozen_ridge", **changes)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("biomass_lib.loop.world", lambda: (0, 2))
    with pytest.raises(ValueError, match="solved by one process, not by 2"):
        fit_ridges(None, None, None, Config(), tmp_path, 1.0)


def test_the_shipped_file_builds():
    config = config_from_yaml(PARAMS / "frozen_ridge.yaml")
    with torch.device("meta"):
        params = {name: config.to_dict()[name] for name in ("backbone", "img_size", "layers", "pools", "scales")}
        model = create_model("frozen_ridge", **params)
    assert model.raw_weight.shape == (3, 24 * 1024)
    assert sum(p.numel() for p in model.parameters()) > 300e6
