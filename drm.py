"""DRM: dual risk minimization for robust fine-tuning of zero-shot models (arXiv 2411.19757).

Two text heads on one CLIP: df from default prompts, which elicit the class and all that goes with
it, and cd from concept descriptions of the class's core features. Fine-tune the df head to the
labels (empirical risk) while the cd head keeps to a zero-shot estimate of what the core features
tell (worst-case risk).

Equations (f(x), g(t): unit features; A(x, t) = <f(x), g(t)>; theta_0: before fine-tuning)
    Eq. (5)   p(y|x) = softmax_y(A(x, t_y) / tau), tau = 1 / s                      both_logits
    Eq. (4)   R_c = E_x E_{y ~ p_c(y|x)} [-log p_cd(y|x)], soft cross-entropy   worst_case_risk
    Eq. (7)   R(df) + lambda R_c(cd); Eq. (13) writes it out                          make_loss
    Eq. (8)   gamma(x, y) = (xi - min xi) / (max xi - min xi), extremes over the training
              images labelled y; xi(x, y) = exp(A_0(x, t_y^cd) / tau)        core_targets
    Eq. (9)   p_c(y_x|x) = gamma(x, y_x) for the label y_x; others share the rest     core_targets
    Eq. (10)  beta p_df + (1 - beta) p_cd, beta = 1 / (1 + lambda) by default           mixture
    FLYP      R(df): CLIP's symmetric loss of images and captions (5.1)        contrastive_loss
Symbols: s = exp(logit_scale); W_df, W_cd (C, D) heads with unit rows; F_0 (N, D) zero-shot
    features.

The authors published inference code and descriptions, never training code. The objective, both
towers, FLYP's loss, the hyperparameters (Appendix F) and early stopping are the paper's; prompts,
crops and heads of one text a class are the released code's; the mean of several texts is
App. C's, here of unit features; the 500 warm-up steps and a trained s are FLYP's code's.
Reconstructions:
    Eq. (9)   the rest, 1 - gamma, is split by softmax over y != y_x of s A_0(x, t_y^cd)
    captions  of FLYP's loss: each image has the default prompt of its class (FLYP: one of all
              templates at random)

Deviations
    1. From the paper: xi has a temperature of its own, 1, where Section 4.2 writes the tau of
       Eq. (5). With that, 1/s, gamma is nearly 0 for nearly every image (simulated, 1,300 normal
       affinities of deviation 0.02: median 0.002, 98% below 0.1; with 1 the median is near 0.5).
       --tau 0.01 is the paper's reading for OpenAI's models.
    2. From the paper: Eq. (13)'s first term is the cross-entropy of the df head, --erm ce; we
       follow Section 5.1, FLYP's loss. --erm ce trains through the text tower, as FLYP's
       ablation; a linear head on the image tower (Table 11, row 2, as we read it) is absent.
    3. From the paper's text (resize, centre crop), with the released transform: images are
       cropped at random (RandomResizedCrop 0.9-1).
    4. From FLYP: towers in bf16 or fp16 on CUDA, theirs in fp32; an epoch is one pass over the
       images, theirs shuffles rows of image and template; ceil(epochs n / B) steps. --lam 0 is
       FLYP but for this, deviation 7, a batch of 256 where FLYP has 512 on ImageNet, one prompt
       in training, and all templates' mean in its evaluation head. ERM's cd and mixture rows are
       that model's, with DRM's beta.
    5. The contrastive batch is that of all ranks, but with --accum it is one part of the step.
    6. p_c is that of the un-augmented training images, whose features F_0 are computed once.
    7. Early stopping chooses among the ends of epochs, by the mixture's accuracy (--lam 0: the df
       head's) on held-out images: 2% of ImageNet's and DomainNet's training images, 10% of
       CIFAR-10's and of a folder without val/. iWildCam is measured by macro-F1; accuracy chooses.
    8. lambda is 1, not chosen from 1 to 5 by validation. --alpha is the weight of the fine-tuned
       model, 1 - rho, and not chosen by validation.
    9. A text that is longer than the context is refused; the released code cuts it, end token
       included. Descriptions are joined by name first; the code joins by position.
   10. Absent: ablations (b1), (b2), (c2), (d2), (d3), (e), LP-FT, ResNet50. Recipes for
       shapes, folder, CIFAR-10 and DomainNet are ours.

Usage
    python drm.py                                               # the embedded data
    python drm.py --lam 0                                       # FLYP
    python drm.py --data folder --data-dir MY_IMAGES --descriptions MINE.json
    python drm.py --data imagenet --descriptions DRM/prompts/imagenet_cd.json  # the authors'
    python drm.py --finetuned runs/drm-shapes-s0 --predict MY_IMAGES    # class, probability
Expected result: README.md, "Results"; the authors' ViT-B/16 checkpoints (not run by us), beta 0.5:
    ImageNet 82.05, V2 73.43, R 77.82, A 53.53, Sketch 52.48; iWildCam macro-F1 .5353 ID / .4049
    OOD; FMoW .6857 ID / .4566 worst region OOD.
"""
import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import nn

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(epochs=10, batch_size=256, lr=1e-5, wd=0.1, warmup=500, grad_clip=0.0,
             augment="crop", keep="best")  # Appendix F; the warm-up is FLYP's
