"""Lipsum-FT: robust fine-tuning using random text guidance (arXiv 2404.00860, ICLR 2024).

Fine-tuning changes how the image tower scores *any* text, not only the class names. Lipsum-FT
measures that change on random token sequences and penalises it.

Equations (numbers of the OpenReview version)
    Eq. (6)       mean over t, x of (<G(t), F_theta(x)> - <G(t), F_theta0(x)>)^2     energy_gap
                  for reference: R is half of it
    Eq. (7), (8)  R = 1/(2M) ||v_theta(x) - v_theta0(x)||^2, mean over x,    lipsum_regularizer
                  v^(m) = <G(t_m), F_theta(x)>, times s (deviation 1)
    loss          cross-entropy + lambda R                                            make_loss
    texts         t_m = [SOT, L random ids, EOT], new at every step               random_tokens
Symbols: F image tower, theta its weights (theta0: zero-shot), G frozen text tower, both with
    unit-norm outputs; s = exp(logit_scale); x image, t text; M texts of L random tokens;
    v (B, M); lambda (--lam). The head starts as W, unit rows, and is trained; s, frozen, stays
    outside.

Deviations (lambda = 1, M = 80 and L = 8 are the defaults of the official code)
    1. From the paper, which writes no s, with the code: v carries it, so that lambda = 1 means
       s^2 on raw cosines, 10^4 for OpenAI's models.
    2. From the code: warm-up starts at lr / warm-up steps, not at 0; where the number of steps is
       not divisible by ten, the cosine takes one step more.
    3. From the code: towers are bf16 or fp16 on CUDA and fp32 elsewhere, theirs bf16; both of
       Adam's moments are fp32, and the projections run in the towers' precision; there the first
       moment is bf16 (mu_dtype) and the projections are fp32.
    4. From the code: the model of the last step is kept, not the best on the test set of every
       1,000 steps; --keep best keeps the epoch that is best on held-out images. With either, 2% of
       ImageNet's and DomainNet's training images, 10% of CIFAR-10's and of a folder without val/
       are held out; --holdout 0 trains on all, as theirs.
    5. From the code: whole epochs are shuffled, not a buffer of 16 batches. Crops are PIL's,
       antialiased, rounded to 8 bits, after the flip, their area uniform in 8-100% of the image;
       theirs are floats, before the flip, their side uniform and the area 10-100%. Evaluation is
       CLIP's resize and crop, theirs a crop of 224/256 of the shorter side.
    6. From the code: NLL is exact; theirs adds 1e-8 to probabilities before the logarithm.
    7. Recipes for the data sets that are not in the paper are ours.

Usage
    python lipsum_ft.py                                       # embedded data: a minute on a CPU
    python lipsum_ft.py --data folder --data-dir MY_IMAGES    # MY_IMAGES/train/CLASS/*.jpg, ...
    python lipsum_ft.py --data imagenet --data-dir ~/data --tests v2,r,a,sketch     # the paper's
Expected result: README.md, "Results"; ViT-B/16 on ImageNet in the authors' log, one seed, the best
    of its steps (not run by us): ImageNet 83.3, V2 73.6, R 75.9, A 49.9, Sketch 51.5.
"""
import torch
import torch.nn.functional as F

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(batch_size=256, lr=1e-5, wd=0.0, warmup=0.1, grad_clip=0.0, augment="crop-flip",
             baseline=False)  # official scripts/
RECIPES = {
    "imagenet": dict(PAPER, steps=50_000), "domainnet": dict(PAPER, steps=5_000),
    # These are ours
    "cifar10": dict(PAPER, epochs=10), "iwildcam": dict(PAPER, epochs=10),
    "fmow": dict(PAPER, epochs=10), "folder": PAPER, "shapes": dict(PAPER, baseline=True),
}  # what the data brings to every method is in common.OF_DATA


def get_args():
    p = common.parser(__doc__)
    p.add("--lam", 1.0, "lambda, weight of the regulariser (official code: 1); 0 is plain "
          "fine-tuning")
    p.add("--texts", 80, "M, random texts a step (official code: 80)", low=1)
    p.add("--text-length", 8, "L, random tokens a text (official code: 8)", low=1)
    p.add("--freeze", "none", "part that is not trained", choices=["none", "head"])
    p.add("--baseline", False, "also train without the regulariser")
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
    fp32 whatever it is given: the sum over M texts may overflow fp16.
    """
    v, v0, M = v.float(), v0.float(), v.shape[1]
    return (v - v0).square().sum(dim=1).mean() / (2 * M)


# ---------------------------------------- Loss ----------------------------------------

def make_loss(clip_model, zero_shot, tokenizer, lam, texts, text_length, seed):
    """loss_fn(model, batch) -> cross-entropy + lam R, and its parts.

    zero_shot: the ImageClassifier with theta_0.
    """
    s, device, amp = zero_shot.scale, zero_shot.head.device, zero_shot.amp
    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id

    def random_text_features(step):
        """G(t) (M, D) of the step's texts, equal on all ranks and after a resume."""
        generator = torch.Generator().manual_seed(common.seed_of(seed, step))
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
            f0 = zero_shot(batch.images)[1]                   # (B, D)
        v, v0 = s * features @ g.T, s * f0 @ g.T              # (B, M); times s: deviation 1
        r = lipsum_regularizer(v, v0)
        return ce + lam * r, {"ce": ce, "lipsum": r}

    return loss_fn


# ---------------------------------------- main ----------------------------------------

def fine_tune(setup, zero_shot, lam, out):
    """The model trained from theta_0 with weight `lam` of the regulariser; saved in `out`."""
    args = setup.args
    reference = torch.compile(zero_shot) if args.compile else zero_shot
    loss_fn = make_loss(setup.clip, reference, setup.tokenizer, lam, args.texts,
                        args.text_length, args.seed)
    frozen = () if args.freeze == "none" else ("head",)
    model = common.train(zero_shot, loss_fn, setup, out, frozen=frozen)
    common.save_run(setup, model, out)
    return model


def main():
    args = get_args()
    if args.predict:
        return common.predict_with_head(args)
    setup = common.start(args, common.load_data(args))
    try:
        ids = setup.tokenizer.sot_token_id, setup.tokenizer.eot_token_id
        common.encode_texts(setup.clip, random_tokens(1, args.text_length, *ids))
    except (AttributeError, ValueError) as error:  # not CLIP's tokenizer, not causal, too long
        raise common.Fail(f"--text-length {args.text_length}, --model {args.model}: random texts "
                          f"cannot be encoded: {error}") from None
    if args.finetuned:
        zero_shot, tuned = common.load_finetuned(setup)
        models = {"zero-shot": zero_shot, "fine-tuned": tuned}
    else:
        zero_shot = common.ImageClassifier(setup.clip.visual, setup.head, setup.scale,
                                           amp=setup.amp).eval()
        models = {"zero-shot": zero_shot}
        common.preview(common.each(models), setup)
        if args.baseline and args.lam:
            models["fine-tuned"] = fine_tune(setup, zero_shot, 0, setup.out / "fine-tuned")
        name = "Lipsum-FT" if args.lam else "fine-tuned"
        models[name] = fine_tune(setup, zero_shot, args.lam, setup.out)
    common.finish(setup, common.evaluate(common.each(models), setup))


if __name__ == "__main__":
    common.cli(main)
