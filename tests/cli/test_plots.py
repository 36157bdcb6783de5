import struct
import sys

import pytest

import pnc
from digits import NEW, pair, support
from pnc.cli.plots import check_plot, draw_scan
from pnc.foundation.errors import InputError


def test_a_scan_is_drawn_as_png_and_twice_the_same(tmp_path):
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names())
    found = pnc.scan(task)
    for name in ("a.png", "b.PNG"):
        draw_scan(found, found.choose(), tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and data == (tmp_path / "b.PNG").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1200, 750)
    draw_scan(found, found.positions[-1], tmp_path / "b.PNG")
    assert data != (tmp_path / "b.PNG").read_bytes()


def test_other_formats_and_a_missing_matplotlib_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"plot: expected a PNG file, with a name that ends in \.png; got .*a\.pdf"):
        check_plot(tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r'pip install "pnc\[plots\]"'):
        check_plot(tmp_path / "a.png")
