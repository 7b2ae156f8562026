"""Instructions that a compiled kernel executes, counted in its disassembly; no GPU is needed.

A warp executes each basic block so many times: the trip counts of the loops round it, multiplied.
The branch that closes a loop carries the source line of its `for`, whose range is computed from the
kernel's compile-time constants. Left out, and named in `Counts.cold`: blocks that only call a
division's slow path, and the bodies of `if`s that the caller says are rare.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Loads, asynchronous copies to shared memory, stores, atomics; what follows may tell their width.
ACCESS = re.compile(r"^(LDG|LDGSTS|STG|ATOMG|RED)((?:\.\w+)+)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Instructions of which a scheduler starts one in so many cycles, by the unit that they run on; the
# rest start one a cycle. From the throughput table of the CUDA programming guide for 9.0.
INTEGER_UNIT = frozenset(
    {"BMSK", "BREV", "F2FP", "FCHK", "FLO", "FMNMX", "FSEL", "FSETP", "HMNMX2", "HSETP2", "I2FP"}
    | {"I2IP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "P2R", "PLOP3", "PRMT", "R2P"}
    | {"SEL", "SGXT", "SHF", "SHL", "SHR", "VABSDIFF", "VIADD", "VIMNMX"}
)
SLOW_UNIT = frozenset({"F2F", "F2I", "FRND", "I2F", "I2I", "MUFU", "POPC"})
UNIT_CYCLES = {"integer": 2, "slow": 8}

# Products on the matrix units: of four warps together, and of one.
_WIDE_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32(?:\.(TF32|BF16))?")
_PRODUCT = re.compile(r"HMMA\.(16816|1688|1684)\.F32(?:\.(TF32|BF16))?")

_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+|\$__internal\w+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


# A file and a line.
Place = tuple[str, int]


class BudgetError(Exception):
    """A kernel whose instructions cannot be counted."""


@dataclass
class Block:
    """Instructions without a branch between them, and the source line of each."""

    instructions: list[str] = field(default_factory=list)
    lines: list[Place | None] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """What one warp executes of a kernel.

    Attributes:
        by_name: executions of each instruction, by its name without suffixes.
        accesses: executed global-memory instructions by (kind, bytes per thread).
        products: FLOPs on the matrix units, by the type of the factors; a warp's share.
        loops: `file:line` of each loop and how often its body runs each time it is reached.
        cold: what was left out, and of how many instructions.
    """

    by_name: Mapping[str, float]
    accesses: Mapping[tuple[str, int], float]
    products: Mapping[str, float]
    loops: Mapping[str, float]
    cold: Mapping[str, int]

    @property
    def instructions(self) -> float:
        return sum(self.by_name.values())

    @property
    def barriers(self) -> float:
        return self.by_name.get("BAR", 0.0)

    def cycles(self) -> dict[str, float]:
        """Scheduler cycles that a warp takes: to start its instructions, and of each unit."""
        units = {"issue": self.instructions}
        for unit, names in (("integer", INTEGER_UNIT), ("slow", SLOW_UNIT)):
            units[unit] = UNIT_CYCLES[unit] * sum(self.by_name.get(name, 0.0) for name in names)
        return units


def tool(name: str) -> str | None:
    """One of the CUDA tools that Triton brings along; None where it does not."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if os.access(path, os.X_OK) else None


