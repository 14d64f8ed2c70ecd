"""Pictures of a feature map: every element has its group's letter and colour."""

import re
from collections import Counter

import matplotlib.image
import pytest

import normkit as nk
from normkit.lab.drawing import panels_of
from normkit.lab.drawing.figure import write_figure
from normkit.lab.drawing.panels import COLOURS, Key, View, shown
from normkit.lab.drawing.terminal import draw_lines


def drawn(spec, shape, width=80):
    """Lines of the first panel, without colours."""
    panel = panels_of(nk.build(spec, shape[1]), shape)[0]
    return [line.plain for line in draw_lines(panel, width)]


def test_a_map_is_drawn_element_by_element():
    assert drawn("bgn:4", (2, 2, 2, 3)) == [
        "   c0  c1",
        "n0 AAA CCC",
        "   BBB DDD",
        "",
        "n1 AAA CCC",
        "   BBB DDD",
        "",
    ]
    assert drawn("ghost:2", (3, 2)) == ["   c0 c1", "n0 A  B", "n1 A  B", "n2 C  D", ""]
    assert drawn("ibn", (1, 4, 2)) == ["   c0 c1 c2 c3", "n0 AA BB ·· ··", ""]
    assert drawn("pn", (1, 2, 2, 2))[1:3] == ["n0 AB AB", "   CD CD"]


def test_the_middle_of_what_is_too_large_is_left_out():
    lines = drawn("ln", (12, 30, 20, 30), width=40)
    assert max(map(len, lines)) <= 40
    assert lines[:6] == [
        "    c0     c1     c2     … c29",
        "n0  AAAA…A AAAA…A AAAA…A … AAAA…A",
        "    AAAA…A AAAA…A AAAA…A … AAAA…A",
        "    AAAA…A AAAA…A AAAA…A … AAAA…A",
        "    ……………… ……………… ……………… … ………………",
        "    AAAA…A AAAA…A AAAA…A … AAAA…A",
    ]
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        *(f"n{n}" for n in range(6)), "…", "n11",
    ]  # fmt: skip
    assert lines[-2].split()[0] == "GGGG…G"


def test_letters_that_come_again_are_said_to():
    assert "letters repeat" in drawn("pn", (2, 1, 8, 8))[-1]
    assert drawn("pn", (2, 1, 5, 6))[-1] == ""


@pytest.mark.parametrize(
    ("spec", "shape", "titles"),
    [
        ("bgn:2", (2, 2, 3), ["2 groups, statistics over 6 elements each"]),
        ("bgn:1", (2, 2, 3), ["1 group, statistics over 12 elements"]),
        (
            "ghost:2",
            (3, 1, 2),
            ["2 groups, statistics over 4 elements each, 2 in the last examples"],
        ),
        (
            "bcn:1:micro",
            (2, 2, 3),
            [
                "batch stage: 2 groups, running estimates updated with 6 elements each",
                "channel stage: 2 groups, statistics over 6 elements each",
            ],
        ),
    ],
)
def test_titles_say_over_how_many_elements(spec, shape, titles):
    assert [panel.title for panel in panels_of(nk.build(spec, shape[1]), shape)] == titles


def test_titles_of_evaluation_say_what_is_running():
    panels = panels_of(nk.BatchNorm(2, example_weight=0.25).eval(), (2, 2, 3))
    assert [panel.title for panel in panels] == [
        "2 groups, running statistics, which do not depend on the input, with a weight of 0.75",
        "4 groups, statistics over 3 elements each, with a weight of 0.25",
    ]


@pytest.mark.parametrize("num_channels", [6, 8, 13, 14, 15, 28])
def test_neighbours_differ_in_colour_and_letter(num_channels):
    (panel,) = panels_of(nk.InstanceNorm(num_channels), (4, num_channels, 2))
    key = panel.key(View([0, 1, 2, 3], shown(num_channels, 99), [0], [0, 1]))
    for look in (key.colour, key.letter):
        for group in range(3 * num_channels):
            assert look(group) != look(group + num_channels)
            assert look(group) != look(group + 1)


def test_few_groups_have_colours_of_their_own_wherever_they_are():
    key = Key({14 * rank: rank for rank in range(14)}, stride=200)
    assert [key.colour(group) for group in key.ranks] == list(COLOURS)


def test_a_picture_has_as_much_of_a_colour_as_its_group_has_elements(tmp_path):
    path = tmp_path / "picture.png"
    write_figure(path, panels_of(nk.InstanceBatchNorm(6), (2, 6, 4, 4)), "ibn")
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    counts = Counter(map(tuple, pixels.reshape(-1, 3)))
    found = {name: counts[tuple(bytes.fromhex(name[1:]))] for name in (*COLOURS, "#e9ecef")}
    first, fourth, nothing = (found[name] for name in (COLOURS[0], COLOURS[3], "#e9ecef"))
    assert 2.5 < first / fourth < 3.5  # 16 + 32 elements, less the letters' pixels, and 16
    assert 3.5 < nothing / first < 5  # 96 + 96 elements
    assert all(found[name] == 0 for name in COLOURS[6:])


def test_a_drawing_is_text_and_the_same_every_time(tmp_path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        write_figure(path, panels_of(nk.SwitchableNorm(4), (2, 4, 40, 40)), "sn, (2, 4, 40, 40)")
    one, two = (path.read_text() for path in paths)
    assert one == two
    assert len(one) < 60_000
    texts = " ".join(re.findall(r"<text[^>]*>([^<]*)<", one))
    for text in (
        "sn, (2, 4, 40, 40)",
        "example n",
        "40 \N{MULTIPLICATION SIGN} 40 positions each",
        "layer norm: 2 groups",
    ):
        assert text in texts
