"""Runs that end in the middle, as if their process were killed."""


class Killed(BaseException):
    """Nothing may catch it, as nothing may catch SIGKILL."""


def killed_after(num_steps):
    """What a run calls after each step, which kills it after so many."""
    count = 0

    def on_step():
        nonlocal count
        count += 1
        if count == num_steps:
            raise Killed

    return on_step
