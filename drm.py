"""DRM: dual risk minimization for robust fine-tuning of zero-shot models (arXiv 2411.19757).

Two text heads on one CLIP: df from default prompts, which elicit the class and all that goes with
it, and cd from concept descriptions of the class's core features. Fine-tune the df head to the
labels (expected risk) while the cd head keeps to a zero-shot estimate of what the core features
tell (worst-case risk).

Equations (f(x), g(t): unit features; A(x, t) = <f(x), g(t)>; theta_0: before fine-tuning)
    Eq. (5)   p(y|x) = softmax_y(A(x, t_y) / tau), tau = 1 / s                      both_logits
    Eq. (4)   R_c = E_x E_{y ~ p_c(y|x)} [-log p_cd(y|x)], soft cross-entropy   worst_case_risk
    Eq. (7)   R(df) + lambda R_c(cd); Eq. (13) writes it out                          make_loss
    Eq. (8)   gamma(x, y) = (xi - min xi) / (max xi - min xi), extremes over the training
              images labelled y; xi(x, y) = exp(A_0(x, t_y^cd) / tau_xi)           core_targets
    Eq. (9)   p_c(y_x|x) = gamma(x, y_x) for the label y_x; others share the rest  core_targets
    Eq. (10)  beta p_df + (1 - beta) p_cd, beta = 1 / (1 + lambda) by default           mixture
    FLYP      R(df): CLIP's symmetric loss of images and captions (5.1)        contrastive_loss
Symbols: s = exp(logit_scale); W_df, W_cd (C, D) heads with unit rows; F_0 (N, D) zero-shot
    features.

The authors published inference code and descriptions, never training code. The objective, both
towers, FLYP's loss, the hyperparameters (Appendix F) and early stopping are the paper's; heads,
mixture, prompts and crops are the released code's; the 500 warm-up steps are FLYP's.
Reconstructions:
    tau_xi    with the model's temperature, gamma is nearly 0 for nearly every image; --tau 1
              spreads it over [0, 1]
    Eq. (9)   the rest, 1 - gamma, is split by softmax over y != y_x of s A_0(x, t_y^cd)
    captions  of FLYP's loss: each image has the default prompt of its class (FLYP: one of all
              templates at random)

Deviations
    1. From the paper's text (resize, centre crop), with the released transform: images are
       cropped at random (RandomResizedCrop 0.9-1).
    2. From FLYP: token embeddings that no text uses are not trained; there weight decay shrinks
       them.
    3. The contrastive batch is that of all ranks, but with --accum it is one part of the step.
    4. p_c is that of the un-augmented training images, whose features F_0 are computed once.
    5. Early stopping chooses among the ends of epochs, by the mixture's accuracy on held-out
       images: 2% of ImageNet's and DomainNet's training images, 10% of CIFAR-10's and of a folder
       without val/. iWildCam is measured by macro-F1; accuracy chooses.
    6. lambda is 1, not chosen from 1 to 5 by validation. --alpha is the weight of the fine-tuned
       model, 1 - rho, and not chosen by validation.
    7. A text that is longer than the context is refused; the released code cuts it, end token
       included.
       Descriptions are joined by name where names are unique, by position else; the code always
       joins by position.
    8. --no-tune-text trains the image tower alone, with s and both heads frozen.
    9. --print-prompt asks for what App. C asks, in other words. WRM alone (ablation d3) is absent.
   10. --data shapes, folder and the sets marked in RECIPES have recipes of their own.

Usage
    python drm.py                                               # the embedded data
    python drm.py --lam 0                                       # FLYP
    python drm.py --data folder --data-dir MY_IMAGES --descriptions MINE.json
    python drm.py --data folder --data-dir MY_IMAGES --print-prompt     # ask any LLM for them
    python drm.py --data imagenet --descriptions DRM/prompts/imagenet_cd.json  # the authors'
    python drm.py --finetuned runs/drm-shapes-s0 --predict MY_IMAGES    # class, probability
Expected result: README.md, "Results"; the authors' ViT-B/16 checkpoints (not run by us), beta 0.5:
    ImageNet 82.05, V2 73.43, R 77.82, A 53.53, Sketch 52.48; iWildCam macro-F1 .5353 ID / .4049
    OOD; FMoW .6857 ID / .4566 worst region OOD.
"""
import argparse
import copy
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import nn

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(epochs=10, batch_size=256, lr=1e-5, wd=0.1, warmup=500, grad_clip=0.0,
             augment="crop", keep="best", prompt="a photo of a {}.",  # Appendix F; FLYP's warm-up
             baseline=False)
