"""Where a data set's sites are: in folders, in CSV lists of images, ours and VisA's, or in mixtures of public data sets
in YAML.

docs/data-sets.md has an example of each, and the folders that each public data set comes in.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from feddymem.datasets import (
    GOOD,
    DatasetError,
    Images,
    SiteData,
    TestImage,
    list_images,
    load_category,
    make_site,
    read_mask,
)
from feddymem.images import ImageError

NORMAL_LABELS = frozenset({"good", "normal", "ok", "0"})
TRAIN_SHARE = 0.8
"""Share of the normal images that train where a CSV does not say."""
_OUR_COLUMNS = {"path": "path", "label": "label", "mask": "mask", "site": "site"}
_VISA_COLUMNS = {"path": "image", "label": "label", "mask": "mask", "site": "object"}


def load_sites(path: Path) -> tuple[SiteData, ...]:
    """All sites of a data set, by name.

    Args:
        path: a folder of site folders in the MVTec AD layout; a CSV file of images, ours or VisA's; or a YAML file that
            makes sites out of several public data sets.

    Raises:
        DatasetError: nothing there, not in the layout, or a site without images for training.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise DatasetError(f"data set {path} does not exist; expected a folder, a CSV or a YAML file")
    if path.suffix.lower() == ".csv":
        return load_csv(path)
    if path.suffix.lower() in {".yaml", ".yml"}:
        return load_mixture(path)
    raise DatasetError(f"data set {path} is neither a folder nor a .csv, .yaml or .yml file")


def _load_folder(root: Path) -> tuple[SiteData, ...]:
    folders = sorted(path for path in root.iterdir() if (path / "train" / GOOD).is_dir())
    if not folders:
        raise DatasetError(
            f"data folder {root} has no SITE/train/{GOOD} folder; expected one folder per site (MVTec AD layout)"
        )
    return tuple(make_site(folder.name, *load_category(folder)) for folder in folders)


def load_csv(path: Path) -> tuple[SiteData, ...]:
    """Sites of a CSV file, by name.

    Its header has `path,label,mask,site` and perhaps `split`, or is VisA's own: `object,split,label,image,mask`.

    Raises:
        DatasetError: another header, or a row that is off; the text names the row.
    """
    rows = defaultdict(list)
    for row in _read_rows(path):
        rows[row.site].append(row)
    if not rows:
        raise DatasetError(f"{path} lists no image")
    return tuple(make_site(site, *_images(path, rows[site])) for site in sorted(rows))


@dataclass(frozen=True)
class _Row:
    """One line of a CSV file, as it stands there; `number` is the line's."""

    number: int
    path: str
    label: str
    mask: str
    site: str
    split: str = ""


def _read_rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = _columns(path, reader.fieldnames or ())
            for cells in reader:
                yield _Row(reader.line_num, **{name: cells[column].strip() for name, column in columns.items()})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """Column of each of our names: path, label, mask, site, and split where there is one."""
    for columns in (_OUR_COLUMNS, _VISA_COLUMNS):
        if set(columns.values()) <= set(header):
            return columns | ({"split": "split"} if "split" in header else {})
    raise DatasetError(
        f"{path} has the columns {','.join(header) or 'none'}; expected path,label,mask,site (and split where you have "
        "one), or object,split,label,image,mask as in VisA"
    )


def _images(file: Path, rows: Iterable[_Row]) -> Images:
    """Images of one site's rows."""
    root = _csv_root(file)
    train, test = [], []
    for row in rows:
        try:
            image = _image(root, row)
            if _trains(row, image, root):
                train.append(image.path)
            else:
                test.append(image)
        except DatasetError as error:
            raise DatasetError(f"{file}, line {row.number}: {error}") from error
    return train, test


def _csv_root(file: Path) -> Path:
    """Folder that a CSV file's paths are relative to; VisA's files lie in a folder of their own beside the images."""
    return file.parent.parent if file.parent.name == "split_csv" else file.parent


def _image(root: Path, row: _Row) -> TestImage:
    if not (row.path and row.label and row.site):
        raise DatasetError("path, label or site is empty; only mask and split may be")
    for name in filter(None, (row.path, row.mask)):
        if not (root / name).is_file():
            raise DatasetError(f"file {name} does not exist in {root}")
    kind = _kind(row.label)
    return TestImage(root / row.path, kind, root / row.mask if row.mask and kind != GOOD else None)


def _kind(label: str) -> str:
    if label.lower() in NORMAL_LABELS:
        return GOOD
    return "defect" if label == "1" else label


