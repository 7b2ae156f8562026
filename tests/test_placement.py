"""The placement plan, by the extension and by the torch path."""

from __future__ import annotations

import pytest

from latentwire_fast import placement
from latentwire_fast.errors import ConfigError

BACKENDS = [
    pytest.param(
        "extension",
        marks=pytest.mark.skipif(not placement.has_extension(), reason="extension not built"),
    ),
    "torch",
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(placement, "_C", None)
    return request.param


@pytest.mark.usefixtures("backend")
class TestPlan:
    def test_contiguous_layers_make_one_run_per_device(self) -> None:
        assert placement.plan(["cpu"] * 3 + ["cuda:1"] * 2) == [
            ("cpu", [(0, 3)]),
            ("cuda:1", [(3, 2)]),
        ]

    def test_odd_map_gives_a_device_several_runs(self) -> None:
        assert placement.plan(["cuda:0", "cpu", "cuda:0", "cuda:0"]) == [
            ("cuda:0", [(0, 1), (2, 2)]),
            ("cpu", [(1, 1)]),
        ]

    @pytest.mark.parametrize(
        ("devices", "message"),
        [
            ([], "names no layer"),
            (["cpu", "disk"], "layer 1 is on 'disk', which holds no memory"),
            (["meta"], "layer 0 is on 'meta', which holds no memory"),
            (["cpu", "cpu", "gpu0"], "layer 2 is on 'gpu0', which is not a device"),
        ],
    )
    def test_bad_maps_are_refused(self, devices: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            placement.plan(devices)
