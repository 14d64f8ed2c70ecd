"""Seconds are shared by the parts, most important first; what they do not suffice for is named."""

import importlib

import pytest


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def budgets():
    return importlib.import_module("gpu_budget")


def items(budget, clock, done, name, seconds, number=4):
    """A part of so many items, each of which takes so long and says so."""

    def take(i):
        clock.now += seconds
        done.append(f"{name}{i}")

    def run():
        for i in range(number):
            budget.attempt(f"{name}{i}", lambda i=i: take(i), seconds)

    return run


def test_a_part_may_use_what_earlier_ones_leave_and_later_ones_do_not_need(budgets, clock):
    budget, done = budgets.Budget(100, clock), []
    parts = [
        budgets.Part("a", 30, items(budget, clock, done, "a", 5)),  # leaves 10
        budgets.Part("b", 40, items(budget, clock, done, "b", 20)),  # two of four, and no more
        budgets.Part("c", 30, items(budget, clock, done, "c", 7)),
    ]
    after = []
    budget.run(parts, after.append)
    assert done == ["a0", "a1", "a2", "a3", "b0", "b1", "c0", "c1", "c2", "c3"]
    assert budget.left_out == {"b": ["b2", "b3"]}
    assert budget.seconds == {"a": 20, "b": 40, "c": 28}
    assert budget.spent_s == 88
    assert after == ["a", "b", "c"]


def test_an_item_that_needs_more_than_the_parts_time_does_not_begin(budgets, clock):
    budget, done = budgets.Budget(60, clock), []
    parts = [
        budgets.Part("a", 20, items(budget, clock, done, "a", 50, number=1)),
        budgets.Part("b", 20, items(budget, clock, done, "b", 1, number=1)),
    ]
    budget.run(parts, lambda part: None)
    assert done == ["b0"]
    assert budget.left_out == {"a": ["a0"]}


def test_a_part_that_takes_too_long_costs_the_least_important_ones(budgets, clock):
    budget, done = budgets.Budget(60, clock), []
    parts = [
        budgets.Part("long", 20, lambda: setattr(clock, "now", clock.now + 41)),
        budgets.Part("b", 20, items(budget, clock, done, "b", 1)),  # its time is gone
        budgets.Part("c", 15, items(budget, clock, done, "c", 1)),
        budgets.Part("longer", 5, lambda: setattr(clock, "now", clock.now + 41)),
        budgets.Part("d", 0, items(budget, clock, done, "d", 1)),
    ]
    budget.run(parts, lambda part: None)
    assert done == ["c0", "c1", "c2", "c3"]
    assert budget.left_out == {"b": ["all of it"], "d": ["all of it"]}


def test_an_error_is_noted_and_the_rest_goes_on(budgets, clock):
    budget, done = budgets.Budget(60, clock), []

    def broken():
        budget.attempt("an item", lambda: 1 / 0)
        done.append("next item")
        raise RuntimeError("x" * 1000)

    parts = [
        budgets.Part("broken", 1, broken),
        budgets.Part("b", 1, lambda: done.append("next part")),
    ]
    budget.run(parts, lambda part: None)
    assert done == ["next item", "next part"]
    first, second = budget.errors
    assert first == {
        "part": "broken", "what": "an item", "error": "ZeroDivisionError: division by zero",
    }  # fmt: skip
    assert (second["what"], len(second["error"])) == ("all of it", 600)


def test_interrupting_ends_everything(budgets, clock):
    def stop():
        raise KeyboardInterrupt

    budget = budgets.Budget(60, clock)
    with pytest.raises(KeyboardInterrupt):
        budget.run([budgets.Part("a", 1, stop)], lambda part: None)


def test_the_real_shares_fit_in_eight_minutes_in_the_order_of_importance(budgets):
    parts = importlib.import_module("gpu_parts")
    shares = {part.name: part.share_s for part in parts.parts_of(None)}
    assert sum(shares.values()) <= 465
    assert list(shares)[:7] == [
        "contract", "checks", "steps", "compiled steps", "calls", "graphs", "bandwidth",
    ]  # fmt: skip