LATER = dict(PAPER, epochs=20, wd=0.2)
RECIPES = {
    "imagenet": dict(PAPER, prompt="a good photo of the {}."),
    "iwildcam": dict(LATER, prompt="a photo of {}."),
    "fmow": dict(LATER, prompt="satellite photo of a {}."),
    "cifar10": PAPER, "domainnet": PAPER, "folder": PAPER,  # these and the next are ours
    "shapes": dict(PAPER, prompt="a photo of a {}", baseline=True),
}  # what the data brings to every method is in common.OF_DATA


def get_args():
    p = common.parser(__doc__)
    p.add("--descriptions", "", "JSON: {class: text}, {index: text} or {class: [texts]}; shapes "
          "brings its own, and of folder it is descriptions.json", type=common.absolute)
    p.add("--prompt", "a photo of a {}.", "default prompt, {} is the class name")
    p.add("--lam", 1.0, "lambda, weight of the worst-case risk (paper: 1 to 5); 0 is FLYP")
    p.add("--beta", 0.0, "weight of the df head at inference; 0 is 1 / (1 + lambda)", high=1)
    p.add("--targets", "paper", "p_c: paper is Eq. (9); softmax the direct estimate (ablation "
          "c1); onehot the labels (c3)", choices=["paper", "softmax", "onehot"])
    p.add("--tau", 1.0, "temperature of Eq. (8)'s xi (paper: the model's, 0.01 for OpenAI's)",
          low=1e-6)
    p.add("--erm", "flyp", "empirical risk: FLYP's contrastive loss, or cross-entropy of the df "
          "head", choices=["flyp", "ce"])
    p.add("--alpha", 0.0, "if above 0, also evaluate (1 - alpha) zero-shot + alpha DRM weights of "
          "both towers", high=1)
    p.add("--baseline", False, "also train with lambda = 0 (ERM)")
    args = common.parse(p, "drm", RECIPES, ["descriptions", "prompt", "lam", "beta"])
    args.beta = args.beta or 1 / (1 + args.lam)  # Section 4.3
    if args.prompt.count("{}") != 1:
        raise common.Fail(f"--prompt '{args.prompt}': must hold {{}} once, where the name goes")
    if args.erm == "flyp" and args.batch_size < 2 * args.accum:
        raise common.Fail(f"--accum {args.accum}: leaves the contrastive loss a batch of one image")
    return args


# ------------------------------------- Equations -------------------------------------

