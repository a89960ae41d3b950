"""Recipes: the papers' own settings, at the papers' own scale.

The idea. A method is more than its equations: batch, learning rate and length were tuned
together. `python train.py --recipe maskdit --data imagenet/ --vae sd.safetensors` takes all
of them from the table below, and every flag given beside it wins. Names are train.py's
options. A value is what the paper or its released code says; "ours" marks where this
project departs or had to choose. The sizes are for many GPUs, on *our* network and average:
for minutes on a laptop, train.py's defaults are better. `--dry-run` shows what a recipe
costs.

    maskdm    2306.11363   CelebA-HQ at 256 px, pixels, U-ViT-like base, blocks of tokens,
                           90 % hidden; then all tokens at a twentieth of the rate
    maskdit   2306.09305   ImageNet at 256 px in Stable Diffusion's latents, XL/2 and 8
                           decoder blocks, half hidden; then all tokens at half the rate
    lmd       2312.07971   ImageNet at 224 px in the same latents, 49 tokens, the hidden
                           share rises from 15 to 75 %; ours: its target is not whitened
    ddm       2306.13720   CIFAR-10 in pixels, the constant attenuation, ten steps
"""
from plumbing.console import UserError

NO_CLIP = 1e6                                                   # larger than any gradient

RECIPES = {
    "maskdm": {
        "train": dict(
            data=None, size=256, patch=4,                       # CelebA-HQ, patch 4 at every size
            # U-ViT, 768 wide, 12 heads, 13 blocks (ours: 12, no learned positions)
            model="base", skips=True,
            # 416 of 4096 tokens visible (ours: 410, rounded once)
            mask=0.9, policy="block", block=4,
            schedule="vp-cosine", predict="eps",                # cosine betas, noise prediction,
            time_sampling="uniform",                            # no weights
            precondition="none",
            optimizer="adamw",
            batch=256, lr=2e-4, warmup=0, lr_end=1.0,           # constant rate
            steps=200_000,                                      # of the released checkpoint
            beta1=0.99, beta2=0.99, wd=0.03, clip=1.0,          # decay on all parameters
            ema=0.999, flip=False),                             # flips 0
        "finetune": dict(                                       # "best FID" of the release
            mask=0.0, optimizer="adamw",
            batch=32, lr=1e-5, warmup=5000, lr_end=1.0, steps=200_000,
            beta1=0.99, beta2=0.99, wd=0.03, clip=1.0,
            ema=0.999, weights="model")},                       # raw weights, fresh optimizer
    "maskdit": {
        "train": dict(
            data=None, labels=True, label_dropout=0.1,          # ImageNet
            size=256, space="latent", patch=2,                  # 32 x 32 x 4 latents, 256 tokens
            model="xl", decoder=8,                              # 28 x 1152, then 8 x 512
            mask=0.5, policy="patch", recon=0.1,                # lambda = 0.1
            # target as released (ours: read from the raw output)
            recon_target="noisy",
            # ln sigma ~ N(-1.2, 1.2^2); sigma_data 0.5 there, measured here
            schedule="edm", predict="unit", time_sampling="lognormal", precondition="none",
            optimizer="adamw",
            batch=1024, lr=1e-4, warmup=0, lr_end=1.0,          # 128 x 8 GPUs, constant rate
            steps=2_000_000,
            # AdamW as released; flips very likely none; fp16 there (NaNs were reported)
            beta1=0.9, beta2=0.999, wd=0.0, clip=NO_CLIP, ema=0.9999, flip=False),
        # Zero-ratio, the stage before guided samples. The other one adds
        # --mask-from 0.5 --ramp cosine4 --recon 0.1 --steps 100000.
        "finetune": dict(
            mask=0.0, optimizer="adamw",
            batch=512, lr=5e-5, warmup=0, lr_end=1.0,           # half the rate, half the batch
            steps=75_000, amp="off",                            # TF32; best guided FID at 75k
            # ours: a new average; there the first stage's goes on
            beta1=0.9, beta2=0.999, wd=0.0, clip=NO_CLIP, ema=0.9999)},
    "lmd": {
        "train": dict(
            data=None, size=224, space="latent", patch=4,       # 28 x 28 x 4 latents, 49 tokens
            model="base", decoder=8,                            # 12 x 768, then 8 x 512
            mask=0.75, mask_from=0.15, ramp="cosine",           # the schedule left active in the
            policy="patch",                                     # release
            objective="reconstruct",                            # its only loss: no noise, no time
            precondition="none",
            # ours: the patches themselves, of which a picture can be made. LMD whitens each
            # patch (--recon-target whitened)
            recon_target="clean",
            optimizer="adamw",                                  # Adan there
            batch=64, lr=7.5e-5, warmup=20_000, lr_end=0.0,     # 3e-4 x 64 / 256; one epoch
            steps=8_000_000,                                    # 400 epochs, its parser's default
            beta1=0.9, beta2=0.95, wd=0.05, clip=10.0)},        # betas ours, as in MAE
    "ddm": {
        "train": dict(
            data=None, size=32,                                 # CIFAR-10
            # ours: 130 M, as many as its U-Net with one decoder (216 M with two)
            model="base", patch=2,
            # constant h, two heads, weights on; the release adds |x0_hat - x0| and LPIPS
            schedule="ddm", predict="both", weighting="ddm", time_sampling="uniform",
            precondition="none",
            optimizer="adamw",
            # 128 x 2; down to 5e-6 as its config says (its code goes to 0); ours along a
            # cosine, there a power of 0.96
            batch=256, lr=1e-4, warmup=0, lr_end=0.05, steps=800_000,
            beta1=0.9, beta2=0.999, wd=0.01, clip=1.0,
            ema=0.999, amp="off")},                             # float32
}


def recipe_options(recipe, stage, given):
    """The values of a recipe, under the options that were given beside it.

    recipe: a name in RECIPES, or None: nothing but `given`. stage: "train" or "finetune".
    given: {name: value} of the command line. -> {name: value}. UserError for a stage that
    the paper does not have."""
    if not recipe:
        return given
    if stage not in RECIPES.get(recipe, {}):
        raise UserError(f"--recipe {recipe}: this paper has no second stage; give the options of "
                        f"{stage}.py one by one")
    values = dict(RECIPES[recipe][stage])
    if "minutes" in given:                                                  # a clock replaces steps
        values.pop("steps", None)
    return values | given
