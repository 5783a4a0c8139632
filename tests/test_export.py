"Every kind of model as an ONNX file, which must give the same grams, without PyTorch."

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from biomass_lib.demo import render_dataset
from biomass_lib.export import export_onnx
from biomass_lib.models import create_model, save_weights
from biomass_lib.photos import predict_photos
from biomass_lib.portable import PortableModel, predict_portable
from biomass_lib.targets import TARGETS

MODELS = {
    "two_stream": {"backbone": "test_convnext", "pool": "attention", "fuse": "cross", "targets": "components"},
    "dinov2_tiled": {"backbone": "test_vit"},
    "dense": {"backbone": "test_vit", "targets": "components"},
    "frozen_ridge": {"backbone": "test_resnet", "layers": "-1+-2", "scales": "1.0+0.5"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    render_dataset(folder, n_train=4, n_test=3, seed=0, workers=1)
    return sorted((folder / "test").glob("*.jpg"))


def write_model(kind: str, path: Path) -> None:
    "Draw all weights at random: as built, the heads would predict one number for each photograph."
    torch.manual_seed(0)
    model = create_model(kind, img_size=64, mean_g=(26, 12, 7, 33, 45), **MODELS[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone"):
                parameter.normal_(std=0.1)
        if kind == "frozen_ridge":
            model.most_g.fill_(1000)
            model.raw_bias.copy_(torch.tensor([60.0, 40.0, 20.0]))
            model.raw_weight.normal_(std=2)
            model.log_weight.normal_(std=0.1)
    save_weights(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_of_model_gives_the_same_grams(kind: str, photos: list[Path], tmp_path: Path):
    write_model(kind, tmp_path / "model.safetensors")
    views = ("identity", "horizontal", "left")
    assert export_onnx(tmp_path / "model.safetensors", tmp_path / "model.onnx", views=views) < 0.1
    wanted = predict_photos(tmp_path / "model.safetensors", photos, views, amp="off")[[*TARGETS]].to_numpy()
    result = predict_portable(PortableModel(tmp_path / "model.onnx"), photos)
    assert np.abs(result[[*TARGETS]].to_numpy() - wanted).max() < 0.1
    assert np.ptp(wanted, axis=0).max() > 0.1, "all photographs look alike to this model: the test shows nothing"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []


def test_an_export_that_fails_leaves_no_file(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model("frozen_ridge", tmp_path / "model.safetensors")
    monkeypatch.setattr(PortableModel, "__call__", lambda self, halves: np.full((len(halves), 5), 1e4))
    with pytest.raises(ValueError, match="differs from PyTorch by .* nothing was written"):
        export_onnx(tmp_path / "model.safetensors", tmp_path / "model.onnx")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_command_without_onnxruntime_names_the_remedy(tmp_path: Path):
    code = "import sys; sys.modules['onnxruntime'] = None\nfrom biomass_lib.portable import portable_main\n"
    code += f"portable_main([{str(tmp_path / 'model.onnx')!r}, 'photos'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "biomass_onnx: an .onnx file needs the package onnxruntime: pip install onnxruntime" in done.stderr
