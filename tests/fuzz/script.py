"""A finding as a script that needs normkit and torch alone."""

from __future__ import annotations

from fuzz.check import Finding
from fuzz.trial import LAYERS, gradient_of, mask_of, values_of

MODES = {
    "train": "layer.train()",
    "eval": "layer.eval()",
    "frozen": "nk.freeze_statistics(layer.train())",
    "off": "holder.track_running_stats = False\nlayer.train()",
    "off-eval": "holder.track_running_stats = False\nlayer.eval()",
}


def script(finding: Finding) -> str:
    """Build the layer as it was before its last step, call it, and print what comes out."""
    trial, step = finding.trial, finding.trial.steps[-1]
    options = ", ".join(f"{name}={value!r}" for name, value in trial.options)
    name = f"nk.{LAYERS[trial.kind].__name__}"
    x, grad, mask = values_of(trial, step), gradient_of(trial, step), mask_of(trial, step)
    lines = [
        f'"""{finding.what} is wrong: {finding.detail}."""',
        "from math import inf, nan",
        "import torch",
        "import normkit as nk",
        f"torch.set_num_threads({trial.threads})",
        f"layer = {name}({trial.num_features}, {options}, dtype=torch.{trial.parameters})",
        f"layer.load_state_dict({{{_state(finding)}}})",
        *_mode(trial, step),
        f"x = {_tensor(x)}.requires_grad_()",
        f"grad = {_tensor(grad)}",
        f"mask = {None if mask is None else _plain(mask)}",
        f"with nk.use_kernels({trial.kernels!r}):",
        "    y = layer(x, mask)",
        "    y.backward(grad)",
        'print("y", y)',
        'print("gradient of x", x.grad)',
        "for name, p in layer.named_parameters():",
        '    print("gradient of", name, p.grad)',
        "for name, buffer in layer.named_buffers():",
        "    print(name, buffer)",
    ]
    if finding.expected is not None:
        expected = finding.expected.flatten().tolist()
        lines.append(f'print("but {finding.what} is, in float64,", {expected})')
    return "\n".join(lines) + "\n"


def _mode(trial, step):
    lines = MODES[step.mode].splitlines()
    if step.mode.startswith("off"):
        named = "m for m in layer.modules() if getattr(m, 'running_mean', None) is not None"
        lines.insert(0, f"holder = next({named})")
    return lines


def _state(finding):
    return ", ".join(f"{name!r}: {_plain(t)}" for name, t in (finding.before or {}).items())


def _plain(t):
    return f"torch.tensor({t.tolist()}, dtype={t.dtype})"


def _tensor(t):
    """The same values at the same strides."""
    if t.is_contiguous():
        values = f"torch.tensor({t.flatten().tolist()}, dtype={t.dtype})"
        return f"{values}.reshape{tuple(t.shape)}"
    reach = 1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
    memory = t.as_strided((reach,), (1,)) if t.numel() else t.flatten()
    values = f"torch.tensor({memory.tolist()}, dtype={t.dtype})"
    return f"{values}.as_strided({tuple(t.shape)}, {t.stride()})"