def core_targets(affinities, labels, low, high, scale, tau=1.0):
    """Eq. (8), (9): p_c (B, C) of zero-shot affinities A_0 (B, C) = F_0 W_cd^T, labels y_x (B,).

    low, high (C,): extremes of A_0(x, t_y^cd) over the training images labelled y. gamma is 1
    where they are equal (a class with one image). The label has gamma(x, y_x); the rest is split
    by softmax of scale A_0 over the other classes (reconstruction).
    """
    own = F.one_hot(labels, affinities.shape[1]).bool()                # (B, C)
    a = affinities.gather(1, labels[:, None])[:, 0]                    # (B,)
    most = high[labels].double()  # exp(-most / tau) cancels; without it a small tau overflows
    xi, xi_min, xi_max = (((x - most) / tau).exp() for x in (a, low[labels], most))
    gamma = (xi - xi_min) / (xi_max - xi_min)                          # Eq. (8)
    gamma = torch.where(xi_max > xi_min, gamma.clamp(0, 1), 1).to(affinities.dtype)
    others = (scale * affinities).masked_fill(own, -torch.inf).softmax(dim=1)
    return torch.where(own, gamma[:, None], (1 - gamma)[:, None] * others)


def affinity_extremes(features_0, labels, w_cd):
    """low, high (C,) of Eq. (8): extremes of <F_0(x), W_cd[y]> over the images x labelled y.

    features_0 (N, D), labels (N,), w_cd (C, D). Without an image: low = inf, high = -inf.
    """
    a = (features_0 * w_cd[labels]).sum(dim=1)                        # (N,)
    low, high = a.new_full((len(w_cd),), torch.inf), a.new_full((len(w_cd),), -torch.inf)
    return low.scatter_reduce(0, labels, a, "amin"), high.scatter_reduce(0, labels, a, "amax")


def contrastive_loss(features, captions, scale):
    """FLYP's loss, CLIP's own: cross-entropy of s f_i . g_j against i = j, mean of both ways.

    features, captions (B, D): unit rows, the caption of row i is of image i's class. Equal
    captions of other images count as wrong. Source: locuslab/FLYP flyp_loss.py, ClipLoss.
    """
    logits = scale * features @ captions.T                            # (B, B)
    diagonal = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def worst_case_risk(logits_cd, p_c):
    """Eq. (4), (13): -sum_y p_c(y|x) log p_cd(y|x), mean over the batch; both (B, C)."""
    return -(p_c * F.log_softmax(logits_cd, dim=1)).sum(dim=1).mean()


def mixture(logits_df, logits_cd, beta=0.5):
    """Eq. (10), official eval_helper.py: beta p_df + (1 - beta) p_cd, probabilities (B, C)."""
    return beta * torch.softmax(logits_df, dim=1) + (1 - beta) * torch.softmax(logits_cd, dim=1)


# ------------------------------------- Two heads -------------------------------------

class Texts(NamedTuple):
    """The texts of a head."""
    tokens: torch.Tensor  # (P, n), on the CPU like all indices here: a GPU would be waited for
    owner: torch.Tensor   # (P,) class of each text, ascending


def text_head(clip_model, texts, classes):
    """W (U, D) with unit rows for `classes` (U,), ascending.

    The mean of the unit features of a class's texts, normalised. Source: official zeroshot.py,
    which encodes one description a class as it is, without a template; App. C's mean for six.
    """
    chosen = torch.isin(texts.owner, classes)
    tokens, owner = texts.tokens[chosen], texts.owner[chosen]
    # Texts of like length go together: a part is encoded up to its longest text's end only.
    order = tokens.argmax(dim=1).argsort(stable=True)
    parts = tokens[order].split(256)
    features = torch.cat([common.encode_texts(clip_model, part) for part in parts])  # (P, D)
    rows = torch.searchsorted(classes, owner[order])                                 # (P,)
    rows = rows.to(features.device, non_blocking=True)
    total = features.new_zeros(len(classes), features.shape[1]).index_add(0, rows, features)
    return F.normalize(total, dim=1)


