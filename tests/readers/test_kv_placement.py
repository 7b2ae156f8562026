"""Placement by the extension and by the torch path, against a loop over layers; the C++ tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers import kv_placement
from latentwire_fast.readers.kv_placement import Copies, Placement, Placer

needs_extension = pytest.mark.skipif(
    not kv_placement.has_extension(), reason="the extension is not built"
)
BACKENDS = [pytest.param("extension", marks=needs_extension), "torch"]
LAYERS, HEADS, WIDTH = 5, 3, 7


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kv_placement, "_C", None)
    return request.param


def make_prefix(batch: int = 2, positions: int = 4, dtype: torch.dtype = torch.float32):
    return torch.randn(LAYERS, 2, batch, HEADS, positions, WIDTH).to(dtype)


def make_placer(dtype: torch.dtype = torch.float32) -> Placer:
    return Placer(["cpu"] * LAYERS, dtype=dtype)


def layer_by_layer(
    prefix: torch.Tensor, *, batch: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The result of a loop over layers: each moved, cast and broadcast by itself."""
    keys, values = (
        [prefix[i, part].to("cpu").to(dtype).expand(batch, -1, -1, -1) for i in range(len(prefix))]
        for part in (0, 1)
    )
    return keys, values


def assert_same(placed: Placement, expected: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    for mine, theirs in zip((placed.keys, placed.values), expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.usefixtures("backend")
class TestPlan:
    def test_contiguous_layers_make_one_run_per_device(self) -> None:
        assert kv_placement.plan(["cpu"] * 3 + ["cuda:1"] * 2) == [
            ("cpu", [(0, 3)]),
            ("cuda:1", [(3, 2)]),
        ]

    def test_odd_map_gives_a_device_several_runs(self) -> None:
        groups = kv_placement.plan(["cuda:0", "cpu", "cuda:0", "cuda:0"])
        assert groups == [("cuda:0", [(0, 1), (2, 2)]), ("cpu", [(1, 1)])]
        assert [group.layers for group in groups] == [[0, 2, 3], [1]]

    @pytest.mark.parametrize(
        ("devices", "message"),
        [
            ([], "names no layer"),
            (["cpu", "disk"], "layer 1 is on 'disk', which holds no memory"),
            (["meta"], "layer 0 is on 'meta', which holds no memory"),
            (["cpu", "cpu", "gpu0"], "layer 2 is on 'gpu0', which is not a device"),
            (["cuda"], "layer 0 is on 'cuda', which may be any of several"),
        ],
    )
    def test_bad_maps_are_refused(self, devices: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            kv_placement.plan(devices)


@pytest.mark.usefixtures("backend")
class TestPlace:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "batch"), [(1, 1), (2, 2), (1, 8)])
    @pytest.mark.parametrize("positions", [1, 5])
    def test_equals_the_loop_over_layers(
        self, dtype: torch.dtype, cache_dtype: torch.dtype, rows: int, batch: int, positions: int
    ) -> None:
        prefix = make_prefix(rows, positions, dtype)
        placed = make_placer(cache_dtype).place(prefix, batch_size=batch)
        assert_same(placed, layer_by_layer(prefix, batch=batch, dtype=cache_dtype))
        assert placed.copies == Copies(prepare=int(dtype != cache_dtype), link=0, scatter=0)

    def test_a_prefix_that_fits_is_not_copied(self) -> None:
        prefix = make_prefix()
        placed = make_placer().place(prefix, batch_size=2)
        assert placed.keys[3].data_ptr() == prefix[3, 0].data_ptr()
        assert placed.values[4].data_ptr() == prefix[4, 1].data_ptr()

    def test_on_one_device_nothing_is_under_way(self) -> None:
        placed = make_placer(torch.bfloat16).place(make_prefix(), batch_size=2, stable=True)
        assert not any(placed.is_under_way(layer) for layer in range(LAYERS))
        placed.wait_for_layer(LAYERS - 1)

    def test_broadcasting_takes_no_memory(self) -> None:
        placed = make_placer().place(make_prefix(batch=1), batch_size=8)
        assert placed.keys[0].shape[0] == 8
        assert placed.keys[0].stride(0) == 0

    @pytest.mark.parametrize(
        ("order", "copies"),
        [("L2BPHD", 0), ("BPL2HD", 0), ("2LBHPD", 1), ("BL2PHD", 0), ("LB2HPD", 1)],
    )
    def test_a_prefix_with_strides_is_copied_only_where_views_cannot_show_it(
        self, order: str, copies: int
    ) -> None:
        """`order` is that in memory; a deep prefix comes as BPL2HD."""
        prefix = make_prefix()
        inner = ["L2BHPD".index(dim) for dim in order]
        outer = [order.index(dim) for dim in "L2BHPD"]
        prefix = prefix.permute(inner).contiguous().permute(outer)
        assert not prefix.is_contiguous()
        for dtype, made in ((torch.float32, copies), (torch.bfloat16, 1)):
            placed = make_placer(dtype).place(prefix, batch_size=2)
            assert_same(placed, layer_by_layer(prefix, batch=2, dtype=dtype))
            assert placed.copies.prepare == made
            assert copies or placed.keys[0].stride() == prefix[0, 0].stride()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_that_was_broadcast_before_is_one_row(self, dtype: torch.dtype) -> None:
        prefix = make_prefix(batch=1)
        placed = make_placer(dtype).place(prefix.expand(-1, -1, 8, -1, -1, -1), batch_size=8)
        assert_same(placed, layer_by_layer(prefix, batch=8, dtype=dtype))
        assert placed.keys[0].untyped_storage().nbytes() == prefix.numel() * dtype.itemsize
        assert placed.copies.prepare == int(dtype != torch.float32)

    @pytest.mark.parametrize(("rows", "batch"), [(1, 4), (4, 4)])
    def test_a_placement_never_writes_where_an_earlier_one_lives(
        self, rows: int, batch: int
    ) -> None:
        placer = make_placer(torch.bfloat16)
        expected, living = [], []
        for number in range(12):
            prefix = make_prefix(rows)
            placed = placer.place(prefix, batch_size=batch)
            # One view of it outlives the placement.
            living.append(placed.values[number % LAYERS])
            expected.append(prefix[number % LAYERS, 1].bfloat16().expand(batch, -1, -1, -1))
            del placed, prefix
            if number % 3 == 2:
                del living[0], expected[0]
            assert all(map(torch.equal, living, expected))

    def test_threads_share_a_placer(self) -> None:
        placer = make_placer(torch.bfloat16)

        def place(number: int) -> bool:
            prefix = torch.full((LAYERS, 2, 2, HEADS, 4, WIDTH), float(number))
            first, second = (placer.place(prefix, batch_size=2) for _ in range(2))
            parts = [*first.keys, *first.values, *second.keys, *second.values]
            return all(bool((part == number).all()) for part in parts)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(place, range(200)))

    @pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
    def test_gradients_flow_back(self, cache_dtype: torch.dtype) -> None:
        data = make_prefix(batch=1)
        gradients = []
        for make in (
            lambda x: (lambda p: (p.keys, p.values))(
                make_placer(cache_dtype).place(x, batch_size=3)
            ),
            lambda x: layer_by_layer(x, batch=3, dtype=cache_dtype),
        ):
            prefix = data.clone().requires_grad_()
            keys, values = make(prefix)
            parts = [part.float().square() for part in (*keys, *values)]
            sum(((i + 1) * part.sum() for i, part in enumerate(parts)), torch.zeros(())).backward()
            gradients.append(prefix.grad)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
    def test_every_row_of_a_broadcast_prefix_has_its_gradient(
        self, cache_dtype: torch.dtype
    ) -> None:
        rows = make_prefix(batch=1).expand(-1, -1, 3, -1, -1, -1).requires_grad_()
        keys = make_placer(cache_dtype).place(rows, batch_size=3).keys[0]
        (keys.float() * torch.arange(1.0, 4.0)[:, None, None, None]).sum().backward()
        assert rows.grad is not None
        assert rows.grad[0, 0, :, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]

    def test_scatter_writes_its_positions_alone(self) -> None:
        prefix = make_prefix(batch=1, positions=4)
        target = torch.full((LAYERS, 2, 2, HEADS, 9, WIDTH), -1.0, dtype=torch.bfloat16)
        placed = make_placer(torch.bfloat16).place(prefix, batch_size=2)
        placed.scatter(0, target=target)
        placed.wait(0)
        assert torch.equal(target[:, :, :, :, :4], prefix.bfloat16().expand(-1, -1, 2, -1, -1, -1))
        assert (target[:, :, :, :, 4:] == -1).all()
        assert placed.copies == Copies(prepare=1, link=0, scatter=1)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (torch.zeros(LAYERS, 2, 2, HEADS, 3, WIDTH), "holds 3 positions and the prefix 4"),
            (torch.zeros(LAYERS, 2, 1, HEADS, 9, WIDTH), r"the cache is \[5, 2, 1, 3, 9, 7\] of"),
            (
                torch.zeros(LAYERS, 2, 2, HEADS, 9, WIDTH).double(),
                "the cache is .* of .*([dD]ouble|float64)",
            ),
            (torch.zeros(3), "holds 0 positions"),
        ],
    )
    def test_scatter_refuses_a_target_that_does_not_fit(
        self, target: torch.Tensor, message: str
    ) -> None:
        placed = make_placer().place(make_prefix(), batch_size=2)
        with pytest.raises(ConfigError, match=message):
            placed.scatter(0, target=target)

    @pytest.mark.parametrize(
        ("prefix", "batch", "message"),
        [
            (torch.zeros(LAYERS, 2, 1, HEADS, WIDTH), 1, "a prefix is .layers, 2, batch or 1"),
            (torch.zeros(LAYERS, 3, 1, HEADS, 4, WIDTH), 1, "a prefix is .layers, 2, batch or 1"),
            (torch.zeros(LAYERS, 2, 1, HEADS, 0, WIDTH), 1, "none of them 0"),
            (torch.zeros(4, 2, 1, HEADS, 4, WIDTH), 1, "has 4 layers and the reader 5"),
            (torch.zeros(LAYERS, 2, 2, HEADS, 4, WIDTH), 3, "only a batch of 1 is broadcast"),
            (torch.zeros(LAYERS, 2, 1, HEADS, 4, WIDTH), 0, "must be at least 1"),
            (torch.zeros(LAYERS, 2, 1, HEADS, 4, WIDTH).int(), 1, "dense tensor of floats"),
            (torch.zeros(LAYERS, 2, 1, HEADS, 4, WIDTH, device="meta"), 1, "with memory"),
        ],
    )
    def test_bad_prefixes_are_refused(self, prefix: torch.Tensor, batch: int, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make_placer().place(prefix, batch_size=batch)

    def test_bad_placers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="not a float"):
            make_placer(torch.int32)
        with pytest.raises(
            ConfigError, match="layer 1 is on 'cuda:99', which is not on this machine"
        ):
            Placer(["cpu", "cuda:99"], dtype=torch.float32)


