"""draw: what is drawn of a model, that nothing overlaps and labels fit, the four formats, what is refused."""

from __future__ import annotations

import re
import struct
import sys
import xml.etree.ElementTree as ET
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pygraphviz
import pytest
import resvg_py
import torch
from torch import Tensor, nn

import graphreg
from drawn_nets import GPT, Again, Half, Loops, Tagger, TwoForwards
from geometry import check_geometry
from graphreg import GraphRegError
from graphreg.drawing.layout import Arrangement, arrange
from graphreg.drawing.render import COLOURS, colour
from graphreg.drawing.scene import IN, OUT, Box, Picture, label_lines, picture, text_width, unfolded
from graphreg.drawing.view import viewed
from graphreg.passes import BernoulliDropout, HiddenL1

IDS = torch.zeros(2, 7, dtype=torch.long)
SVG = "{http://www.w3.org/2000/svg}"


@cache
def module(name: str) -> nn.Module:
    if name == "gpt":
        return graphreg.regularize(GPT(12), example_inputs=IDS, rng=0, hidden_dropout=0.1, weight_l2=1e-4, own_dropout="seeded")
    if name == "lstm":
        penalty = {"weight": 1.0, "pattern": "rnn"}
        return graphreg.regularize(Tagger(), example_inputs=IDS, rng=0, recurrent_norm=penalty, hidden_dropout=0.1, weight_l1=1e-3)
    if name == "loops":
        return graphreg.regularize(Loops(), hidden_dropout=0.1, rng=0)
    return graphreg.regularize(Again(), hidden_dropout=0.1, contractive={"weight": 0.1, "pattern": "twice"}, rng=0)


@cache
def shown(name: str) -> Picture:
    return picture(viewed(module(name)))


# What is drawn


def test_a_picture_in_full() -> None:
    made = picture(viewed(graphreg.regularize(Half(), BernoulliDropout("relu", 0.1), HiddenL1("relu", 0.2), rng=0)))
    assert list(made.nodes) == ["x", "a", "relu", "b", "relu_1", "add", "$output"]
    assert made.boxes == {"/": Box("", "", "Half", list(made.nodes), made.boxes["/"].links, made.boxes["/"].acts, 7, "/")}
    assert [(link.start, link.end) for link in made.boxes["/"].links] == [
        ("x", "a"), ("x", "b"), ("a", "relu"), ("relu", "add"), ("b", "relu_1"), ("relu_1", "add"), ("add", "$output"),
    ]  # fmt: skip
    shown = [label_lines(made, key) for key in ("x", "a", "add", "$output")]
    assert shown == [("x", "input"), ("a", "Linear"), ("add", ""), ("output", "")]
    assert {key: [badge.text for badge in badges] for key, badges in made.badges.items()} == {"relu": ["dropout 0.1", "hidden_l1 0.2"]}
    assert made.regularizers == {
        "dropout": "BernoulliDropout 0.1 on 'relu', 1 site", "hidden_l1": "HiddenL1 0.2 on 'relu', 1 site"
    }  # fmt: skip


def test_lines_end_at_the_border_of_a_module() -> None:
    made = shown("again")
    assert [(link.start, link.end, link.back) for link in made.boxes["/"].links] == [
        ("x", "twice/", False), ("twice/", "between", False), ("between", "tanh", False), ("tanh", "twice/", True),
        ("twice/", "$output", False),
    ]  # fmt: skip
    inside = made.boxes["twice/"]
    assert [link.end for link in inside.links if link.start == IN] == ["twice.a", "twice.b", "twice.a_1", "twice.b_1"]
    assert [link.start for link in inside.links if link.end == OUT] == ["twice.add", "twice.add_1"]
    assert [badge.text for badge in made.badges["x"]] == ["contractive: wrt"] and made.boxes["twice/"].acts["contractive"] == 1


