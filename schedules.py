"""Schedules: how an image fades and how noise comes in, and the exact way back.

The idea (DDM, arXiv 2306.13720). Corruption is two functions of time: the image's share
a(t) and the noise's standard deviation b(t). DDM lets the image fade to zero along an
analytic path (its h_t = -x0 gives a = 1 - t) while Brownian noise grows (b = sqrt t).
Both are closed formulas, so the way from any time t to any earlier time s is one, too: ten
steps, or one. DDPM (2006.11239), EDM (2206.00364) and rectified flow (2209.03003) are other
choices of the same two functions.

    forward    x_t = a(t) x0 + b(t) eps + sum_j e_j(t) kappa_j     a(0) = 1, b(0) = 0
               kappa_1 ... kappa_S: DDM's random slopes, where a schedule has any
    split      network output -> (x0, eps)                         a formula per prediction
    step       x_s = a_s x0 + b_s (sqrt(1-k) eps + sqrt(k) noise)  noise ~ N(0, I)
               eps = (x_t - a_t x0) / b_t              recomputed, so that x0 may be clipped
               k   = 1 - (1 - k_max)^churn             churn 0: deterministic (DDIM)
                                                       churn 1: the posterior q(x_s|x_t,x0)
               k_max = 1 - b_s^2 / b_t^2               "wiener": noise is Brownian motion on
                                                       the clock b^2 (DDM)
               k_max = 1 - (a_t b_s / (a_s b_t))^2     "markov": the signal is scaled by a
                                                       Markov chain (DDPM)
    unit       F = (b x0 - a data_std^2 eps) / (data_std sqrt V)   the network's target
               V = a^2 data_std^2 + b^2                            variance of x_t
               F has variance 1 and no correlation with x_t at any t. EDM's c_skip, c_out
               and c_in are this for a = 1; v-prediction is -F for data_std = 1
    both       x0 = w f0 + (1 - w) (x_t - b f1) / a                two heads f0, f1
               w = 1 - a (DDM) where the image fades to nothing, b^2 / V elsewhere
    slopes     are taken off x_t before step and split, and put into x_s after it

Coefficients are computed in float64 and cast to the image's type at the end.
Shapes: B batch, C channels, S slopes; t in [0, 1], one time per image (B,) or one for all;
z or x0 the clean image (B, C, H, W); n the noise bundle (B, (1+S) C, H, W): eps, slopes.
Run `python schedules.py` to see one image fade along every schedule.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch

from plumbing.faces import draw_faces
from plumbing.images import to_float, to_uint8
from plumbing.sheets import draw_plot, draw_sheet, to_picture


T_MIN = 1e-4                                        # [DDM] t = 1e-4 + (1 - 1e-4) U(0, 1)


@dataclass(frozen=True)
class Schedule:
    """A corruption x_t = a(t) x0 + b(t) eps + sum_j e_j(t) kappa_j and its consequences.

    a, b: functions of time, float64 tensors to float64 tensors.
    law: which process carries the noise, "wiener" or "markov". It changes the posterior and
    never the marginals.
    slopes: the functions e_j of DDM's random slopes, e_j(0) = e_j(1) = 0.
    data_std: root mean square of the data, measured once by train.py:
    `dataclasses.replace(SCHEDULES["ddm"], data_std=0.5)`.
    t_min: the earliest time of a sampler's grid, before its last step to 0.
    doc: the schedule in one line, for --help."""
    a: Callable
    b: Callable
    law: str = "wiener"
    slopes: tuple = ()
    data_std: float = 1.0
    t_min: float = T_MIN
    doc: str = ""

    # -- coefficients ----------------------------------------------------------------------

    def coefficients(self, t, like):
        """[a, b, e_1, ... e_S] at times t, each shaped to multiply the images `like`."""
        t = to_float64(t)
        return [per_image(f(t), like) for f in (self.a, self.b, *self.slopes)]

    def variance(self, a, b):
        """V = a^2 data_std^2 + b^2: the variance of x_t, without slopes."""
        return a ** 2 * self.data_std ** 2 + b ** 2

    def input_scale(self, t):
        """1 / sqrt V, float64: the network's input x_t / sqrt V has variance 1 at all t."""
        t = to_float64(t)
        return self.variance(self.a(t), self.b(t)).rsqrt()                      # [EDM] c_in

    def angle(self, t):
        """The noise level as an angle in [0, pi/2], float64: always finite, and smooth."""
        t = to_float64(t)
        # theta = arctan(b / (a data_std))
        return torch.atan2(self.b(t), self.a(t) * self.data_std)

    def time_at(self, angle):
        """The inverse of `angle` for any monotone pair (a, b), by bisection in float64."""
        angle = to_float64(angle)
        lo, hi = torch.zeros_like(angle), torch.ones_like(angle)
        for _ in range(60):
            mid = (lo + hi) / 2
            early = self.angle(mid) < angle
            lo, hi = torch.where(early, mid, lo), torch.where(early, hi, mid)
        return hi

    @property
    def fades(self):
        """Whether nothing is left of the image at t = 1: less than a hundredth."""
        return bool(self.a(to_float64(1.0)) < 0.01)

    def blend_weights(self, a, b):
        """How the two guesses of `both` become one image: w f0 + (1 - w) (x_t - b f1) / a.

        a, b: at one time. -> (w, (1 - w) / a); nothing is divided by a"""
        if self.fades:
            return 1 - a, torch.ones_like(a)                                    # [DDM] as released
        V = self.variance(a, b)
        return b ** 2 / V, a * self.data_std ** 2 / V               # [EDM] the second is c_skip

    def start_time(self, predict, sigma=200.0):
        """Where sampling begins: t = 1, or the largest t with b / a <= sigma.

        The second is for the raw noise head: x0 = (x_t - b eps) / a does not exist where
        the image has faded to nothing."""
        if not PREDICTIONS[predict].needs_image:
            return 1.0
        angle = torch.tensor(math.atan(sigma / self.data_std), dtype=torch.float64)
        return float(self.time_at(angle))

    # -- forward ---------------------------------------------------------------------------

    def noise(self, z, generator=None):
        """All that is random in x_t: eps, then S slopes -> n (B, (1+S) C, H, W)."""
        B, C, H, W = z.shape
        device = generator.device if generator is not None else z.device
        shape = (B, (1 + len(self.slopes)) * C, H, W)
        n = torch.randn(shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
        if not self.slopes:
            return n
        return torch.cat([n[:, :C], n[:, C:].clamp(-1, 1)], 1)      # [DDM] slopes ~ clamp(N(0, I))

    def corrupt(self, z, n, t):
        """The image z with the noise n at times t -> x_t (B, C, H, W)."""
        a, b, *e = self.coefficients(t, z)
        eps, *kappa = n.split(z.shape[1], 1)
        return a * z + b * eps + _add_slopes(e, kappa)                          # [DDM] forward

    # -- network output <-> image and noise ------------------------------------------------

    def head_count(self, predict):
        """How many image-shaped fields the network outputs: the prediction's, S slopes."""
        return PREDICTIONS[predict].heads + len(self.slopes)

    def target(self, z, n, t, predict):
        """What the network should output -> list of fields (B, C, H, W), one a head."""
        a, b, *_ = self.coefficients(t, z)
        eps, *kappa = n.split(z.shape[1], 1)
        return [*PREDICTIONS[predict].target(z, eps, a, b, self), *kappa]

    def split(self, out, zt, t, predict):
        """The network's output at x_t as an image and its noise.

        out (B, heads C, H, W), zt (B, C, H, W) -> x0 (B, C, H, W), n (B, (1+S) C, H, W)"""
        a, b, *e = self.coefficients(t, zt)
        prediction = PREDICTIONS[predict]
        fields = out.to(zt.dtype).split(zt.shape[1], 1)
        kappa = fields[prediction.heads:]
        zt = zt - _add_slopes(e, kappa)                             # [DDM] first without the slopes
        x0, eps = prediction.split(fields[:prediction.heads], zt, a, b, self)
        return x0, torch.cat([eps, *kappa], 1)

    # -- backward --------------------------------------------------------------------------

    def kept_share(self, t, s, churn):
        """1 - k: the share of the noise's variance that a step t -> s keeps, float64.

        The rest is drawn afresh. churn is a power and no factor: only so do steps compose,
        that is, two steps t -> r -> s have the law of one step t -> s."""
        t, s = to_float64(t), to_float64(s)
        posterior = (self.b(s) / self.b(t)) ** 2                                # [DDM] bridge
        if self.law == "markov":
            posterior = posterior * (self.a(t) / self.a(s)) ** 2                # [DDPM] ancestral
        return posterior ** churn

    def step(
        self,
        zt,            # (B, C, H, W): x_t
        x0,            # (B, C, H, W): the image, or a guess of it
        t,             # the time of x_t, in (0, 1]
        s,             # the earlier time to go to, in [0, t)
        churn=0.0,     # 0: deterministic, 1: the posterior
        noise=None,    # (B, C, H, W) ~ N(0, I), for churn > 0
        slopes=(),     # kappa_1 ... kappa_S, each (B, C, H, W), or guesses of them
    ):
        """The analytic transition x_t -> x_s (B, C, H, W): a step of any length.

        It is exact for the true x0: a step to s = 0 returns x0, from any t."""
        a_t, _, *e_t = self.coefficients(t, zt)
        a_s, b_s, *e_s = self.coefficients(s, zt)
        kept = self.kept_share(t, s, churn)
        # b_s sqrt(1-k) eps with eps = (x_t - a_t x0) / b_t. The ratio b_s / b_t is computed
        # in float64, for b_t may be too small for float32.
        ratio = per_image(self.b(to_float64(s)) / self.b(to_float64(t)) * kept.sqrt(), zt)
        noisy = zt - a_t * x0 - _add_slopes(e_t, slopes)                        # b_t eps
        zs = a_s * x0 + ratio * noisy + _add_slopes(e_s, slopes)                # [DDM] reverse step
        if churn > 0:
            zs = zs + b_s * per_image((1 - kept).sqrt(), zt) * noise            # [DDM] fresh noise
        return zs

    def eps(self, zt, x0, t, slopes=()):
        """The noise that makes x_t of this image, for t > 0 -> (B, C, H, W)."""
        a, b, *e = self.coefficients(t, zt)
        return (zt - a * x0 - _add_slopes(e, slopes)) / b


def _add_slopes(e, kappa):
    """sum_j e_j kappa_j; 0 for a schedule without random slopes."""
    return sum(e_j * kappa_j for e_j, kappa_j in zip(e, kappa))


def per_image(values, like):
    """One number per image (B,), or one for all, shaped to multiply the images `like`.

    like (B, C, H, W) -> (B, 1, 1, 1) or (1, 1, 1, 1) in its type and on its device."""
    values = values.reshape((-1,) + (1,) * (like.dim() - 1))
    return values.to(like.dtype).to(like.device)                    # type first: MPS has no float64


def to_float64(t):
    """Times as a float64 tensor, on the CPU if the device (Apple's MPS) has no such type.

    A plain number must not pass through float32."""
    if not torch.is_tensor(t):
        return torch.tensor(t, dtype=torch.float64)
    return t.to("cpu" if t.device.type == "mps" else t.device).double()


# --- what the network predicts ------------------------------------------------------------

class Prediction:
    """What the network predicts: two functions; `split` undoes `target`.

    heads: how many image-shaped fields it is.
    needs_image: it is not defined at a = 0, where nothing of the image is left.
    has_image: its first field is the image itself, in the data's own unit."""
    heads = 1
    needs_image = False
    has_image = False

    def target(self, x0, eps, a, b, schedule):
        """The fields that the network learns, linear in x0 and eps.

        -> list of `heads` fields (B, C, H, W)"""
        raise NotImplementedError

    def split(self, fields, xt, a, b, schedule):
        """The network's fields at x_t -> (x0, eps), each (B, C, H, W)."""
        raise NotImplementedError


class BothPrediction(Prediction):
    """The image and the noise, from two raw heads. [DDM]

    With `ddm` and churn 1 the step of Schedule is then the paper's own, for any two heads:
    x_s = x_t + (t - s) f0 - ((t - s) / sqrt t) f1 + sqrt(s (t - s) / t) noise."""
    heads = 2
    has_image = True

    def target(self, x0, eps, a, b, schedule):
        return [x0, eps]

    def split(self, fields, xt, a, b, schedule):
        x0_head, eps_head = fields
        # [DDM] x0 = x_t - H(t) - b eps with H = (a - 1) x0: the released blend of heads.
        # For a = 1 it would never read the image head: see Schedule.blend_weights.
        of_image, of_rest = schedule.blend_weights(a, b)
        return of_rest * xt + of_image * x0_head - of_rest * b * eps_head, eps_head


class NoisePrediction(Prediction):
    """The noise eps. [DDPM, MaskDM]"""
    needs_image = True

    def target(self, x0, eps, a, b, schedule):
        return [eps]

    def split(self, fields, xt, a, b, schedule):
        eps, = fields
        return (xt - b * eps) / a, eps              # not defined at a = 0: see Schedule.start_time


class ImagePrediction(Prediction):
    """The image x0."""
    has_image = True

    def target(self, x0, eps, a, b, schedule):
        return [x0]

    def split(self, fields, xt, a, b, schedule):
        x0, = fields
        return x0, (xt - a * x0) / b                # not defined at b = 0, where no step starts


class VelocityPrediction(Prediction):
    """The velocity v = (a eps - b x0) / r, r^2 = a^2 + b^2. [Salimans and Ho, 2202.00512]

    Theirs has r = 1 at all times. Without r, the largest noise levels would be most of the
    loss of a schedule whose b grows to 80."""

    def target(self, x0, eps, a, b, schedule):
        r = (a ** 2 + b ** 2).sqrt()
        return [(a * eps - b * x0) / r]

    def split(self, fields, xt, a, b, schedule):
        v, = fields
        r = (a ** 2 + b ** 2).sqrt()
        return (a * xt - b * r * v) / r ** 2, (b * xt + a * r * v) / r ** 2


class UnitPrediction(Prediction):
    """A blend of image and noise with variance 1 at every time. [EDM]

    The plain squared error of F is EDM's loss on the image with lambda = 1 / c_out^2."""

    def target(self, x0, eps, a, b, schedule):
        data_std, V = schedule.data_std, schedule.variance(a, b)
        return [(b * x0 - a * data_std ** 2 * eps) / (data_std * V.sqrt())]     # [EDM] target F

    def split(self, fields, xt, a, b, schedule):
        F, = fields
        data_std, V = schedule.data_std, schedule.variance(a, b)
        # [EDM] c_skip x_t + c_out F
        x0 = (a * data_std ** 2 / V) * xt + (b * data_std / V.sqrt()) * F
        eps = (b / V) * xt - (a * data_std / V.sqrt()) * F
        return x0, eps


PREDICTIONS = {
    "both": BothPrediction(),
    "eps": NoisePrediction(),
    "x0": ImagePrediction(),
    "v": VelocityPrediction(),
    "unit": UnitPrediction(),
}


# --- when: how training times are drawn from uniforms in (0, 1) ---------------------------

def times(kind, schedule, B, generator=None):
    """Draw a training time for each image -> (B,) in [T_MIN, 1], or all 0; float64.

    The B uniforms are stratified, u_i = (u + i/B) mod 1 (2107.00630): each is uniform by
    itself. Together they cover [0, 1] evenly, which makes the loss less noisy at no cost.
    kind: a name in TIMES, or "zero" for reconstruction [LMD]: no time at all. There a = 1
    and b = 0, so x_t is the image, bit for bit."""
    device = generator.device if generator is not None else torch.device("cpu")
    if kind == "zero":
        return to_float64(torch.zeros(B, device=device))
    drawn = device
    if device.type == "cuda":       # time_at is 700 tiny operations: a GPU would wait for each
        drawn, generator = "cpu", torch.Generator().manual_seed(generator.initial_seed())
    u = torch.rand(1, generator=generator, device=drawn)
    u = to_float64((u + torch.arange(B, device=drawn) / B) % 1)
    t = TIMES[kind](schedule, u).clamp(T_MIN, 1)
    return t if device.type == "mps" else t.to(device)      # MPS has no float64: CPU times do


def uniform_times(schedule, u):
    """Uniform in t. [DDM]"""
    return T_MIN + (1 - T_MIN) * u


def lognormal_times(schedule, u):
    """Normal in the logarithm of the noise level, most of it in the middle. [EDM]

    ln sigma ~ N(-1.2, 1.2^2) with sigma = b / a, whatever the schedule."""
    sigma = (-1.2 + 1.2 * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).exp()   # [EDM]
    return schedule.time_at(torch.atan(sigma / schedule.data_std))


def angle_times(schedule, u):
    """Uniform in the noise level as an angle: low, middle and high noise equally often.

    Uniform times of `ddm` have half of their angles above 72 of 90 degrees (on the drawn
    faces, data_std .456), where little of an image is left."""
    first, last = schedule.angle(T_MIN), schedule.angle(1.0)
    return schedule.time_at(first + (last - first) * u)


def mixed_times(schedule, u):
    """Two thirds of them uniform in t, one third in the angle.

    Shapes are learned from much noise, details from little. Uniform times alone left
    specks in our pictures, angles alone left tokens of different tints."""
    return torch.where(u < 2 / 3, uniform_times(schedule, (1.5 * u).clamp(max=1)),
                       angle_times(schedule, (3 * u - 2).clamp(min=0)))


TIMES = {"uniform": uniform_times, "lognormal": lognormal_times, "angle": angle_times,
         "mixed": mixed_times}


# --- the schedules ------------------------------------------------------------------------

def _fade(f, *slopes, doc):
    """[DDM] the image fades along f, made to go from 1 to 0, in noise of variance t.

    f: any falling function of time. slopes: the e_j of random slopes. doc: one line."""
    first, last = f(to_float64(0.0)), f(to_float64(1.0))

    def a(t):
        return ((f(t) - last) / (first - last)).clamp(min=0)        # a(1) = 0 whatever the rounding

    return Schedule(a, torch.sqrt, slopes=slopes, doc=doc)


def _keep_variance(log_alpha_bar, doc):
    """A variance-preserving pair: a^2 = alpha-bar, b^2 = 1 - alpha-bar, exact near 0."""
    return Schedule(
        lambda t: (log_alpha_bar(t) / 2).exp(),
        lambda t: (-torch.expm1(log_alpha_bar(t))).sqrt(),
        law="markov", doc=doc)


def _log_cosine(t, shift=0.008):
    """alpha-bar = (cos((t + .008) / 1.008 pi/2) / cos(.008 / 1.008 pi/2))^2 [2102.09672]"""
    angle = (t + shift) / (1 + shift) * math.pi / 2
    first = (0.0 + shift) / (1 + shift) * math.pi / 2
    # clamp: rounding must not pass alpha-bar = 1
    return (2 * (torch.cos(angle).abs().log() - math.log(math.cos(first)))).clamp(max=0)


SCHEDULES = {
    "ddm": _fade(lambda t: 1 - t,                                               # [DDM] h = -x0
                 doc="constant attenuation, the paper's best [DDM]"),
    # Random slopes: h is drawn. Its constant c is solved for, so that the image is gone at
    # t = 1. The network predicts the drawn fields, too.
    "ddm-linear": _fade(lambda t: 1 - t, lambda t: (t ** 2 - t) / 2,            # h = kappa t + c
                        doc="ddm with a random slope in each pixel [DDM]"),
    "ddm-quadratic": _fade(lambda t: 1 - t,                     # h = kappa_1 t^2 + kappa_2 t + c
                           lambda t: (t ** 3 - t) / 3, lambda t: (t ** 2 - t) / 2,
                           doc="ddm with two random slopes in each pixel [DDM]"),
    # Nothing random: any a(t) that falls from 1 to 0. The paper names constant, linear,
    # quadratic and exponential; the forms are ours.
    "ddm-square": _fade(lambda t: 1 - t ** 2,                                   # h = -2 x0 t
                        doc="the image fades slowly at first, a = 1 - t^2"),
    "ddm-cosine": _fade(lambda t: torch.cos(math.pi / 2 * t),
                        doc="the image fades along a quarter of a cosine"),
    "ddm-exponential": _fade(lambda t: torch.exp(-3 * t),
                             doc="the image fades fast at first, along exp(-3 t)"),
    "ddm-logarithmic": _fade(lambda t: -torch.log1p((math.e - 1) * t),
                             doc="the image fades fast at first, along a logarithm"),
    "ddm-root": _fade(lambda t: 1 - t.sqrt(),                                   # h = -x0 / 2 sqrt t
                      doc="the image fades fastest at first, a = 1 - sqrt t"),
    "flow": Schedule(lambda t: 1 - t, lambda t: t,                              # [DDM v9]
                     doc="a = 1 - t, b = t: rectified flow's straight path"),
    "vp-linear": _keep_variance(lambda t: -(0.1 * t + 9.95 * t ** 2),   # beta 1e-4 to .02 in 1000
                                doc="DDPM's linear beta, in continuous time [DDPM]"),
    "vp-cosine": _keep_variance(_log_cosine,
                                doc="Nichol and Dhariwal's cosine [2102.09672]"),
    "edm": Schedule(lambda t: torch.ones_like(t), lambda t: 80 * t ** 7,  # t is EDM's rho = 7 grid
                    doc="the image stays, the noise grows to 80 [EDM]"),
}


# --- the picture --------------------------------------------------------------------------

def draw_schedules(side=52, columns=6, seed=0):
    """The picture of `python schedules.py`: along each schedule a face, and its curves.

    Schedules with the same a and b share a row. side: pixels of a picture. columns: how
    many times. seed: which face and which noise. -> PIL image"""
    x0 = to_float(draw_faces(1, side, seed).pixels)                                   # (1, 3, H, W)
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, columns, dtype=torch.float64)
    rows, row_of = [], {}
    for name, schedule in SCHEDULES.items():
        curves = str((schedule.a(t).tolist(), schedule.b(t).tolist()))
        if curves in row_of:                                                    # differs by slopes
            title, pictures = rows[row_of[curves]]
            rows[row_of[curves]] = (f"{title}\n{name}", pictures)
            continue
        row_of[curves] = len(rows)
        z, n = x0.expand(columns, -1, -1, -1), schedule.noise(x0, generator)
        xt = schedule.corrupt(z, n.expand(columns, -1, -1, -1), t)
        xt = xt * per_image(schedule.input_scale(t).clamp(max=1), xt)           # tames edm's 80
        pictures = [to_picture(image, zoom=2) for image in to_uint8(xt)]
        rows.append((name, [*pictures, *draw_curves(schedule, 4 * side, 2 * side)]))
    titles = [f"t = {time:.3g}" for time in t.tolist()]
    titles += ["image's share a (blue), noise b (red)", "ln(a^2 / b^2), cut at 10"]
    return draw_sheet(rows, titles)


def draw_curves(schedule, width, height, points=100):
    """Plots of a schedule over time: a and b, then ln(a^2 / b^2) -> two PIL images."""
    t = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    a, b = schedule.a(t), schedule.b(t)
    snr = (-2 * (b / a).log()).clamp(-10, 10)
    top = max(1.0, float(b[-1]))
    curves = [("", "blue", list(zip(t.tolist(), a.tolist()))),
              ("", "red", list(zip(t.tolist(), b.tolist())))]
    shares = draw_plot(curves, width, height, y_range=(0, top), ticks=3)
    curve = [("", "black", list(zip(t.tolist(), snr.tolist())))]
    return shares, draw_plot(curve, width, height, y_range=(-10, 10), ticks=3)


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw one image along every schedule.", draw_schedules,
                        "schedules.png", seed=(0, "which face and which noise"))