@needs_extension
def test_a_cast_reuses_the_memory_of_what_is_gone() -> None:
    placer = make_placer(torch.bfloat16)
    addresses = []
    for _ in range(3):
        placed = placer.place(make_prefix(), batch_size=2)
        addresses.append(placed.keys[0].data_ptr())
        del placed
    assert len(set(addresses)) == 1
    prefix = make_prefix()
    keys = placer.place(prefix, batch_size=2).keys[0]
    del placer  # what it placed outlives it
    assert torch.equal(keys, prefix[0, 0].bfloat16())


@pytest.mark.gpu
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("source", ["cpu", "cuda:0"])
@pytest.mark.parametrize("devices", [["cuda:0"] * 5, ["cuda:0", "cpu", "cuda:0", "cpu", "cuda:0"]])
def test_across_devices(source: str, devices: list[str]) -> None:
    prefix = make_prefix().to(source)
    placed = Placer(devices, dtype=torch.bfloat16).place(prefix, batch_size=2)
    for number in range(len(set(devices))):
        placed.wait(number)
    keys, values = layer_by_layer(prefix.cpu(), batch=2, dtype=torch.bfloat16)
    for layer, device in enumerate(devices):
        assert placed.keys[layer].device == torch.device(device)
        assert torch.equal(placed.keys[layer].cpu(), keys[layer])
        assert torch.equal(placed.values[layer].cpu(), values[layer])
    assert placed.copies.prepare <= 2
    assert placed.copies.link == len(set(devices) - {source})


