"""A report is whole, strict JSON, and its page stands by itself and runs nothing."""

import base64
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image
from rich.console import Console

from hasten.measure.html import html
from hasten.measure.machine import machine
from hasten.measure.quality import Quality
from hasten.measure.report import Cost, Report
from hasten.measure.timing import Spread


def cost(scale):
    return Cost(
        seconds=Spread.of([3.0 / scale]),
        denoising_seconds=Spread.of([2.5 / scale]),
        first_call_seconds=4.0,
        calls=50 / scale,
        flops=2_500_000_000_000 // scale,
        activation_bytes=40_000_000,
        weight_bytes=123_456_789 // scale,
    )


@pytest.fixture
def report():
    return Report(
        recipe={"hasten": 1, "solver": "dpmpp_2m", "steps": 8},
        pipeline="emoji-flow <script>alert('x')</script> & \"co\"",
        untouched=cost(1),
        tuned=cost(4),
        end_to_end=Spread.of([3.9, 4.0, 4.1]),
        denoising=Spread.of([5.0]),
        quality=Quality(0.93, 0.9, 0.96, 0.95, 0.93, 0.2, 64, 64),
        psnr_db=math.inf,
        feature_distance=0.01,
        frechet=3.2,
        frechet_untouched=3.0,
        kernel=-1e-4,
        kernel_untouched=1e-5,
        features="efficientnet-lite0@224",
        machine=machine(),
    )


def test_the_file_is_strict_json_of_the_whole(report, tmp_path):
    report.write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == report.to_dict()
    assert found["report"] == 1
    assert found["recipe"] == report.recipe
    assert found["psnr_db"] is None  # infinite
    assert found["tuned"]["seconds"]["median"] == 0.75
    assert found["quality"]["low"] == 0.9
    assert found["machine"]["torch"] == report.machine["torch"]


def test_the_table_tells_both_sides_and_the_gain(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table())
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert "4.00x (3.95-4.05)" in lines["seconds an image"]
    assert "123 MB" in lines["weights"]
    assert "30.9 MB" in lines["weights"]
    assert "4.00x" in lines["weights"]
    assert "2.5 T" in lines["FLOPs an image"]
    assert "0.930 (0.900-0.960)" in lines["quality (1: like untouched)"]
    assert "inf dB" in lines["same seeds: PSNR"]


def test_what_was_not_counted_is_told_so(report):
    silent = replace(report, tuned=replace(report.tuned, flops=None))
    row = next(r for r in silent.rows() if r[0] == "FLOPs an image")
    assert row[2:] == ("not counted", "")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_by_itself(report):
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    text = html(report, {"Same prompts <b>& seeds": picture, "Time": picture})
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("img") == 2
    assert "url(" not in text
    assert "http" not in text
    for link in page.links:
        kind, data = link.split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()


def test_the_page_tells_what_the_table_tells_and_runs_nothing(report):
    page = Page(html(report, {"<img src=x onerror=alert(1)>": Image.new("RGB", (2, 2))}))
    assert report.pipeline in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "solver: dpmpp_2m" in page.text
    assert all(cell in page.text for row in report.rows() for cell in row)
