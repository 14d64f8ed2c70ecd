"""A composite of one's own: the page's example, and formulas that use every step there is."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from cases import randn
from formulas import FORMULAS, results
from normkit.core.composite import Composite, own_groups
from normkit.core.normalize import Affine
from normkit.core.stages import normalize_composite
from normkit.core.trace import programs_of
from normkit.kernels.program import STEPS, parsed

PAGE = (Path(__file__).parents[2] / "docs" / "composites.md").read_text()


def test_the_page_prints_what_it_says(capsys):
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    for code, printed in blocks:
        exec(code, scope)
        assert capsys.readouterr().out.splitlines() == [line[4:] for line in printed.splitlines()]


def page():
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0], scope)
    return scope


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_the_pages_norm_is_the_mean_of_both(kernels):
    layer, x = page()["MeanOfNorms"](8).double(), randn(4, 8, 5, 5).requires_grad_()
    plain = nn.BatchNorm2d(8).double()
    with torch.no_grad():
        for weight in (layer.weight, plain.weight):
            weight.copy_(randn(8, seed=1))

    def both(x):
        return (nn.functional.group_norm(x, 2, plain.weight, plain.bias) + plain(x)) / 2

    with nk.use_kernels(kernels):
        for _ in range(2):
            y, expected = layer(x), both(x)
            assert_close(y, expected)
            for ours, theirs in zip(
                torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters())),
                torch.autograd.grad(expected.pow(3).sum(), (x, *plain.parameters())),
                strict=True,
            ):
                assert_close(ours, theirs)
            layer.eval(), plain.eval()
    assert_close(layer.running_var, plain.running_var)
    assert torch.autograd.gradgradcheck(layer, x[:2, :, :2, :2].detach().requires_grad_())


def test_the_pages_norm_compiles():
    layer, x = page()["MeanOfNorms"](8), randn(4, 8, 5, 5, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("num_examples", [1, 3, 900])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_program_computes_what_its_formula_does(name, training, num_examples):
    x, grad = randn(num_examples, 12, 6, mean=1.0), randn(num_examples, 12, 6, seed=1)
    expected, found = (
        results(name, x, grad, kernels, training) for kernels in ("reference", "cpu")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, float(theirs.abs().max())))


def test_these_formulas_use_every_step():
    used = set()
    for formula, sizes in FORMULAS.values():
        for source in ("own", "given", "mixed", "estimates"):
            programs = programs_of(Composite(formula, (), 1e-2), 12, sizes, source)
            assert programs.why_not is None
            for text in programs[:2]:
                program = parsed(text)
                assert str(program) == text
                used |= {step.name for step in program.steps}
    assert used == STEPS.keys()


def test_what_no_program_has_a_step_for_is_computed_on_tables():
    def absolute(batch):
        return lambda table, *given: Affine(table.var.abs(), table.mean.exp())

    composite = Composite(absolute, (), 1e-2, has_batch=False)
    assert "step for a tensor's abs" in programs_of(composite, 4, (), "own").why_not
    x = randn(2, 4, 6)
    with nk.use_kernels("cpu"):
        y = normalize_composite(x, composite, None, True, (), None, None)
    mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, correction=0)
    assert_close(y, var * (x - mean) + mean.exp())


def test_running_statistics_that_would_follow_the_wrong_input_are_refused():
    def after_another(batch):
        def formula(table, *given):
            return batch(table.transform(*own_groups(2, 1e-5)(table, None, None)), None, None)

        return formula

    with pytest.raises(TypeError, match=r"after_another normalises another input .* batch_input"):
        programs_of(Composite(after_another, (), 1e-2), 4, (), "own")