@needs_extension
@pytest.mark.gpu
def test_a_large_prefix_comes_in_parts() -> None:
    """32 MB in four parts; each layer is read as soon as it is there."""
    prefix = torch.randn(8, 2, 1, 8, 1024, 128).bfloat16()
    placer = Placer(["cuda:0"] * 8, dtype=torch.bfloat16)
    for stable in (False, True):
        held = prefix.pin_memory()
        placed = placer.place(held, batch_size=1, stable=stable)
        if not stable:
            held.zero_()
        assert placed.copies == Copies(prepare=int(not stable), link=4, scatter=0)
        for layer in range(8):
            assert placed.is_under_way(layer)
            placed.wait_for_layer(layer)
            assert torch.equal(placed.values[layer].cpu(), prefix[layer, 1])


CPP_TESTS = [
    "plan",
    "from_another_device",
    "from_the_host",
    "odd_map",
    "static_cache",
    "layout_stays",
    "host_pool",
    "parts",
    "two_streams",
    "a_prefix_that_is_written_again",
    "a_missing_wait_shows",
    "consumer_on_another_stream",
]


@pytest.fixture(scope="session")
def cpp_tests(repository: Path) -> Path:
    """The C++ tests, built in the folder where setup.py built the extension."""
    build = repository / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=search)
    if cmake is None or not (build / "CMakeCache.txt").exists():
        pytest.skip("the extension was not built from this checkout")
    command = [cmake, "--build", str(build), "--target", "placement_test"]
    done = subprocess.run(
        command, env=os.environ | {"PATH": search}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "placement_test"


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_TESTS)
def test_cpp(cpp_tests: Path, name: str) -> None:
    """Plans, and copies between make-believe devices whose work runs in hundreds of orders."""
    done = subprocess.run([cpp_tests, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("found", ["None", "type('Older', (), {'plan': None})"])
def test_a_missing_or_older_extension_is_one_warning_and_works(found: str) -> None:
    code = (
        "import sys, latentwire_fast\n"
        f"latentwire_fast._C = sys.modules['latentwire_fast._C'] = {found}\n"
        "if latentwire_fast._C is None: del latentwire_fast._C\n"
        "import torch\n"
        "from latentwire_fast.readers import kv_placement\n"
        "assert not kv_placement.has_extension()\n"
        "prefix = torch.ones(2, 2, 1, 1, 1, 4)\n"
        "placer = kv_placement.Placer(['cpu'] * 2, dtype=torch.float32)\n"
        "placed = placer.place(prefix, batch_size=2)\n"
        "print(len(placed.keys))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert done.stderr.count("the C++ extension is not built") == 1
    assert len(done.stderr.splitlines()) == 1
