"""Which norms of a network become others, by the rules of the papers."""

from normkit.convert.placement.gnbn import place_gnbn_
from normkit.convert.placement.ibn import place_ibn_
from normkit.convert.placement.xbn import place_xbn_

__all__ = ["place_gnbn_", "place_ibn_", "place_xbn_"]
