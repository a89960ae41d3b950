"""Schedules: how an image fades and how noise comes in, and the exact way back.

The idea (DDM, arXiv 2306.13720). Corruption is two functions of time, the image's share a(t) and the noise's standard
deviation b(t). DDM lets the image fade to zero along an analytic path (its h_t = -x0 gives a = 1 - t) while Brownian noise
grows (b = sqrt t). Because both are closed formulas, so is the way from any time t to any earlier time s: ten steps, or one.
DDPM (2006.11239), EDM (2206.00364) and rectified flow (2209.03003) are other choices of the same two functions.

    forward    x_t = a(t) x0 + b(t) eps + sum_j e_j(t) K_j            a(0) = 1, b(0) = 0; K_j: DDM's random slopes, if any
    split      network output -> (x0, eps): one formula per prediction (PREDICTIONS)
    step       x_s = a_s x0 + b_s (sqrt(1-k) eps + sqrt(k) n),  n ~ N(0, I)
               eps = (x_t - a_t x0) / b_t                             recomputed, so that x0 may be clipped
               k   = 1 - (1 - k_max)^churn                            churn 0: deterministic (DDIM), churn 1: the posterior
               k_max = 1 - b_s^2 / b_t^2              "wiener": noise is Brownian motion on the clock b^2 (DDM)
               k_max = 1 - (a_t b_s / (a_s b_t))^2    "markov": the signal is scaled by a Markov chain (DDPM)
    unit       V = a^2 s^2 + b^2,  s^2 = mean of data^2;  the target F = (b x0 - a s^2 eps) / (s sqrt V) has variance 1 and no
               correlation with x_t at any t. EDM's c_skip, c_out, c_in are this for a = 1; v-prediction is -F for s = 1, V = 1

Coefficients are computed in float64 and cast to the image's type at the end.
Shapes: B batch, C channels; t in [0, 1], one time per image (B,) or one for all; n (B, (1+S)C, H, W) holds eps and S slopes.
Run `python schedules.py` to see one image fade along every schedule.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch


@dataclass(frozen=True)
class Schedule:
    """A corruption x_t = a(t) x0 + b(t) eps (+ e_j(t) K_j), and everything that follows from it.

    a, b map float64 tensors of times to float64 tensors. `law` says which process carries the noise ("wiener" or "markov"):
    it changes the posterior, never the marginals. `slopes` are the e_j of DDM's random attenuations, e_j(0) = e_j(1) = 0.
    `s` is the data's root mean square, measured once by train.py: `dataclasses.replace(SCHEDULES["ddm"], data_std=0.5)`."""
    a: Callable
    b: Callable
    law: str = "wiener"
    slopes: tuple = ()
    data_std: float = 1.0

    # -- coefficients ---------------------------------------------------------------------------------------------------------

    def coefficients(self, t, like):
        """(a, b, e_1, ...) at times t, shaped to multiply the images `like` (B, C, H, W), in their type and on their device."""
        t = to_float64(t)
        return [per_image(f(t), like) for f in (self.a, self.b, *self.slopes)]

    def input_scale(self, t):
        """1 / sqrt V, float64: the network's input `scale(t) * x_t` has unit variance at every t. [EDM] c_in."""
        t = to_float64(t)
        return (self.a(t) ** 2 * self.data_std ** 2 + self.b(t) ** 2).rsqrt()

    def angle(self, t):
        """theta = arctan(b / (a s)) in [0, pi/2], float64: the noise level as an angle, finite everywhere and smooth."""
        t = to_float64(t)
        return torch.atan2(self.b(t), self.a(t) * self.data_std)

    def time_at(self, angle):
        """The inverse of `angle`, by bisection: works for any monotone pair (a, b), to the last bit of float64."""
        angle = to_float64(angle)
        lo, hi = torch.zeros_like(angle), torch.ones_like(angle)
        for _ in range(60):
            mid = (lo + hi) / 2
            early = self.angle(mid) < angle
            lo, hi = torch.where(early, mid, lo), torch.where(early, hi, mid)
        return hi

    def start_time(self, predict, sigma=200.0):
        """Where sampling begins: t = 1, but for a raw noise head the largest t with b / a <= sigma, since x0 = (x_t - b eps) / a
        does not exist where the image has faded to nothing."""
        if not PREDICTIONS[predict].needs_image:
            return 1.0
        return float(self.time_at(torch.tensor(math.atan(sigma / self.data_std), dtype=torch.float64)))

    # -- forward --------------------------------------------------------------------------------------------------------------

    def noise(self, z, generator=None):
        """All that is random in x_t: eps ~ N(0, I), then one clamped slope field each. z (B, C, H, W) -> (B, (1+S)C, H, W)."""
        B, C, H, W = z.shape
        device = generator.device if generator is not None else z.device
        n = torch.randn(B, (1 + len(self.slopes)) * C, H, W, generator=generator, device=device, dtype=z.dtype).to(z.device)
        return torch.cat([n[:, :C], n[:, C:].clamp(-1, 1)], 1) if self.slopes else n          # [DDM] slopes ~ clamp(N(0,1), -1, 1)

    def corrupt(self, z, n, t):
        """x_t = a z + b eps + sum e_j K_j. z (B, C, H, W), n from `noise`, t (B,) -> (B, C, H, W).   [DDM] forward"""
        a, b, *e = self.coefficients(t, z)
        eps, *K = n.split(z.shape[1], 1)
        return a * z + b * eps + sum(ej * Kj for ej, Kj in zip(e, K))

    # -- network output <-> image and noise ---------------------------------------------------------------------------------

    def head_count(self, predict):
        """How many image-shaped fields the network must output: the prediction's own, then one per random slope."""
        return PREDICTIONS[predict].heads + len(self.slopes)

    def target(self, z, n, t, predict):
        """What the network should output: a list of fields (B, C, H, W), `heads(predict)` of them."""
        a, b, *_ = self.coefficients(t, z)
        eps, *K = n.split(z.shape[1], 1)
        return [*PREDICTIONS[predict].target(z, eps, a, b, self.data_std), *K]

    def split(self, out, zt, t, predict):
        """Network output (B, heads C, H, W) at x_t -> (x0, n): the image and the noise (eps, then slopes, as in `noise`)."""
        a, b, *e = self.coefficients(t, zt)
        fields = out.to(zt.dtype).split(zt.shape[1], 1)
        own, K = fields[:PREDICTIONS[predict].heads], fields[PREDICTIONS[predict].heads:]
        zt = zt - sum(ej * Kj for ej, Kj in zip(e, K))                          # [DDM] take the slopes away, then as usual
        x0, eps = PREDICTIONS[predict].split(own, zt, a, b, self.data_std)
        return x0, torch.cat([eps, *K], 1)

    # -- backward ---------------------------------------------------------------------------------------------------------------

    def kept_share(self, t, s, churn):
        """1 - k: the share of the noise's variance that a step t -> s keeps, the rest is drawn afresh. float64, in [0, 1]."""
        t, s = to_float64(t), to_float64(s)
        posterior = (self.b(s) / self.b(t)) ** 2                                               # [DDM] Brownian bridge
        if self.law == "markov":
            posterior = posterior * (self.a(t) / self.a(s)) ** 2                               # [DDPM] ancestral posterior
        return posterior ** churn               # a power, not a factor: only so do steps compose, t -> u -> s having the law of t -> s

    def step(self, zt, x0, t, s, churn=0.0, noise=None, slopes=()):
        """The analytic transition x_t -> x_s for any 0 <= s < t <= 1, given the image x0 (and slopes K_j, if the schedule has any).

        Exact for the true x0: a step to s = 0 returns x0, from any t. churn in [0, 1]; churn > 0 needs `noise` ~ N(0, I)."""
        a_t, _, *e_t = self.coefficients(t, zt)
        a_s, b_s, *e_s = self.coefficients(s, zt)
        kept = self.kept_share(t, s, churn)
        # b_s sqrt(1-k) eps with eps = (x_t - a_t x0) / b_t: the ratio b_s / b_t in float64, for b_t may be too small for float32
        ratio = per_image(self.b(to_float64(s)) / self.b(to_float64(t)) * kept.sqrt(), zt)
        zs = a_s * x0 + ratio * (zt - a_t * x0 - sum(e * K for e, K in zip(e_t, slopes))) + sum(e * K for e, K in zip(e_s, slopes))
        return zs + b_s * per_image((1 - kept).sqrt(), zt) * noise if churn > 0 else zs

    def eps(self, zt, x0, t, slopes=()):
        """The noise that makes x_t of this image: (x_t - a x0 - sum e_j K_j) / b, for t > 0."""
        a, b, *e = self.coefficients(t, zt)
        return (zt - a * x0 - sum(ej * Kj for ej, Kj in zip(e, slopes))) / b


