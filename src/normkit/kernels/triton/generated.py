"""Triton kernels that are generated from programs on tables, see ``kernels.program``.

An instance of such a kernel holds a block ``(BR, BG, BJ)`` of examples, groups and channels of a
group. For each sum over examples it loops over all of them. Each loop computes the steps before its
sum again, so that nothing is stored between two loops.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import triton
import triton.language as tl

from normkit.kernels.program import OVER_COLUMNS, OVER_EXAMPLES, TABLES, Program, parsed
from normkit.kernels.shapes import Shape, shapes_of, width_of
from normkit.kernels.triton import device, on_tables
from normkit.kernels.triton.arguments import halves
from normkit.kernels.triton.geometry import power_of_two
from normkit.kernels.triton.parts import Part, parts_of

BUFFERS = "running_mean", "running_var", "counter", "rate_high", "rate_low"
CONSTANTS = "HAS_RUNNING", "HAS_COUNTER", "BR", "BG", "BJ"
INPUTS = ("mean", "var", "grad_scale", "grad_center")
_ROWS = ("parameter", "given", "kept")
_TEXTS = {
    "add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}",
    "rsqrt": "on_tables.root({})", "sigmoid": "on_tables.logistic({})",
    "softmax": "on_tables.shares({}, lanes, {columns})",
    "repeat": "{}", "detach": "{}", "each_example": "{}",
    "share": "device.join(rate_high, rate_low)",
    "inverse_examples": "1.0 / tl.cast(N, tl.float64)",
    "inverse_size": "1.0 / tl.cast(L, tl.float64)",
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel, and the names of its tensor arguments, which come before the numbers N and L."""

    function: Any
    names: tuple[str, ...]


@lru_cache(maxsize=1024)
def kernel_of(text: str, is_wide: bool, index: int) -> Kernel:
    """The kernel of one launch of a program."""
    parts = parts_of(text, is_wide)
    program = parsed(text)
    known: dict[int, str] = {}
    for part in parts[:index]:
        kept = (name for name in part.results if name.startswith("kept"))
        known |= {program.results[name]: name for name in kept}  # buffers are updated by now
        known |= {line: f"stored{line}" for line in part.stored}
    writer = _Writer(program, parts[index], known)
    source = writer.write()
    file = f"<normkit program {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"__name__": __name__, "tl": tl, "device": device, "on_tables": on_tables}
    exec(compile(source, file, "exec"), scope)
    return Kernel(triton.jit(scope["tables_kernel"]), tuple(writer.names))


