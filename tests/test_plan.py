"""Laws of the plan: a run ends on its plan and on its minutes, on machines that change
their speed."""

import itertools
import math

import pytest
from hypothesis import given, strategies as st

from plumbing.plan import Plan


class PretendedMachine:
    """A clock, and steps that take as long as their cost says, times how slow the machine
    is now."""
    def __init__(self, slowness):
        self.now, self.slowness = 1000.0, slowness

    def clock(self):
        return self.now

    def work(self, seconds, share):
        self.now += seconds * self.slowness(share)


def run_plan(minutes, step_seconds, slowness, cost=lambda p: 1.0, look_seconds=0.0, look_every=500):
    """A whole run. -> (plan, progress before each step, seconds that it took)"""
    machine = PretendedMachine(slowness)
    plan = Plan(None, minutes, cost, look_every, clock=machine.clock)
    share, path = lambda: plan.seconds / (60 * minutes), []
    while not plan.is_done:
        path.append(plan.progress)
        plan.start_watch()
        machine.work(step_seconds * cost(plan.progress), share())
        plan.count_step()
        plan.adopt(plan.propose_steps_left())
        if plan.step % look_every == 0 or plan.is_done:
            before = machine.now
            machine.work(look_seconds, share())
            plan.count_look(machine.now - before)
    return plan, path, plan.seconds


CONSTANT = lambda p: 1.0  # noqa: E731
RAMPS = {
    "none": CONSTANT, "rising": lambda p: 1.2 - p, "falling": lambda p: 0.2 + p,
    "stairs": lambda p: 1.0 - 0.1 * round(7 * min(1, p / 0.67)),
}


@pytest.mark.parametrize("ramp", RAMPS)
@given(minutes=st.sampled_from([1, 4]),
       step=st.floats(0.02, 0.4),
       factor=st.sampled_from([0.5, 1.0, 2.0]),
       change=st.floats(0.0, 0.94),
       back=st.floats(0.0, 0.94),
       )
def test_minutes_are_kept_within_a_twentieth_on_machines_that_change_their_speed_by_two(
        ramp, minutes, step, factor, change, back):
    """It slows down or speeds up by 2 at one moment, and at a later one it may be as
    before."""
    slowness = lambda share: (factor if change <= share <= max(change, back) or back < change <=
                              share else 1.0)  # noqa: E731
    plan, path, seconds = run_plan(minutes,
                                   step,
                                   slowness,
                                   RAMPS[ramp],
                                   look_seconds=0.5,
                                   look_every=200)
    assert 0.95 <= seconds / (60 * minutes) <= 1.05
    assert plan.step == plan.total == len(path) and plan.progress == pytest.approx(1)


@pytest.mark.parametrize("ramp", RAMPS)
@given(factor=st.sampled_from([0.5, 2.0]), change=st.floats(0.05, 0.94))
def test_progress_never_falls_and_never_jumps(ramp, factor, change):
    _, path, _ = run_plan(4, 0.05, lambda share: factor if share >= change else 1.0, RAMPS[ramp])
    steps = [later - earlier for earlier, later in zip(path[20:], path[21:])]
    assert path[:20] == [0.0] * 20
    assert min(steps) > 0 and max(steps) < 6 / len(path)
    assert path[-1] == pytest.approx(1, abs=6 /
                                     len(path))  # the last step's rate is the end of the decay


def test_a_number_of_steps_is_its_own_plan_and_knows_no_clock():
    plan = Plan(steps=40, clock=lambda: math.nan)
    for i in range(40):
        assert plan.progress == i / 40 and not plan.is_done
        plan.count_step()
        assert plan.propose_steps_left() == 0
    assert plan.is_done


def test_a_plan_that_goes_on_from_its_state_makes_the_same_steps_until_the_next_plan():
    whole = Plan(None, 10.0, clock=itertools.count(0.0, 0.05).__next__)
    for _ in range(20):
        whole.count_step()
    whole.adopt(whole.propose_steps_left())
    for _ in range(30):
        whole.count_step()
    again = Plan(None,
                 10.0,
                 state=whole.state() | dict(step=whole.step),
                 seconds=5.0,
                 clock=lambda: 0.0)
    for _ in range(50):
        whole.count_step()
        again.count_step()
        assert (again.step, again.total, again.progress) == (whole.step, whole.total,
                                                             whole.progress,
                                                             )


def test_very_slow_steps_are_planned_after_a_tenth_of_the_time():
    plan, _, seconds = run_plan(4, 13.0, lambda share: 1.0)
    assert plan.step in (17, 18, 19) and seconds < 1.06 * 240