def disassembled(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The assembly with source lines, and the registers, stack and local bytes that it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", "-g", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    return text, {key: int(value) for key, value in found}


def _run(name: str, *arguments: str) -> str:
    path = tool(name)
    if path is None:
        raise BudgetError(f"this Triton has no {name}")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def width(instruction: str) -> tuple[str, int] | None:
    """(kind, bytes per thread) of a global-memory instruction."""
    match = ACCESS.match(_PREDICATE.sub("", instruction))
    if match is None:
        return None
    widths = [WIDTHS[part] for part in match[2].split(".") if part in WIDTHS]
    return match[1], widths[-1] if widths else 4


def product(instruction: str) -> tuple[str, float] | None:
    """(type of the factors, FLOPs of one warp) of a product on the matrix units."""
    if match := _WIDE_PRODUCT.search(instruction):
        return match[4] or "F16", 2 * int(match[1]) * int(match[2]) * int(match[3]) / 4
    if match := _PRODUCT.search(instruction):
        return match[2] or "F16", 2 * 16 * 8 * int(match[1].removeprefix("168"))
    return None


def _name(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0].split(".")[0]


def _blocks(text: str) -> list[Block]:
    """Basic blocks in order; `after` holds the indices of those that may follow each."""
    body = text[text.index("\n.text.") :]
    blocks, labels = [Block()], {}
    place: Place | None = None
    for line in body.splitlines():
        if found := _LINE.search(line):
            place = found[1], int(found[2])
        elif found := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[found[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            blocks[-1].instructions.append(found[2].strip())
            blocks[-1].lines.append(place)
            if _name(found[2]) in ("BRA", "EXIT", "RET", "CALL"):
                blocks.append(Block())
    for index, block in enumerate(blocks):
        block.after = list(_followers(index, block, labels, len(blocks)))
    return blocks


def _followers(index: int, block: Block, labels: dict[str, int], count: int) -> Iterator[int]:
    last = block.instructions[-1] if block.instructions else "NOP"
    # A uniform branch names a second predicate before its target.
    conditional = last.startswith("@") or re.search(r"\bU?P\d\b", last.split("`")[0]) is not None
    goes_on = _name(last) not in ("BRA", "EXIT", "RET") or conditional
    if goes_on and index + 1 < count:
        yield index + 1
    target = _TARGET.search(last)
    if _name(last) == "BRA" and target:
        yield labels[target[1]]


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text())


@dataclass(frozen=True)
class _Rare:
    """A branch of an `if` that is seldom taken: the condition's line, and those of the branch."""

    name: str
    condition: Place
    body: range


@cache
def _rare_branches(path: str, rare: frozenset[str]) -> list[_Rare]:
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.If):
            condition = ast.unparse(node.test)
            for name, body in ((condition, node.body), (f"else: {condition}", node.orelse)):
                if name in rare:
                    lines = range(body[0].lineno, (body[-1].end_lineno or 0) + 1)
                    found.append(_Rare(name, (path, node.lineno), lines))
    return found


def _share(block: Block, branch: _Rare) -> float:
    """Of a block's instructions, how many come from a branch."""
    path = branch.condition[0]
    inside = sum(bool(p) and p[0] == path and p[1] in branch.body for p in block.lines)
    return inside / max(len(block.lines), 1)


def _reached(blocks: list[Block], rare: frozenset[str]) -> tuple[set[int], Counter[str]]:
    """Blocks that nearly all warps go through, and the names of those they pass by."""
    seen: set[int] = set()
    cold: Counter[str] = Counter()
    waiting = [0]
    while waiting:
        index = waiting.pop()
        block = blocks[index]
        if index in seen:
            continue
        if block.instructions and _name(block.instructions[-1]) == "CALL":
            cold["slow path of a division"] += len(block.instructions)
            continue
        seen.add(index)
        after = block.after
        place = block.lines[-1] if block.lines else None
        if len(after) > 1 and place:
            for branch in _rare_branches(place[0], rare):
                if branch.condition == place:
                    out = max(after, key=lambda i: _share(blocks[i], branch))
                    cold[branch.name] += len(blocks[out].instructions)
                    after = [i for i in after if i != out]
        waiting += after
    return seen, cold


def _ranges(node: ast.For, path: str, constants: Mapping[str, Any]) -> range:
    """The range of a `for`, in the kernel itself or in a function that was inlined into it."""
    assert isinstance(node.iter, ast.Call)
    bounds = [ast.unparse(argument) for argument in node.iter.args]
    found, missing = set(), ""
    constants = {**constants, **_assigned(path, constants)}
    for names in [constants, *_arguments(path, node.lineno, constants)]:
        try:
            found.add(range(*(eval(bound, {}, dict(names)) for bound in bounds)))
        except NameError as error:
            missing = str(error)
    if len(found) != 1:
        message = f"{path}:{node.lineno}: range({', '.join(bounds)}) "
        raise BudgetError(message + (f"may be {found}" if found else f"is not known: {missing}"))
    return found.pop()


def _assigned(path: str, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Names that a file's functions give to compile-time numbers (`name: tl.constexpr = ...`)."""
    found: dict[str, Any] = {}
    for node in ast.walk(_tree(path)):
        constant = isinstance(node, ast.AnnAssign) and node.value is not None
        if constant and ast.unparse(node.annotation) == "tl.constexpr":
            try:
                value = eval(ast.unparse(node.value), {}, {**constants, **found})
            except NameError:  # of another kernel in the file
                continue
            found[ast.unparse(node.target)] = value
    return found


def _arguments(path: str, line: int, constants: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the function round a line is called with, by each call in the same folder, as far as
    the constants tell."""
    functions = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef)]
    function = next(f for f in functions if f.lineno <= line <= (f.end_lineno or line))
    parameters = [argument.arg for argument in function.args.args]
    for file in sorted(Path(path).parent.glob("*.py")):
        for call in ast.walk(_tree(str(file))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == function.name:
                given = (a.value.elts if isinstance(a, ast.Starred) else [a] for a in call.args)
                bound = dict(
                    zip(parameters, (ast.unparse(a) for g in given for a in g), strict=False)
                )
                known = {n: constants[a] for n, a in bound.items() if a in constants}
                yield {**constants, **known}


def _trips(loops: list[Place], constants: Mapping[str, Any]) -> float:
    """How often the innermost of nested loops runs for one run of the outermost's surroundings."""
    if not loops:
        return 1.0
    path, line = loops[0]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.While) and node.lineno == line:
            return _trips(loops[1:], constants)  # repeats are rare
        if isinstance(node, ast.For) and node.lineno == line:
            name = ast.unparse(node.target)
            values = _ranges(node, path, constants)
            return sum(_trips(loops[1:], {**constants, name: value}) for value in values)
    raise BudgetError(f"a loop closes at {path}:{line}, where no `for` or `while` is")


def _loops(blocks: list[Block], live: set[int]) -> list[tuple[int, int, Place]]:
    """(first block, last block, its `for`) of each loop, the outermost first."""
    found = []
    for index in sorted(live):
        for target in blocks[index].after:
            if target <= index:
                place = blocks[index].lines[-1]
                if not place:
                    raise BudgetError("a loop without a source line: compile with line numbers")
                found.append((target, index, place))
    return sorted(found, key=lambda loop: loop[0] - loop[1])


def count(
    assembly: str, constants: Mapping[str, Any], rare: frozenset[str] = frozenset()
) -> Counts:
    """What one warp executes, on the way that nearly all warps go.

    Args:
        assembly: of `disassembled`; constants: compile-time arguments by name, which loops' ranges
            are computed from; rare: conditions of `if`s (as `ast.unparse` writes them) whose
            bodies are left out; with `else: ` before it, the other branch.

    Raises:
        BudgetError: a loop whose trip count the constants do not tell.
    """
    blocks = _blocks(assembly)
    live, cold = _reached(blocks, rare)
    loops = _loops(blocks, live)
    names: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    products: Counter[str] = Counter()
    for index in sorted(live):
        times = _trips([place for a, b, place in loops if a <= index <= b], constants)
        for instruction in blocks[index].instructions:
            names[_name(instruction)] += times
            if access := width(instruction):
                accesses[access] += times
            if found := product(instruction):
                products[found[0]] += times * found[1]
    trips = {}
    for first, last, place in loops:
        nest = [outer for a, b, outer in loops if a <= first and last <= b]
        where = f"{Path(place[0]).name}:{place[1]}"
        trips[where] = _trips(nest, constants) / _trips(nest[:-1], constants)
    return Counts(dict(names), dict(accesses), dict(products), trips, dict(cold))
