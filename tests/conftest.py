"""Settings of the whole suite."""

import os

from hypothesis import settings

# No deadlines: a busy machine is not a failure. In CI the drawn examples are the same every time.
settings.register_profile("normkit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("normkit")
