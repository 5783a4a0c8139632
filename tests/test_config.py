"Parameters: each has a use, the few that people turn stand first, and files of former runs are still read."

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from biomass_lib.config import MACHINE_PARAMETERS, Config, config_from_yaml, config_to_yaml
from biomass_lib.logs import open_wandb

ROOT = Path(__file__).parent.parent
NAMES = [field.name for field in dataclasses.fields(Config)]


def cells(name: str) -> str:
    "The text of a notebook's cells."
    notebook = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"])


def uses(name: str) -> list[str]:
    "List where a parameter is used: parameter files, workflows, benchmarks, docs/details.md."
    paths = (ROOT / "notebooks/params").glob("*.yaml")
    found = [path.name for path in paths if re.search(rf"^{name}:", path.read_text(encoding="utf-8"), re.MULTILINE)]
    flows = ["variants.ipynb", "tta.ipynb", "bench_loading.ipynb", "bench_predict.ipynb", "bench_training.ipynb"]
    found += [flow for flow in flows if re.search(rf'"{name}":|\b{name}=', cells(flow))]
    details = (ROOT / "docs/details.md").read_text(encoding="utf-8")
    return found + ["details.md"] * bool(re.search(rf"`{name}`|`{name}: |-p {name} ", details))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_use(name: str):
    assert uses(name), f"{name}: use it in notebooks/params, a workflow or docs/details.md, or remove it"


def test_what_people_turn_stands_first():
    "About twenty parameters, before the first line that says advanced."
    notebook = json.loads((ROOT / "notebooks/train_fold.ipynb").read_text(encoding="utf-8"))
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    first, _, rest = "".join(tagged[0]["source"]).partition("# advanced")
    assert 15 <= len(re.findall(r"^\w+:", first, re.MULTILINE)) <= 24
    assert len(re.findall(r"^\w+:", rest, re.MULTILINE)) == len(NAMES) - len(re.findall(r"^\w+:", first, re.MULTILINE))


def test_parameter_files_of_former_runs_are_read(tmp_path: Path):
    "In another order, without the parameters that came later, and with lists as text."
    former = {name: value for name, value in sorted(Config().to_dict().items()) if not name.startswith("wandb_")}
    text = yaml.safe_dump(former | {"aux": "height+ndvi", "augment": "reference+blur", "exclude": []})
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    config = config_from_yaml(tmp_path / "params.yaml")
    assert (config.aux, config.augment) == (("height", "ndvi"), ("reference", "blur"))
    written = config_to_yaml(config, without=MACHINE_PARAMETERS)
    assert "aux: height+ndvi\n" in written
    assert "augment: reference+blur\n" in written
    assert "wandb" not in written


@pytest.mark.parametrize(
    ("changes", "entity", "name"),
    [({}, None, "two_stream fold 0"), ({"wandb_entity": "us", "wandb_name": "first try"}, "us", "first try")],
)
def test_run_of_weights_and_biases_has_its_entity_and_name(changes, entity, name, tmp_path, monkeypatch):
    begun = {}
    client = ModuleType("wandb")
    client.init = lambda **options: begun.update(options) or "a run"
    client.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert open_wandb(tmp_path, Config(wandb=True, **changes)) == "a run"
    assert (begun["entity"], begun["name"], begun["group"]) == (entity, name, "two_stream")
    assert begun["project"] == "csiro-biomass"


def test_contributing_names_what_exists():
    "`module.name` in the walks through the code; parameters in backticks are parameters."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = "|".join(path.stem for path in (ROOT / "biomass_lib").glob("[!_]*.py"))
    named = re.findall(rf"`({modules})\.(\w+)`", text)
    files = {"csv", "yaml", "json", "ckpt", "ipynb", "py"}
    named = [(module, name) for module, name in named if name not in files]
    assert len(named) > 25
    assert [f"{a}.{b}" for a, b in named if not hasattr(importlib.import_module(f"biomass_lib.{a}"), b)] == []


def test_details_say_what_the_parameter_files_cost():
    "Notebook 38_cost compares the files with what it counts; the table in docs/details.md repeats them."
    line = r"^\| `(\w+)` \|.*\| (\d+) GB \| (\d+) minutes \|$"
    rows = re.findall(line, (ROOT / "docs/details.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for name, memory, minutes in rows:
        words = f"# about {memory} GB of GPU memory and {minutes} minutes of two T4"
        assert words in (ROOT / f"notebooks/params/{name}.yaml").read_text(), name
