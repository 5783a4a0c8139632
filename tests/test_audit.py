"The audit on a broken copy of rendered data, one defect of each kind: each is found, and nothing else."

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from biomass_lib.audit import _green_share, audit, audit_folder, audit_main, stop_on_errors
from biomass_lib.demo import render_dataset
from biomass_lib.files import write_csv
from biomass_lib.images import check_photo_file, load_halves, read_photo
from biomass_lib.tables import TRAIN_COLUMNS, check_photos, long_to_wide, read_text_csv, wide_to_long
from biomass_lib.targets import TARGETS

FLIPS = (None, 0, 1, -1)  # of cv2.flip
NOISE = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
EXIF_ORIENTATION = 0x0112
SEEN_IN_PIXELS = ("flat", "near_copy", "zero_green")


@pytest.fixture(scope="module")
def clean_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "48 photographs: twelve rendered ones, each as it is and flipped in three ways, with masses of its own."
    drawn, folder = tmp_path_factory.mktemp("drawn") / "demo", tmp_path_factory.mktemp("clean")
    render_dataset(drawn, n_train=12, n_test=1, seed=0)
    (folder / "train").mkdir()
    table = long_to_wide(read_text_csv(drawn / "train.csv", TRAIN_COLUMNS))
    table["Dry_Green_g"] = table["Dry_Green_g"].clip(lower=1)  # no green at all would be worth a note
    table["GDM_g"] = table["Dry_Green_g"] + table["Dry_Clover_g"]
    table["Dry_Total_g"] = table["GDM_g"] + table["Dry_Dead_g"]
    parts = []
    for k, flip in enumerate(FLIPS):
        part = table.assign(image_id=[f"ID{100 * (k + 1) + i}" for i in range(len(table))])
        part["image_path"] = "train/" + part["image_id"] + ".jpg"
        part[list(TARGETS)] *= 1 + k / 10
        for old, new in zip(table["image_path"], part["image_path"], strict=True):
            photo_HW3 = cv2.imread(str(drawn / old))
            cv2.imwrite(str(folder / new), photo_HW3 if flip is None else cv2.flip(photo_HW3, flip))
        parts.append(part)
    write_csv(wide_to_long(pd.concat(parts)), folder / "train.csv")
    return folder


