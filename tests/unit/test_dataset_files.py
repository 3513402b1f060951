"""Files that make sites: CSV lists, VisA's split file, mixtures of public data sets, and clear words about errors."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from feddymem.dataset_files import load_sites
from feddymem.datasets import DatasetError, SiteData, TestImage
from tests.unit.test_datasets import image
from tests.unit.test_datasets import site as mvtec_category


def csv_file(root: Path, text: str, name: str = "images.csv") -> Path:
    """A CSV file, and every image and mask that it names."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    for path in re.findall(r"[^,\s]+\.png", text):
        image((file.parent.parent if file.parent.name == "split_csv" else file.parent) / path)
    return file


def mixture(root: Path, text: str) -> Path:
    (root / "sites.yaml").write_text(text)
    return root / "sites.yaml"


def names(root: Path, site: SiteData) -> tuple[list[str], list[tuple[str, str]]]:
    return (
        [path.relative_to(root).as_posix() for path in site.train],
        [(each.path.relative_to(root).as_posix(), each.kind) for each in site.test],
    )


def test_a_csv_makes_sites(tmp_path: Path) -> None:
    file = csv_file(
        tmp_path,
        "path,label,mask,site,split\n"
        "z.png,good,,b,train\n"
        "y.png,OK,,a,train\nx.png,0,,a,train\n"
        "w.png,scratch,w_mask.png,a,test\nv.png,1,,a,test\nu.png,Normal,,a,test\n",
    )
    a, b = load_sites(file)
    assert (a.name, b.name) == ("a", "b")
    assert names(tmp_path, a) == (
        ["x.png", "y.png"],
        [("u.png", "good"), ("v.png", "defect"), ("w.png", "scratch")],
    )
    assert a.test[2].mask == tmp_path / "w_mask.png"
    assert names(tmp_path, b) == (["z.png"], [])


def test_the_order_of_a_csv_does_not_matter(tmp_path: Path) -> None:
    rows = [f"{number:03}.png,{'good' if number % 3 else 'crack'},,a\n" for number in range(60)]
    sites = []
    for seed in range(2):
        random.Random(seed).shuffle(rows)  # noqa: S311 - no secret
        sites.append(load_sites(csv_file(tmp_path, "path,label,mask,site\n" + "".join(rows))))
    assert sites[0] == sites[1]


def test_a_csv_may_have_absolute_paths_a_byte_order_mark_and_columns_of_its_own(tmp_path: Path) -> None:
    far = image(tmp_path / "far/train/x.png")
    (tmp_path / "near").mkdir()
    file = tmp_path / "near/images.csv"
    file.write_text(f"\ufeffcamera,path,label,mask,site,split\n7,{far},good,,a,train\n", encoding="utf-8")
    assert load_sites(file)[0].train == (far,)


def test_folders_named_train_and_test_decide_where_split_does_not(tmp_path: Path) -> None:
    file = csv_file(
        tmp_path,
        "path,label,mask,site,split\n"
        "train/a.png,good,,a,\ntest/b.png,good,,a,\ntest/c.png,hole,,a,\ntrain/d.png,good,,a,test\n",
    )
    (site,) = load_sites(file)
    assert names(tmp_path, site) == (
        ["train/a.png"],
        [("test/b.png", "good"), ("test/c.png", "hole"), ("train/d.png", "good")],
    )


