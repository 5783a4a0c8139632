"Every variant learns, trains all of its parameters, and comes back from disk; backbones of many families fit into it."

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from biomass_lib import backbones
from biomass_lib.backbones import create_backbone, drop_head, layer_numbers
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
KNOWN |= {"five_intervals": [[0.0, 20.0], [0.0, 9.0], [0.0], [12.0, 30.0], [30.0, 50.0]]}
VARIANTS = {
    "two_stream": {},
    "two_stream, components": {"targets": "components"},
    "two_stream, ratios": {"targets": "ratios"},
    "two_stream, five": {"targets": "five"},
    "two_stream, mean": {"pool": "mean"},
    "two_stream, max_mean": {"pool": "max_mean"},
    "two_stream, gem, side by side": {"pool": "gem", "fuse": "concat"},
    "two_stream, attention, cross": {"pool": "attention", "fuse": "cross"},
    "two_stream, max_mean, cross": {"pool": "max_mean", "fuse": "cross"},
    "two_stream, layers": {"pool": "layers", "layers": "-1+-2", "pools": "mean+max"},
    "two_stream, layers, side by side": {"pool": "layers", "layers": "-2+-1", "pools": "gem", "fuse": "concat"},
    "two_stream, aux, condition": {"aux": KNOWN, "condition": True},
    "dinov2_tiled": {},
    "dinov2_tiled, identity, 3 x 3": {"film": "identity", "grid": 3},
    "dinov2_tiled, aux, condition": {"aux": KNOWN, "condition": True, "fuse": "concat"},
    "dense": {},
    "dense, components": {"targets": "components"},
    "dense, ratios": {"targets": "ratios"},
    "dense, aux": {"aux": KNOWN},
    "dense, linear": {"hidden_ratio": 0.0, "targets": "five"},
    "dense, apart": {"halves": "apart", "hidden_ratio": 0.0, "targets": "components", "aux": KNOWN},
    "two_stream, linear": {"hidden_ratio": 0.0},
    "dinov2_tiled, linear, five": {"hidden_ratio": 0.0, "targets": "five"},
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


def without_gradient(slopes: dict[str, float]) -> list[str]:
    "Parameters whose largest gradient is nothing but the rounding errors of one that cancels out, or not finite."
    return [name for name, slope in slopes.items() if not 1e-7 * max(slopes.values()) < slope < torch.inf]


def weighted(mass_B5: torch.Tensor) -> torch.Tensor:
    "A loss that does not cancel behind a norm, as a sum does."
    return (mass_B5 * torch.randn(mass_B5.shape, generator=torch.Generator().manual_seed(0))).sum()


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
    optimizer, slopes = torch.optim.AdamW(model.parameters(), lr=3e-3), {}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    for _ in range(80):  # as many as the running statistics of batch norms need
        said = model.train().outputs(model.features(halves_B2CHW))
        assert ("half_mass_25" in said) == (VARIANTS[name].get("halves") == "apart")
        half_B25 = said.pop("half_mass_25", said["mass_5"].unsqueeze(1))
        loss = (half_B25 - true_B5.unsqueeze(1)).square().mean()
        loss = loss + sum(value.square().mean() for name, value in said.items() if name != "mass_5")
        optimizer.zero_grad()
        loss.backward()
        for path, p in model.named_parameters():
            slopes[path] = max(slopes.get(path, 0.0), 0.0 if p.grad is None else p.grad.abs().max().item())
        optimizer.step()
        schedule.step()
    assert without_gradient(slopes) == []
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
    """Forward and backward at 96 pixels, which patches of 14 do not divide, pooled, as tiles of 48, and as a map.

    Within a backbone gradients may be zero, since layer scales and last norms of blocks may begin there."""
    halves_B2CHW = torch.randint(0, 256, (2, 2, 3, 96, 96), dtype=torch.uint8)
    for name, options in (("two_stream", {}), ("dinov2_tiled", {}), ("dense", {"targets": "components"})):
        torch.manual_seed(0)
        model = create_model(name, backbone=backbone, img_size=96, mean_g=MEAN_G, **options).train()
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight)
        mass_B5 = model(halves_B2CHW)
        assert mass_B5.shape == (2, 5) and torch.isfinite(mass_B5).all() and (mass_B5 >= 0).all()
        weighted(mass_B5).backward()
        slopes = {path: p.grad.abs().max().item() for path, p in model.named_parameters()}  # None would end it here
        assert all(slope < torch.inf and (slope > 0 or path.startswith("backbone.")) for path, slope in slopes.items())
        assert slopes["backbone." + next(path for path, p in model.backbone.named_parameters() if p.ndim == 4)] > 0


