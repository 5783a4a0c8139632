"Rendered photographs keep to ranges around aggregate figures of the real ones (357 rows, 87 photographs)."

import numpy as np
import pytest

from biomass_lib.baselines import colour_statistics, texture_statistics
from biomass_lib.demo import render_dataset
from biomass_lib.tables import read_train

pytestmark = pytest.mark.slow

# low, high; the real figure stands behind
TABLE = {
    "mean total, g": (36, 56),  # 45.3
    "sd of total, g": (18, 40),  # 28.0
    "mean total in NSW, g": (52, 100),  # 70.9
    "zeros in green": (0, 0.12),  # .05
    "zeros in dead": (0.06, 0.30),  # .11
    "zeros in clover": (0.25, 0.55),  # .38
    "correlation of GDM and NDVI": (0.2, 0.65),  # .47
    "correlation of total and height": (0.25, 0.75),  # .50
}
PHOTOS = {
    "mean red": (0.36, 0.50),  # .44
    "mean green": (0.43, 0.57),  # .50
    "mean blue": (0.25, 0.40),  # .31
    "saturation": (0.28, 0.52),  # .43
    "brightness": (0.45, 0.60),  # .52
    "excess green": (0.13, 0.33),  # .25
    "sd of excess green": (0.05, 0.20),  # .15
    "correlation of excess green and GDM": (-0.2, 0.65),  # .47
    "gradient energy, finest scale": (-4.9, -3.9),  # -4.4
    "gradient energy, middle scale": (-5.6, -4.6),  # -5.1
    "gradient energy, coarsest scale": (-6.2, -4.9),  # -5.7
}


@pytest.fixture(scope="module", params=[0])
def drawn(request, tmp_path_factory):  # folder and table of a data set
    folder = tmp_path_factory.mktemp("demo") / "data"
    render_dataset(folder, n_train=96, n_test=1, seed=request.param)
    return folder, read_train(folder)


def outside(found: dict[str, float], ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    "Collect the figures that lie outside their ranges."
    return {name: round(found[name], 3) for name, (low, high) in ranges.items() if not low <= found[name] <= high}


def test_masses_are_like_the_real_ones(drawn):
    _, table = drawn
    found = {
        "mean total, g": table.Dry_Total_g.mean(),
        "sd of total, g": table.Dry_Total_g.std(),
        "mean total in NSW, g": table[table.State == "NSW"].Dry_Total_g.mean(),
        "zeros in green": (table.Dry_Green_g == 0).mean(),
        "zeros in dead": (table.Dry_Dead_g == 0).mean(),
        "zeros in clover": (table.Dry_Clover_g == 0).mean(),
        "correlation of GDM and NDVI": table.GDM_g.corr(table.Pre_GSHH_NDVI),
        "correlation of total and height": table.Dry_Total_g.corr(table.Height_Ave_cm),
    }
    assert not outside(found, TABLE)
    assert table.groupby("State").Dry_Total_g.mean().idxmax() == "NSW"


def test_colours_and_textures_are_like_the_real_ones(drawn):
    folder, table = drawn
    paths = [folder / name for name in table.image_path]
    colour_ND, texture_ND = colour_statistics(paths), texture_statistics(paths)
    red, green, blue, _, saturation, brightness, excess = colour_ND[:, :7].mean(axis=0)
    found = {"mean red": red, "mean green": green, "mean blue": blue, "saturation": saturation}
    found |= {"brightness": brightness, "excess green": excess, "sd of excess green": colour_ND[:, 6].std()}
    found["correlation of excess green and GDM"] = np.corrcoef(colour_ND[:, 6], table.GDM_g)[0, 1]
    for number, scale in enumerate(("finest", "middle", "coarsest")):
        found[f"gradient energy, {scale} scale"] = texture_ND[:, 4 * number].mean()
    assert not outside(found, PHOTOS)