def exif_of(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def greyed(photo: PIL.Image.Image, colour: tuple[int, int, int] = (128, 128, 128)) -> PIL.Image.Image:
    "The lower part as a truncated file leaves it."
    photo.paste(colour, (0, photo.height * 2 // 3, photo.width, photo.height))
    return photo


class Data:
    "A data folder to be broken: the table as text, and the photographs."

    def __init__(self, folder: Path):
        self.folder = folder
        self.long = read_text_csv(folder / "train.csv", TRAIN_COLUMNS)

    def path(self, i: str) -> Path:
        return self.folder / f"train/{i}.jpg"

    def rows(self, i: str) -> pd.Series:
        return self.long["sample_id"].str.startswith(f"{i}__")

    def row(self, i: str, name: str) -> pd.Series:
        return self.long["sample_id"] == f"{i}__{name}"

    def say(self, i: str, column: str, cell: str) -> None:
        self.long.loc[self.rows(i), column] = cell

    def weigh(self, i: str, name: str, cell: str, column: str = "target") -> None:
        self.long.loc[self.row(i, name), column] = cell

    def weigh_all(self, i: str, green: float, clover: float, dead: float) -> None:
        for name, mass in zip(TARGETS, (green, dead, clover, green + clover, green + clover + dead), strict=True):
            self.weigh(i, name, str(mass))

    def same_labels(self, i: str, other: str) -> None:
        for column in ("target", "Sampling_Date"):
            self.long.loc[self.rows(i), column] = self.long.loc[self.rows(other), column].to_numpy()

    def double(self, i: str) -> None:
        self.long = pd.concat([self.long, self.long[self.row(i, "GDM_g")]], ignore_index=True)

    def drop(self, i: str) -> None:
        self.long = self.long[~self.row(i, "Dry_Clover_g")].reset_index(drop=True)

    def write(self, i: str, data: bytes) -> None:
        self.path(i).write_bytes(data)

    def splice(self, i: str, piece: bytes, lost: int) -> None:
        "Put a piece in the place of some bytes in the middle of a photograph."
        whole = self.path(i).read_bytes()
        middle = len(whole) // 2
        self.write(i, whole[:middle] + piece + whole[middle + lost :])

    def promise(self, i: str, width: int, height: int) -> None:
        "Another size in the header."
        data = self.path(i).read_bytes()
        at = data.index(b"\xff\xc0") + 5
        self.write(i, data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :])

    def resave(self, i: str, change: Callable[[PIL.Image.Image], PIL.Image.Image], **options) -> None:
        with PIL.Image.open(self.path(i)) as photo:
            changed = change(photo.copy())
        changed.save(self.path(i), "JPEG", quality=95, **options)

    def save_brighter(self, i: str, other: str) -> None:
        brighter_HW3 = cv2.convertScaleAbs(cv2.imread(str(self.path(other))), alpha=1.05)
        cv2.imwrite(str(self.path(i)), brighter_HW3, [cv2.IMWRITE_JPEG_QUALITY, 70])


# severity and check that must be reported, and what is done to photograph i, with the help of photograph o
DEFECTS = [
    ("error", "path", lambda d, i, o: d.say(i, "image_path", "")),
    ("error", "date", lambda d, i, o: d.say(i, "Sampling_Date", "2015/13/4")),
    ("error", "number", lambda d, i, o: d.say(i, "Pre_GSHH_NDVI", "high")),
    ("error", "number", lambda d, i, o: d.say(i, "Height_Ave_cm", "")),
    ("error", "number", lambda d, i, o: d.weigh(i, "Dry_Green_g", "12g")),
    ("error", "number", lambda d, i, o: d.weigh(i, "Dry_Total_g", "inf")),
    ("error", "negative", lambda d, i, o: d.weigh(i, "Dry_Dead_g", "-4.2")),
    ("error", "sample_id", lambda d, i, o: d.weigh(i, "Dry_Dead_g", f"{i}_Dry_Dead_g", "sample_id")),
    ("error", "sample_id", lambda d, i, o: d.weigh(i, "GDM_g", "gdm", "target_name")),
    ("error", "five_rows", lambda d, i, o: d.drop(i)),
    ("error", "doubled_row", lambda d, i, o: d.double(i)),
    ("error", "agreement", lambda d, i, o: d.weigh(i, "GDM_g", "3.3", "Height_Ave_cm")),
    ("error", "shared_file", lambda d, i, o: d.say(i, "image_path", f"train/{o}.jpg")),
    ("error", "missing", lambda d, i, o: d.path(i).unlink()),
    ("error", "truncated", lambda d, i, o: d.write(i, d.path(i).read_bytes()[:100_000])),
    ("error", "truncated", lambda d, i, o: d.write(i, b"")),
    ("error", "unreadable", lambda d, i, o: d.write(i, b"<html>Too many requests</html>")),
    ("error", "damaged", lambda d, i, o: d.splice(i, NOISE, len(NOISE))),
    ("error", "damaged", lambda d, i, o: d.splice(i, bytes(1024), 1024)),
    ("error", "damaged", lambda d, i, o: d.splice(i, b"", 4096)),  # last of the three: only the decoder notices
    ("error", "shape", lambda d, i, o: d.resave(i, lambda photo: photo.rotate(90, expand=True))),
    ("error", "shape", lambda d, i, o: d.resave(i, lambda photo: photo.crop((0, 0, 1500, 1000)))),
    ("error", "exif", lambda d, i, o: d.resave(i, lambda photo: photo, exif=exif_of(6))),
    ("warning", "exif", lambda d, i, o: d.resave(i, lambda photo: photo, exif=exif_of(3))),
    ("warning", "size", lambda d, i, o: d.resave(i, lambda photo: photo.resize((1600, 800)))),
    ("warning", "mode", lambda d, i, o: d.resave(i, lambda photo: photo.convert("L"))),
    ("warning", "mode", lambda d, i, o: d.resave(i, lambda photo: photo.convert("CMYK"))),
    ("error", "flat", lambda d, i, o: d.resave(i, greyed)),
    ("warning", "flat", lambda d, i, o: d.resave(i, lambda photo: greyed(photo, (20, 20, 20)))),
    ("error", "unreadable", lambda d, i, o: d.promise(i, 40_000, 20_000)),
    ("warning", "copy", lambda d, i, o: shutil.copy(d.path(o), d.path(i))),
    ("warning", "near_copy", lambda d, i, o: d.save_brighter(i, o)),
    ("warning", "ndvi", lambda d, i, o: d.say(i, "Pre_GSHH_NDVI", "65")),
    ("warning", "height", lambda d, i, o: d.say(i, "Height_Ave_cm", "-2")),
    ("warning", "blank", lambda d, i, o: d.say(i, "State", " ")),
    ("warning", "blank", lambda d, i, o: d.say(i, "Species", "")),
    ("warning", "spelling", lambda d, i, o: d.say(i, "State", d.long.loc[d.rows(i), "State"].iloc[0].lower() + " ")),
    ("note", "lonely_state", lambda d, i, o: d.say(i, "State", "Qld")),
    ("warning", "far_date", lambda d, i, o: d.say(i, "Sampling_Date", "2051/9/4")),
    ("warning", "balance", lambda d, i, o: d.weigh(i, "Dry_Total_g", "99")),
    ("warning", "extreme", lambda d, i, o: d.weigh_all(i, 900, 0, 0)),
    ("warning", "bare", lambda d, i, o: d.weigh_all(i, 0, 0, 0)),
    ("warning", "zero_green", lambda d, i, o: d.weigh_all(i, 0, 0, 7)),
    ("warning", "same_labels", lambda d, i, o: d.same_labels(i, o)),
]


@pytest.fixture(scope="module")
def broken(clean_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, str]]]:
    "A folder with all the defects, each in a photograph of its own, and what must be reported."
    folder = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(clean_dir, folder)
    data = Data(folder)
    ids = sorted(data.long["sample_id"].str.split("__").str[0].unique())
    others = ids[: len(ids) - len(DEFECTS)]  # before the victims, which are reported as copies of them
    greenest = max(ids[len(others) :], key=lambda i: _green_share(read_photo(data.path(i))))
    victims = iter([i for i in ids[len(others) :] if i != greenest])
    expected = []
    for number, (severity, check, spoil) in enumerate(DEFECTS):
        victim = greenest if check == "zero_green" else next(victims)
        spoil(data, victim, others[number % len(others)])
        expected.append((severity, check, victim))
    write_csv(data.long, folder / "train.csv")
    return folder, expected