class DualPrompts(nn.Module):
    """A CLIP with the texts of its two heads; both towers and s are trained.

    forward(images (B, 3, H, W), classes (U,)) -> f (B, D), W_df of these classes (U, D),
    W_cd (C, D), s (). Without with_cd, W_cd may be None.
    """

    def __init__(self, clip_model, df, cd, classes, amp=None):
        super().__init__()
        self.clip, self.amp = copy.deepcopy(clip_model), amp
        self.df, self.cd, self.all = df, cd, torch.arange(classes)
        self.fixed_heads = None

    def head(self, texts, classes):
        """A head of `classes`, from the text tower as it is."""
        device = self.clip.logit_scale.device.type
        with torch.autocast(device, self.amp, enabled=self.amp is not None):
            return text_head(self.clip, texts, classes)

    def heads(self):
        """W_df, W_cd (C, D), computed once; train() and eval() forget them."""
        if self.fixed_heads is None:
            with torch.no_grad():
                self.fixed_heads = self.head(self.df, self.all), self.head(self.cd, self.all)
        return self.fixed_heads

    def train(self, mode=True):
        self.fixed_heads = None
        return super().train(mode)

    def forward(self, images, classes, with_cd=True):
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            f = self.clip.visual(images)
        f, s = F.normalize(f.float(), dim=-1), self.clip.logit_scale.exp()
        if self.training:
            w_cd = self.head(self.cd, self.all) if with_cd else None
            return f, self.head(self.df, classes), w_cd, s
        w_df, w_cd = self.heads()
        return f, w_df[classes], w_cd, s


# ---------------------------------------- Loss ----------------------------------------

def make_loss(lam, features_0, labels, w_cd_0, s_0, targets="paper", tau=1.0, erm="flyp"):
    """loss_fn(model, batch) -> Eq. (7) and its parts; lam = 0 is FLYP.

    features_0 (N, D): F_0 of the un-augmented training images; labels (N,); both on the CPU;
    w_cd_0 (C, D) and s_0 of theta_0. p_c is made of a batch's rows, since N x C of it would be
    5 GB for ImageNet.
    """
    device, C = w_cd_0.device, len(w_cd_0)
    extremes = affinity_extremes(features_0, labels, w_cd_0.cpu())
    low, high = extremes[0].to(device), extremes[1].to(device)

    def estimate(batch):
        """p_c (B, C)"""
        A_0 = features_0[batch.index].to(device, non_blocking=True) @ w_cd_0.T  # (B, C)
        if targets == "paper":
            return core_targets(A_0, batch.labels, low, high, s_0, tau)
        if targets == "softmax":
            return torch.softmax(s_0 * A_0, dim=1)
        return F.one_hot(batch.labels, C).float()

    def loss_fn(model, batch):
        classes, rows = torch.arange(C), batch.labels
        if erm == "flyp":  # captions of the batch's classes only
            classes, rows = labels[batch.index].unique(return_inverse=True)
            rows = rows.to(device, non_blocking=True)
        f, w_df, w_cd, s = model(batch.images, classes, lam > 0)
        if erm == "flyp":
            risk = contrastive_loss(*whole_batch(f, w_df[rows]), s)   # R(df)
        else:
            risk = F.cross_entropy(s * f @ w_df.T, rows)
        if lam == 0:
            return risk, {"erm": risk, "s": s}
        worst = worst_case_risk(s * f @ w_cd.T, estimate(batch))      # R_c(cd)
        loss = risk + lam * worst                                     # Eq. (7)
        return loss, {"erm": risk, "wrm": worst, "s": s}
    return loss_fn


def whole_batch(features, captions):
    """Both (B, D) with the rows of all ranks, gradients included."""
    if common.WORLD == 1:
        return features, captions
    return gather_features(features, captions, gather_with_grad=True, rank=common.RANK,
                           world_size=common.WORLD)


# ------------------------------------- Inference -------------------------------------

def both_logits(model, images):
    """Eq. (5) before its softmax: logits (B, C) of both heads of a DualPrompts."""
    f, w_df, w_cd, s = model(images, model.all)
    return s * f @ w_df.T, s * f @ w_cd.T