def test_a_list_that_the_parent_loops_over_is_drawn_in_order(tmp_path: Path) -> None:
    made = picture(viewed(Loops()))
    run = ["layers.0", "tanh", "drops.0", "layers.1", "tanh_1", "drops.1", "nested.0.0", "relu", "nested.0.1", "blocks.0/", "add"]
    children = ["x", *run, "blocks.1/", "add_1", "chain/", "heads/", "stack", "$output"]
    assert made.boxes["/"].children == children
    links = [(link.start, link.end) for link in made.boxes["/"].links]
    assert not any(link.back for box in made.boxes.values() for link in box.links)
    assert [pair for pair in links if pair[0] in run[:8]] == list(pairwise(run[:9]))
    assert {("nested.0.1", "blocks.0/"), ("nested.0.1", "add"), ("blocks.0/", "add"), ("add", "blocks.1/"), ("add_1", "chain/")} < {*links}
    named = [label_lines(made, key)[0] for key in ("layers.1", "nested.0.1", "blocks.1/", "blocks.1.a")]
    assert named == ["layers.1", "nested.0.1", "blocks.1 Half", "a"]
    assert unfolded(made, 1) == {"/"} and unfolded(made, 2) == {"/", "chain/", "heads/"}
    # a list whose parts follow one another is a box, and so is one whose parts stand beside one another
    assert [(link.start, link.end) for link in made.boxes["chain/"].links] == [
        (IN, "chain.0"), ("chain.0", "chain.1"), ("chain.1", OUT),
    ]  # fmt: skip
    assert [(link.start, link.end) for link in made.boxes["heads/"].links] == [
        (IN, "heads.0"), (IN, "heads.1"), ("heads.0", OUT), ("heads.1", OUT),
    ]  # fmt: skip
    texts = "".join(ET.parse(graphreg.draw(Loops(), tmp_path / "loops.svg")).getroot().itertext())
    assert "blocks.1 Half" in texts and "layers ModuleList" not in texts and "heads ModuleList" in texts
    folded = picture(viewed(Loops(12))).boxes  # blocks that alternate with the parent's own operations repeat
    assert [box.op for box in folded.values() if box.kind == "repeats"] == ["(Half, add) × 12"]


def test_sizes_keys_and_totals_are_not_drawn() -> None:
    made, whole = shown("gpt"), graphreg.to_networkx(module("gpt"))
    left_out = set(whole) - set(made.nodes)
    assert {"$key", "$weight_l2", "h.0.getattr", "h.0.getitem", "h.0.floordiv"} <= left_out
    nodes = [whole.nodes[key] for key in left_out]
    kinds = {"key", "total", "no tensor", "splice", "read", "other"}
    assert {node.get("why_not") or node.get("added") or node["kind"] for node in nodes} == kinds
    assert {node["op"] for node in nodes if node["kind"] == "other"} == {"decided_count"}  # ``b, t = x.shape`` asserts two
    assert label_lines(made, "h.0.drop") == ("drop", "Dropout 2x7x16 rate 0.1 native: seeded")
    assert label_lines(made, "h.0/") == ("0 Block", "20 inside") and label_lines(made, "h/") == ("h Block × 12", "240 inside")
    assert [badge.text for badge in made.badges["h.0.qkv"]] == ["weight: weight_l2 0.0001"]


def test_what_is_unfolded() -> None:
    made = shown("gpt")
    assert unfolded(made) == {"/"}  # the blocks are equal
    assert unfolded(made, 1) == {"/"} and unfolded(made, 2) == {"/", "h/"} and unfolded(made, 9) == set(made.boxes)
    assert unfolded(picture(viewed(GPT(2)))) == {"/", "h/", "h.0/", "h.1/", "h.0.mlp/", "h.1.mlp/"}


def test_blocks_whose_native_dropout_changes_are_not_folded_with_others() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 4), nn.ReLU()) for _ in range(12)))
    made = picture(viewed(graphreg.regularize(model, own_dropout={"5.2": "off"}, rng=0)))
    assert {box.op for box in made.boxes.values() if "×" in box.op} == {"Sequential × 5", "Sequential × 6"}


# Where it stands


@pytest.mark.parametrize("level", [None, 1, 99])
@pytest.mark.parametrize("name", ["gpt", "lstm", "again", "loops"])
def test_nothing_overlaps_and_labels_fit(name: str, level: int | None) -> None:
    made = shown(name)
    opened = unfolded(made, level)
    arranged = arrange(made, opened)
    places = {key: vars(place) for key, place in arranged.places.items()}
    around = {key: made.outside(key)[-1] for key in made.boxes if key != "/"} | {key: made.around(key)[-1] for key in made.nodes}
    check_geometry(places, {key: around.get(key) for key in places})
    for key, place in arranged.places.items():
        if key not in opened:
            first, second = label_lines(made, key)
            small = [second, *(badge.text for badge in made.badges.get(key, ()))]
            assert max(1.1 * text_width(first), *(0.9 * text_width(text) for text in small)) <= place.width, key
    check_lines(arranged)


