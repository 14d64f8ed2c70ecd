"""All presets, by name."""

from normkit.errors import SpecError
from normkit.lab.reproduce import channels, landscape, lipschitz, noise, statdiff
from normkit.lab.reproduce.preset import Preset
from normkit.lab.reproduce.stack import presets as stack

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for module in (stack, channels, statdiff, lipschitz, landscape, noise)
    for preset in module.PRESETS
}


def find_preset(name: str) -> Preset:
    """The preset of this name, in any case: its own, or that of a figure it repeats.

    Raises:
        SpecError: If there is none.
    """
    by_name = {
        known.lower(): preset
        for preset in PRESETS.values()
        for known in (preset.name, *preset.rows)
    }
    if name.lower() not in by_name:
        raise SpecError(f"there is no preset {name!r}; known are {', '.join(PRESETS)}, all")
    return by_name[name.lower()]