RECIPES = {
    "shapes": dict(PAPER, model="shapes-clip", batch_size=64, lr=6e-4, warmup=0.1,
                   augment="none", prompt="a photo of a {}", baseline=True),
    "folder": dict(PAPER, batch_size=64, warmup=0.1),
    "imagenet": dict(PAPER, prompt="a good photo of the {}.", holdout=0.02),
    "iwildcam": dict(PAPER, prompt="a photo of {}.", epochs=20, wd=0.2),
    "fmow": dict(PAPER, prompt="satellite photo of a {}.", epochs=20, wd=0.2),
    "domainnet": dict(PAPER, holdout=0.02),  # this and the next are not in the paper
    "cifar10": PAPER,
}


def get_args():
    switch = argparse.BooleanOptionalAction
    p = common.parser(__doc__)
    p.add("--descriptions", "none", "JSON: {class: text}, {index: text} or {class: [texts]}; "
          "shapes brings its own")
    p.add("--prompt", common.RECIPE, "default prompt, {} is the class name")
    p.add("--lam", 1.0, "lambda, weight of the worst-case risk (paper: 1 to 5); 0 is FLYP",
          type=common.limited(low=0))
    p.add("--beta", None, "weight of the df head at inference; None is 1 / (1 + lambda)",
          type=common.limited(low=0, high=1))
    p.add("--targets", "paper", "p_c: paper is Eq. (9); softmax the direct estimate (ablation "
          "c1); onehot the labels (c3)", choices=["paper", "softmax", "onehot"])
    p.add("--tau", 1.0, "tau_xi of Eq. (8), a reconstruction", type=common.limited(above=0))
    p.add("--erm", "flyp", "expected risk: FLYP's contrastive loss, or cross-entropy of the df "
          "head (Table 11, row 2)", choices=["flyp", "ce"])
    p.add("--tune-text", True, "train the text tower and the temperature too, as the paper",
          action=switch)
    p.add("--alpha", 0.0, "if above 0, also evaluate (1 - alpha) zero-shot + alpha DRM weights of "
          "both towers", type=common.limited(low=0, high=1))
    p.add("--baseline", common.RECIPE, "also train with lambda = 0 (ERM)", action=switch)
    p.add("--print-prompt", False, "print a request for descriptions, to give to an LLM, and end",
          action=switch)
    args = common.parse(p, "drm", RECIPES, inherit=["descriptions", "prompt", "lam", "beta"])
    if args.beta is None:
        args.beta = 1 / (1 + args.lam)  # Section 4.3
    return args


# ------------------------------------- Equations -------------------------------------

