"""The report: its figures equal the library's, and the page is self-contained and looks right."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import pnc
from browser import CHROMIUM, browser
from digits import BASE, NEW, held_out_images, pair, support
from pnc.composite.batched_logits import logits_of
from pnc.composite.evaluation import Answers
from pnc.report import confusion as confusions
from pnc.report.confusion import confusion
from pnc.report.facts import collect_facts
from pnc.report.figures import amount, draw_front, draw_networks, networks_height, svg_of

FRONT = [{"macs_share": 0.1, "score": 0.8}, {"macs_share": 0.3, "score": 0.9}]


def made(classes: tuple[str, ...], name: str, density: float, **facts: Any) -> pnc.Clone:
    nets = pair()
    given: Any = {"density": density, "method": "taylor", "classes": classes, "name": name}
    clone = pnc.clone(nets.source.module, nets.target.module, support(classes=classes), **given, **nets.names())
    return replace(clone, recipe={**clone.recipe, **facts})


@pytest.fixture(scope="module")
def clones() -> tuple[pnc.Clone, pnc.Clone]:
    return made(NEW[:2], "low", 1.0), made(NEW[2:], "<high> & $x_1$", 0.5, front=FRONT)


@pytest.fixture(scope="module")
def net(clones: tuple[pnc.Clone, pnc.Clone]) -> pnc.Composite:
    return pnc.attach(pair().target.module, *clones)


@pytest.fixture(scope="module")
def page(net: pnc.Composite, clones: tuple[pnc.Clone, pnc.Clone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    files = [folder / "low.safetensors", folder / "high.safetensors"]
    for clone, file in zip(clones, files, strict=True):
        pnc.save(clone, file)
    pnc.write_report(net, held_out_images(), folder / "report.html", files=files, png=folder / "png")
    return folder / "report.html"


class Reader(HTMLParser):
    """All text of a page, its element names, and its references."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.names, self.links = "", set[str](), list[str]()
        self.open: list[str] = []
        self.feed(page.read_text())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += " " + data


def test_the_page_is_one_small_file_without_scripts_or_links(page: Path) -> None:
    found = Reader(page)
    assert page.stat().st_size < 1_000_000
    assert "script" not in found.names and {"svg", "details", "table", "main"} <= found.names
    assert all(link.startswith(("data:", "#")) for link in found.links)
    content = page.read_text()
    assert not re.search(r"url\((?!data:|#)", content)
    assert "currentColor" in content and "#123456" not in content
    assert str(page.parent) not in content, "no path of the machine that made it"


def test_it_says_what_the_library_measures(page: Path, net: pnc.Composite) -> None:
    text, measured = Reader(page).text, pnc.evaluate(net, held_out_images())
    for value in (measured.new_accuracy, measured.base_accuracy, measured.average_accuracy, measured.leak):
        assert f"{value:.1%}" in text
    assert f"measured on {measured.n_images} held-out images" in text
    assert "Not calibrated: low, <high> & $x_1$." in text
    assert "verified the target's own logits" in text and "FAILED" not in text
    for file in ("low.safetensors", "high.safetensors"):
        assert f"{(page.parent / file).stat().st_size:,} bytes" in text and f"pnc verify {file} " in text


def test_names_are_shown_as_they_are_in_tables_and_pictures(page: Path) -> None:
    content = page.read_text()
    assert "<high>" not in content
    assert "&lt;high&gt; &amp; $x_1$" in content
    picture = svg_of(lambda axes: axes.set(title="<b> $x_1$ & more"), 2, "<i>")
    assert "&lt;b&gt; $x_1$ &amp; more</text>" in picture and "<title>&lt;i&gt;</title>" in picture


def test_text_in_pictures_is_text(page: Path) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(pictures) == 5, "two clones, one front, leak and calibration"
    assert all("</text>" in picture and 'role="img"' in picture for picture in pictures)
    ids = [set(re.findall(r'\bid="(\w+)"', picture)) for picture in pictures]
    drawn = [{one for one in own if len(one) > 8 and "_" not in one} for own in ids]
    assert not set.intersection(*drawn), "clips of one picture are not taken for those of another"


def test_two_reports_are_the_same_bytes(page: Path, net: pnc.Composite, tmp_path: Path) -> None:
    files = [page.parent / "low.safetensors", page.parent / "high.safetensors"]
    pnc.write_report(net, held_out_images(), tmp_path / "again.html", files=files)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html"]


