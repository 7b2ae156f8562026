"""The kernels' instruction budgets: one that executes more than its budget allows fails here."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from bench.kernels import issue_budget, sass
from bench.kernels.budget_rows import Plan, plans
from bench.kernels.launches import Launch

BUDGET = issue_budget.read_budget()
compiles = pytest.mark.skipif(
    triton.__version__ != BUDGET["triton"] or sass.tool("nvdisasm") is None,
    reason="the budgets are those of another Triton",
)
QUICK = [plan for plan in plans() if plan.quick]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("plan", QUICK, ids=lambda plan: plan.title)
def test_no_kernel_exceeds_its_budget(plan: Plan) -> None:
    """`python -m bench.kernels.issue_budget` does this for all rows, and `--write` renews them."""
    assert issue_budget.exceeded(issue_budget.row(plan), BUDGET) == []


@compiles
def test_a_kernel_over_its_budget_is_named() -> None:
    plan = next(plan for plan in QUICK if plan.title.startswith("K1 pack, 4 bits"))
    found = issue_budget.row(plan)
    assert issue_budget.exceeded(found, {"rows": {plan.title: found.budget()}}) == []
    tight = found.budget()
    tight["_quantize_pack_kernel"]["instructions"] *= 0.96
    (message,) = issue_budget.exceeded(found, {"rows": {plan.title: tight}})
    assert message.startswith(f"{plan.title}: _quantize_pack_kernel: ")
    assert "instructions per value; the budget is" in message
    (message,) = issue_budget.exceeded(found, {"rows": {}})
    assert message.endswith("no budget; write one with --write")


def test_every_row_has_a_budget() -> None:
    assert {plan.title for plan in plans()} == set(BUDGET["rows"])


def test_a_plan_records_its_launches_without_a_gpu() -> None:
    plan = next(plan for plan in plans() if plan.title == "K2 forward, 16384 x 256 x 4096")
    launch, product = plan.record()
    assert isinstance(launch, Launch)
    assert launch.programs == 512
    assert launch.constants["WIDTH"] == 256
    assert product.name == "addmm"
    assert product.work.flops == 2 * 16384 * 256 * 4096


SOURCE = """\
def kernel(WIDTH):
    before()
    for start in range(0, WIDTH, 16):
        for part in range(0, start + 16, 16):
            if rare:
                seldom()
            often()
"""
# Addresses, a loop in a loop, a rare branch, a call of a slow path, a function after the end.
ASSEMBLY = """
.text.kernel:
\t//## File "{path}", line 2
        /*0000*/                   MUFU.RCP R0, R1 ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__division) ;
        /*0030*/                   MOV R9, R9 ;
.L_x_9:
.L_x_0:
\t//## File "{path}", line 3
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
\t//## File "{path}", line 5
        /*0050*/              @!P1 BRA `(.L_x_2) ;
\t//## File "{path}", line 6
        /*0060*/                   SEL R0, R0, R1, P0 ;
        /*0070*/                   SEL R0, R0, R1, P0 ;
.L_x_2:
\t//## File "{path}", line 7
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
\t//## File "{path}", line 4
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/              @!P3 STG.E.U16 desc[UR4][R2.64], R4 ;
\t//## File "{path}", line 3
        /*00b0*/               @P3 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
$__internal_0_$__division:
        /*00d0*/                   FADD R0, R0, R0 ;
        /*00e0*/                   RET.REL.NODEC R2 `(kernel) ;
"""


def test_instructions_are_counted_as_often_as_they_run(tmp_path: Path) -> None:
    """A loop of 4 round a loop of 1, 2, 3 and 4."""
    (tmp_path / "kernel.py").write_text(SOURCE)
    assembly = ASSEMBLY.format(path=tmp_path / "kernel.py")
    found = sass.count(assembly, {"WIDTH": 64}, frozenset({"rare"}))
    assert found.by_name == {
        **{"MUFU": 1, "BRA": 1 + 10 + 10 + 4, "LDG": 4, "HGMMA": 10, "STG": 4, "EXIT": 1}
    }
    assert found.accesses == {("LDG", 16): 4, ("STG", 2): 4}
    assert found.products == {"BF16": 10 * 2 * 64 * 32 * 16 / 4}
    assert found.loops == {"kernel.py:3": 4, "kernel.py:4": 2.5}
    assert found.cold == {"slow path of a division": 1, "rare": 2}
    assert found.cycles() == {"issue": 45, "integer": 0, "slow": 8}
    assert sass.count(assembly, {"WIDTH": 64}).by_name["SEL"] == 20
    with pytest.raises(sass.BudgetError, match="WIDTH"):
        sass.count(assembly, {})


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(32, 0, 4, 16), (40, 0, 4, 12), (128, 98304, 8, 2), (255, 0, 8, 1), (16, 0, 1, 32)],
)
def test_programs_on_an_sm(registers: int, shared: int, warps: int, resident: int) -> None:
    counts = sass.Counts({}, {}, {}, {}, {})
    code = issue_budget.Compiled(counts, registers, 0, shared, warps, "")
    assert code.resident == resident