def test_without_any_word_four_of_five_normal_images_train_wherever_the_data_lie(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,{'good' if number < 200 else 'crack'},,a\n" for number in range(220))
    splits = []
    for folder in (tmp_path / "here", tmp_path / "test" / "there"):
        (site,) = load_sites(csv_file(folder, "path,label,mask,site\n" + rows))
        splits.append(names(folder, site))
        assert sum(each.defect for each in site.test) == 20
        assert 0.72 < len(site.train) / 200 < 0.88
    assert splits[0] == splits[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.png,crack,,a,train", "line 3: a defect (crack) is marked for training"),
        ("train/a.png,crack,,a,", "line 3: a defect (crack) is marked for training"),
        ("a.png,good,,a,validation", "line 3: split is 'validation'; expected train, test or nothing"),
        ("a.gif,good,,a,train", "line 3: file a.gif does not exist in "),
        ("a.png,crack,none.bmp,a,test", "line 3: file none.bmp does not exist in "),
        (",good,,a,train", "line 3: path, label or site is empty; only mask and split may be"),
        ("a.png,,,a,train", "line 3: path, label or site is empty"),
        ("a.png,good", "line 3: path, label or site is empty"),
        ("a.png,good,,a b,train", "site name 'a b' must be 1 to 63 letters"),
        ("a.png,good,,b,test", "site b has no normal image for training"),
        ("ok.png,good,,a,test", "site a has the image "),
    ],
)
def test_a_row_that_is_off_is_named(tmp_path: Path, row: str, said: str) -> None:
    file = csv_file(tmp_path, f"path,label,mask,site,split\nok.png,good,,a,train\n{row}\n")
    with pytest.raises(DatasetError, match=re.escape(said)):
        load_sites(file)


def test_a_csv_with_other_columns_is_told_which(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"images\.csv has the columns file,class; expected path,label,mask,site"):
        load_sites(csv_file(tmp_path, "file,class\n"))
    with pytest.raises(DatasetError, match=r"has the columns none; expected"):
        load_sites(csv_file(tmp_path, ""))


