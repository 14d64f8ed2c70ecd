"""The gradient of a program on tables, as another program; each step has one transpose."""

from __future__ import annotations

from collections.abc import Callable

from normkit.kernels.program import Program, Step, Steps, finished

Parts = list[tuple[int, int]]  # terms of a gradient: a sign and a line of the new program each


def transposed(forward: Program, num_parameters: int) -> Program:
    """Make the program of the gradient, from the gradients of scale and center.

    Its results are the gradients of the parameters and the factors of the map's gradient
    ``k1 * grad + k2 * (x - mean) + k3``. Values of the forward program are recomputed, except for
    the batch stage's statistics, which were kept.
    """
    return _Transpose(forward).run(num_parameters)


class _Transpose:
    def __init__(self, forward: Program) -> None:
        self.forward = forward
        self.steps = Steps(forward.channels)
        self.recomputed: dict[int, int] = {}  # line of the forward program: line of the new one
        self.parts: list[Parts] = [[] for _ in forward.steps]
        kept = ("kept_mean", "kept_var")
        for i, name in enumerate(kept):
            line = forward.results.get(name)
            if line is not None:
                columns = forward.kept_columns
                self.recomputed[line] = self.steps.add("kept", numbers=(i,), columns=columns)
        self.wanted = self._wanted()

    def _wanted(self) -> list[bool]:
        """Which lines depend on the map or a parameter, so that their gradient is needed."""
        found: list[bool] = []
        for step in self.forward.steps:
            is_source = step.name in ("mean", "var", "parameter")
            reaches = any(found[t] for t in step.tables) and step.name != "detach"
            found.append(is_source or reaches)
        return found

    def run(self, num_parameters: int) -> Program:
        steps, forward = self.steps, self.forward
        sums = [steps.add(name, columns=forward.channels) for name in ("grad_scale", "grad_center")]
        for name, line in zip(("scale", "center"), sums, strict=True):
            self.parts[forward.results[name]].append((1, line))
        found: dict[str, int] = {}
        for line in reversed(range(len(forward.steps))):
            step = forward.steps[line]
            grad = self._gradient(line) if self.wanted[line] else None
            if grad is None:
                continue
            if step.tables:
                _TRANSPOSES[step.name](self, line, step, grad)
            else:
                found[" ".join([step.name, *map(str, step.numbers)])] = grad
        results = self._factors(found, sums[1])
        for i in range(num_parameters):
            if f"parameter {i}" in found:
                results[f"gradient{i}"] = found[f"parameter {i}"]
        return finished(steps, results, "nothing", forward.given_from, forward.kept_columns)

    def _factors(self, found: dict[str, int], grad_center: int) -> dict[str, int]:
        steps = self.steps
        scale = self.value(self.forward.results["scale"])
        inverse_size = steps.add("inverse_size", columns=1)
        none = steps.number(0.0)
        direct = steps.add("multiply", scale, grad_center)
        rest = steps.add("subtract", found.get("mean", none), direct)
        slope = steps.add("multiply", found.get("var", none), steps.scaled(inverse_size, 2.0))
        return {"k1": scale, "k2": slope, "k3": steps.add("multiply", rest, inverse_size)}

    def value(self, line: int) -> int:
        """The line that recomputes a line of the forward program."""
        if line not in self.recomputed:
            step = self.forward.steps[line]
            tables = (self.value(t) for t in step.tables)
            columns = step.columns
            self.recomputed[line] = self.steps.add(
                step.name, *tables, numbers=step.numbers, columns=columns
            )
        return self.recomputed[line]

    def give(self, line: int, grad: int, sign: int = 1) -> None:
        """Add a term to the gradient of a forward line."""
        if self.wanted[line]:
            self.parts[line].append((sign, grad))

    def _gradient(self, line: int) -> int | None:
        """Sum the terms of a line's gradient, in the shape of its table."""
        step, steps = self.forward.steps[line], self.steps
        parts = [(sign, self._narrowed(grad, step.columns)) for sign, grad in self.parts[line]]
        wide = [part for part in parts if steps.made[part[1]].per_example]
        rest = [part for part in parts if not steps.made[part[1]].per_example]
        total = self._sum(wide)
        if total is not None and not step.per_example:
            rest.append((1, steps.add("sum_examples", total)))
            total = None
        if total is not None:
            rest.append((1, total))
        found = self._sum(rest)
        if found is not None and step.per_example and not steps.made[found].per_example:
            return steps.add("each_example", found)
        return found

    def _narrowed(self, grad: int, columns: int) -> int:
        """Sum a gradient over its columns if the line was one value, broadcast to all of them."""
        has = self.steps.made[grad].columns
        if has == columns:
            return grad
        return self.steps.add("sum_runs", grad, numbers=(has,), columns=1)

    def _sum(self, parts: Parts) -> int | None:
        if not parts:
            return None
        (sign, total), *rest = sorted(parts, key=lambda part: -part[0])
        if sign < 0:
            total = self.steps.scaled(total, -1.0)
        for sign, grad in rest:
            total = self.steps.add("add" if sign > 0 else "subtract", total, grad)
        return total


