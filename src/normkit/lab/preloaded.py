"""Importing this imports all that a run of ``compare`` needs, before its worker is forked."""

from normkit.lab import train
from normkit.lab.evaluation import metrics_library
from normkit.lab.fabric import fabric_library
from normkit.lab.tasks import classification

__all__ = ["classification", "train"]

metrics_library()
fabric_library()
