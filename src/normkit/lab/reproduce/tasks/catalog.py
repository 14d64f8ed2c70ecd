"""All tasks, by the name that records have."""

from normkit.lab.reproduce.tasks.drawn import DRAWN
from normkit.lab.reproduce.tasks.landscape import ALONG, RATES
from normkit.lab.reproduce.tasks.noise import NOISE
from normkit.lab.reproduce.tasks.stack import STACK
from normkit.lab.reproduce.tasks.standardized import STANDARDIZED
from normkit.lab.reproduce.tasks.statdiff import STATDIFF

TASKS = {task.name: task for task in (DRAWN, ALONG, RATES, NOISE, STACK, STANDARDIZED, STATDIFF)}
