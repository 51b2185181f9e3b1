"""Lipsum-FT: robust fine-tuning using random text guidance (arXiv 2404.00860, ICLR 2024).

Fine-tuning changes how the image tower scores *any* text, not only the class names. Lipsum-FT
measures that change on random token sequences and penalises it.

Equations (numbers of the OpenReview version)
    Eq. (6)       mean over t, x of (<G(t), F_theta(x)> - <G(t), F_theta0(x)>)^2     energy_gap
    Eq. (7), (8)  R = 1/(2M) ||v_theta(x) - v_theta0(x)||^2, mean over x,    lipsum_regularizer
                  v^(m) = <G(t_m), F_theta(x)>, times s (deviation 1)
    loss          cross-entropy + lambda R                                            make_loss
    texts         t_m = [SOT, L random ids, EOT], new at every step               random_tokens
Symbols: F image tower, theta its weights (theta0: zero-shot), G frozen text tower, both with
    unit-norm outputs; s = exp(logit_scale); x image, t text; M texts of L random tokens;
    v (B, M); lambda (--lam). The head is W with unit rows, trained, the frozen s outside.

Deviations (lambda = 1, M = 80 and L = 8 are the defaults of the official code)
    1. From the paper, with the code: v carries the factor s, so that lambda = 1 means s^2 = 10^4
       on raw cosines.
    2. From the code: warm-up starts at lr / warm-up steps, not at 0; where the number of steps is
       not divisible by ten, the cosine takes one step more.
    3. From the code: both of Adam's moments are fp32, and the projections run in the towers'
       precision; there the first moment is bf16 (mu_dtype) and the projections are fp32.
    4. From the code: the model of the last step is kept, not the best on the test set; --keep
       best keeps the epoch that is best on held-out training images: 2% of ImageNet's and
       DomainNet's, 10% of CIFAR-10's and of a folder without val/. --holdout 0 trains on all, as
       theirs.
    5. From the code: whole epochs are shuffled, not a buffer of 16 batches; crops are PIL's,
       antialiased, and come after the flip; they are 8-100% of the image, theirs 10-100%;
       evaluation uses CLIP's resize and centre crop.
    6. From the code: NLL is exact; theirs adds 1e-8 to probabilities before the logarithm.
    7. From the code: with --augment none F_theta0(x) is computed once, equal up to rounding.
    8. From both: --data shapes, folder and those marked in RECIPES have recipes of their own.

Usage
    python lipsum_ft.py                                       # embedded data: minutes on a CPU
    python lipsum_ft.py --data folder --data-dir MY_IMAGES    # MY_IMAGES/train/CLASS/*.jpg, ...
    python lipsum_ft.py --data imagenet --data-dir ~/data     # the paper's main experiment
Expected result: README.md, "Results"; ViT-B/16 on ImageNet in the authors' log, one seed, the best
    of its steps (not run by us): ImageNet 83.3, V2 73.6, R 75.9, A 49.9, Sketch 51.5.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(batch_size=256, lr=1e-5, wd=0.0, warmup=0.1, grad_clip=0.0,  # official scripts/
             augment="crop-flip")
RECIPES = {
    "shapes": dict(PAPER, model="shapes-clip", epochs=10, batch_size=64, lr=6e-4, wd=0.1,
                   augment="none", baseline=True),
    "folder": dict(PAPER, epochs=10, batch_size=64),
    "imagenet": dict(PAPER, steps=50_000, holdout=0.02),
    "domainnet": dict(PAPER, steps=5_000, holdout=0.02),
    "cifar10": dict(PAPER, epochs=10),   # this and the next two are not in the paper
    "iwildcam": dict(PAPER, epochs=10),
    "fmow": dict(PAPER, epochs=10),
}


def get_args():
    p = common.parser(__doc__)
    p.add("--lam", 1.0, "lambda, weight of the regulariser (official code: 1); 0 is plain "
          "fine-tuning", type=common.limited(low=0))
    p.add("--texts", 80, "M, random texts a step (official code: 80)",
          type=common.limited(int, 1))
    p.add("--text-length", 8, "L, random tokens a text (official code: 8)",
          type=common.limited(int, 1))
    p.add("--alpha", 0.0, "if above 0, also evaluate (1 - alpha) zero-shot + alpha Lipsum-FT "
          "weights, as WiSE-FT does", type=common.limited(low=0, high=1))
    p.add("--freeze", "none", "part that is not trained", choices=["none", "head"])
    p.add("--baseline", False, "also train without the regulariser; on for shapes",
          action=argparse.BooleanOptionalAction)
    return common.parse(p, "lipsum_ft", RECIPES)


# ------------------------------------- Equations -------------------------------------

def random_tokens(m, length, sot, eot, generator=None):
    """m random texts [SOT, `length` ids uniform below SOT, EOT]: (m, length + 2) int64.

    Source: official code, scripts/Lipsum-FT.py, step_trn. sot, eot: the tokenizer's ids (49406
    and 49407 for CLIP).
    """
    ids = torch.randint(0, sot, (m, length), generator=generator)
    return torch.cat([torch.full((m, 1), sot), ids, torch.full((m, 1), eot)], dim=1)


def energy_gap(v, v0):
    """Eq. (6): mean over images and texts of (v - v0)^2, fp32.

    v, v0 (B, M): inner products <G(t_m), F(x_b)> of the trained and of the zero-shot tower.
    """
    return (v.float() - v0.float()).square().mean()


def lipsum_regularizer(v, v0):
    """Eq. (7), (8): R = 1/(2M) ||v - v0||_2^2, mean over the batch; v, v0 (B, M).

    Half the energy gap of the same v. Source: official code, scripts/Lipsum-FT.py, step_trn. In
    fp32 whatever it is given: s^2 overflows fp16.
    """
    v, v0, M = v.float(), v0.float(), v.shape[1]
    return (v - v0).square().sum(dim=1).mean() / (2 * M)


# ---------------------------------------- Loss ----------------------------------------

def make_loss(clip_model, zero_shot, tokenizer, lam, texts, text_length, seed, features_0=None):
    """loss_fn(model, batch) -> cross-entropy + lam R, and its parts.

    zero_shot: the ImageClassifier with theta_0. features_0 (N, D): F_theta0(x) of all training
    images, looked up by index; None computes it for every batch.
    """
    s, device, amp = zero_shot.scale, zero_shot.head.device, zero_shot.amp
    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id

    def random_text_features(step):
        """G(t) (M, D) of the step's texts, equal on all ranks and after a resume."""
        generator = torch.Generator().manual_seed(hash((seed, step)) & 0xFFFFFFFF)
        t = random_tokens(texts, text_length, sot, eot, generator)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            return common.encode_texts(clip_model, t)

    def loss_fn(model, batch):
        logits, features = model(batch.images)                # (B, C), (B, D)
        ce = F.cross_entropy(logits, batch.labels)
        if lam == 0:
            return ce, {"ce": ce}
        with torch.no_grad():
            g = random_text_features(batch.step)              # (M, D)
            if features_0 is None:
                f0 = zero_shot(batch.images)[1]               # (B, D)
            else:
                f0 = common.moved(features_0[batch.index], device)
        v, v0 = s * features @ g.T, s * f0 @ g.T              # (B, M); times s: deviation 1
        r = lipsum_regularizer(v, v0)
        return ce + lam * r, {"ce": ce, "lipsum": r}

    return loss_fn


