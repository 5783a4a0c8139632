"The artefact detectors on real photographs of the competition, where they are at hand. Counts only, no pictures."

from pathlib import Path

import cv2
import pandas as pd
import pytest

from biomass_lib.artefacts import clean_photo, find_artefacts

FOLDER = Path(__file__).parents[2] / "shared/data/real_photos/train"
BY_EYE = {"date_stamp": 0, "flash_dots": 2, "cardboard": 5, "black_rim": 24}  # of 87; dark slivers of the frame: about
SURELY_RIM = 15  # fewer would mean that the detector has gone blind


@pytest.fixture(scope="module")
def photos() -> list:
    paths = sorted(FOLDER.glob("*.jpg"))
    if len(paths) != 87:
        pytest.skip(f"the 87 real photographs are not in {FOLDER} ({len(paths)} there)")
    return [cv2.imread(str(path))[..., ::-1].copy() for path in paths]


@pytest.fixture(scope="module")
def flags(photos: list) -> pd.DataFrame:
    return pd.DataFrame([find_artefacts(photo_HW3) for photo_HW3 in photos])


def test_artefacts_are_counted_as_by_eye(flags: pd.DataFrame) -> None:
    "Stamps, dots and cardboard exactly; of the slivers of the frame most, and no more than there are."
    counts = flags.sum().to_dict()
    assert {name: counts[name] for name in ("date_stamp", "flash_dots", "cardboard")} == {
        name: BY_EYE[name] for name in ("date_stamp", "flash_dots", "cardboard")
    }
    assert SURELY_RIM <= counts["black_rim"] <= BY_EYE["black_rim"], counts


def test_artefacts_are_found_in_half_the_size(photos: list) -> None:
    "The audit decodes at half size."
    halves = [cv2.resize(photo_HW3, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for photo_HW3 in photos]
    counts = pd.DataFrame([find_artefacts(photo_hw3) for photo_hw3 in halves]).sum()
    assert counts[["date_stamp", "flash_dots", "cardboard"]].tolist() == [0, 2, 5]


def test_artefacts_are_gone_after_cleaning(photos: list, flags: pd.DataFrame) -> None:
    "Photographs without artefacts stay the very same; dots and cardboard of the others are not found again."
    for photo_HW3, has in zip(photos, flags.to_dict("records"), strict=True):
        cleaned_HW3 = clean_photo(photo_HW3, "both")
        assert (cleaned_HW3 is photo_HW3) == (not any(has.values()))
        if has["flash_dots"] or has["cardboard"]:
            again = find_artefacts(cleaned_HW3)
            assert not again["cardboard"] and (not again["flash_dots"]), has
