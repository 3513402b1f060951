from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import grpc
import pytest
from rich.console import Console

import services.cli.inspect
from feddymem.datasets import DatasetError
from feddymem.v1.inspection_pb2 import VERDICT_ANOMALOUS, VERDICT_NORMAL, Guarantee, InspectRequest, InspectResponse
from services.cli.inspect import Inspection, find_images, inspect
from tests.scripted_service import scripted_service


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/2.png", "b/1.JPG", "b/deep/3.tif", "b/notes.txt", "a/4.bmp", "5.jpeg", "odd[1].png", "raw.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (["b"], ["b/1.JPG", "b/2.png", "b/deep/3.tif"]),
        (["5.jpeg", "a"], ["5.jpeg", "a/4.bmp"]),
        (["b/2.png", "b"], ["b/2.png", "b/1.JPG", "b/deep/3.tif"]),
        (["b/*"], ["b/1.JPG", "b/2.png", "b/deep/3.tif"]),
        (["**/*.png"], ["b/2.png", "odd[1].png"]),
        (["*/*.[bj]*"], ["a/4.bmp"]),
        (["odd[1].png"], ["odd[1].png"]),
        (["raw.dat"], ["raw.dat"]),
    ],
)
def test_files_folders_and_patterns_are_found_in_order_each_once(
    folder: Path, inputs: list[str], found: list[str]
) -> None:
    assert [str(path) for path in find_images(inputs)] == found
    absolute = find_images([str(folder / each) for each in inputs])
    assert [str(path.relative_to(folder)) for path in absolute] == found


@pytest.mark.parametrize("nothing", ["missing.png", "*.gif", "empty", "e*", "b/*.txt"])
def test_what_has_no_image_is_named(folder: Path, nothing: str) -> None:
    with pytest.raises(DatasetError) as caught:
        find_images(["5.jpeg", nothing])
    assert nothing in str(caught.value)


def judge(request: InspectRequest) -> InspectResponse | grpc.StatusCode:
    """Scores an image with its length; an empty one is none."""
    assert (request.false_alarm_rate, request.regions) == (0.1, True)
    if not request.encoded:
        return grpc.StatusCode.INVALID_ARGUMENT
    anomalous = request.HasField("threshold") and len(request.encoded) >= request.threshold
    return InspectResponse(
        score=len(request.encoded),
        verdict=VERDICT_ANOMALOUS if anomalous else VERDICT_NORMAL,
        threshold=3,
        p_value=0.25,
        normalised_score=0.75,
        guarantee=Guarantee(false_alarm_rate=0.125, images=7),
    )


@pytest.fixture
def asked(folder: Path) -> Inspection:
    """All images of the folder, the last of which is none."""
    for number, path in enumerate(reversed(find_images(["."]))):
        path.write_bytes(bytes(number))
    return Inspection(
        (".",),
        *("", None, "", ""),
        threshold=3,
        pixel_threshold=None,
        false_alarm_rate=0.1,
        regions=True,
        heatmaps=None,
        as_json=True,
        csv="all.csv",
    )


def test_lines_are_whole_although_a_terminal_shows_progress(
    asked: Inspection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(services.cli.inspect, "_errors", Console(file=terminal, force_terminal=True, highlight=False))
    with scripted_service(judge) as service:
        assert inspect(dataclasses.replace(asked, server=service.address)) == 4
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == ["5.jpeg", "a/4.bmp", "b/1.JPG", "b/2.png", "b/deep/3.tif", "odd[1].png"]
    assert [row.get("score") for row in rows] == [5, 4, 3, 2, 1, None]
    calibrated = {name: rows[0][name] for name in ("threshold", "p_value", "normalised_score")}
    assert calibrated == {"threshold": 3, "p_value": 0.25, "normalised_score": 0.75}
    assert (rows[0]["guaranteed_rate"], rows[0]["guaranteed_images"]) == (0.125, 7)
    assert "6/6" in terminal.getvalue()
    assert "3 anomalous, 1 failed, 2 normal" in terminal.getvalue()
    with Path("all.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["verdict"] for line in lines] == [*["anomalous"] * 3, *["normal"] * 2, ""]
    assert [line["p_value"] for line in lines] == [*["0.25"] * 5, ""]
    assert [line["regions"] for line in lines] == [*["0"] * 5, ""]
    assert [line["code"] for line in lines] == [*[""] * 5, "3"]


def test_what_is_done_is_kept_when_nobody_answers_any_more(
    asked: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_service(lambda r: grpc.StatusCode.NOT_FOUND if len(r.encoded) == 3 else judge(r)) as service:
        assert inspect(dataclasses.replace(asked, server=service.address)) == 3
    printed = capsys.readouterr()
    assert [json.loads(line)["score"] for line in printed.out.splitlines()] == [5, 4]
    assert "1.JPG: as told" in printed.err


def test_names_of_images_are_printed_as_they_are(
    asked: Inspection, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as markup, which knows `[/x]` only behind an `[x]`, and `[red]` as a colour."""
    monkeypatch.setenv("COLUMNS", "200")  # each name on one line
    names = ["parts/[red]/1.png", "parts/[/x].png", "parts/:x:.png"]
    for number, name in enumerate(names, 1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(number))
    (tmp_path / "parts/[b]none.png").touch()
    with scripted_service(judge) as service:
        assert (
            inspect(dataclasses.replace(asked, images=("parts",), server=service.address, as_json=False, csv=None)) == 4
        )
    printed = capsys.readouterr()
    assert all(name in printed.out for name in names)
    assert "parts/[b]none.png: as told" in printed.err
