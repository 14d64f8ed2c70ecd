"""All presets, by name."""

from normkit.errors import SpecError
from normkit.lab.reproduce import channels, disturbed, landscape, lipschitz, noise, statdiff
from normkit.lab.reproduce.preset import Preset
from normkit.lab.reproduce.stack import presets as stack

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for module in (stack, disturbed, channels, statdiff, lipschitz, landscape, noise)
    for preset in module.PRESETS
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        SpecError: If there is none.
    """
    if name not in PRESETS:
        raise SpecError(f"there is no preset {name!r}; known are {', '.join(PRESETS)}, all")
    return PRESETS[name]