def per_image(v, like):
    """One number per image (B,), or one for all, shaped to multiply the images `like` (B, C, H, W), in their type and on their device."""
    return v.reshape((-1,) + (1,) * (like.dim() - 1)).to(like.dtype).to(like.device)         # type first: MPS has no float64


def to_float64(t):
    """Times as float64 (a plain number must not pass through float32), on the CPU where the device, Apple's MPS, has no such type."""
    if not torch.is_tensor(t):
        return torch.tensor(t, dtype=torch.float64)
    return t.to("cpu" if t.device.type == "mps" else t.device).double()


# --- what the network predicts ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prediction:
    """`target(x0, eps, a, b, s)` -> fields the network learns; `split(fields, xt, a, b, s)` -> (x0, eps), its inverse. needs_image: it is
    not defined at a = 0, where nothing of the image is left."""
    heads: int
    target: Callable
    split: Callable
    needs_image: bool = False


def _split_eps(f, xt, a, b, s):
    return (xt - b * f[0]) / a, f[0]                                            # not defined at a = 0: see Schedule.start


def _split_x0(f, xt, a, b, s):
    return f[0], (xt - a * f[0]) / b                                            # not defined at b = 0, where no step starts


def _split_v(f, xt, a, b, s):
    return (a * xt - b * f[0]) / (a ** 2 + b ** 2), (b * xt + a * f[0]) / (a ** 2 + b ** 2)