def core_targets(affinities, labels, low, high, scale, tau=1.0):
    """Eq. (8), (9): p_c (B, C) of zero-shot affinities A_0 (B, C) = F_0 W_cd^T, labels y_x (B,).

    low, high (C,): extremes of A_0(x, t_y^cd) over the training images labelled y; gamma is 1
    where they are equal (a class with one image). The label has gamma(x, y_x); the rest is split
    by softmax of scale A_0 over the other classes (reconstruction, as is tau = 1).

    With a = A_0 of the label, in [low, high], exp(a / tau) would overflow at a small tau. Equal,
    and with no exponent above 0:
        gamma = e^((a - high)/tau) (1 - e^((low - a)/tau)) / (1 - e^((low - high)/tau))
    """
    low, high = low[labels], high[labels]                             # (B,)
    a = affinities.gather(1, labels[:, None])[:, 0].clamp(low, high)  # (B,)
    gamma = torch.expm1((low - a) / tau) / torch.expm1((low - high) / tau)
    gamma = torch.where(high > low, ((a - high) / tau).exp() * gamma, 1.0)
    own = F.one_hot(labels, affinities.shape[1]).bool()               # (B, C)
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
    which encodes the descriptions as they are, without a template.
    """
    tokens, owner = (values[torch.isin(texts.owner, classes)] for values in texts)
    # Texts of like length go together: a part is encoded up to its longest text's end only.
    order = tokens.argmax(dim=1).argsort(stable=True)
    parts = tokens[order].split(256)
    features = torch.cat([common.encode_texts(clip_model, part) for part in parts])  # (P, D)
    rows = common.moved(torch.searchsorted(classes, owner[order]), features.device)  # (P,)
    total = features.new_zeros(len(classes), features.shape[1]).index_add(0, rows, features)
    return F.normalize(total, dim=1)


class DualPrompts(nn.Module):
    """A CLIP with the texts of its two heads.

    Both towers and s are trained, or (tune_text=False) the image tower alone.
    forward(images (B, 3, H, W), classes (U,)) -> f (B, D), W_df of these classes (U, D),
    W_cd (C, D), s (). Without with_cd, W_cd may be None.
    """

    def __init__(self, clip_model, df, cd, classes, tune_text=True, amp=None):
        super().__init__()
        self.clip, self.amp, self.tune_text = copy.deepcopy(clip_model), amp, tune_text
        self.all = torch.arange(classes)
        both = torch.cat([df.tokens.flatten(), cd.tokens.flatten()])
        self.used, rows = common.shrink_vocabulary(self.clip, both)
        split = df.tokens.numel()
        self.df = Texts(rows[:split].view_as(df.tokens), df.owner)
        self.cd = Texts(rows[split:].view_as(cd.tokens), cd.owner)
        for name, parameter in self.clip.named_parameters():
            text = tune_text and name != "logit_bias"  # SigLIP's, which no loss here uses
            parameter.requires_grad_(text or name.startswith("visual."))
        self.fixed_heads = None

    def head(self, texts, classes):
        """A head of `classes`, from the text tower as it is."""
        device = self.clip.logit_scale.device.type
        with torch.autocast(device, self.amp, enabled=self.amp is not None):
            return text_head(self.clip, texts, classes)

    def heads(self):
        """W_df, W_cd (C, D), computed once while the text tower does not change."""
        if self.fixed_heads is None:
            with torch.no_grad():
                self.fixed_heads = self.head(self.df, self.all), self.head(self.cd, self.all)
        return self.fixed_heads

    def train(self, mode=True):
        if self.tune_text:
            self.fixed_heads = None
        return super().train(mode)

    def forward(self, images, classes, with_cd=True):
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            f = self.clip.visual(images)
        f, s = F.normalize(f.float(), dim=-1), self.clip.logit_scale.exp()
        if self.training and self.tune_text:
            w_cd = self.head(self.cd, self.all) if with_cd else None
            return f, self.head(self.df, classes), w_cd, s
        w_df, w_cd = self.heads()
        return f, w_df[common.moved(classes, f.device)], w_cd, s

    def full_state(self, whole):
        """State dict by open_clip's names; token embeddings not in use are those of `whole`."""
        state = self.clip.state_dict()
        name = next(key for key in state if key.endswith("token_embedding.weight"))
        state[name] = whole[name].index_copy(0, self.used.to(state[name].device), state[name])
        return state


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
        A_0 = common.moved(features_0[batch.index], device) @ w_cd_0.T  # (B, C)
        if targets == "paper":
            return core_targets(A_0, batch.labels, low, high, s_0, tau)
        if targets == "softmax":
            return torch.softmax(s_0 * A_0, dim=1)
        return F.one_hot(batch.labels, C).float()

    def loss_fn(model, batch):
        classes, rows = torch.arange(C), batch.labels
        if erm == "flyp":  # captions of the batch's classes only
            classes, rows = labels[batch.index].unique(return_inverse=True)
            rows = common.moved(rows, device)
        f, w_df, w_cd, s = model(batch.images, classes, lam > 0)
        if erm == "flyp":
            risk = contrastive_loss(*whole_batch(f, w_df[rows]), s)   # R(df)
        else:
            risk = F.cross_entropy(s * f @ w_df.T, rows)
        if lam == 0:
            return risk, {"erm": risk}
        worst = worst_case_risk(s * f @ w_cd.T, estimate(batch))      # R_c(cd)
        loss = risk + lam * worst                                     # Eq. (7)
        return loss, {"erm": risk, "wrm": worst}
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
            mixed = common.log_mixture(df, cd, beta)
            found |= {f"{name} df": df, f"{name} cd": cd, f"{name} mixture": mixed}
        return found
    return rows