def check_lines(arranged: Arrangement) -> None:
    """Every line leaves the lower border of what it comes from, and arrives at the upper border of what it goes to."""
    ends = 0
    for curve in arranged.curves:
        for key, (x, y), leaves in ((curve.link.start, curve.points[0], True), (curve.link.end, curve.points[-1], False)):
            if key in (IN, OUT):
                continue
            place = arranged.places[key]
            border = place.y + place.height * (leaves != curve.link.back)
            assert abs(y - border) < 1.5 and place.x < x < place.x + place.width, (key, curve.link)
            ends += 1
    assert ends > 8


# The formats


def test_svg(tmp_path: Path) -> None:
    root = ET.parse(graphreg.draw(module("lstm"), tmp_path / "x.svg")).getroot()
    things = {part.get("data-key"): "".join(text.text or "" for text in part.iter(f"{SVG}text")) for part in root.iter(f"{SVG}g")}
    assert things["embed"] == "embedEmbedding 2x7x8hidden_dropout 0.1weight: weight_l1 0.001"
    assert things["$rnn"] == "rnnLSTMweight_ih_l0: weight_l1 0.001weight_hh_l0: weight_l1 0.001"
    assert things["rnn"] == "rnn:outLSTM 2x7x6hidden_dropout 0.1recurrent_norm 1" and things["rnn:h_n"] == "rnn:h_nLSTM 1x2x6"
    assert set(shown("lstm").nodes) == set(things) - {None}
    legend = [text.text for text in root.findall(f"{SVG}text")]
    assert legend == [
        "Tagger", "hidden_dropout: BernoulliDropout 0.1 on '*', 3 sites", "recurrent_norm: RecurrentNorm 1 on 'rnn', 1 site",
        "weight_l1: WeightL1 0.001 on '*', 4 sites",
    ]  # fmt: skip
    pills = {part.findtext(f"{SVG}text"): part.find(f"{SVG}rect").get("fill") for part in root.iter(f"{SVG}g") if part.get("class")}  # type: ignore[union-attr]
    assert len({pills["hidden_dropout 0.1"], pills["recurrent_norm 1"], pills["weight: weight_l1 0.001"]}) == 3


def test_many_regularizers_have_colours_of_their_own() -> None:
    made = [colour(i) for i in range(40)]
    assert len(set(made)) == 40 and all(re.fullmatch("#[0-9a-f]{6}", one) for one in made)


def test_png(tmp_path: Path) -> None:
    graphreg.draw(module("lstm"), tmp_path / "x.svg")
    root = ET.parse(tmp_path / "x.svg").getroot()
    data = graphreg.draw(module("lstm"), str(tmp_path / "x.PNG")).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == pytest.approx([1.5 * int(root.get(side, 0)) for side in ("width", "height")], abs=1)


def test_a_png_that_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is smaller as long as it is not smaller than the .svg, whose text has 9 points."""
    monkeypatch.setattr("graphreg.drawing.render.LARGEST", 1200)
    data = graphreg.draw(module("lstm"), tmp_path / "x.png").read_bytes()
    assert max(struct.unpack(">II", data[16:24])) == 1200
    monkeypatch.setattr("graphreg.drawing.render.LARGEST", 300)
    assert "many viewers open no .png of more than 300. Draw .svg or .html" in refused(module("lstm"), tmp_path / "y.png")


def test_the_title_says_the_mode_where_there_are_two(tmp_path: Path) -> None:
    model = TwoForwards()
    train, evaluation = graphreg.draw(model, tmp_path / "train.svg"), graphreg.draw(model, tmp_path / "eval.svg", mode="eval")
    assert "TwoForwards, in train mode" in train.read_text() and "TwoForwards, in eval mode" in evaluation.read_text()
    assert "Half, in" not in graphreg.draw(Half(), tmp_path / "x.svg", mode="eval").read_text()


def test_a_parameter_goes_by_its_own_name(tmp_path: Path) -> None:
    """torch.export's name of one has its whole path in it."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight)

    traced = graphreg.trace(nn.Sequential(Inside(), nn.Linear(4, 2)), torch.ones(3, 4), front_end="export")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", graphreg.draw(traced, tmp_path / "x.svg").read_text())
    assert "weight" in shown and not [text for text in shown if "_weight" in text]