def told(report: pd.DataFrame) -> list[tuple[str, str, str]]:
    "What is reported of single photographs, artefacts aside."
    told = report[~report["check"].isin(["artefacts", "unnamed"])]
    return sorted(told[["severity", "check", "image_id"]].itertuples(index=False, name=None))


def test_clean_data_have_nothing_but_notes(clean_dir: Path) -> None:
    report = audit_folder(clean_dir)
    assert report.loc[report["severity"] != "note"].to_dict("records") == []


def test_each_defect_is_found_and_nothing_else(broken: tuple[Path, list]) -> None:
    folder, expected = broken
    report = audit_folder(folder)
    assert told(report) == sorted(expected)
    no_row = [victim for _, check, victim in expected if check in ("path", "shared_file")]
    unnamed = report.loc[report["check"] == "unnamed", "found"].item()
    assert unnamed == f"2 photographs that no row names: {no_row[0]}.jpg, {no_row[1]}.jpg"
    assert report["severity"].tolist() == sorted(report["severity"], key=["error", "warning", "note"].index)


def test_without_pixels_only_what_pixels_tell_is_lost(broken: tuple[Path, list]) -> None:
    folder, expected = broken
    unheard = [finding for finding in expected if finding[1] == "damaged"][-1]
    unseen = [finding for finding in expected if finding[1] in SEEN_IN_PIXELS]
    report = audit_folder(folder, pixels=False)
    assert told(report) == sorted(set(expected) - {unheard, *unseen})
    tables_only = audit(read_text_csv(folder / "train.csv", TRAIN_COLUMNS))
    assert set(told(tables_only)) < set(told(report))


def test_errors_stop_and_all_are_listed(broken: tuple[Path, list]) -> None:
    folder, expected = broken
    report = audit_folder(folder, pixels=False)
    with pytest.raises(ValueError) as stopped:
        stop_on_errors(report)
    for finding in report[report["severity"] == "error"].itertuples():
        assert finding.image_id in str(stopped.value) and finding.where in str(stopped.value)
    stop_on_errors(report[report["severity"] != "error"])


def test_command(clean_dir: Path, broken: tuple[Path, list], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    audit_main([str(clean_dir), "--no-pixels"])
    assert "errors: 0, warnings: 0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        audit_main([str(broken[0]), "--no-pixels", "--csv", str(tmp_path / "report.csv")])
    assert stopped.value.code == 1
    assert "error missing (1): download the data" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "report.csv")) == len(audit_folder(broken[0], pixels=False))


def test_nothing_in_a_cell_makes_it_crash(clean_dir: Path) -> None:
    cells = [
        "",
        " ",
        "nan",
        None,
        np.nan,
        np.inf,
        "1e999",
        -1,
        10**30,
        "__",
        "a__b__c",
        "\0",
        "é",
        [1],
        {"a": 2},
        True,
        "0/0/0",
    ]
    cells += ["train", "../" * 50, "x" * 5000, pd.Timestamp("2015-09-04"), "9999-12-31", "Dry_Green_g"]
    clean = read_text_csv(clean_dir / "train.csv", TRAIN_COLUMNS)[:60].astype(object)
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 1.0):
        long = clean.copy()
        for row in range(len(long)):
            for column in range(long.shape[1]):
                if rng.random() < share:
                    long.iat[row, column] = cells[rng.integers(len(cells))]
        report = audit(long.sample(frac=1, replace=True, random_state=0), clean_dir, pixels=False)
        assert (report["severity"] == "error").any()
    assert audit(clean.drop(columns=["State", "target"]))["found"].tolist() == ["no column State, target"]


