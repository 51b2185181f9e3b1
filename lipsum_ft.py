"""Lipsum-FT: robust fine-tuning of zero-shot models using random text guidance (arXiv 2404.00860, ICLR 2024).

Fine-tuning changes how the image tower scores *any* text, not only the class names. Lipsum-FT measures that
change on random token sequences and penalises it.

Equations (numbers of the OpenReview version)
    Eq. (6)  energy gap             mean over t, x of (<G(t), F_theta(x)> - <G(t), F_theta0(x)>)^2     energy_gap
    Eq. (7), (8)  regulariser       R = 1/(2M) ||v_theta(x) - v_theta0(x)||^2, mean over x,        lipsum_regularizer
                                    v^(m) = <G(t_m), F_theta(x)>, times s (deviation 1)
    loss                            cross-entropy + lambda R, lambda = 1                               make_loss
    texts                           t_m = [SOT, L random ids, EOT], M = 80, L = 8, new at every step   random_tokens
Symbols: F image tower, theta its weights (theta0: zero-shot), G frozen text tower, both with unit-norm outputs;
    s = exp(logit_scale); x image, t text; M texts of L random tokens; v (B, M); lambda the weight of R (--lam).

Deviations
    1. From the paper, with the official code: v carries the factor s, so lambda = 1 means s^2 = 10^4 on raw cosines.
    2. From the code: warm-up starts at lr / warm-up steps, not at 0.
    3. From the code: both of Adam's moments are fp32, and the projections run in the towers' precision; there the
       first moment is bf16 (mu_dtype) and the projections are fp32.
    4. From the code: the model of the last step is kept, not the best on the test set.
    5. From the code: crops are PIL's, antialiased, after the flip; evaluation uses CLIP's resize and centre crop.
    6. From both: --data shapes, folder and the sets that RECIPES marks use recipes of their own.
    7. From the code: with --augment none F_theta0(x) is computed once, not at every step; equal up to rounding.

Usage
    python lipsum_ft.py                                       # the embedded data: minutes on two CPU cores
    python lipsum_ft.py --data folder --data-dir MY_IMAGES    # MY_IMAGES/train/CLASS/*.jpg, test/CLASS/*.jpg, ...
    python lipsum_ft.py --data imagenet --data-dir ~/data     # the paper's main experiment
Expected result: README.md, "Results"; ImageNet with ViT-B/16 in the authors' log (not run by us): ImageNet 83.3,
    V2 73.6, R 75.9, A 49.9, Sketch 51.5.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import common

# ------------------------------------------------------ Args ------------------------------------------------------

PAPER = dict(batch_size=256, lr=1e-5, wd=0.0, warmup=0.1, grad_clip=0.0, augment="crop-flip")  # official scripts/
RECIPES = {
    "shapes": dict(model="shapes-clip", epochs=10, batch_size=64, lr=6e-4, wd=0.1, warmup=0.1, grad_clip=0.0,
                   augment="none", baseline=True),
    "folder": dict(PAPER, epochs=10, batch_size=64),
    "imagenet": dict(PAPER, steps=50_000, holdout=0.0),
    "domainnet": dict(PAPER, steps=5_000, holdout=0.0),
    **{data: dict(PAPER, epochs=10) for data in ("cifar10", "iwildcam", "fmow")},  # not in the paper
}


def get_args():
    p = common.parser(__doc__)
    p.add("--lam", 1.0, "lambda, weight of the regulariser (paper: 1); 0 is plain fine-tuning",
          type=common.number(low=0))
    p.add("--texts", 80, "M, random texts a step (paper: 80)", type=common.number(int, 1))
    p.add("--text-length", 8, "L, random tokens a text (paper: 8)", type=common.number(int, 1))
    p.add("--alpha", 0.0, "if above 0, also evaluate (1 - alpha) zero-shot + alpha Lipsum-FT weights, as WiSE-FT does",
          type=common.number(low=0, high=1))
    p.add("--baseline", False, "also train without the regulariser; on for shapes",
          action=argparse.BooleanOptionalAction)
    return common.parse(p, "lipsum_ft", RECIPES)


# ---------------------------------------------------- Equations ----------------------------------------------------

def random_tokens(m, length, sot, eot, generator=None):
    """m random texts [SOT, `length` ids uniform below SOT, EOT]: (m, length + 2) int64. Official code.

    Source: scripts/Lipsum-FT.py, step_trn. sot, eot: the tokenizer's ids (49406, 49407 for CLIP).
    """
    ids = torch.randint(0, sot, (m, length), generator=generator)
    return torch.cat([torch.full((m, 1), sot), ids, torch.full((m, 1), eot)], dim=1)


def encode_tokens(clip_model, tokens):
    """G(t): unit-norm text features (m, D) of tokens (m, n) that end with EOT, computing only those n positions.

    Equal to padding to the context length: attention is causal, so no position before the padding sees it, and the
    feature is read at EOT. ValueError for a text tower without these two properties, or n above its context length.
    """
    tower = getattr(clip_model, "text", clip_model)  # open_clip.CLIP holds the text tower's parts itself
    pooling = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    if getattr(tower, "attn_mask", None) is None or pooling != "argmax" or getattr(tower, "cls_emb", None) is not None:
        raise ValueError("the text tower is not causal with its output read at EOT")
    n = tokens.shape[1]
    if n > len(tower.positional_embedding):
        raise ValueError(f"{n} tokens exceed the context length {len(tower.positional_embedding)}")
    x = tower.token_embedding(tokens) + tower.positional_embedding[:n]        # (m, n, width)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:n, :n]))[:, -1]
    x = tower.text_projection(x) if callable(tower.text_projection) else x @ tower.text_projection
    return F.normalize(x.float(), dim=-1)                                    # (m, D)


def energy_gap(v, v0):
    """Eq. (6): mean over images and texts of (v - v0)^2; v, v0 (B, M) inner products <G(t_m), F(x_b)>."""
    return (v - v0).square().mean()


def lipsum_regularizer(v, v0):
    """Eq. (7), (8): R = 1/(2M) ||v - v0||_2^2, mean over the batch; v, v0 (B, M). Half the energy gap of the same v."""
    M = v.shape[1]
    return (v - v0).square().sum(dim=1).mean() / (2 * M)


# ------------------------------------------------------ Loss ------------------------------------------------------

def make_loss(clip_model, zero_shot, tokenizer, lam, texts, text_length, seed, features_0=None):
    """loss_fn(model, batch) -> cross-entropy + lam R, and its parts. zero_shot: ImageClassifier with theta_0.

    features_0 (N, D): F_theta0(x) of all training images, looked up by index; None computes them for every batch.
    """
    s, device = zero_shot.scale, zero_shot.head.device

    def loss_fn(model, batch):
        logits, features = model(batch.images)                               # (B, C), (B, D)
        ce = F.cross_entropy(logits, batch.labels)
        if lam == 0:
            return ce, {"ce": ce}
        with torch.no_grad(), torch.autocast(device.type, zero_shot.amp, enabled=zero_shot.amp is not None):
            rng = torch.Generator().manual_seed(hash((seed, batch.step)) & 0xFFFFFFFF)  # equal on all ranks
            t = random_tokens(texts, text_length, tokenizer.sot_token_id, tokenizer.eot_token_id, rng)
            g = encode_tokens(clip_model, t.to(device))                      # G(t) (M, D)
            f0 = zero_shot(batch.images)[1] if features_0 is None else features_0[batch.index].to(device)  # (B, D)
        v, v0 = s * features @ g.T, s * f0 @ g.T                             # times s: deviation 1; (B, M)
        r = lipsum_regularizer(v, v0)
        return ce + lam * r, {"ce": ce, "lipsum": r}

    return loss_fn


# ------------------------------------------------------ main ------------------------------------------------------

def main():
    args = get_args()

    def check(setup):
        """The tokenizer and the text tower can make and take the random texts."""
        try:
            t = random_tokens(1, args.text_length, setup.tokenizer.sot_token_id, setup.tokenizer.eot_token_id)
            encode_tokens(setup.clip, t.to(setup.device))
        except (ValueError, AttributeError) as error:
            raise common.Fail(f"--text-length {args.text_length} with --model {args.model}: {error}") from None
    setup = common.start(args, check)
    zero_shot = setup.classifier(own=False)  # the frozen teacher needs no tower of its own
    rows = {"zero-shot": zero_shot}

    def fit(lam, out):
        once = args.augment == "none" and lam > 0  # the teacher sees the same images in every epoch
        loss_fn = make_loss(setup.clip, torch.compile(zero_shot) if args.compile else zero_shot, setup.tokenizer, lam,
                            args.texts, args.text_length, args.seed,
                            common.train_features(zero_shot, setup, setup.out) if once else None)
        model = setup.fit(setup.classifier(), loss_fn, out)
        common.save_run(setup, model, out)
        return model

    if args.finetuned != "none":
        run = common.read_json(Path(args.finetuned) / "args.json", "a finished run")
        regularised = run["method"] == "lipsum_ft" and run["lam"] > 0 and "part_of" not in run  # a part: the baseline
        zero_shot, tuned = setup.finetuned
        rows = {"zero-shot": zero_shot, "Lipsum-FT" if regularised else "fine-tuned": tuned}
    else:
        if args.baseline and args.lam:
            rows["fine-tuned"] = fit(0, setup.out / "fine-tuned")
        rows["Lipsum-FT" if args.lam else "fine-tuned"] = fit(args.lam, setup.out)
    if args.alpha:
        *_, name = rows
        rows[f"{name} + WiSE {args.alpha:g}"] = common.merged(zero_shot, rows[name], args.alpha)
    common.finish(setup, common.evaluate(rows, setup))


if __name__ == "__main__":
    common.cli(main)