def _split_unit(f, xt, a, b, s):
    V = a ** 2 * s ** 2 + b ** 2
    return (a * s ** 2 / V) * xt + (b * s / V.sqrt()) * f[0], (b / V) * xt - (a * s / V.sqrt()) * f[0]


def _target_unit(x0, eps, a, b, s):
    return [(b * x0 - a * s ** 2 * eps) / (s * (a ** 2 * s ** 2 + b ** 2).sqrt())]


def _split_both(f, xt, a, b, s):
    return xt + (1 - a) * f[0] - b * f[1], f[1]                                 # [DDM] x0 = x_t - H(t) - b eps, H = (a - 1) x0


PREDICTIONS = {
    "both": Prediction(2, lambda x0, eps, a, b, s: [x0, eps], _split_both),                      # [DDM] two raw heads
    "eps": Prediction(1, lambda x0, eps, a, b, s: [eps], _split_eps, needs_image=True),          # [DDPM], [MaskDM]
    "x0": Prediction(1, lambda x0, eps, a, b, s: [x0], _split_x0),
    "v": Prediction(1, lambda x0, eps, a, b, s: [a * eps - b * x0], _split_v),                   # 2202.00512
    "unit": Prediction(1, _target_unit, _split_unit),                                            # [EDM] for any pair (a, b)
}


# --- when: how training times are drawn from u in (0, 1) ---------------------------------------------------------------------------

T_MIN = 1e-4                                                                    # [DDM] t = 1e-4 + (1 - 1e-4) U(0, 1)


def times(kind, schedule, B, generator=None):
    """Training times (B,) in [T_MIN, 1], float64. The B uniforms are stratified, u_i = (u + i/B) mod 1 (2107.00630): each is
    uniform by itself, together they cover the unit interval evenly, which takes noise out of the loss for nothing.
    kind: a name in TIMES, or "zero": no time at all, for reconstruction. There a = 1 and b = 0, so x_t is the image, bit for bit [LMD]."""
    device = generator.device if generator is not None else "cpu"
    if kind == "zero":
        return to_float64(torch.zeros(B, device=device))
    u = torch.rand(1, generator=generator, device=device)
    u = to_float64((u + torch.arange(B, device=device) / B) % 1)
    return TIMES[kind](schedule, u).clamp(T_MIN, 1)


def uniform_times(schedule, u):
    """Uniform in t."""
    return T_MIN + (1 - T_MIN) * u


def lognormal_times(schedule, u):
    """[EDM] ln sigma ~ N(-1.2, 1.2^2) with sigma = b / a, whatever the schedule."""
    sigma = (-1.2 + 1.2 * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).exp()
    return schedule.time_at(torch.atan(sigma / schedule.data_std))


TIMES = {"uniform": uniform_times, "lognormal": lognormal_times}


# --- the schedules -------------------------------------------------------------------------------------------------------------------

def _vp(log_alpha_bar):
    """A variance-preserving pair from ln(alpha-bar): a = sqrt(alpha-bar), b = sqrt(1 - alpha-bar), exact near t = 0 too."""
    return Schedule(lambda t: (log_alpha_bar(t) / 2).exp(), lambda t: (-torch.expm1(log_alpha_bar(t))).sqrt(), "markov")


def _cosine(t, shift=0.008):
    """[Nichol & Dhariwal, 2102.09672] alpha-bar = cos^2((t + .008) / 1.008 pi/2) / cos^2(.008 / 1.008 pi/2)."""
    x = lambda t: (t + shift) / (1 + shift) * math.pi / 2
    return (2 * (torch.cos(x(t)).abs().log() - math.log(math.cos(x(0.0))))).clamp(max=0)       # rounding must not pass alpha-bar = 1


def _fade(a, *slopes):
    """[DDM] the image fades along a(t), a(1) = 0 whatever the rounding, in Brownian noise of variance t."""
    return Schedule(lambda t: a(t).clamp(min=0), torch.sqrt, slopes=slopes)