@pytest.mark.parametrize("backbone", ["beit_base_patch16_224", "cait_xxs24_224", "vit_small_patch14_dinov2"])
@pytest.mark.parametrize("name", ["two_stream", "dense"])
def test_sizes_that_a_patch_does_not_divide(backbone: str, name: str):
    with torch.device("meta"):
        assert create_model(name, backbone=backbone, img_size=100)(torch.zeros(1, 2, 3, 100, 100)).shape == (1, 5)


def test_sizes_that_windows_do_not_tile_are_refused_by_name():
    message = "maxvit_tiny_rw_224 cannot take pictures of 100 px; the nearest side that it can is 96 px: set img_size"
    with pytest.raises(ValueError, match=message):
        create_model("two_stream", backbone="maxvit_tiny_rw_224", img_size=100)


def test_heads_that_lie_in_each_other_are_dropped(monkeypatch: pytest.MonkeyPatch):
    "Nine of them: had the order been that of a set, one would come before what it lies in, whatever the hash seed."

    class Pool(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
            return self.mlp(super().forward(features_ND))

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pools = nn.Linear(4, 4), nn.ModuleDict({f"pool{i}": Pool() for i in range(9)})

        def forward_features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
            return self.stem(pixels_NCHW.mean(dim=(1, 2))[:, :4])

        def forward_head(self, features_ND: torch.Tensor, pre_logits: bool) -> torch.Tensor:
            return sum(pool(features_ND) for pool in self.pools.values())

    monkeypatch.setattr(backbones, "_outline", lambda name, **options: Toy())
    monkeypatch.setattr(backbones, "size_options", lambda name, img_size: {})
    toy = Toy()
    drop_head(toy, "toy", 8)
    assert [path for path, _ in toy.named_parameters()] == ["stem.weight", "stem.bias"]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_the_last_layers_are_unfrozen_and_no_others(backbone: str, layers: int):
    "Told by names, so that the numbers of layers are tested, too."
    last = {
        "test_resnet": ["layer4.0.", "layer3.0.", "layer2.0."],
        "test_vit": ["blocks.5.", "blocks.4.", "blocks.3."],
        "test_convnext": ["stages.3.blocks.1.", ("stages.3.downsample.", "stages.3.blocks.0."), "stages.2.blocks.3."],
    }[backbone][:layers]
    torch.manual_seed(0)
    model = create_model("two_stream", backbone=backbone, img_size=64, mean_g=MEAN_G)
    for heads in model.heads.layers:
        torch.nn.init.normal_(heads[-1].weight)
    model.unfreeze(layers)
    weighted(model.train()(brightness(4, 64)[0])).backward()
    names = [name for name, _ in model.backbone.named_parameters()]
    assert {name for name, p in model.backbone.named_parameters() if p.grad is not None} == {
        name for name in names if any(name.startswith(part) for part in (*last, "norm.", "head."))
    }


@pytest.mark.parametrize(
    "backbone", ["convnext_atto", "eva02_tiny_patch14_224", "densenet121", "mobilenetv3_small_050"]
)
def test_a_norm_or_a_head_is_no_layer_of_its_own(backbone: str):
    with torch.device("meta"):
        network = create_backbone(backbone, 56)
    numbers = layer_numbers(network)
    last = [name for name, number in numbers.items() if number == max(numbers.values())]
    assert sum(p.ndim > 1 for name, p in network.named_parameters() if name in last) > 1
    assert set(numbers.values()) == set(range(max(numbers.values()) + 1))


@pytest.mark.parametrize(
    "path", [p for p in sorted(PARAMS.glob("*.yaml")) if "bench" not in p.name], ids=lambda p: p.stem
)
def test_parameter_files_build_their_model(path: Path):
    "At full size, on torch's meta device: shapes, no numbers."
    config = config_from_yaml(path)
    names = ("pool", "fuse", "grid", "film", "condition", "targets", "clean", "hidden_ratio", "halves")
    params = config.to_dict()
    options = {name: params[name] for name in (*names, "layers", "pools", "scales")}
    aux = {name: KNOWN[name] for name in config.aux}
    with torch.device("meta"):
        shape = {"backbone": config.backbone, "img_size": config.img_size, "aux": aux}
        model = create_model(config.model, **shape, **options)
        assert model(torch.zeros(1, 2, 3, config.img_size, config.img_size)).shape == (1, 5)


def test_auxiliary_heads_know_the_training_data():
    "Built from a table, they are in the spec and come back from it."
    table = pd.DataFrame({"State": ["WA", "Tas"], "Height_Ave_cm": [3.0, 9.0], "Dry_Total_g": [20.0, 60.0]})
    table = table.assign(Dry_Green_g=[0.0, 30.0], Dry_Dead_g=[5.0, 9.0], Dry_Clover_g=0.0, GDM_g=[0.0, 30.0])
    names = ("state", "height", "intervals", "five_intervals")
    spec = aux_spec(names, table)
    model = create_model("two_stream", backbone="test_resnet", img_size=64, aux=spec)
    assert model.spec["aux"]["state"] == ["Tas", "WA"] and set(model.aux.layers) == set(names)
    assert model.spec["aux"]["five_intervals"][2] == [0.0]  # no clover anywhere: nobody is in the second range


SLOW_TO_LEARN = [pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2_tiled", "dense")]


@pytest.mark.slow
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
    "What is kept for the backward pass is at most half as much, since each block is computed again."
    halves_B2CHW, true_B5 = brightness(2, 64)
    gradients, kept_bytes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model("dense", backbone=backbone, img_size=64, mean_g=MEAN_G, dropout=0.0).train()
        for layers in model.heads.layers:
            torch.nn.init.normal_(layers[-1].weight)
        model.backbone.set_grad_checkpointing(checkpointing)
        own, kept = {p.data_ptr() for p in model.parameters()}, {}

        def keep(tensor: torch.Tensor, own: set = own, kept: dict = kept) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage()  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (model(halves_B2CHW) - true_B5).square().mean()
        kept_bytes.append(sum(storage.nbytes() for storage in {s.data_ptr(): s for s in kept.values()}.values()))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
    assert kept_bytes[1] < 0.5 * kept_bytes[0]


def test_low_rank_changes_are_trained_and_merged(tmp_path: Path):
    "Nothing else of the backbone moves in stage 2, and the weights file is that of an ordinary network."
    torch.manual_seed(0)
    halves_B2CHW, true_B5 = brightness(4, 64)
    model = create_model("two_stream", backbone="test_vit", img_size=64, mean_g=MEAN_G, dropout=0.0, lora_rank=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.unfreeze(None)
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


def test_batch_norms_between_low_rank_changes_are_frozen():
    torch.manual_seed(0)
    model = create_model("two_stream", backbone="maxvit_rmlp_pico_rw_256", img_size=64, mean_g=MEAN_G, lora_rank=2)
    for layers in model.heads.layers:
        torch.nn.init.normal_(layers[-1].weight)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    for prepare in (lambda: None, lambda: model.unfreeze(None), lambda: model.unfreeze(1)):
        prepare()
        weighted(model.train()(brightness(2, 64)[0])).backward()
        assert sum("running_mean" in name for name in before) > 10
        assert [name for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])] == []
    assert any(".lora_B" in name and p.grad.any() for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("backbone", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb"])
def test_low_rank_changes_that_nothing_reaches_are_left_out(backbone: str):
    side = 28 if "14" in backbone else 32
    with pytest.warns(UserWarning, match=f"lora_rank: 12 of 48 layers of {backbone} get no low-rank changes .qkv."):
        model = create_model("two_stream", backbone=backbone, img_size=side, mean_g=MEAN_G, lora_rank=2)
    for layers in model.heads.layers:
        torch.nn.init.normal_(layers[-1].weight)
    model.unfreeze(None)
    weighted(model.train()(brightness(2, side)[0])).backward()
    slopes = {name: p.grad for name, p in model.named_parameters() if ".lora_B" in name}
    assert len(slopes) == 36 and all(slope is not None and slope.any() for slope in slopes.values())


def test_a_stage_that_would_train_nothing_of_the_backbone_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backbones, "_reached_by_lora", lambda name, paths: ["blocks.0.attn.qkv"])
    with pytest.warns(UserWarning, match="get no low-rank changes"):
        model = create_model("two_stream", backbone="test_vit", img_size=64, lora_rank=2)
    model.unfreeze(None)
    with pytest.raises(ValueError, match="lora_rank: the last 1 layers .* set unfreeze to all or to more layers"):
        model.unfreeze(1)
    assert any(p.requires_grad for p in model.backbone.parameters())  # as it was
