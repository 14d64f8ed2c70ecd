"""Settings of the whole suite."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in the background of a shell; programs that tests start, and interrupt, would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with all threads in each they wait for one another most of the time.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from hypothesis import HealthCheck, settings

# A busy machine is not a failure. In CI the drawn examples are the same every time.
settings.register_profile(
    "normkit",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("normkit")
