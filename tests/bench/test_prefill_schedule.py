"""When which row of the prefill benchmark runs: with a clock of its own, over the real plan too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from bench import prefill_latency
from bench.kernels.ceilings import REACHABLE
from bench.prefill import gpu_prefill, measure, schedule
from bench.prefill.clock import Sample
from bench.prefill.rows import TEMPLATE_POSITIONS, Plan, Row, Sizes, adapter_of, plan_of
from bench.prefill.schedule import (
    OUT_OF_TIME,
    Effort,
    Timed,
    Timetable,
    expected_seconds,
    interleave,
    measure_rows,
    runs_within,
    warm_up,
)
from bench.prefill.shapes import SHAPES
from latentwire_fast.readers.shapes import Dims

H200 = REACHABLE["H200"]


@dataclass
class World:
    """Time that passes only where a row runs."""

    now: float = 0.0
    calls: list[Any] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def runs(self, name: Any, cost: float) -> Callable[[], Sample]:
        def run() -> Sample:
            self.calls.append(name)
            self.now += cost
            return Sample(1e3 * cost, {})

        return run

    def row(self, name: str, cost: float, wanted: int) -> Timed[str]:
        return Timed(name, self.runs(name, cost), wanted=wanted)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(schedule, "time", world)
    return world


def unwatched(runs: Iterator[int], _total: int) -> Iterator[int]:
    return runs


def measured(rows: list[Any], make: Any, effort: Effort, released: list[float]) -> dict[Any, Any]:
    found = measure_rows(
        *(rows, make),
        effort=effort, release=lambda: released.append(0), watch=unwatched,
    )  # fmt: skip
    return {timed.row: timed for timed in found}


# --- one row, and a few ---------------------------------------------------------------------------


def test_warm_ups_are_not_kept_and_slow_ones_stop_early(world: World) -> None:
    row = world.row("a", 1.0, 5)
    warm_up(row, runs=10, limited=False)
    assert (len(world.calls), row.samples, row.cost) == (10, [], 1.0)
    warm_up(row, runs=10, limited=True)
    assert len(world.calls) == 11
    warm_up(world.row("b", 0.05, 5), runs=10, limited=True)
    assert world.calls.count("b") == 10


def test_one_hiccup_makes_no_slow_row(world: World) -> None:
    costs = iter([0.01] * 9 + [3.0])
    row: Timed[str] = Timed("a", lambda: world.runs("a", next(costs))())
    warm_up(row, runs=10, limited=True)
    assert row.cost == pytest.approx(0.01)


def test_rows_take_turns_and_cheap_ones_several_in_a_round(world: World) -> None:
    rows = [world.row("a", 1.0, 2), world.row("b", 0.1, 5)]
    assert list(interleave(rows, deadline=None)) == list(range(1, 8))
    assert "".join(world.calls) == "abbabbb"
    equal = [world.row("c", 1.0, 3), world.row("d", 1.0, 3)]
    list(interleave(equal, deadline=None))
    assert "".join(world.calls).endswith("cdcdcd")


def test_nothing_starts_after_the_deadline(world: World) -> None:
    row = world.row("a", 1.0, 50)
    list(interleave([row], deadline=2.5))
    assert len(row.samples) == 3


def test_fast_rows_get_all_their_runs_before_slow_ones_get_more_than_five() -> None:
    costs = [0.01, 0.04, 0.1, 1.0]
    assert runs_within(1e9, costs, repeats=50) == [50] * 4
    assert runs_within(0.0, costs, repeats=50) == [5] * 4
    assert runs_within(2.5 + 5.5, costs, repeats=50) == [50, 50, 5, 5]
    more = runs_within(2.5 + 5.5 + 2.0, costs, repeats=50)
    assert more == [50, 50, 25, 5]
    assert runs_within(0.0, costs, repeats=3) == [3] * 4
    assert runs_within(5.0, [], repeats=3) == []


def test_a_row_that_fails_late_costs_itself_alone_and_gives_its_memory_back(world: World) -> None:
    def make(row: str) -> Callable[[], Sample]:
        if row == "never":
            raise RuntimeError("no such kernel")
        left = {"warming": 1, "later": 4}.get(row, 99)
        run = world.runs(row, 0.01)

        def limited() -> Sample:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError("CUDA out of memory")
            return run()

        return limited

    released: list[float] = []
    found = measured(["never", "warming", "later", "fine"], make, Effort(2, 8), released)
    assert len(found["fine"].samples) == 8
    failures = {row: timed.failure for row, timed in found.items()}
    assert failures == {
        "never": "RuntimeError: no such kernel",
        "warming": "MemoryError: CUDA out of memory",
        "later": "MemoryError: CUDA out of memory",
        "fine": None,
    }
    assert len(released) == 3
    assert all(found[row].run is None and not found[row].samples for row in ("warming", "later"))


def test_no_row_is_made_at_the_cost_of_those_that_are_there(world: World) -> None:
    def make(row: str) -> Callable[[], Sample]:
        world.now += 3.0
        return world.runs(row, 1.0)

    found = measured(list("abc"), make, Effort(1, 5, deadline=17.0), [])
    assert [len(found[row].samples) for row in "abc"] == [5, 5, 0]
    assert found["c"].failure == OUT_OF_TIME


def test_rows_that_are_there_get_their_least_runs_after_their_groups_share(world: World) -> None:
    """Making them took longer than expected; before, no row of such a group had a sample."""

    def make(row: str) -> Callable[[], Sample]:
        world.now += 4.0
        return world.runs(row, 1.0)

    found = measured(list("abc"), make, Effort(1, 50, deadline=13.0, latest=30.0), [])
    assert [len(found[row].samples) for row in "abc"] == [5, 5, 0]
    world.now = 0.0
    found = measured(list("ab"), make, Effort(1, 50, deadline=13.0, latest=15.5), [])
    assert [len(found[row].samples) for row in "ab"] == [3, 3]


# --- groups ---------------------------------------------------------------------------------------


def test_what_a_group_leaves_is_for_the_others(world: World) -> None:
    table = Timetable({"a": 10.0, "b": 10.0, "c": 20.0}, deadline=80.0)
    assert table.start("a") == 20.0
    world.now = 5.0
    assert table.start("b") == 30.0
    world.now = 90.0
    assert table.start("c") == 90.0
    assert Timetable({"a": 1.0}, deadline=None).start("a") is None
    world.now = 0.0
    table = Timetable({"a": 10.0, "b": 10.0}, deadline=80.0)
    table.skip("a")
    table.skip("a")
    assert table.start("b") == 80.0


def test_a_group_is_expected_to_take_what_its_rows_do(world: World) -> None:
    groups = {"cheap": [0.01] * 3, "dear": [0.01] * 3 + [2.0]}
    builds = {"reader": 23.0}
    found = expected_seconds(groups, builds=builds, effort=Effort(10, 50, deadline=60.0))
    made = 3 * schedule.ROW_SECONDS
    assert found["reader"] == 23.0
    assert found["cheap"] - made == pytest.approx(1.89)
    # Made, warmed up once, and some of 50 samples.
    slow = found["dear"] - 1.89 - made - schedule.ROW_SECONDS
    assert (3 + 1 + 5) * 2.0 <= slow < (3 + 1 + 50) * 2.0
    assert 0.9 * 60 < sum(found.values()) <= 60
    free = expected_seconds(groups, builds=builds, effort=Effort(10, 50))
    assert free["dear"] - found["dear"] > 80


# --- the real plan --------------------------------------------------------------------------------


def seconds_of(section: Any) -> float:
    """What it may take if the extension was built and the tests ran in 30 and 35 s."""
    planned = gpu_prefill.EXTENSION_SECONDS + gpu_prefill.TESTS_SECONDS
    whole = gpu_prefill.TOTAL_SECONDS
    return float(section.seconds * (whole - 65) / (whole - planned))


def simulate(world: World, section: Any, *, slower: float) -> dict[Row, Timed[Row]]:
    """A section as `measure.Run` runs it, on a machine that is slower than predicted."""
    args = prefill_latency.parse(section.options.split())
    args.dtype = "bfloat16"
    world.now = gpu_prefill.IMPORT_SECONDS
    ends = seconds_of(section)
    args.until = ends - section.margin
    run: Any = measure.Run.__new__(measure.Run)
    run.args = args
    timetable = Timetable(run._expected(H200), deadline=args.until)
    found: dict[Row, Timed[Row]] = {}
    for source in args.readers:
        # A reader, and the kernels that Triton compiles first.
        world.now += 6.0 + 12.0 * (source == args.readers[0])
        for key in ((source, measure.READER), measure.KERNELS):
            timetable.skip(key)
        for batch in args.batches:
            deadline = timetable.start((source, batch))
            dims = Dims.of(SHAPES[source])
            sizes = Sizes(dims, Dims.of(SHAPES[args.encoder]), 32, TEMPLATE_POSITIONS, 2)

            def make(row: Row, sizes: Sizes = sizes) -> Callable[[], Sample]:
                cost = slower * sizes.cost(row).predict(H200, engine=row.engine)
                world.now += 0.5 + (4 if row.engine == "graph" else 2) * cost
                return world.runs(row, cost)

            rows = list(plan_of(args).rows(source, batch, dims, element=2))
            effort = Effort(args.warm_ups, args.repeats, deadline, latest=args.until)
            found |= measured(rows, make, effort, [])
            assert adapter_of(args).adapter.kind == "mlp"
    assert world.now <= ends
    return found


@pytest.mark.parametrize("slower", [1.0, 1.25])
def test_the_tables_fit_their_section(world: World, slower: float) -> None:
    """With 25% more time per run than predicted, and half a second to make a row."""
    section = next(s for s in gpu_prefill.SECTIONS if s.name == "tables")
    found = simulate(world, section, slower=slower)
    absent = [row.title for row, timed in found.items() if timed.failure]
    assert not absent
    few = [row.title for row, t in found.items() if t.cost < 0.05 and len(t.samples) < 50]
    assert not few
    assert all(len(timed.samples) >= 5 for timed in found.values())
    texts = {(r.reader, r.engine, r.batch, r.text_tokens) for r in found if r.method == "text"}
    assert len(texts) == 2 * 2 * 8  # all but 4,000 tokens at batch 32
    latents = {(r.batch, r.latents) for r in found if r.method == "latent_cached"}
    assert latents == {(batch, m) for batch in (1, 8, 32) for m in (16, 32, 64)}


@pytest.mark.parametrize("slower", [1.5, 2.5])
def test_a_machine_that_is_much_slower_keeps_its_text_rows(world: World, slower: float) -> None:
    section = next(s for s in gpu_prefill.SECTIONS if s.name == "tables")
    found = simulate(world, section, slower=slower)
    assert not [row.title for row, t in found.items() if row.method == "text" and t.failure]


def test_text_comes_first_and_eager_before_graphs() -> None:
    plan = Plan(("text", "latent_cached", "kv_reuse"), ("eager", "graph"), (250, 1000), (16,), (6,))
    rows = list(plan.rows("r", 1, Dims.of(SHAPES["llama-tiny"]), element=2))
    methods = [(row.engine, row.method) for row in rows]
    both = [(e, m) for e in ("eager", "graph") for m in ("text", "text", "latent_cached")]
    assert methods == both + [("eager", "kv_reuse")] * 2
