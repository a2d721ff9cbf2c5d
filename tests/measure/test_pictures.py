"""The sheet shows every picture where it belongs, untouched by scaling; the plot marks the front that nothing beats."""

import numpy as np
import pytest
from PIL import Image

from hasten.measure.pictures import CHOSEN, PAPER, Point, contact_sheet, front, gallery, pareto

COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff"]


def tiles(colours, side=64):
    return [Image.new("RGB", (side, side), c) for c in colours]


def places(sheet, colour):
    """Box (left, top, right, bottom) of a colour."""
    found = np.argwhere((np.asarray(sheet) == np.array(Image.new("RGB", (1, 1), colour))[0, 0]).all(-1))
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    assert len(found) == (right - left) * (bottom - top), "the picture is covered, or is there twice"
    return left, top, right, bottom


def test_every_picture_is_there_doubled_in_its_row_and_column(tmp_path):
    rows = [("untouched", tiles(COLOURS[:3])), ("tuned, 8 steps", tiles(COLOURS[3:]))]
    captions = ["a grinning face", "a very long caption that needs to be broken into many lines and cut", "x" * 90]
    sheet = contact_sheet(rows, captions, tmp_path / "sheet.png")
    boxes = [places(sheet, c) for c in COLOURS]
    assert {(b[2] - b[0], b[3] - b[1]) for b in boxes} == {(128, 128)}
    assert [b[0] for b in boxes[:3]] == [b[0] for b in boxes[3:]] == sorted(b[0] for b in boxes[:3])
    assert len({b[1] for b in boxes[:3]}) == len({b[1] for b in boxes[3:]}) == 1
    assert boxes[0][1] + 128 < boxes[3][1]
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == np.asarray(sheet)).all()


def test_a_gallery_breaks_into_rows_and_keeps_the_order(tmp_path):
    sheet = gallery(tiles(COLOURS[:5]), [f"picture {i}" for i in range(5)], 2, tmp_path / "gallery.png")
    boxes = [places(sheet, c) for c in COLOURS[:5]]
    assert boxes[0][0] == boxes[2][0] == boxes[4][0] < boxes[1][0] == boxes[3][0]
    assert boxes[0][1] == boxes[1][1] < boxes[2][1] == boxes[3][1] < boxes[4][1]
    assert (np.asarray(Image.open(tmp_path / "gallery.png")) == np.asarray(sheet)).all()


def test_captions_stay_over_their_own_column():
    bare = contact_sheet([("", tiles(COLOURS[:2]))], ["", ""])
    long = contact_sheet([("", tiles(COLOURS[:2]))], ["w" * 300, ""])
    left, top, right, _ = places(long, COLOURS[0])
    ink = np.argwhere((np.asarray(long)[:top] != 255).any(-1))
    assert len(ink)
    assert ink[:, 1].min() >= left
    assert ink[:, 1].max() < right
    assert ink[:, 0].max() < top
    assert bare.width == long.width


def test_scaling_is_exact():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([("", [Image.fromarray(pixels)])], [""]))
    large = pixels.repeat(4, 0).repeat(4, 1)
    found = [
        (y, x)
        for y in range(sheet.shape[0] - 127)
        for x in range(sheet.shape[1] - 127)
        if (sheet[y, x : x + 128] == large[0]).all() and (sheet[y : y + 128, x : x + 128] == large).all()
    ]
    assert len(found) == 1


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [Point(str(i), s, q) for i, (s, q) in enumerate(rng.random((200, 2)))]
    unbeaten = {
        p.name
        for p in points
        if not any(o.seconds <= p.seconds and o.quality >= p.quality and o is not p for o in points)
    }
    found = front(points)
    assert {p.name for p in found} == unbeaten
    assert [p.quality for p in found] == sorted(p.quality for p in found)


def test_the_plot_shows_the_chosen_recipe_where_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    fast, slow = Point("fast", 0.1, 0.2), Point("slow", 10.0, 0.9)

    def star(chosen):
        picture = pareto([Point("untouched", 20.0, 1.0, untouched=True), fast, slow], chosen, tmp_path / "p.png")
        red = np.array(Image.new("RGB", (1, 1), CHOSEN))[0, 0]
        found = np.argwhere((np.asarray(picture) == red).all(-1))
        return found[found[:, 0] > 60].mean(0)  # below the legend

    assert star("fast")[1] < star("slow")[1]  # further left
    assert star("fast")[0] > star("slow")[0]  # further down
    assert Image.open(tmp_path / "p.png").getpixel((1, 1)) == Image.new("RGB", (1, 1), PAPER).getpixel((0, 0))


def test_says_what_it_wants():
    with pytest.raises(ValueError, match=r"rows of 2 pictures, got \[3\]"):
        contact_sheet([("a", tiles(COLOURS[:3]))], ["", ""])
    with pytest.raises(ValueError, match="named 'absent'"):
        pareto([Point("a", 1, 1)], "absent")