def _trains(row: _Row, image: TestImage, root: Path) -> bool:
    """Whether an image is for training: as `split` says, else as the first folder called train or test says, else by
    hash.
    """
    if row.split not in {"", "train", "test"}:
        raise DatasetError(f"split is {row.split!r}; expected train, test or nothing")
    key = _key(image.path, root)
    folders = (part for part in Path(key).parts[:-1] if part in {"train", "test"})
    split = row.split or next(folders, "")
    if split == "train" and image.defect:
        raise DatasetError(f"a defect ({row.label}) is marked for training; memory banks are made of normal images")
    if split:
        return split == "train"
    return not image.defect and _drawn("train", key) < TRAIN_SHARE


def _key(path: Path, root: Path) -> str:
    """What is hashed of an image: its path below `root`, so that a data set may lie anywhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _drawn(purpose: str, key: str) -> float:
    """A number in 0..1, even over keys, always the same for one, and unrelated between purposes."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class _Entry(BaseModel):
    """One category of a public data set; `root` lies relative to the mixture file's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["mvtec", "mpdd", "visa", "btad", "kolektor_sdd2", "csv"]
    root: Path
    category: str = ""
    split_over: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _has_category(self) -> _Entry:
        if (self.layout == "kolektor_sdd2") == bool(self.category):
            raise ValueError(f"layout {self.layout} {'has no' if self.category else 'needs a'} category")
        return self

    def images(self, folder: Path) -> Images:
        """Its images; `folder` is the mixture file's."""
        root = folder / self.root
        match self.layout:
            case "kolektor_sdd2":
                return _load_kolektor_sdd2(root)
            case "visa":
                return _load_site_of_csv(root / "split_csv" / "1cls.csv", self.category)
            case "csv":
                return _load_site_of_csv(root, self.category)
            case "btad":
                return load_category(root / self.category, good="ok", masks=("{stem}.png", "{stem}.bmp"))
            case "mvtec" | "mpdd":
                return load_category(root / self.category)

    def site(self, name: str, image: Path, folder: Path) -> str:
        """Site of one of its images: `name`, or one of NAME-1 to NAME-N where the category is split."""
        if self.split_over == 1:
            return name
        root = folder / self.root
        key = _key(image, _csv_root(root) if self.layout == "csv" else root)
        return f"{name}-{1 + int(_drawn('site', key) * self.split_over)}"


class _Mixture(BaseModel):
    """Content of a mixture file: the entries of each site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: dict[str, Annotated[tuple[_Entry, ...], BeforeValidator(_as_list), Field(min_length=1)]] = Field(
        min_length=1
    )


def load_mixture(path: Path) -> tuple[SiteData, ...]:
    """Sites of a mixture file, by name.

    Raises:
        DatasetError: not such a file, or a data set that is not in its layout; the text names the key or the site.
    """
    sites: list[SiteData] = []
    for name, entries in _read_mixture(path).sites.items():
        try:
            sites += _mix(name, entries, path.parent)
        except DatasetError as error:
            raise DatasetError(f"{path}, site {name}: {error}") from error
    for name, count in Counter(site.name for site in sites).items():
        if count > 1:
            raise DatasetError(f"{path} makes {count} sites named {name}; rename all but one")
    return tuple(sorted(sites, key=lambda site: site.name))


def _read_mixture(path: Path) -> _Mixture:
    try:
        return _Mixture.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read as YAML in UTF-8: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DatasetError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from error


def _mix(name: str, entries: Iterable[_Entry], folder: Path) -> list[SiteData]:
    """The sites of one name: the images of all entries, joined."""
    train, test = defaultdict(list), defaultdict(list)
    for entry in entries:
        normal, tested = entry.images(folder)
        for path in normal:
            train[entry.site(name, path, folder)].append(path)
        for image in tested:
            test[entry.site(name, image.path, folder)].append(image)
    return [make_site(site, train[site], test[site]) for site in sorted({*train, *test})]


def _load_site_of_csv(path: Path, site: str) -> Images:
    rows = [row for row in _read_rows(path) if row.site == site]
    if not rows:
        raise DatasetError(f"{path} lists no image of {site}")
    return _images(path, rows)


def _load_kolektor_sdd2(root: Path) -> Images:
    """Images of KolektorSDD2; defects among its training images are left out."""
    train = [image.path for image in _kolektor_images(root / "train") if not image.defect]
    return train, _kolektor_images(root / "test")


def _kolektor_images(folder: Path) -> list[TestImage]:
    """Images NAME.png of a folder with masks NAME_GT.png; one with any pixel in its mask is a defect."""
    images = []
    for path in list_images(folder):
        if "_GT" in path.stem:
            continue
        mask = path.with_name(f"{path.stem}_GT.png")
        try:
            defect = read_mask(mask).any()
        except ImageError as error:
            raise DatasetError(
                f"{path} needs a mask {mask.name} that says whether it shows a defect: {error}"
            ) from error
        images.append(TestImage(path, "defect", mask) if defect else TestImage(path, GOOD, None))
    return images