def test_dot(tmp_path: Path) -> None:
    text = graphreg.draw(module("gpt"), tmp_path / "x.dot", level=2).read_text()
    graph = pygraphviz.AGraph(text)
    assert [part.name for part in graph.subgraphs()] == ["cluster h/"]
    assert set(map(str, graph.nodes())) == {key for key in arrange(shown("gpt"), {"/", "h/"}).places if key not in ("/", "h/")}
    assert graph.has_edge("h.10/", "h.11/") and graph.has_edge("h.11/", "ln_f") and not graph.has_edge("h.0/", "h.0/")
    assert graph.get_node("h.0/").attr["label"] == "0 Block\\n20 inside" and graph.get_node("h.0/").attr["peripheries"] == "2"
    assert graph.get_node("ln_f").attr["color"] == COLOURS[0] and graph.get_node("ln_f").attr["label"].endswith("[hidden_dropout 0.1]")
    assert "weight_l2: WeightL2 0.0001 on '*', 51 sites" in graph.graph_attr["label"]


def test_a_plan_and_a_bare_model(tmp_path: Path) -> None:
    model = Half()
    before = dict(vars(model))
    traced = graphreg.trace(model)
    plan = graphreg.plan(traced, BernoulliDropout("relu", 0.1))
    planned = graphreg.draw(traced, tmp_path / "plan.svg", plan=plan).read_text()
    assert planned == graphreg.draw(plan, tmp_path / "alone.svg").read_text()
    assert planned == graphreg.draw(graphreg.rewrite(traced, plan), tmp_path / "done.svg").read_text() and "dropout 0.1" in planned
    bare = graphreg.draw(model, tmp_path / "bare.svg", example_inputs=torch.ones(3, 4)).read_text()
    assert "Linear 3x4" in bare and "dropout" not in bare and vars(model) == before


def test_level_folds(tmp_path: Path) -> None:
    few, more = (graphreg.draw(module("gpt"), tmp_path / f"{level}.svg", level=level).read_text() for level in (1, 2))
    assert 'data-key="h/"' in few and 'data-key="h.0/"' not in few and 'data-key="h.0/"' in more


# What is refused


def refused(*given: Any, **options: Any) -> str:
    with pytest.raises(GraphRegError) as caught:
        graphreg.draw(*given, **options)
    return str(caught.value)


def test_paths(tmp_path: Path) -> None:
    assert refused(Half(), "x.svgg") == "'x.svgg' ends in '.svgg'; drawings end in .svg, .png, .dot, .html. Near ones: .svg."
    assert refused(Half(), "x") == "'x' ends in 'no extension'; drawings end in .svg, .png, .dot, .html."
    assert refused(Half(), 3) == "draw writes to a path, not to int: draw(module, 'model.svg')."
    missing = tmp_path / "no" / "x.svg"
    assert refused(Half(), missing) == f"'{missing}' cannot be written: there is no folder '{missing.parent}'. Make it first."
    (tmp_path / "taken.svg").mkdir()
    told = refused(Half(), tmp_path / "taken.svg")
    assert told.startswith(f"'{tmp_path / 'taken.svg'}' cannot be written (IsADirectoryError: ") and told.endswith("Give another path.")


def test_what_has_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    assert refused(3, path).startswith("int has no graph.")
    assert refused(Half(), path, level=0).startswith("level=0 is not a depth of modules")
    assert refused(Half(), path, mode="test").startswith("mode='test' is unknown")
    told = "example_inputs= is for a model that is not traced yet; a rewritten module knows what it was traced with. Leave it out."
    assert refused(graphreg.regularize(Half(), weight_l2=0.1), path, example_inputs=torch.ones(2, 4)) == told
    assert not path.exists()


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert refused(Half(), tmp_path / "x.png") == "a .png is made by resvg-py, which is not installed: pip install 'graphreg[draw]'."
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    for name in ("x.svg", "x.html", "x.png"):
        assert refused(Half(), tmp_path / name) == (
            "drawings are laid out by pygraphviz, which is not installed: pip install 'graphreg[draw]'. A .dot file does not need it."
        )
    assert graphreg.draw(Half(), tmp_path / "x.dot").read_text().startswith('digraph "Half" {')


def test_without_a_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **options: plain(**options, skip_system_fonts=True))
    assert refused(Half(), tmp_path / "x.png") == (
        "no font is installed, and a .png would have no letters (Debian: fonts-dejavu-core). Draw .svg instead."
    )
