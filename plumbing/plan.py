"""The plan of a run: how many steps there will be, and how far the run is.

Learning rate and mask ratio follow *progress*, a number that goes from 0 to 1. With
`--steps` it is step / steps. With `--minutes` nobody knows the number of steps, so it is
planned from the clock:

    first      after 20 timed steps (or a tenth of the time, if that comes first)
    again      every 2 % of the time, from what the last steps took; the last time when 5 %
               are left
    progress   += (1 - progress) / (steps left): it never falls and never jumps, and after
               the last step it is 1, however often the plan was changed

A ramp of the mask makes steps dearer or cheaper as it goes on, so a step is counted by its
cost:

    seconds left = (seconds per unit of cost) x (steps left)
                 x (mean cost from progress to 1)
                 + (seconds of one evaluation) x (evaluations left)

A machine that slows down or speeds up by 2 at any moment but the last twentieth therefore
ends within 5 % of its minutes.
"""
import statistics
import time

TIMED = 20                      # steps that are timed before --minutes becomes a plan
EVERY = 0.02                    # of the time lies between two plans
LAST = 0.95                     # of the time: from here on the plan stays


class Plan:
    """Number of steps and progress of one run.

    steps       how many steps, or None: then `minutes` decides
    minutes     how long, or None
    cost        progress in [0, 1] -> relative cost of a step there
    look_every  steps between two evaluations
    state       of a run that goes on: what `state()` gave, and its "step"
    seconds     how long that run has taken so far
    clock       a function: the time in seconds"""

    def __init__(self, steps=None, minutes=None, cost=lambda progress: 1.0, look_every=500,
                 state=None, seconds=0.0, clock=time.monotonic):
        self.minutes, self.cost, self.look_every, self.clock = minutes, cost, look_every, clock
        self.step, self.total, self.progress = 0, steps, 0.0
        if state:
            self.step = state["step"]
            self.total = steps or state["plan"]
            self.progress = state["progress"]
        if self.total and not minutes:
            self.progress = self.step / self.total
        self.begun, self.tick = clock() - seconds, clock()
        self.planned = seconds              # when the plan was last made, in seconds of the run
        self.look_seconds = 0.0             # of one evaluation, the last one
        self.looked = 0.0                   # of all evaluations since the last plan
        self.durations, self.costs = [], []                 # of the steps since the last plan

    def state(self):
        """What a checkpoint keeps. -> {"plan": steps or None, "progress": in [0, 1]}"""
        return dict(plan=self.total, progress=self.progress)

    @property
    def seconds(self):
        """How long the run has taken so far, all of its parts together."""
        return self.clock() - self.begun

    @property
    def is_done(self):
        """Whether the plan is fulfilled."""
        return self.total is not None and self.step >= self.total

    def start_watch(self):
        """The next step begins now: what lies between two steps is not theirs."""
        self.tick = self.clock()

    def count_step(self):
        """One step more: it took the time since `start_watch`."""
        self.durations.append(self.clock() - self.tick)
        self.costs.append(self.cost(self.progress))
        self.step += 1
        if self.total is None:
            return                          # no plan yet: the start of every schedule
        if self.minutes is None:
            self.progress = self.step / self.total
        else:
            self.progress += (1 - self.progress) / (self.total - self.step + 1)

    def count_look(self, seconds):
        """An evaluation took so many seconds."""
        self.look_seconds = seconds
        self.looked += seconds

    def propose_steps_left(self):
        """How many steps should still come: a number, or 0 to leave the plan as it is."""
        if self.minutes is None or self.is_done or not self.durations:
            return 0
        whole, now = 60 * self.minutes, self.seconds
        if self.total is None:
            is_due = len(self.durations) >= TIMED or now > 0.1 * whole
        else:
            is_last = self.planned < LAST * whole <= now
            is_due = is_last or (now - self.planned >= EVERY * whole and now < LAST * whole)
        if not is_due:
            return 0
        left = whole - now - self.look_seconds              # the last evaluation comes at the end
        path = [self.progress + (1 - self.progress) * i / 100 for i in range(101)]
        mean = statistics.fmean(map(self.cost, path))       # cost of a step from here to the end
        each = self.seconds_per_cost() * mean + self.look_seconds / self.look_every
        return max(1, int(left / each))

    def seconds_per_cost(self):
        """Seconds per unit of cost. At first the median of the steps, for one of them is
        far slower. Later all the time since the last plan counts, evaluations aside."""
        if self.total is None:
            return statistics.median(d / c for d, c in zip(self.durations, self.costs))
        return (self.seconds - self.planned - self.looked) / sum(self.costs)

    def adopt(self, steps_left):
        """Plan so many steps more, as `propose_steps_left` of one process said for all."""
        if steps_left:
            self.total = self.step + int(steps_left)
            self.planned, self.looked = self.seconds, 0.0
            self.durations, self.costs = [], []
