"Every variant learns, trains all of its parameters, and comes back from disk; backbones of many families fit into it."

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from biomass_lib.config import Config, config_from_yaml, smoke_config
from biomass_lib.dataset import HalvesDataset, make_loader
from biomass_lib.demo import render_dataset
from biomass_lib.heads import aux_spec
from biomass_lib.loop import fit, seed_everything
from biomass_lib.models import create_model, load_model, save_weights
from biomass_lib.tables import read_train
from biomass_lib.targets import TARGETS, primary_to_all

PARAMS = Path(__file__).parent.parent / "notebooks" / "params"
MEAN_G = (26.6, 12.0, 6.7, 33.3, 45.3)
KNOWN = {"height": [8.0, 4.0], "ndvi": [0.6, 0.1], "state": ["Tas", "WA"], "intervals": [30.0, 50.0]}
VARIANTS = {
    "two_stream": {},
    "two_stream, components": {"targets": "components"},
    "two_stream, ratios": {"targets": "ratios"},
    "two_stream, five": {"targets": "five"},
    "two_stream, mean": {"pool": "mean"},
    "two_stream, max_mean": {"pool": "max_mean"},
    "two_stream, gem, mean of halves": {"pool": "gem", "fuse": "mean"},
    "two_stream, attention, cross": {"pool": "attention", "fuse": "cross"},
    "two_stream, max_mean, cross": {"pool": "max_mean", "fuse": "cross"},
    "two_stream, aux, condition": {"aux": KNOWN, "condition": True},
    "dinov2_tiled": {},
    "dinov2_tiled, identity, 3 x 3": {"film": "identity", "grid": 3},
    "dinov2_tiled, aux, condition": {"aux": KNOWN, "condition": True, "fuse": "mean"},
    "dense": {},
    "dense, components": {"targets": "components"},
    "dense, ratios": {"targets": "ratios"},
    "dense, aux": {"aux": KNOWN},
}
FAMILIES = [
    "resnet18",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "regnety_002",
    "densenet121",
    "nfnet_l0",
    "repvit_m0_9",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "deit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_rw_224",
    "edgenext_xx_small",
    "pvt_v2_b0",
    "caformer_s18",
    "fastvit_t8",
]


