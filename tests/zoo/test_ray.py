"""Ray gives the ranking of one process, also if an actor is killed in the middle."""

import os
import signal
import sys

import pytest
from test_rank import asked, images, same, zoo  # noqa: F401 # a fixture

import pnc
from digits import BASE, network
from pnc.zoo import rank as ranking_module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_gives_the_same_ranking_and_a_killed_actor_loses_nothing(
    zoo: pnc.Zoo,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    killed: list[int] = []

    class Deadly(ranking_module.RayWorker):
        """Its process is killed before it can answer for one source, once."""

        def look(self, unit):
            if unit[0] == "others" and not killed:
                killed.append(self.pid)
                os.kill(self.pid, signal.SIGKILL)
            return super().look(unit)

    target = network(BASE).module
    one = pnc.rank(zoo, target, images(), workers=1, **asked())
    monkeypatch.setattr(ranking_module, "RayWorker", Deadly)
    both = pnc.rank(zoo, target, images(), workers=2, ray_address="local", **asked())
    assert same(one, both) and len(killed) == 1


def test_without_ray_one_line_says_what_to_install(
    zoo: pnc.Zoo,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(pnc.InputError, match=r'ray_address: Ray is not installed; pip install "pnc\[ray\]"'):
        pnc.rank(zoo, network(BASE).module, images(), ray_address="local", **asked())