def three_rows(models, beta):
    """rows(images, project) -> {"NAME df", "NAME cd", "NAME mixture": logits} of each model."""
    def rows(images, project):
        found = {}
        for name, model in models.items():
            logits_df, logits_cd = both_logits(model, images)
            df, cd = project(logits_df), project(logits_cd)
            mixed = common.log_probabilities(mixture(df.double(), cd.double(), beta))
            found |= {f"{name} df": df, f"{name} cd": cd, f"{name} mixture": mixed}
        return found
    return rows


# ------------------------------------ Descriptions ------------------------------------

def descriptions(pairs, classnames, aliases, source):
    """A list of texts for each class, from (key, value) pairs in the order of a JSON object.

    A key belongs to the class of that name or second name, exactly or else in any case; of two
    classes of a name (ImageNet has two "missile") to that at the key's own place, or the first
    without a key. Keys that are all indices, and none a name, count the classes. Keys and classes
    that are left at equal places are joined, and said, at most a tenth; then a class without a
    key takes the text of another of its name.
    """
    keys, C, of_class, matches = [common.plain(key) for key, _ in pairs], len(classnames), {}, []
    for any_case in (False, True):
        for ours in (classnames, aliases):
            for c, name in enumerate(ours):
                same = [k for k, key in enumerate(keys) if key == name or
                        any_case and key.casefold() == name.casefold()]
                matches += [(any_case, ours is aliases, k != c, k, c) for k in same]
    if not matches and sorted(keys) == sorted(map(str, range(C))):
        matches = [(k, int(key)) for k, key in enumerate(keys)]
        common.say(f"{source}: keys are indices: 0 {classnames[0]}, ...")
    free = set(range(len(keys)))
    for *_, k, c in sorted(matches):  # the best first
        if k in free and c not in of_class:
            of_class[c] = k
            free.remove(k)
    of_name = {classnames[c]: k for c, k in of_class.items()}
    by_place = [c for c in range(C) if c not in of_class and c in free]
    by_place = by_place if len(by_place) <= 0.1 * C else []
    of_class |= {c: c for c in by_place}
    for c, name in enumerate(classnames):
        if c not in of_class and name in of_name:
            of_class[c] = of_name[name]
    missing = [name for c, name in enumerate(classnames) if c not in of_class]
    unknown = [keys[k] for k in sorted(free - set(by_place))]
    if missing or unknown:
        raise common.Fail(f"{source}: classes without a description: {missing[:5]}, keys that are "
                          f"no class: {unknown[:5]}")
    if by_place:
        joined = ", ".join(f"'{keys[c]}' for '{classnames[c]}'" for c in by_place)
        common.say(f"{source}: joined by their places: {joined}")
    found = []
    for c, name in enumerate(classnames):
        value = pairs[of_class[c]][1]
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise common.Fail(f"{source}: '{name}' has no text or list of texts")
        found.append(texts)
    for texts in dict.fromkeys(map(tuple, found)):
        alike = {name for name, own in zip(classnames, found) if tuple(own) == texts}
        if len(alike) > 1:
            common.say(f"warning: {source}: the cd head cannot tell apart {sorted(alike)}")
    return found


# ---------------------------------------- main ----------------------------------------

def read_texts(args, data):
    """(prompts, descriptions): the texts of both heads, a list for each class."""
    source, pairs = args.descriptions or "descriptions.json", data.descriptions
    if args.descriptions:
        pairs = common.read_json(Path(source), list)  # keys may repeat
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise common.Fail(f"--data {args.data} brings no descriptions: give --descriptions "
                          "FILE.json, an object of class names and texts")
    prompts = [[args.prompt.replace("{}", name)] for name in data.classnames]
    return prompts, descriptions(pairs, data.classnames, data.aliases or data.classnames, source)


def encode(texts, setup):
    """Texts of a list of texts for each class."""
    owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    tokens = common.tokenize(sum(texts, []), setup.tokenizer, setup.clip.context_length)
    return Texts(tokens, owner)


