"""Instructions, registers and floors of every kernel, counted from its code for sm_90.

    python -m bench.kernels.issue_budget                  # both tables
    python -m bench.kernels.issue_budget K1               # rows whose name begins so
    python -m bench.kernels.issue_budget --write          # issue_budget.json anew

No GPU is needed. A row is one operation at one shape of docs/kernels.md. Its launches are recorded,
compiled and disassembled. An SM's four schedulers start one instruction a cycle each: that is the
issue floor of a launch, beside those of memory and of the matrix units. The prediction adds up the
launches, each at its highest floor. It leaves out waiting: a kernel at its floor hides all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.kernels import sass
from bench.kernels.budget_rows import Plan, plans
from bench.kernels.ceilings import REACHABLE, Ceilings
from bench.kernels.launches import KERNELS, Launch, Operation
from bench.kernels.tables import seconds, table

BUDGET = Path(__file__).with_suffix(".json")
# By so much a kernel may execute more instructions than its budget.
MARGIN = 0.03
# Of both cards: SMs, their schedulers, and the clock that they keep under load (boost is 1.98 GHz).
SMS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
# An SM's registers and those given out at a time to a warp, bytes of shared memory (each program
# takes 1024 for itself), warps and programs.
REGISTERS, REGISTER_UNIT, SHARED, SHARED_OWN = 65536, 256, 228 * 1024, 1024
MOST_WARPS, MOST_PROGRAMS = 64, 32
# `if`s of the kernels whose bodies few warps run: rows of no weight or without a label.
RARE = frozenset(
    {
        "else: counts",
        "else: label >= 0",
    }
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        counts: executed by a warp; registers: of a thread; spilled: bytes of stack and local
        memory; shared: bytes of a program; warps: of a program; ptx: that it was made from.
    """

    counts: sass.Counts
    registers: int
    spilled: int
    shared: int
    warps: int
    ptx: str

    @property
    def resident(self) -> int:
        """Programs that an SM holds at a time."""
        per_warp = math.ceil(self.registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // self.warps
        by_shared = SHARED // (self.shared + SHARED_OWN)
        return min(MOST_WARPS // self.warps, MOST_PROGRAMS, by_registers, by_shared)


_compiled: dict[Any, Compiled] = {}


def compiled(launch: Launch) -> Compiled:
    """Of launches of the same code, one is compiled."""
    if launch.key not in _compiled:
        kernel = launch.compiled()
        assembly, usage = sass.disassembled(kernel.asm["cubin"])
        # Triton's cache may have it from another checkout, whose sources may be gone.
        assembly = re.sub(r'File "[^"]*/kernels/(\w+\.py)"', rf'File "{KERNELS}/\1"', assembly)
        _compiled[launch.key] = Compiled(
            *(sass.count(assembly, launch.constants, RARE), usage["REG"]),
            *(usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, launch.warps),
            ptx=kernel.asm["ptx"],
        )
    return _compiled[launch.key]


def launch_floors(launch: Launch, card: Ceilings) -> dict[str, float]:
    """Seconds of a launch by each of its limits: what its instructions take on the SM that has most
    programs, what its matrix products take, and its tensors' bytes moved once."""
    code = compiled(launch)
    programs = math.ceil(launch.programs / SMS)
    cycles = code.counts.cycles()
    cycle = programs * launch.warps / SCHEDULERS / CLOCK
    flops = sum(
        amount * (2 if kind == "TF32" else 1) for kind, amount in code.counts.products.items()
    )
    return {
        **{unit: amount * cycle for unit, amount in cycles.items()},
        "matmul": flops * launch.warps * launch.programs / card.flops_per_second,
        "memory": launch.traffic(code.ptx) / card.bytes_per_second,
        "launch": card.launch_seconds,
    }


@dataclass(frozen=True)
class Row:
    """A plan with its launches."""

    plan: Plan
    steps: list[Launch | Operation]

    def launches(self) -> Iterator[tuple[str, Launch]]:
        """Each with a name of its own: the kernel's, numbered where it comes again."""
        seen: dict[str, int] = {}
        for step in self.steps:
            if isinstance(step, Launch):
                seen[step.name] = seen.get(step.name, 0) + 1
                yield f"{step.name} {seen[step.name]}".removesuffix(" 1"), step

    def instructions(self, launch: Launch) -> float:
        """Of a thread, per element of the plan."""
        each = compiled(launch).counts.instructions
        return each * launch.warps * 32 * launch.programs / self.plan.elements

    def predicted(self, card: Ceilings) -> float:
        total = 0.0
        for step in self.steps:
            if isinstance(step, Operation):
                total += card.floor(step.work)
            else:
                floors = launch_floors(step, card)
                again = self.plan.read_again.get(step.name, 0.0) / card.bytes_per_second
                total += max(*floors.values(), floors["memory"] + again)
        return total

    def budget(self) -> dict[str, Any]:
        found = {}
        for name, launch in self.launches():
            code = compiled(launch)
            found[name] = {
                "instructions": round(self.instructions(launch), 2),
                "registers": code.registers,
                "shared": code.shared,
            }
        return found


@cache
def row(plan: Plan) -> Row:
    return Row(plan, plan.record())


# --- The tables -----------------------------------------------------------------------------------

CODE_HEAD = (
    *("row", "kernel", "instructions per", "integer / slow unit, share of issue"),
    *(
        "global accesses of a warp",
        "barriers",
        "registers",
        "spilled",
        "shared",
        "programs on an SM",
    ),
    "left out",
)


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def code_lines(rows: Iterable[Row]) -> Iterator[list[str]]:
    """One line for each kernel of each row."""
    for r in rows:
        for name, launch in r.launches():
            code = compiled(launch)
            cycles = code.counts.cycles()
            accesses = ", ".join(
                f"{kind} {size} x {number(count)}"
                for (kind, size), count in sorted(code.counts.accesses.items())
            )
            shares = (f"{cycles[unit] / cycles['issue']:.2f}" for unit in ("integer", "slow"))
            yield [
                *(r.plan.title, f"`{name}`"),
                f"{number(r.instructions(launch))} {r.plan.unit}",
                " / ".join(shares),
                *(accesses, number(code.counts.barriers), str(code.registers), str(code.spilled)),
                *(f"{code.shared:,}", str(code.resident)),
                ", ".join(f"{what} ({size})" for what, size in code.counts.cold.items()) or "-",
            ]


FLOOR_HEAD = (
    *("row", "launches", "target"),
    *(
        f"{card} {what}"
        for card in REACHABLE
        for what in ("memory", "matmul", "issue", "predicted", "share of floor")
    ),
)


def floor_lines(rows: Iterable[Row]) -> Iterator[list[str]]:
    """One line for each row: the floors of its work, the issue floor of its code, and the share of
    the former that the prediction reaches."""
    for r in rows:
        cells = [r.plan.title, str(len(r.steps)), r.plan.target or "-"]
        for card in REACHABLE.values():
            issue = sum(
                max(launch_floors(step, card)[unit] for unit in ("issue", *sass.UNIT_CYCLES))
                for step in r.steps
                if isinstance(step, Launch)
            )
            predicted = r.predicted(card)
            floor = max(card.floor(r.plan.work), r.plan.least_launches * card.launch_seconds)
            work = r.plan.work
            cells += [
                seconds(work.traffic / card.bytes_per_second),
                seconds(work.flops / card.flops_per_second) if work.flops else "-",
                *(seconds(issue), seconds(predicted), f"{floor / predicted:.2f}"),
            ]
        yield cells


# --- The budget -----------------------------------------------------------------------------------


def read_budget() -> dict[str, Any]:
    return json.loads(BUDGET.read_text())


def exceeded(found: Row, budget: dict[str, Any]) -> list[str]:
    """What a row takes more of than its budget allows."""
    allowed = budget["rows"].get(found.plan.title)
    if allowed is None:
        return [f"{found.plan.title}: no budget; write one with --write"]
    wrong = []
    for name, launch in found.launches():
        instructions, code = found.instructions(launch), compiled(launch)
        if name not in allowed:
            wrong.append(f"{found.plan.title}: {name}: no budget; write one with --write")
        elif instructions > allowed[name]["instructions"] * (1 + MARGIN):
            wrong.append(
                f"{found.plan.title}: {name}: {instructions:.2f} instructions per "
                f"{found.plan.unit}; the budget is {allowed[name]['instructions']}"
            )
        if code.spilled:
            wrong.append(f"{found.plan.title}: {name}: {code.spilled} bytes spilled")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of rows, by their beginnings; all by default")
    parser.add_argument("--write", action="store_true", help="write issue_budget.json anew")
    options = parser.parse_args(arguments)
    rows = [
        row(plan)
        for plan in plans()
        if not options.names or plan.title.startswith(tuple(options.names))
    ]
    print(table(CODE_HEAD, code_lines(rows)), end="\n\n")
    print(table(FLOOR_HEAD, floor_lines(rows)))
    if options.write:
        known = read_budget()["rows"] if BUDGET.exists() and options.names else {}
        known |= {r.plan.title: r.budget() for r in rows}
        content = {"triton": triton.__version__, "rows": known}
        BUDGET.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    if not BUDGET.exists():
        return 0
    wrong = [line for r in rows for line in exceeded(r, read_budget())]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