class _Writer:
    """Writes the source text of the kernel of one launch."""

    def __init__(self, program: Program, part: Part, known: dict[int, str]) -> None:
        self.program, self.part, self.known = program, part, known
        self.shapes = shapes_of(program)
        self.width = width_of(program)
        self.lines: list[str] = []
        self.indent = 1
        self.names: list[str] = []
        self.made: set[int] = set()  # lines of computed rows and sums over examples

    def write(self) -> str:
        self._begin()
        waiting = [i for i in self.part.sums if self.program.steps[i].name in OVER_EXAMPLES]
        while waiting:
            ready = [i for i in waiting if not self._pending(i, waiting)]
            self._sum_examples(ready)
            waiting = [i for i in waiting if i not in ready]
        results = self.program.results
        rows = [name for name in self.part.results if name not in TABLES]
        tables = [name for name in self.part.results if name in TABLES]
        stored = [i for i in self.part.stored if self.program.steps[i].per_example]
        lines = [*(results[name] for name in tables), *stored]
        if lines:
            self._rows(lines)
            if self.part.axes != "columns":
                self._loop()
            self._examples(lines)
            for name in tables:
                self._store(name, results[name])
            for line in stored:
                self._store(f"stored{line}", line)
            self.indent = 1
        self._finish_rows(rows)
        names = [*self.names, *BUFFERS]
        head = ", ".join([*names, "N", "L", *(f"{c}: tl.constexpr" for c in CONSTANTS)])
        return "\n".join([f"def tables_kernel({head}):", *self.lines, ""])

    def _put(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def _name(self, name: str) -> str:
        if name not in self.names:
            self.names.append(name)
        return name

    def _begin(self) -> None:
        channels, groups = self.program.channels, self.program.channels // self.width
        if self.part.axes == "examples":
            self._put("c = (tl.program_id(0) * BJ + tl.arange(0, BJ))[None, None, :]")
            self._put(f"g = c // {self.width}")
            self._put(f"there = c < {channels}")
            self._put(f"leads = there & (c % {self.width} == 0)")
        else:
            first = "tl.program_id(0) * BG + " if self.part.axes == "both" else ""
            self._put(f"g = ({first}tl.arange(0, BG))[None, :, None]")
            self._put("j = tl.arange(0, BJ)[None, None, :]")
            self._put(f"c = g * {self.width} + j")
            self._put(f"there = (g < {groups}) & (j < {self.width})")
            self._put(f"leads = g < {groups}")
        if self.part.axes == "columns":
            self._put("n = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None, None]")
            self._at()
        pairs = zip(self.program.steps, self.shapes, strict=True)
        sizes = (step.columns for step, shape in pairs if shape.kind == "vector")
        self._put(f"lanes = tl.arange(0, {power_of_two(max(sizes, default=1))})")

    def _loop(self) -> None:
        self._put("for top in range(0, N, BR):")
        self.indent = 2
        self._put("n = (top + tl.arange(0, BR))[:, None, None]")
        self._at()

    def _at(self) -> None:
        self._put("valid = n < N")
        self._put("inside = valid & there")
        self._put(f"at = n.to(tl.int64) * {self.program.channels} + c")

    def _pending(self, line: int, waiting: list[int]) -> bool:
        return any(i in waiting for i in self._needed([line]) if i != line)

    def _sum_examples(self, lines: list[int]) -> None:
        steps = self.program.steps
        tables = [t for line in lines for t in steps[line].tables]
        self._rows(tables)
        for line in lines:
            shape = {"cell": "BR, BG, BJ", "group": "BR, BG, 1"}.get(
                self.shapes[line].kind, "BR, 1, 1"
            )
            if self.part.axes == "examples" and self.shapes[line].kind == "group":
                shape = "BR, BG, BJ"
            self._put(f"s{line} = tl.zeros(({shape}), tl.float64)")
        self._loop()
        self._examples([t for t in tables if steps[t].per_example])
        for line in lines:
            first, *rest = (f"v{t}" for t in steps[line].tables)
            value = first
            if steps[line].name == "spread_examples":
                m, center = rest
                value = f"{first} + ({m} - {center}) * ({m} - {center})"
            self._put(f"s{line} += tl.where(valid, {value}, 0.0)")
        self.indent = 1
        for line in lines:
            is_sum = steps[line].name == "sum_examples"
            total = f"tl.sum(s{line}, axis=0)[None, :, :]"
            if self.shapes[line].kind == "scalar":
                total = f"on_tables.sum_block(s{line})"
            self._put(f"v{line} = {total}" + ("" if is_sum else " / N"))
            self.made.add(line)

    def _rows(self, lines: Iterable[int]) -> None:
        """Compute the rows that these lines need."""
        steps = self.program.steps
        for line in self._needed(lines):
            if not steps[line].per_example and line not in self.made:
                self._make(line)
                self.made.add(line)

    def _examples(self, lines: list[int]) -> None:
        """Compute lines for the examples of a block; the rows they need have been computed."""
        for line in self._needed(lines):
            if self.program.steps[line].per_example:
                self._make(line)

    def _needed(self, lines: Iterable[int]) -> list[int]:
        return self.program.needed(lines, {*self.known, *self.made})

    def _make(self, line: int) -> None:
        step, shape = self.program.steps[line], self.shapes[line]
        if line in self.known:
            self._put(f"v{line} = {self._load_stored(line)}")
        elif step.name in INPUTS:
            given = f"tl.load({self._name(step.name)} + at, mask=inside, other=0.0)"
            self._put(f"v{line} = {given}.to(tl.float64)")
            self._center_on_given(line)
        elif step.name in _ROWS:
            self._put(f"v{line} = {self._load_row(line, f'{step.name}{step.numbers[0]}')}")
        else:
            self._put(f"v{line} = {self._formula(line, shape)}")

    def _center_on_given(self, line: int) -> None:
        """Use given statistics as the mean of channels that are normalised by these alone."""
        program, name = self.program, self.program.steps[line].name
        is_given = name in ("mean", "var") and "kept_mean" in program.results
        if program.given_from == program.channels or not is_given:
            return
        is_beside = f"c >= {program.given_from}"
        kept = self._kept(f"given{int(name == 'var')}", program.given_from)
        value = f"device.finite({kept})" if name == "mean" else kept
        self._put(f"v{line} = tl.where({is_beside}, {value}, v{line})")
        self._put(f"tl.store({name} + at, v{line}, mask=inside & ({is_beside}))")

    def _kept(self, name: str, start: int) -> str:
        columns = self.program.kept_columns
        return self._load(self._name(name), self._columns(Shape("cell", start, False), columns))

    def _load_row(self, line: int, name: str) -> str:
        columns = self.program.steps[line].columns
        return self._load(self._name(name), self._columns(self.shapes[line], columns))

    def _load(self, name: str, place: tuple[str, str]) -> str:
        at, mask = place
        if not mask:
            return f"tl.load({name}).to(tl.float64)"
        return f"tl.load({name} + {at}, mask={mask}, other=0.0).to(tl.float64)"

    def _columns(self, shape: Shape, columns: int) -> tuple[str, str]:
        """Address of a row's values, and a mask of those in a block that exist."""
        if shape.kind == "cell":
            if columns == self.program.channels:
                return "c", "there"
            start = shape.start
            return f"(c - {start})", f"there & (c >= {start}) & (c < {start + columns})"
        if shape.kind == "group":
            return "g", "there" if self.part.axes == "examples" else "leads"
        return ("lanes", f"lanes < {columns}") if shape.kind == "vector" else ("0", "")

    def _load_stored(self, line: int) -> str:
        step, shape = self.program.steps[line], self.shapes[line]
        name = self._name(self.known[line])
        if not step.per_example:
            return self._load_row(line, name)
        groups = step.columns
        if groups == 1:
            return f"tl.load({name} + n, mask=valid, other=0.0)"
        _, mask = self._columns(shape, groups)
        return f"tl.load({name} + n * {groups} + g, mask=valid & {mask}, other=0.0)"

    def _formula(self, line: int, shape: Shape) -> str:
        step = self.program.steps[line]
        v = [f"v{t}" for t in step.tables]
        if step.name in _TEXTS:
            return _TEXTS[step.name].format(*v, columns=step.columns)
        if step.name in OVER_COLUMNS:
            return self._over_columns(line, v)
        if step.name == "number":
            return _literal(step.numbers[0])
        return self._in_columns(line, shape, v)

    def _over_columns(self, line: int, v: list[str]) -> str:
        step, shape = self.program.steps[line], self.shapes[line]
        source = self.shapes[step.tables[0]]
        if source.kind == "vector":
            return f"tl.sum({v[0]}, axis=0)"
        value = v[0]
        if step.name == "spread_runs":
            value = f"{v[0]} + ({v[1]} - {v[2]}) * ({v[1]} - {v[2]})"
        _, mask = self._columns(source, self.program.steps[step.tables[0]].columns)
        masked = f"tl.where({mask}, {value}, 0.0)"
        total = f"on_tables.sum_columns({masked})"
        if shape.kind == "group":
            total = f"tl.sum({masked}, axis=2)[:, :, None]"
        elif shape.kind == "scalar":
            total = f"on_tables.sum_block({masked})"
        return total if step.name == "sum_runs" else f"{total} / {self.width}"

    def _in_columns(self, line: int, shape: Shape, v: list[str]) -> str:
        """Write a step ``slice``, ``pad`` or ``join``."""
        step = self.program.steps[line]
        source = self.program.steps[step.tables[0]]
        if step.name == "join":
            return f"tl.where(c < {shape.start + source.columns}, {v[0]}, {v[1]})"
        first = int(step.numbers[0])
        if step.name == "slice":
            if self.shapes[step.tables[0]].kind != "vector":
                return v[0]
            return f"tl.sum(tl.where(lanes == {first}, {v[0]}, 0.0), axis=0)"
        if shape.kind == "vector":
            return f"tl.where(lanes == {first}, {v[0]}, 0.0)"
        start = shape.start + first
        return f"tl.where((c >= {start}) & (c < {start + source.columns}), {v[0]}, 0.0)"

    def _store(self, name: str, line: int) -> None:
        step = self.program.steps[line]
        out = self._name(name)
        # Adding zeros makes a table of a value that may be a row or a number.
        value, at, mask = f"tl.zeros((1, 1, 1), tl.float64) + v{line}", "at", "inside"
        if name.startswith("stored"):
            is_one = step.columns == 1
            at = "n" if is_one else f"n * {step.columns} + g"
            mask = "valid" if is_one else "valid & leads"
        self._put(f"tl.store({out} + {at}, ({value}).to({out}.dtype.element_ty), mask={mask})")

    def _finish_rows(self, names: list[str]) -> None:
        """Store rows that are results or that later launches need, and update the buffers."""
        results, steps = self.program.results, self.program.steps
        stored = [i for i in self.part.stored if not steps[i].per_example]
        self._rows([*(results[n] for n in names), *stored])
        for name in names:
            self._store_row(name, results[name])
        for line in stored:
            self._store_row(f"stored{line}", line)
        if "kept_mean" in names and self.program.moves != "nothing":
            self._move()
        self._put("if HAS_COUNTER:")
        self._put("    device.count_batch(counter, tl.program_id(0) == 0)")

    def _store_row(self, name: str, line: int) -> None:
        shape, columns = self.shapes[line], self.program.steps[line].columns
        out = self._name(name)
        value = f"(v{line}).to({out}.dtype.element_ty)"
        at, mask = self._columns(shape, columns)
        if shape.kind == "group":
            mask = "leads"
        if self.part.axes == "both" and shape.kind in ("vector", "scalar"):
            at = f"tl.program_id(0) * {columns} + {at}"
        if not mask:
            self._put(f"tl.store({out} + {at}, {value})")
            return
        self._put(f"tl.store({out} + {at}, {value}, mask={mask})")

    def _move(self) -> None:
        results = self.program.results
        shape = self.shapes[results["kept_mean"]]
        at, mask = self._columns(shape, self.program.kept_columns)
        mean, var = f"v{results['kept_mean']}", f"v{results['kept_var']}"
        self._put("if HAS_RUNNING:")
        if self.program.moves == "estimates":
            for buffer, value in (("running_mean", mean), ("running_var", var)):
                kept = f"({value}).to({buffer}.dtype.element_ty)"
                self._put(f"    tl.store({buffer} + {at}, {kept}, mask={mask})")
            return
        self._put("    size = tl.cast(N, tl.float64) * L")
        unbiased = f"{var} * (size / tl.maximum(size - 1.0, 1.0))"
        for buffer, value in (("running_mean", mean), ("running_var", unbiased)):
            self._put(f"    device.move({buffer} + {at}, {value}, rate_high, rate_low, {mask})")


def _literal(value: float) -> str:
    """Source text of a float64 number; Triton would round a plain literal to float32."""
    high, low = halves(value)
    return repr(value) if low == 0 else f"device.join({high!r}, {low!r})"