def as_mpo(photo: PIL.Image.Image) -> bytes:
    "A photograph with a smaller one behind it, as phones store depth and gain maps."
    file = io.BytesIO()
    photo.save(file, "MPO", save_all=True, append_images=[photo.resize((500, 250))])
    return file.getvalue()


def phone_files(jpeg: Path) -> dict[str, bytes]:
    "What phones make of a photograph, all of it whole; and each of them cut in the picture."
    data = jpeg.read_bytes()
    with PIL.Image.open(jpeg) as photo:
        small = io.BytesIO()
        photo.resize((160, 80)).save(small, "JPEG")
        thumbnail = small.getvalue()  # with an end marker of its own
        exif = b"\xff\xe1" + (2 + len(thumbnail)).to_bytes(2, "big") + thumbnail
        mpo = as_mpo(photo)
    film = b"\0\0\0\x18ftypmp42" + NOISE * 8
    whole = {"motion": data + film, "padding": data + bytes(8192), "mpo": mpo, "thumbnail": data[:2] + exif + data[2:]}
    whole |= {"gain_map": data + data, "cut_behind": mpo[:-2000], "all": data[:2] + exif + data[2:] + data + film}
    return whole


def test_phone_photographs_are_whole_everywhere_and_cut_ones_nowhere(clean_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(clean_dir, tmp_path / "data")
    data = Data(tmp_path / "data")
    ids = sorted(data.long["sample_id"].str.split("__").str[0].unique())
    for i, (name, content) in zip(ids, phone_files(data.path(ids[0])).items(), strict=False):
        plain_HW3 = read_photo(clean_dir / f"train/{ids[0]}.jpg")
        data.write(i, content)
        check_photo_file(data.path(i))
        if name not in ("mpo", "cut_behind"):  # saved again by PIL
            np.testing.assert_array_equal(read_photo(data.path(i)), plain_HW3)
        load_halves(data.path(i), 64)
    report = audit_folder(data.folder)
    assert set(report["severity"]) <= {"note", "warning"}
    assert set(report.loc[report["severity"] == "warning", "check"]) <= {"near_copy"}  # they are all of one photograph
    for i, content in zip(ids, phone_files(clean_dir / f"train/{ids[0]}.jpg").values(), strict=False):
        data.write(i, content[:90_000])
        with pytest.raises(ValueError, match="truncated"):
            read_photo(data.path(i))
    report = audit_folder(data.folder, pixels=False)
    assert (report["check"] == "truncated").sum() == 7


def test_names_that_differ_in_case_only_and_backslashes(clean_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(clean_dir, tmp_path / "data")
    data = Data(tmp_path / "data")
    first = sorted(data.long["sample_id"].str.split("__").str[0].unique())[0]
    for path in (tmp_path / "data" / "train").iterdir():
        path.rename(path.with_suffix(".JPG"))
    case = f"{first}.JPG is there: names differ in case only; rename or edit the table"
    finding = audit_folder(data.folder).set_index("check").loc["missing"]
    assert case in finding["found"] and "none of its 48 photographs is there" in finding["found"]
    for read in (read_photo, check_photo_file, lambda path: load_halves(path, 64)):
        with pytest.raises(FileNotFoundError, match=case):
            read(data.path(first))
    with pytest.raises(FileNotFoundError, match="names differ in case only"):
        check_photos(data.long, data.folder)
    data.path(first).with_suffix(".JPG").rename(data.path(first))
    data.long["image_path"] = data.long["image_path"].str.replace("/", "\\")
    write_csv(data.long, data.folder / "train.csv")
    windows = f"image_path uses backslashes; write train/{first}.jpg"
    assert windows in audit_folder(data.folder).set_index("check").loc["missing", "found"]
    with pytest.raises(FileNotFoundError) as stopped:
        check_photos(data.long, data.folder)
    assert windows in str(stopped.value)


@pytest.mark.skipif("BIOMASS_DATA" not in os.environ, reason="BIOMASS_DATA names no folder with the real train.csv")
def test_real_table_has_the_known_imbalance_and_nothing_else() -> None:
    report = audit(read_text_csv(Path(os.environ["BIOMASS_DATA"]) / "train.csv", TRAIN_COLUMNS))
    assert told(report) == [("warning", "balance", "ID2014192906")]