SCHEDULES = {
    "ddm": _fade(lambda t: 1 - t),                                              # [DDM] h constant: -x0. The paper's best
    # Random slopes: h is drawn, and its constant c is solved for so that the image is gone at t = 1; the drawn fields are predicted too.
    "ddm-linear": _fade(lambda t: 1 - t, lambda t: (t ** 2 - t) / 2),           # [DDM] h = K t + c, c = -x0 - K/2
    "ddm-quadratic": _fade(lambda t: 1 - t, lambda t: (t ** 3 - t) / 3, lambda t: (t ** 2 - t) / 2),      # h = K t^2 + L t + c
    # Nothing random: any a(t) that falls from 1 to 0. The paper names constant, linear, quadratic and exponential; the forms are ours.
    "ddm-square": _fade(lambda t: 1 - t ** 2),                                  # h = -2 x0 t
    "ddm-cosine": _fade(lambda t: torch.cos(math.pi / 2 * t)),
    "ddm-exponential": _fade(lambda t: (torch.exp(-3 * t) - math.exp(-3)) / (1 - math.exp(-3))),
    "ddm-logarithmic": _fade(lambda t: 1 - torch.log1p((math.e - 1) * t)),
    "ddm-root": _fade(lambda t: 1 - t.sqrt()),                                  # h = -x0 / (2 sqrt t)
    "flow": Schedule(lambda t: 1 - t, lambda t: t),                             # [DDM v9] noise std t; rectified flow's path
    "vp-linear": _vp(lambda t: -(0.1 * t + 9.95 * t ** 2)),                     # [DDPM] beta from 1e-4 to .02 in 1000, continuous
    "vp-cosine": _vp(_cosine),
    "edm": Schedule(lambda t: torch.ones_like(t), lambda t: 80 * t ** 7),       # [EDM] sigma_max 80; t is its rho = 7 grid
}


# --- the picture ---------------------------------------------------------------------------------------------------------------------

def draw_schedules(side=64, columns=9, seed=0):
    """One row per schedule: a drawing at times 0 to 1, and the curves a (blue), b (red), log-SNR (grey), as a PIL image."""
    from PIL import Image, ImageDraw
    big = Image.new("RGB", (4 * side, 4 * side), (70, 120, 170))                # a small drawing, made large and shrunk: smooth
    pen = ImageDraw.Draw(big)
    unit = side / 16
    pen.ellipse([8 * unit, 6 * unit, 56 * unit, 60 * unit], fill=(245, 200, 150))
    for x in (22, 42):
        pen.ellipse([(x - 5) * unit, 22 * unit, (x + 5) * unit, 32 * unit], fill="white")
        pen.ellipse([(x - 2) * unit, 24 * unit, (x + 2) * unit, 30 * unit], fill=(40, 30, 30))
    pen.chord([20 * unit, 34 * unit, 44 * unit, 52 * unit], 0, 180, fill=(180, 40, 50))
    pixels = torch.frombuffer(bytearray(big.resize((side, side), Image.Resampling.LANCZOS).tobytes()), dtype=torch.uint8)
    x0 = pixels.view(1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, columns, dtype=torch.float64)
    plot = 2 * side
    canvas = Image.new("RGB", (90 + columns * (side + 4) + plot + 8, 24 + len(SCHEDULES) * (side + 4)), "white")
    ink = ImageDraw.Draw(canvas)
    for j in range(columns):
        ink.text((90 + j * (side + 4), 6), f"t = {t[j]:.3g}", fill="black")
    ink.text((90 + columns * (side + 4), 6), "a blue, b red, log SNR grey", fill="black")
    for i, (name, schedule) in enumerate(SCHEDULES.items()):
        top = 24 + i * (side + 4)
        ink.text((6, top + side // 2 - 6), name, fill="black")
        xt = schedule.corrupt(x0.expand(columns, -1, -1, -1), schedule.noise(x0, generator).expand(columns, -1, -1, -1), t)
        xt = xt * schedule.input_scale(t)[:, None, None, None].clamp(max=1)           # what the network sees: edm's 80 would be all white
        tiles = (xt * 127.5 + 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for j in range(columns):
            canvas.paste(Image.fromarray(tiles[j]), (90 + j * (side + 4), top))
        u = torch.linspace(0, 1, plot, dtype=torch.float64)
        a, b = schedule.a(u), schedule.b(u)
        snr = (2 * (a / b).log() / 20 + 0.5)                                    # log SNR from -10 to 10
        left = 90 + columns * (side + 4)
        ink.rectangle([left, top, left + plot, top + side - 1], outline="lightgray")
        for curve, colour in ((snr, "gray"), (b / max(1.0, float(b[-1])), "red"), (a, "blue")):
            points = [(left + k, top + (side - 1) * (1 - float(v))) for k, v in enumerate(curve.clamp(0, 1))]
            ink.line(points, fill=colour)
    return canvas


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw one image along every schedule.", draw_schedules, "schedules.png", seed=(0, "which noise"))
