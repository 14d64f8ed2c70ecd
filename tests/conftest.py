"""Settings of the whole suite."""

import os

# Workers share the cores: with all threads in each they wait for one another most of the time.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

from hypothesis import HealthCheck, settings  # noqa: E402

# A busy machine is not a failure. In CI the drawn examples are the same every time.
settings.register_profile(
    "normkit",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("normkit")