def predict(args):
    """--predict with the mixture of the run --finetuned."""
    run = Path(args.finetuned)
    device, amp = common.compute_device(args)
    saved = common.load_saved(run, device, amp)
    w_cd = cd_head(run, saved.tensors).to(device)
    beta = common.read_json(run / "args.json", "a finished run")["beta"]

    def probabilities(images):
        logits_df, f = saved.model(images)
        return [mixture(logits_df, saved.model.scale * f @ w_cd.T, beta)]
    common.predict_folder(args, saved, device, probabilities)


def cd_head(run, tensors):
    if "head_cd" not in tensors:
        raise common.Fail(f"--finetuned {run}: not a run of drm.py, its head has no cd part")
    return tensors["head_cd"]


# ------------------------------------ Descriptions ------------------------------------

REQUEST = """For each class below, describe in one sentence what makes it recognisable in any
image: its shape, parts, texture and colours that belong to the thing itself.
Leave out the class name, and all that may surround it: background, place, weather, season,
other objects, style of the picture. At most 50 words each. Answer with one JSON object whose keys
are exactly these class names and whose values are the descriptions, and nothing else.

"""


def descriptions(pairs, classnames, source, other_names=None):
    """A list of texts for each class, from any of the released shapes.

    pairs: (key, value) of the file, in its order: {index: text}, or {name: text or [texts]}
    joined by name in any case. ImageNet has two classes "missile" and two "sunglasses", iWildCam
    178 English names for 182 classes: where names are not unique the join is by position, each
    key being the class's name or its other name (iWildCam's Latin ones), and keys that differ
    are printed.
    """
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise common.Fail(f"{source}: expected a JSON object of class names or indices with a "
                          "text or a list of texts")
    C, names = len(classnames), [name.lower() for name in classnames]
    if len(pairs) != C:
        raise common.Fail(f"{source}: {len(pairs)} descriptions for {C} classes")
    keys, values = [key.lower() for key, _ in pairs], [value for _, value in pairs]
    by_key = dict(zip(keys, values))
    indices = [str(i) for i in range(C)]
    if sorted(keys) == sorted(indices) != sorted(names):  # names that are numbers are still names
        values = [by_key[i] for i in indices]
    elif len(set(names)) == C and len(by_key) == C:
        for name in names:
            if name not in by_key:
                raise common.Fail(f"{source}: no description of class '{name}'")
        values = [by_key[name] for name in names]
    else:
        others = [name.lower() for name in other_names or classnames]
        differ = [f"'{key}' for '{name}'" for key, name, other in zip(keys, names, others)
                  if key not in (name, other)]
        if len(differ) > 0.1 * C:
            raise common.Fail(f"{source}: class names are not unique, so descriptions are joined "
                              f"by position, but {len(differ)} of {C} keys are not the class at "
                              f"their position ({differ[0]})")
        common.say(f"{source}: joined by position; keys that differ: "
                   f"{', '.join(differ) or 'none'}")
    texts = [value if isinstance(value, list) else [value] for value in values]
    for name, own in zip(classnames, texts):
        if not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise common.Fail(f"{source}: the description of class '{name}' is not a text or a "
                              "list of texts")
    return texts


def read_descriptions(args, data):
    """descriptions() from --descriptions, or those that the data set brings."""
    pairs, source = data.descriptions, "descriptions.json"
    if args.descriptions != "none":
        source = Path(args.descriptions)
        pairs = common.read_json(source, "a description file", pairs=True)
    if pairs is None:
        raise common.Fail(f"--data {args.data} brings no descriptions: give --descriptions "
                          "FILE.json; --print-prompt prints a request with which an LLM can write "
                          "them")
    return descriptions(pairs, data.classnames, source, data.other_names), source


def tokenize(texts, tokenizer, context, source):
    """Texts of a list of texts for each class; a text that is too long is refused."""
    flat, owner = [], []
    for c, own in enumerate(texts):
        flat += own
        owner += [c] * len(own)
    longer = tokenizer(flat, context_length=context + 1)
    pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", 0)
    for text, last in zip(flat, longer[:, context].tolist()):
        if last != pad:
            raise common.Fail(f"{source}: longer than the {context} tokens of the text tower: "
                              f"'{text[:60]}...'")
    return Texts(tokenizer(flat, context_length=context), torch.tensor(owner))