def test_a_csv_without_rows_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"images\.csv lists no image"):
        load_sites(csv_file(tmp_path, "path,label,mask,site\n"))
    (tmp_path / "images.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"images\.csv cannot be read as CSV in UTF-8"):
        load_sites(tmp_path / "images.csv")


VISA = """object,split,label,image,mask
pcb1,train,normal,pcb1/Data/Images/Normal/0001.png,
pcb1,test,normal,pcb1/Data/Images/Normal/0002.png,
pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.png,pcb1/Data/Masks/Anomaly/000.png
candle,train,normal,candle/Data/Images/Normal/0001.png,
"""


@pytest.mark.parametrize("name", ["split_csv/1cls.csv", "1cls.csv"])
def test_each_object_of_visa_is_a_site(tmp_path: Path, name: str) -> None:
    candle, pcb = load_sites(csv_file(tmp_path, VISA, name))
    assert (candle.name, pcb.name) == ("candle", "pcb1")
    assert names(tmp_path / "pcb1/Data/Images", pcb) == (
        ["Normal/0001.png"],
        [("Anomaly/000.png", "anomaly"), ("Normal/0002.png", "good")],
    )
    assert pcb.test[0].mask == tmp_path / "pcb1/Data/Masks/Anomaly/000.png"


def test_visa_with_defects_for_training_is_refused(tmp_path: Path) -> None:
    text = VISA.replace("pcb1,test,anomaly", "pcb1,train,anomaly")
    with pytest.raises(DatasetError, match=r"1cls\.csv, line 4: a defect \(anomaly\) is marked for training"):
        load_sites(csv_file(tmp_path, text, "split_csv/1cls.csv"))


def kolektor(root: Path) -> None:
    defect = np.zeros((6, 8), np.uint8)
    defect[2, 3] = 255
    for part in ("train", "test"):
        for number, mask in (("10", 0), ("11", defect)):
            image(root / part / f"{number}.png")
            image(root / part / f"{number}_GT.png", mask)
    image(root / "train/10_GT (copy).png")


def public_data_sets(root: Path) -> None:
    mvtec_category(root / "MVTecAD", "screw")
    mvtec_category(root / "MPDD", "bracket_black")
    csv_file(root / "VisA", VISA, "split_csv/1cls.csv")
    for part in ("train/ok/0000.bmp", "test/ok/0001.bmp", "test/ko/0002.bmp", "test/ko/0003.bmp", "test/ko/0004.bmp"):
        image(root / "BTAD/01" / part)
    image(root / "BTAD/01/ground_truth/ko/0002.png")
    image(root / "BTAD/01/ground_truth/ko/0003.bmp")
    kolektor(root / "KolektorSDD2")


MIXTURE = """
sites:
  screw-plant: {layout: mvtec, root: MVTecAD, category: screw}
  pcb-plant: {layout: visa, root: VisA, category: pcb1}
  metal: {layout: mpdd, root: MPDD, category: bracket_black}
  btad: {layout: btad, root: BTAD, category: "01"}
  ksdd2: {layout: kolektor_sdd2, root: KolektorSDD2}
"""


def test_a_mixture_makes_sites_of_public_data_sets(tmp_path: Path) -> None:
    public_data_sets(tmp_path)
    sites = {site.name: site for site in load_sites(mixture(tmp_path, MIXTURE))}
    assert list(sites) == ["btad", "ksdd2", "metal", "pcb-plant", "screw-plant"]
    assert [(len(site.train), len(site.test)) for site in sites.values()] == [(1, 4), (1, 2), (2, 3), (1, 2), (2, 3)]
    assert sites["screw-plant"].test[0].mask == tmp_path / "MVTecAD/screw/ground_truth/crack/000_mask.png"
    assert sites["metal"].test[0].mask == tmp_path / "MPDD/bracket_black/ground_truth/crack/000_mask.png"


def test_masks_of_btad_are_png_or_bmp(tmp_path: Path) -> None:
    public_data_sets(tmp_path)
    (site,) = load_sites(mixture(tmp_path, "sites: {a: {layout: btad, root: BTAD, category: '01'}}"))
    masks = tmp_path / "BTAD/01/ground_truth/ko"
    assert [(each.kind, each.mask) for each in site.test] == [
        ("ko", masks / "0002.png"),
        ("ko", masks / "0003.bmp"),
        ("ko", None),
        ("good", None),
    ]


def test_masks_tell_the_defects_of_kolektor_sdd2_and_none_trains(tmp_path: Path) -> None:
    kolektor(tmp_path / "data")
    (site,) = load_sites(mixture(tmp_path, "sites: {a: {layout: kolektor_sdd2, root: data}}"))
    test = tmp_path / "data/test"
    assert site.train == (tmp_path / "data/train/10.png",)
    assert site.test == (
        TestImage(test / "10.png", "good", None),
        TestImage(test / "11.png", "defect", test / "11_GT.png"),
    )
    (test / "11_GT.png").unlink()
    with pytest.raises(DatasetError, match=r"site a: .*11\.png needs a mask 11_GT\.png that says whether"):
        load_sites(tmp_path / "sites.yaml")


def test_a_site_may_join_several_categories(tmp_path: Path) -> None:
    public_data_sets(tmp_path)
    csv_file(tmp_path / "own", "path,label,mask,site,split\nx.png,good,,east,train\ny.png,good,,west,train\n")
    file = mixture(
        tmp_path,
        """
        sites:
          both:
            - {layout: mvtec, root: MVTecAD, category: screw}
            - {layout: csv, root: own/images.csv, category: east}
        """,
    )
    (site,) = load_sites(file)
    assert [path.name for path in site.train] == ["000.png", "001.png", "x.png"]
    assert len(site.test) == 3


def test_only_the_category_in_use_needs_to_be_there(tmp_path: Path) -> None:
    csv_file(tmp_path / "VisA", VISA, "split_csv/1cls.csv")
    (tmp_path / "VisA/candle/Data/Images/Normal/0001.png").unlink()
    text = "sites: {a: {layout: visa, root: VisA, category: pcb1}}"
    assert len(load_sites(mixture(tmp_path, text))[0].train) == 1


@pytest.mark.parametrize("layout", ["mvtec", "csv"])
def test_a_category_is_split_over_sites_evenly_and_wherever_it_lies(tmp_path: Path, layout: str) -> None:
    parts = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        for number in range(90):
            image(folder / f"data/x/train/good/{number:03}.png")
        rows = "".join(f"x/train/good/{number:03}.png,good,,x\n" for number in range(90))
        (folder / "data/images.csv").write_text("path,label,mask,site\n" + rows)
        root = "data" if layout == "mvtec" else "data/images.csv"
        file = mixture(folder, f"sites: {{line: {{layout: {layout}, root: {root}, category: x, split_over: 3}}}}")
        sites = load_sites(file)
        assert [site.name for site in sites] == ["line-1", "line-2", "line-3"]
        assert sum(len(site.train) for site in sites) == 90
        assert all(18 <= len(site.train) <= 42 for site in sites)
        parts.append([names(folder, site) for site in sites])
    assert parts[0] == parts[1]


def test_where_images_train_and_where_they_go_is_unrelated(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,good,,x\n" for number in range(200))
    csv_file(tmp_path, "path,label,mask,site\n" + rows)
    file = mixture(tmp_path, "sites: {a: {layout: csv, root: images.csv, category: x, split_over: 2}}")
    shares = [len(site.train) / (len(site.train) + len(site.test)) for site in load_sites(file)]
    assert shares == pytest.approx([0.8, 0.8], abs=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sites: {}", "sites.yaml: sites: "),
        ("", "sites.yaml: the file: "),
        ("sites: [", "sites.yaml cannot be read as YAML in UTF-8"),
        ("sites: {a: []}", "sites.yaml: sites.a: "),
        ("sites: {a: {layout: mvtec, root: ., colour: red, category: x}}", "sites.yaml: sites.a.0.colour: Extra"),
        ("sites: {a: {layout: imagenet, root: ., category: x}}", "sites.yaml: sites.a.0.layout: Input should be"),
        ("sites: {a: {layout: mvtec, root: ., category: 01}}", "sites.yaml: sites.a.0.category: Input should be"),
        ("sites: {a: {layout: mvtec, root: .}}", "sites.a.0: Value error, layout mvtec needs a category"),
        ("sites: {a: {layout: kolektor_sdd2, root: ., category: x}}", "layout kolektor_sdd2 has no category"),
        ("sites: {a: {layout: mvtec, root: ., category: x, split_over: 0}}", "sites.a.0.split_over: Input should be"),
        ("sites: {a: {layout: mvtec, root: MVTecAD, category: nut}}", "sites.yaml, site a: folder "),
        ("sites: {a: {layout: visa, root: VisA, category: nut}}", "1cls.csv lists no image of nut"),
        ("sites: {a: {layout: visa, root: MVTecAD, category: nut}}", "1cls.csv cannot be read as CSV"),
        ("sites: {a b: {layout: mvtec, root: MVTecAD, category: screw}}", "site name 'a b' must be"),
        (
            "sites: {a: [{layout: mvtec, root: MVTecAD, category: screw}, {layout: mpdd, root: MVTecAD, category: "
            "screw}]}",
            "000.png 2 times; list each once",
        ),
        (
            "sites: {a-1: {layout: mvtec, root: MVTecAD, category: screw}, a: {layout: mvtec, root: Many, category: x, "
            "split_over: 2}}",
            "sites.yaml makes 2 sites named a-1; rename all but one",
        ),
        (
            "sites: {a: {layout: mvtec, root: MVTecAD, category: screw, split_over: 60}}",
            "has no normal image for training",
        ),
    ],
)
def test_a_mixture_that_is_off_is_told_where(tmp_path: Path, text: str, said: str) -> None:
    public_data_sets(tmp_path)
    for number in range(30):
        image(tmp_path / f"Many/x/train/good/{number}.png")
    with pytest.raises(DatasetError, match=re.escape(said)):
        load_sites(mixture(tmp_path, text))