def test_pictures_are_written_as_png_too(page: Path) -> None:
    names = sorted(path.name for path in (page.parent / "png").iterdir())
    assert names == ["calibration.png", "front_2.png", "leak.png", "networks_1.png", "networks_2.png"]
    assert all((page.parent / "png" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def low_macs(net: pnc.Composite) -> int:
    """The multiply-accumulates that the clone `low` adds."""
    return net.status()[0].n_macs


def test_facts_are_read_from_the_clones(net: pnc.Composite, clones: tuple[pnc.Clone, pnc.Clone]) -> None:
    facts = collect_facts(net, held_out_images())
    whole, part = facts.clones
    assert whole.kept == pytest.approx(1, abs=0.02) and whole.channels == () and whole.front == ()
    assert part.kept == pytest.approx(0.5, abs=0.02)
    kept = {name: (int(mask.sum()), len(mask)) for name, mask in clones[1].masks.kept.items()}  # type: ignore[union-attr]
    assert {name: (n, of) for name, n, of in part.channels} == kept
    own = (part.recipe["macs_share"], part.recipe["score"], True)
    for one in (whole, part):  # which position a scan chooses depends on the processor
        at_input = one.target_cut == one.source_cut == "input"
        assert (one.adapter_macs == 0) == at_input, "one cut at the input needs no adapter"
    assert whole.adapter_macs + whole.kept * (whole.source_macs - whole.source_cut_macs) == pytest.approx(low_macs(net))
    assert part.front == ((0.1, 0.8, False), (0.3, 0.9, False), own)
    assert part.target_macs == part.source_macs, "both are the same small network, but for its classes"
    alone, low, high, together, networks = facts.costs
    assert (low.n_macs, high.n_macs) == tuple(one.n_macs for one in net.status())
    assert together.n_macs == alone.n_macs + low.n_macs + high.n_macs
    assert networks.n_macs == 2 * alone.n_macs, "one source, though two clones are of it"
    assert all(held for _, held in facts.verified)
    rows = {row.name: row for row in facts.class_rows}
    assert rows["7"].before is None and rows["7"].clone == clones[1].name and rows["3"].clone is None
    new = [row for row in facts.class_rows if row.before is None]
    n_new = sum(row.n_images for row in new)
    assert sum(row.after * row.n_images for row in new) / n_new == pytest.approx(facts.evaluation.new_accuracy)
    accuracies, leaks = zip(*facts.trade, strict=True)
    assert list(accuracies) == sorted(accuracies) and list(leaks) == sorted(leaks)
    assert facts.trade_now == (facts.evaluation.new_accuracy, pytest.approx(facts.evaluation.leak))


@pytest.mark.parametrize("front", [None, [], "text", [1], [{"macs_share": "x", "score": 1}], [{"macs_share": 0.5}]])
def test_a_recipe_with_another_front_has_none(front: Any) -> None:
    clone = made(NEW[:1], "one", 1.0, front=front)
    facts = collect_facts(pnc.attach(pair().target.module, clone), held_out_images(NEW[:1]))
    assert facts.clones[0].front == ()


def test_a_front_that_says_what_was_chosen_is_drawn_as_it_is() -> None:
    clone = made(NEW[:1], "one", 1.0, front=[FRONT[0], {**FRONT[1], "chosen": True}])
    facts = collect_facts(pnc.attach(pair().target.module, clone), held_out_images(NEW[:1]))
    assert facts.clones[0].front == ((0.1, 0.8, False), (0.3, 0.9, True))
    assert "candidates" in svg_of(lambda axes: draw_front(axes, facts.clones[0]), 3, "front")


# ------------------------------------------------------------------------------------------------ confusion
def answered(net: pnc.Composite) -> Answers:
    test = held_out_images()
    logits, base = logits_of(net, test.images), logits_of(net.target, test.images)
    return Answers(test.images, test.labels, logits, base, net.classes, net.classes, net.now(), 0)


def test_matrices_count_every_image(net: pnc.Composite) -> None:
    found = answered(net)
    both = confusion(found)
    sklearn = pytest.importorskip("sklearn.metrics")
    for matrix, logits in ((both.before, found.target_logits), (both.after, found.logits)):
        expected = sklearn.confusion_matrix(found.labels, logits.argmax(1), labels=range(10))
        assert [[cell.count for cell in row] for row in matrix] == expected.tolist()
    changes = [[count for count, _ in row] for row in both.difference]
    assert changes == [
        [after.count - before.count for before, after in zip(*rows, strict=True)]
        for rows in zip(both.before, both.after, strict=True)
    ]
    assert both.names == net.classes and both.n_base == len(BASE)


def test_cells_show_images_of_theirs(net: pnc.Composite) -> None:
    found = answered(net)
    answers = found.logits.argmax(1)
    for row, line in enumerate(confusion(found).after):
        for column, cell in enumerate(line):
            assert len(cell.images) == min(cell.count, confusions.PER_CELL)
            assert all(found.labels[i] == row and answers[i] == column for i in cell.images)


def test_many_classes_and_images_stay_small(net: pnc.Composite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusions, "MAX_CLASSES", 7)
    monkeypatch.setattr(confusions, "MAX_IMAGES", 5)
    found = answered(net)
    both = confusion(found)
    assert both.n_base == 3 and both.names[2] == "3 other base" and both.names[3:] == NEW
    assert sum(cell.count for row in both.after for cell in row) == len(found.labels)
    assert len(both.pictures) == 5
    shown = [
        i for row, line in enumerate(both.after) for col, cell in enumerate(line) for i in cell.images if row != col
    ]
    assert set(shown) == set(both.pictures), "wrong answers of the composite go first"


def test_large_and_normalized_images_become_small_pictures(net: pnc.Composite) -> None:
    found = answered(net)
    large = torch.nn.functional.interpolate(found.images, (224, 100)).repeat(1, 3, 1, 1) * 4 - 2
    both = confusion(replace(found, images=large))
    assert both.pictures and all(one.startswith("data:image/jpeg;base64,") for one in both.pictures.values())
    assert max(map(len, both.pictures.values())) < 4000


# ------------------------------------------------------------------------------------------------ refused, seen
def test_what_cannot_be_reported_is_refused(
    net: pnc.Composite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pnc.InputError, match="files: expected one for each of 2 enabled clones, got 1"):
        pnc.write_report(net, held_out_images(), tmp_path / "r.html", files=[Path(__file__)])
    files = [tmp_path / f"{name}.safetensors" for name in net.clones]
    for file in files:
        pnc.save(net.clone(file.stem), file)
    with pytest.raises(pnc.InputError, match="files: .*give them in the order of the clones"):
        pnc.write_report(net, held_out_images(), tmp_path / "r.html", files=files[::-1])
    for file in files:
        file.unlink()
    with pytest.raises(pnc.PNCError, match="missing"):
        pnc.write_report(net, held_out_images(), tmp_path / "r.html", files=[tmp_path / "missing"] * 2)
    with pytest.raises(pnc.InputError, match="net: expected a composite"):
        pnc.write_report(net.target, held_out_images(), tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(pnc.InputError, match=r"path: a report is a page of HTML, and r\.pdf .*; write .*r\.html"):
        pnc.write_report(net, held_out_images(), tmp_path / "r.pdf")
    for package in ("jinja2", "matplotlib.figure"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(pnc.InputError, match=r'is needed for this; pip install "pnc\[report\]"'):
                pnc.write_report(net, held_out_images(), tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_clone_that_runs_very_little_of_its_source_shows_its_adapter(net: pnc.Composite) -> None:
    whole = collect_facts(net, held_out_images()).clones[0]
    late = replace(whole, source_cut_macs=whole.source_macs, adapter_macs=whole.target_macs // 2)
    picture = svg_of(lambda axes: draw_networks(axes, late), networks_height(late), "late")
    assert "the clone runs less than 1% of it" in picture and "adapter between them: 599 k" in picture
    assert networks_height(late) > networks_height(replace(late, adapter_macs=0))


def test_amounts_are_short() -> None:
    assert [amount(number) for number in (0, 999, 1000, 81_612, 2_391_000)] == ["0", "999", "1 k", "81.6 k", "2.39 M"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_looks_right_in_a_browser(page: Path, tmp_path: Path) -> None:
    with browser() as chromium:
        for width in (390, 1280):
            for dark in (False, True):
                picture = tmp_path / f"{width}.png"
                assert chromium.look(page, width, dark, picture) == []
                assert picture.stat().st_size > 50_000
        seen = "getComputedStyle(document.querySelector('svg text')).fill"
        assert chromium.run(seen) == chromium.run("getComputedStyle(document.body).color"), "text follows dark mode"
        chromium.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        shown = "[...document.querySelectorAll('i.p')].filter(one => one.getBoundingClientRect().width < 32).length"
        assert chromium.run(shown) == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<main><div style='width:2000px'>wide</div><script>console.error('oh')</script>"
        "<svg width=200 height=50><text y=20 font-size=5>tiny</text>"
        "<text y=40>one</text><text y=42>two</text></svg></main>"
    )
    with browser() as chromium:
        found = chromium.look(bad, 390, False)
    assert any("console" in one and "oh" in one for one in found)
    for part in ("the page is 20", "DIV sticks out: wide", '"tiny" is ', '"one" lies over "two"'):
        assert any(part in one for one in found), (part, found)