def _add(t: _Transpose, line: int, step: Step, grad: int) -> None:
    for table in step.tables:
        t.give(table, grad)


def _subtract(t: _Transpose, line: int, step: Step, grad: int) -> None:
    first, second = step.tables
    t.give(first, grad)
    t.give(second, grad, -1)


def _multiply(t: _Transpose, line: int, step: Step, grad: int) -> None:
    first, second = step.tables
    if first == second:
        t.give(first, t.steps.scaled(t.steps.add("multiply", grad, t.value(first)), 2.0))
        return
    for one, other in ((first, second), (second, first)):
        if t.wanted[one]:
            t.give(one, t.steps.add("multiply", grad, t.value(other)))


def _rsqrt(t: _Transpose, line: int, step: Step, grad: int) -> None:
    steps, root = t.steps, t.value(line)
    cube = steps.add("multiply", steps.add("multiply", root, root), root)
    t.give(step.tables[0], steps.scaled(steps.add("multiply", cube, grad), -0.5))


def _sigmoid(t: _Transpose, line: int, step: Step, grad: int) -> None:
    steps, share = t.steps, t.value(line)
    slope = steps.add("multiply", share, steps.add("subtract", steps.number(1.0), share))
    t.give(step.tables[0], steps.add("multiply", slope, grad))


def _softmax(t: _Transpose, line: int, step: Step, grad: int) -> None:
    steps, shares = t.steps, t.value(line)
    weighed = steps.add("multiply", shares, grad)
    total = steps.add("sum_runs", weighed, numbers=(step.columns,), columns=1)
    t.give(step.tables[0], steps.add("subtract", weighed, steps.add("multiply", shares, total)))


def _repeat(t: _Transpose, line: int, step: Step, grad: int) -> None:
    columns = step.columns // int(step.numbers[0])
    t.give(step.tables[0], t.steps.add("sum_runs", grad, numbers=step.numbers, columns=columns))


def _sum_runs(t: _Transpose, line: int, step: Step, grad: int) -> None:
    t.give(step.tables[0], _spread(t, step, grad, 1.0))


def _mean_runs(t: _Transpose, line: int, step: Step, grad: int) -> None:
    t.give(step.tables[0], _spread(t, step, grad, 1.0 / step.numbers[0]))


def _spread_runs(t: _Transpose, line: int, step: Step, grad: int) -> None:
    var, mean, center = step.tables
    width = int(step.numbers[0])
    each = _spread(t, step, grad, 1.0 / width)
    columns = step.columns * width
    centers = t.steps.add("repeat", t.value(center), numbers=step.numbers, columns=columns)
    _give_spread(t, var, mean, each, centers)


def _spread(t: _Transpose, step: Step, grad: int, factor: float) -> int:
    columns = step.columns * int(step.numbers[0])
    scaled = t.steps.scaled(grad, factor)
    return t.steps.add("repeat", scaled, numbers=step.numbers, columns=columns)


def _sum_examples(t: _Transpose, line: int, step: Step, grad: int) -> None:
    t.give(step.tables[0], grad)


def _mean_examples(t: _Transpose, line: int, step: Step, grad: int) -> None:
    t.give(step.tables[0], _share(t, grad))


def _spread_examples(t: _Transpose, line: int, step: Step, grad: int) -> None:
    var, mean, center = step.tables
    _give_spread(t, var, mean, _share(t, grad), t.value(center))


def _share(t: _Transpose, grad: int) -> int:
    return t.steps.add("multiply", grad, t.steps.add("inverse_examples", columns=1))


def _give_spread(t: _Transpose, var: int, mean: int, each: int, center: int) -> None:
    """Gradient of the mean of v + (m - M)^2, where M is the mean of m.

    No gradient flows through M: by plain differentiation it is the sum of m - M, which is 0.
    """
    t.give(var, each)
    if t.wanted[mean]:
        apart = t.steps.add("subtract", t.value(mean), center)
        t.give(mean, t.steps.add("multiply", t.steps.scaled(each, 2.0), apart))


def _slice(t: _Transpose, line: int, step: Step, grad: int) -> None:
    (table,) = step.tables
    columns = t.forward.steps[table].columns
    t.give(table, t.steps.add("pad", grad, numbers=step.numbers, columns=columns))


def _join(t: _Transpose, line: int, step: Step, grad: int) -> None:
    first = 0
    for table in step.tables:
        columns = t.forward.steps[table].columns
        t.give(table, t.steps.add("slice", grad, numbers=(first,), columns=columns))
        first += columns


_TRANSPOSES: dict[str, Callable[[_Transpose, int, Step, int], None]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "rsqrt": _rsqrt,
    "sigmoid": _sigmoid,
    "softmax": _softmax,
    "repeat": _repeat,
    "sum_runs": _sum_runs,
    "mean_runs": _mean_runs,
    "spread_runs": _spread_runs,
    "sum_examples": _sum_examples,
    "mean_examples": _mean_examples,
    "spread_examples": _spread_examples,
    "slice": _slice,
    "join": _join,
}
