"""Settings of the whole suite."""

import os

from hypothesis import HealthCheck, settings

# A busy machine is not a failure. In CI the drawn examples are the same every time.
settings.register_profile(
    "normkit",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("normkit")