# ---------------------------------------- main ----------------------------------------

def check_texts(setup):
    """The tokenizer and the text tower can make and take the random texts."""
    args, tokenizer = setup.args, setup.tokenizer
    try:
        t = random_tokens(1, args.text_length, tokenizer.sot_token_id, tokenizer.eot_token_id)
        common.encode_texts(setup.clip, t)
    except (ValueError, AttributeError) as error:
        raise common.Fail(f"--text-length {args.text_length} with --model {args.model}: "
                          f"{error}") from None


def fine_tune(setup, zero_shot, lam, out):
    """Train with weight `lam` of the regulariser from theta_0 and leave the model in `out`."""
    args, features_0, teacher = setup.args, None, zero_shot
    if args.augment == "none" and lam > 0:  # the teacher sees the same images in every epoch
        features_0 = common.features_once(zero_shot, setup.data.train, setup, setup.out)
    if args.compile:
        teacher = torch.compile(zero_shot)
    loss_fn = make_loss(setup.clip, teacher, setup.tokenizer, lam, args.texts, args.text_length,
                        args.seed, features_0)
    model = setup.classifier()
    model.head.requires_grad_(args.freeze != "head")
    setup.fit(model, loss_fn, out)
    common.save_run(setup, model, out)
    return model


def row_of(run):
    """The name of --finetuned's row: "Lipsum-FT" for the model of such a run."""
    path = Path(run) / "args.json"
    about = common.read_json(path, "a finished run") if path.is_file() else {}
    own = about.get("method") == "lipsum_ft" and "part_of" not in about  # not its baseline
    return "Lipsum-FT" if own and about["lam"] > 0 else "fine-tuned"


def main():
    args = get_args()
    if args.predict != "none":
        return common.predict(args)
    setup = common.start(args)
    check_texts(setup)
    models = {}
    if args.finetuned != "none":
        models["zero-shot"], models[row_of(args.finetuned)] = common.load_finetuned(setup)
        setup.out = common.run_folder(args)
    else:
        setup.out = common.run_folder(args)
        zero_shot = setup.classifier(own_tower=False)  # the frozen teacher
        models["zero-shot"] = zero_shot
        common.evaluate_first(common.each(models), setup)
        if args.baseline and args.lam:
            models["fine-tuned"] = fine_tune(setup, zero_shot, 0, setup.out / "fine-tuned")
        name = "Lipsum-FT" if args.lam else "fine-tuned"
        models[name] = fine_tune(setup, zero_shot, args.lam, setup.out)
    if args.alpha:
        name, tuned = list(models.items())[-1]
        average = common.average(models["zero-shot"], tuned, args.alpha)
        models[f"{name} + WiSE {args.alpha:g}"] = average
    results = common.evaluate(common.each(models), setup)
    common.plot_plane(common.plane(results, setup.measure), setup)
    common.finish(setup, results)


if __name__ == "__main__":
    common.cli(main)
