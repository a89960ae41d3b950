"""Losses: denoise what is seen, reconstruct what is hidden.

The idea. Score matching regresses the noise (or the image) in every patch. If only K patches went through the network, only K
patches have an answer, so only those are scored (MaskDM, arXiv 2306.11363) and the sum is divided by K: the scale of the loss
does not depend on the mask ratio. With a decoder (MaskDiT, 2306.09305) hidden patches have an answer too, and guessing them from
their neighbours is a second task:

    L = mean over visible tokens of  sum_f w_f(t) |out_f - target_f|^2   +   lambda mean over hidden tokens of |out - patch|^2

A token economy that lets hidden tokens take part (routing, vit.py) has an answer for them: then all tokens are scored, the ordinary loss.
LMD (2312.07971) drops the noise and the time, and with them the first term: reconstruction alone, of the hidden patches of a clean image.

The targets belong to the prediction (schedules.py); the weights w_f are per image and are applied before any mean, in float32.
The reconstruction reads the network's *raw* output: through EDM's c_skip the noisy patch, which is the target, would leak in.

Shapes: B batch, N tokens, P values per patch and field; out (B, heads C, H, W), z (B, C, H, W), n as drawn by schedule.noise.
"""
import torch

from mask import patchify


def plain_weights(t):
    """Weight 1 for the image head and for the noise head."""
    return torch.ones_like(t), torch.ones_like(t)


def ddm_weights(t):
    """[DDM] the released weights: 1/t for the image head, 1/(1 - t + 1e-4) for the noise head (t >= 1e-4)."""
    return 1 / t, 1 / (1 - t + 1e-4)


WEIGHTS = {"plain": plain_weights, "ddm": ddm_weights}                                          # of the two heads of `both`; one head has weight 1


def clean_target(schedule, z, n, t):
    """The image itself, in units of its standard deviation."""
    return z / schedule.data_std


def noisy_target(schedule, z, n, t):
    """[MaskDiT, released code] the noisy image: what the dropped patch looked like."""
    return schedule.corrupt(z, n, t)


def whitened_target(schedule, z, n, t):
    """[LMD, MAE] the image, to be normalised patch by patch: features get better, but no pixel can be made of them again."""
    return z


RECON_TARGETS = {"clean": clean_target, "noisy": noisy_target, "whitened": whitened_target}


def normalise_patches(u, eps=1e-6):
    """Every patch to mean 0 and (unbiased) variance 1, as MAE and the released MaskDiT do. (B, N, P) -> (B, N, P)."""
    return (u - u.mean(-1, keepdim=True)) / (u.var(-1, keepdim=True) + eps).sqrt()


def token_error(out, z, n, t, schedule, patch, recon_target):
    """Squared error (B, N) of the raw output's first C channels against a target's patches; all but the clean ones are normalised."""
    wanted = patchify(RECON_TARGETS[recon_target](schedule, z, n, t), patch)
    wanted = wanted if recon_target == "clean" else normalise_patches(wanted)
    return ((patchify(out[:, :z.shape[1]].float(), patch) - wanted) ** 2).mean(-1)


def hidden_mean(error, m):
    """The mean of error (B, N) over hidden tokens."""
    hidden = ~m.visible
    return (error * hidden).sum() / hidden.sum()


def build_objective(schedule, predict, patch, weighting="plain", recon=0.0, recon_target="clean", all_scored=False):
    """-> objective(out, z, n, t, m), the scalar training loss in float32.

    weighting: a name in WEIGHTS, used by the prediction `both`. recon: lambda, 0 for none; it needs a decoder, whose outputs at hidden
    patches it scores against RECON_TARGETS[recon_target], all but the clean one normalised patch by patch. m None: nothing is hidden, and
    the reconstruction term is absent (not 0/0). all_scored: score matching on all tokens, hidden or not (ECONOMIES of vit.py)."""
    if recon and all_scored:
        raise ValueError("reconstruction is about tokens that score matching leaves out: there are none when all are scored")

    def objective(out, z, n, t, m):
        C = z.shape[1]
        weights = [w.float() for w in WEIGHTS[weighting](t)] if predict == "both" else []
        error = 0
        for i, (guess, target) in enumerate(zip(out.float().split(C, 1), schedule.target(z, n, t, predict))):
            square = patchify((guess - target) ** 2, patch).mean(-1)                                                 # (B, N)
            error = error + (weights[i].to(square)[:, None] * square if i < len(weights) else square)
        if m is None or all_scored or m.keep.shape[1] == m.n:
            return error.mean()
        loss = error.gather(1, m.keep).mean()                                   # [MaskDM] visible tokens only, divided by K
        if recon:
            loss = loss + recon * hidden_mean(token_error(out, z, n, t, schedule, patch, recon_target), m)    # [MaskDiT] lambda = 0.1
        return loss

    return objective


def build_reconstruction(schedule, predict, patch, weighting="plain", recon=0.0, recon_target="clean", all_scored=False):
    """-> objective(out, z, n, t, m), the mean over hidden tokens of |out - patch|^2: all that is left without noise. [LMD]

    The first arguments are build_objective's; there is nothing to predict or to weigh but the patches. m hides something, always."""
    return lambda out, z, n, t, m: hidden_mean(token_error(out, z, n, t, schedule, patch, recon_target), m)


OBJECTIVES = {"denoise": build_objective, "reconstruct": build_reconstruction}
