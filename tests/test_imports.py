"What a training imports: torch, timm, pandas and OpenCV with what they need themselves, and nothing else that is slow."

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = {"biomass_lib", "safetensors", "tqdm", "yaml"}  # milliseconds each
SLOW = {"albumentations", "IPython", "matplotlib", "pandera", "scipy", "sklearn"}
SCRIPT = """
import json, sys
import cv2, pandas, timm, torch
before = set(sys.modules)
import biomass_lib.train
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_training_imports_nothing_slow_beside_torch_timm_pandas_and_opencv():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    before, added = ({name.partition(".")[0] for name in names} for names in json.loads(run.stdout))
    assert not added & (SLOW - before), "import it inside the function that needs it, and say why"
    others = {name for name in added - SMALL - before - sys.stdlib_module_names if not name.startswith("_")}
    assert others == set()
    modules = {name for names in json.loads(run.stdout) for name in names}
    assert "torch.distributed.launcher" not in modules, "only `launch` needs it"