# ---------------------------------------- main ----------------------------------------

def read_texts(setup):
    """Texts of both heads: default prompts and concept descriptions."""
    prompts = [[setup.args.prompt.replace("{}", name)] for name in setup.data.classnames]
    described, source = read_descriptions(setup.args, setup.data)
    found = []
    for texts, where in ((prompts, "--prompt"), (described, source)):
        found.append(tokenize(texts, setup.tokenizer, setup.clip.context_length, where))
    return found


def fine_tune(setup, zero_shot, features_0, lam, out):
    """Train with lambda from theta_0; leaves the df head's model and the cd head in `out`."""
    args, labels = setup.args, setup.data.train.labels
    w_df_0, w_cd_0 = zero_shot.heads()
    loss_fn = make_loss(lam, features_0, labels, w_cd_0, setup.scale, args.targets, args.tau,
                        args.erm)
    beta = args.beta if lam else 1.0  # ERM has the df head alone

    def predicted(model, images):
        return common.log_mixture(*both_logits(model, images), beta)
    model = setup.fit(copy.deepcopy(zero_shot), loss_fn, out, predicted)
    w_df, w_cd = model.heads()
    df = common.ImageClassifier(model.clip.visual, w_df, model.clip.logit_scale.exp().item())
    state = model.full_state(setup.clip.state_dict())
    text = {name: value for name, value in state.items() if not name.startswith("visual.")}
    common.save_run(setup, df, out, head={"head_cd": w_cd, "head_0": w_df_0}, text=text)
    return model


def load_tuned(setup, df, cd):
    """The DualPrompts of --finetuned: a run of drm.py, or a CLIP that was tuned elsewhere."""
    path = Path(setup.args.finetuned)
    if (path / "head.safetensors").is_file():
        cd_head(path, common.load_tensors(path / "head.safetensors")[0])
    tuned = copy.deepcopy(setup.clip)
    common.load_weights(tuned, common.finetuned_weights(setup), setup.args)
    classes = len(setup.data.classnames)
    return DualPrompts(tuned, df, cd, classes, setup.args.tune_text, setup.amp).eval()


def main():
    args = get_args()
    if args.predict != "none":
        return predict(args)
    if args.prompt.count("{}") != 1:
        raise common.Fail(f"--prompt '{args.prompt}': must hold {{}} once, where the class name "
                          "goes")
    if args.print_prompt:
        names = common.load_data(args).classnames
        return print(REQUEST + json.dumps(names, indent=1, ensure_ascii=False))
    setup = common.start(args)
    if args.keep == "best" and args.finetuned == "none" and not len(setup.data.val):
        raise common.Fail("--keep best: no held-out images to stop early on; raise --holdout, or "
                          "pass --keep last")
    df, cd = read_texts(setup)
    classes = len(setup.data.classnames)
    zero_shot = DualPrompts(setup.clip, df, cd, classes, args.tune_text, setup.amp).eval()
    models = {"zero-shot": zero_shot}
    if args.finetuned != "none":
        models["DRM"] = load_tuned(setup, df, cd)
        setup.out = common.run_folder(args)
    else:
        setup.out = common.run_folder(args)
        common.evaluate_first(three_rows(models, args.beta), setup)
        encoder = setup.classifier(head=zero_shot.heads()[0])
        features_0 = common.features_once(encoder, setup.data.train, setup, setup.out)
        if args.baseline and args.lam:
            models["ERM"] = fine_tune(setup, zero_shot, features_0, 0, setup.out / "erm")
        name = "DRM" if args.lam else "ERM"
        models[name] = fine_tune(setup, zero_shot, features_0, args.lam, setup.out)
    if args.alpha:
        name, tuned = list(models.items())[-1]
        average = common.average(zero_shot, tuned, args.alpha)
        models[f"{name} + WiSE {args.alpha:g}"] = average
    results = common.evaluate(three_rows(models, args.beta), setup)
    common.plot_plane(common.plane(results, setup.measure), setup)
    common.finish(setup, results)


if __name__ == "__main__":
    common.cli(main)