def brightness(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    "A toy problem: all masses follow from how bright the picture is."
    bright_B = torch.linspace(40, 220, count)
    noise = 20 * torch.randn(count, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    true_B5 = primary_to_all(torch.stack([bright_B / 3, bright_B / 4, bright_B / 5], dim=1))
    return (bright_B.view(-1, 1, 1, 1, 1) + noise).clamp(0, 255), true_B5


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", VARIANTS)
def test_learns_all_of_itself_and_comes_back(name: str, backbone: str, tmp_path: Path):
    torch.manual_seed(0)
    halves_B2CHW, true_B5 = brightness(6, 64)
    shape = {"backbone": backbone, "img_size": 64, "mean_g": MEAN_G, "dropout": 0.0}
    model = create_model(name.split(",")[0], **shape, **VARIANTS[name])
    torch.testing.assert_close(model.eval()(halves_B2CHW), torch.tensor([MEAN_G] * 6), atol=0.02, rtol=0)
    optimizer, reached = torch.optim.AdamW(model.parameters(), lr=3e-3), set()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    for _ in range(80):  # as many as the running statistics of batch norms need
        said = model.train().outputs(model.features(halves_B2CHW))
        loss = (said.pop("mass_5") - true_B5).square().mean() + sum(value.square().mean() for value in said.values())
        optimizer.zero_grad()
        loss.backward()
        reached |= {path for path, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        schedule.step()
    assert {path for path, _ in model.named_parameters()} == reached
    model.eval()
    with torch.inference_mode():
        mass_B5 = model(halves_B2CHW)
        error_g = (mass_B5 - true_B5).abs().mean()
        assert error_g < 0.2 * (torch.tensor(MEAN_G) - true_B5).abs().mean() and (mass_B5 >= 0).all()
        save_weights(model, tmp_path / "weights.safetensors")
        assert torch.equal(load_model(tmp_path / "weights.safetensors")(halves_B2CHW), mass_B5)
    if model.spec["targets"] in ("components", "ratios"):
        green, dead, clover, gdm, total = mass_B5.unbind(1)
        torch.testing.assert_close(green + clover, gdm)
        torch.testing.assert_close(gdm + dead, total)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_families_of_backbones(backbone: str):
    "Forward and backward at 96 pixels, which patches of 14 do not divide, pooled, as tiles of 48, and as a map."
    halves_B2CHW = torch.randint(0, 256, (2, 2, 3, 96, 96), dtype=torch.uint8)
    for name, options in (("two_stream", {}), ("dinov2_tiled", {}), ("dense", {"targets": "components"})):
        torch.manual_seed(0)
        model = create_model(name, backbone=backbone, img_size=96, mean_g=MEAN_G, **options).train()
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight)
        mass_B5 = model(halves_B2CHW)
        assert mass_B5.shape == (2, 5) and torch.isfinite(mass_B5).all() and (mass_B5 >= 0).all()
        mass_B5.sum().backward()
        assert [path for path, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "path", [p for p in sorted(PARAMS.glob("*.yaml")) if "bench" not in p.name], ids=lambda p: p.stem
)
def test_parameter_files_build_their_model(path: Path):
    "At full size, on torch's meta device: shapes, no numbers."
    config = config_from_yaml(path)
    options = {
        name: getattr(config, name) for name in ("pool", "fuse", "grid", "film", "condition", "targets", "clean")
    }
    aux = {name: KNOWN[name] for name in filter(None, config.aux.split("+"))}
    with torch.device("meta"):
        shape = {"backbone": config.backbone, "img_size": config.img_size, "aux": aux}
        model = create_model(config.model, **shape, **options)
        assert model(torch.zeros(1, 2, 3, config.img_size, config.img_size)).shape == (1, 5)


def test_auxiliary_heads_know_the_training_data():
    "Built from a table, they are in the spec and come back from it."
    table = pd.DataFrame({"State": ["WA", "Tas"], "Height_Ave_cm": [3.0, 9.0], "Dry_Total_g": [20.0, 60.0]})
    spec = aux_spec(("state", "height", "intervals"), table)
    model = create_model("two_stream", backbone="test_resnet", img_size=64, aux=spec)
    assert model.spec["aux"]["state"] == ["Tas", "WA"] and set(model.aux.layers) == {"state", "height", "intervals"}


SLOW_TO_LEARN = [pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2_tiled", "dense")]


@pytest.mark.parametrize("name", ["two_stream", *SLOW_TO_LEARN])
def test_learns_eight_photographs_by_heart(name: str, tmp_path: Path):
    render_dataset(tmp_path / "demo", n_train=8, n_test=1, seed=0)
    table = read_train(tmp_path / "demo")
    config, _ = smoke_config(Config(augment="none", dropout=0.0), tmp_path / "demo")
    settings = {"stage1_epochs": 0, "stage2_epochs": 100, "stage2_lr": 3e-3, "batch_size": 8}
    seed_everything(0)
    mean_g = table[list(TARGETS)].mean()
    model = create_model(name, backbone="test_resnet", img_size=64, dropout=0.0, mean_g=mean_g)
    photographs = HalvesDataset(table, tmp_path / "demo", 64, cache_dir=tmp_path / "cache")
    loaders = make_loader(photographs, 8, True), make_loader(photographs, 8, False)
    (tmp_path / "fold0").mkdir()
    found = fit(model, *loaders, dataclasses.replace(config, **settings), tmp_path / "fold0", scale_g=28.0)
    assert found.best_score > 0.98


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_checkpointing_changes_memory_and_nothing_else(backbone: str):
    halves_B2CHW, true_B5 = brightness(2, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model("dense", backbone=backbone, img_size=64, mean_g=MEAN_G, dropout=0.0).train()
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight)
        model.backbone.set_grad_checkpointing(checkpointing)
        (model(halves_B2CHW) - true_B5).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_low_rank_changes_are_trained_and_merged(tmp_path: Path):
    "Nothing else of the backbone moves in stage 2, and the weights file is that of an ordinary network."
    torch.manual_seed(0)
    halves_B2CHW, true_B5 = brightness(4, 64)
    model = create_model("two_stream", backbone="test_vit", img_size=64, mean_g=MEAN_G, dropout=0.0, lora_rank=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.thaw(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (model.train()(halves_B2CHW) - true_B5).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if name.startswith("backbone")} == {name for name in before if ".lora_" in name}
    save_weights(model, tmp_path / "weights.safetensors")
    with torch.inference_mode():
        found_B5, again_B5 = (m(halves_B2CHW) for m in (model.eval(), load_model(tmp_path / "weights.safetensors")))
    torch.testing.assert_close(again_B5, found_B5, atol=1e-3, rtol=1e-4)