def fine_tune(setup, zero_shot, features_0, lam, out):
    """Train with lambda from theta_0; leaves the df head's model and the cd head in `out`."""
    args, labels = setup.args, setup.data.train.labels
    w_df_0, w_cd_0 = zero_shot.heads()
    loss_fn = make_loss(lam, features_0, labels, w_cd_0, setup.scale, args.targets, args.tau,
                        args.erm)
    beta = args.beta if lam else 1.0  # ERM has the df head alone

    def predicted(model, images):
        return common.log_probabilities(mixture(*both_logits(model, images), beta))
    model = common.train(zero_shot, loss_fn, setup, out, predicted,
                         frozen=("clip.logit_bias",))  # in no loss: ranks would wait for it
    w_df, w_cd = model.heads()
    df = common.ImageClassifier(model.clip.visual, w_df, model.clip.logit_scale.exp().item())
    common.save_run(setup, df, out, head={"head_cd": w_cd, "head_0": w_df_0},
                    text=model.clip.state_dict())
    return model


def average(model_0, model_1, alpha):
    """The model with weights (1 - alpha) theta_0 + alpha theta_1: WiSE-FT after DRM."""
    theta_0, theta, model = model_0.state_dict(), model_1.state_dict(), copy.deepcopy(model_1)
    for name, value in theta.items():
        if value.is_floating_point():
            theta[name] = (1 - alpha) * theta_0[name] + alpha * value
    model.load_state_dict(theta)
    return model.eval()


def of_run(args, amp):
    """(ImageClassifier of the df head, class names, W_cd (C, D)) of the run --finetuned."""
    model, classnames, tensors = common.load_run(Path(args.finetuned), amp)
    if "head_cd" not in tensors:
        raise common.Fail(f"--finetuned {args.finetuned}: not a run of drm.py: it has no cd head")
    return model, classnames, tensors["head_cd"].to(common.DEVICE)


def predict(args):
    """--predict with the mixture of the run --finetuned."""
    model, classnames, w_cd = of_run(args, common.tower_precision(args))

    def probabilities(images):
        logits_df, f = model(images)
        return [mixture(logits_df, model.scale * f @ w_cd.T, args.beta)]
    common.predict(args, model, classnames, probabilities)


def main():
    args = get_args()
    if args.predict:
        return predict(args)
    data = common.load_data(args)
    prompts, described = read_texts(args, data)
    data.texts = prompts + described  # --resume must find them again
    if args.finetuned and common.is_run(Path(args.finetuned)):
        # A run of another method is refused before CLIP is loaded
        of_run(args, common.tower_precision(args))
    setup = common.start(args, data)
    classes = len(data.classnames)
    df, cd = encode(prompts, setup), encode(described, setup)
    zero_shot = DualPrompts(setup.clip, df, cd, classes, setup.amp).eval()
    models = {"zero-shot": zero_shot}
    if args.finetuned:
        tuned = common.load_tuned_clip(setup)
        models["DRM"] = DualPrompts(tuned, df, cd, classes, setup.amp).eval()
    else:
        common.preview(three_rows(models, args.beta), setup)
        # For its features alone; the head is not used
        encoder = common.ImageClassifier(setup.clip.visual, zero_shot.heads()[0], amp=setup.amp)
        features_0 = common.features_of(encoder.eval(), data.train, setup)
        if args.baseline and args.lam:
            models["ERM"] = fine_tune(setup, zero_shot, features_0, 0, setup.out / "erm")
        name = "DRM" if args.lam else "ERM"
        models[name] = fine_tune(setup, zero_shot, features_0, args.lam, setup.out)
    if args.alpha:
        name, tuned = list(models.items())[-1]
        models[f"{name} + WiSE {args.alpha:g}"] = average(zero_shot, tuned, args.alpha)
    common.finish(setup, common.evaluate(three_rows(models, args.beta), setup))


if __name__ == "__main__":
    common.cli(main)
