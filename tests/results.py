"""All four methods on one data set over several seeds: the README's tables and figure.

    python tests/results.py                                      # runs on shapes, five seeds
    python tests/results.py --data folder --data-dir MY_IMAGES   # the same on your own images
    python tests/results.py --from tests/results.json            # print committed scores
Runs go to --out; finished ones are resumed, which checks flags and data and trains nothing. --json
FILE keeps the scores. Other flags go to every script.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

LAMBDAS = [2, 3, 5]  # of DRM, beside its default 1
UNIT, FOLDED, WISE = "fine-tuned (unit head)", "fine-tuned (folded head)", "WiSE-FT 0.5"
OSE, WSE = "OSE, held-out alpha", "WSE, held-out alpha"
MAIN = ["zero-shot", UNIT, "Lipsum-FT", "Lipsum-FT + WiSE 0.5", FOLDED, WISE, WSE, OSE, "VRF",
        "VRF on Lipsum-FT", "zero-shot cd", "ERM df", "ERM mixture", "DRM df", "DRM cd",
        "DRM mixture", "DRM + WiSE 0.5 mixture"]
PLANE = ["zero-shot", UNIT, "Lipsum-FT", "Lipsum-FT + WiSE 0.5", FOLDED, WISE, "VRF",
         "VRF on Lipsum-FT", "ERM df", "DRM mixture", "DRM + WiSE 0.5 mixture"]


def run(out, script, *flags):
    """results.json of a run in `out`; None without descriptions."""
    goes_on = ["--resume", out] if (out / "args.json").exists() else ["--out", out]
    command = [str(word) for word in (sys.executable, ROOT / script, *flags, *goes_on)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "brings no descriptions" in done.stderr:
        print("no descriptions.json in the data: DRM is left out", file=sys.stderr)
        return None
    if done.returncode:
        sys.exit(f"{out}: {done.stderr}")
    print(f"{out.name}: done", file=sys.stderr, flush=True)
    return json.loads((out / "results.json").read_text())


def compare(seed, out, flags):
    """{row: {test: metrics}} of all methods with one seed, and what was chosen."""
    flags = [*flags, "--seed", seed]
    lipsum = run(out / f"lipsum-{seed}", "lipsum_ft.py", *flags, "--baseline")
    between = run(out / f"lipsum-{seed}-wise", "wise_ft.py", "--finetuned", out / f"lipsum-{seed}",
                  "--alphas", 0.5)
    wise = run(out / f"wise-{seed}", "wise_ft.py", *flags, "--select")
    vrf = run(out / f"vrf-{seed}", "vrf.py", "--finetuned", out / f"wise-{seed}" / "fine-tuned")
    both = run(out / f"vrf-lipsum-{seed}", "vrf.py", "--finetuned", out / f"lipsum-{seed}")
    drm = {"DRM": run(out / f"drm-{seed}", "drm.py", *flags, "--alpha", 0.5, "--baseline")}
    if drm["DRM"]:
        flags.append("--no-baseline")
        for lam in LAMBDAS:
            more = ["drm.py", *flags, "--lam", lam]
            drm[f"DRM lambda {lam}"] = run(out / f"drm-{seed}-lam{lam}", *more)
            half = run(out / f"drm-{seed}-lam{lam}-half", *more, "--beta", 0.5)
            drm[f"DRM lambda {lam}, beta 0.5,"] = half
        for kind in ("softmax", "onehot"):
            path = out / f"drm-{seed}-{kind}"
            drm[f"DRM {kind}"] = run(path, "drm.py", *flags, "--targets", kind)

    rows = {}  # of rows that several runs have, the first counts
    for results, names in ((lipsum, {"fine-tuned": UNIT}), (wise, {"fine-tuned": FOLDED}),
                           (vrf, {"fine-tuned": FOLDED, "OSE": OSE, "WSE": WSE})):
        for row in results["rows"]:
            rows.setdefault(names.get(row["name"], row["name"]), row)
    rows["Lipsum-FT + WiSE 0.5"] = between["rows"][1]
    rows["VRF on Lipsum-FT"] = both["rows"][-1]
    for name, results in drm.items():
        for row in results["rows"] if results else []:
            rows.setdefault(row["name"].replace("DRM", name), row)
    scores = {}
    for name, row in rows.items():
        scores[name] = {test: numbers(values) for test, values in row["tests"].items()}
    return {"measure": wise["measure"], "rows": scores, "wise_alpha": wise["saved_alpha"],
            "ose_curve": vrf["OSE"], "vrf": vrf["vrf"]}


def numbers(values):
    return {key: round(x, 4) for key, x in values.items() if isinstance(x, (int, float))}


class Table:
    """Means and deviations over seeds: mean[row][column], deviation[row][column]."""
    shown = ["ID", "OOD", "NLL", "NLL OOD", "ECE", "ECE OOD"]

    def __init__(self, runs):
        self.measure, self.seeds = runs[0]["measure"], len(runs)
        self.mean, self.deviation = {}, {}
        for name in runs[0]["rows"]:
            cells = [self.cells(run["rows"][name]) for run in runs]
            self.mean[name], self.deviation[name] = {}, {}
            for column in cells[0]:
                values = [cell[column] for cell in cells]
                self.mean[name][column] = np.mean(values)
                self.deviation[name][column] = np.std(values, ddof=len(runs) > 1)

    def cells(self, tests):
        """{column: value}"""
        found = {}
        for title, metric in (("", None), ("NLL", "nll"), ("ECE", "ece")):
            measure = dict.fromkeys(self.measure, metric) if metric else self.measure
            found[title or "ID"], found[f"{title} OOD".strip()] = common.id_ood(tests, measure)
        return found

    def lines(self):
        yield "| | " + " | ".join(self.shown) + " |"
        yield "|---" + "|---" * len(self.shown) + "|"
        for name in MAIN:
            if name in self.mean:
                mean, deviation = self.mean[name], self.deviation[name]
                cells = [f"{mean[key]:.1f}" + f" ± {deviation[key]:.1f}" * (self.seeds > 1)
                         for key in ("ID", "OOD")]
                cells += [f"{mean[key]:.2f}" for key in ("NLL", "NLL OOD")]
                cells += [f"{mean[key]:.1f}" for key in ("ECE", "ECE OOD")]
                yield f"| {name} | " + " | ".join(cells) + " |"


def differences(table, runs):
    """Lines: what each method gains, in points."""
    ID = {name: row["ID"] for name, row in table.mean.items()}
    OOD = {name: row["OOD"] for name, row in table.mean.items()}

    def kept(name, end):
        gain = ID[end] - ID["zero-shot"]
        share = f"{100 * (ID[name] - ID['zero-shot']) / gain:.0f}%" if gain else "nothing"
        return f"{share} of the ID gain"

    def gain(name, other):
        return f"ID {ID[name] - ID[other]:+.1f}, OOD {OOD[name] - OOD[other]:+.1f}"
    yield f"\n- fine-tuning (unit head) against zero-shot: {gain(UNIT, 'zero-shot')}"
    yield (f"- Lipsum-FT keeps {kept('Lipsum-FT', UNIT)}; against fine-tuning: "
           f"{gain('Lipsum-FT', UNIT)}; against zero-shot: {gain('Lipsum-FT', 'zero-shot')}")
    best = max("zero-shot", FOLDED, key=OOD.get)
    yield (f"- {WISE} keeps {kept(WISE, FOLDED)}; against fine-tuning: {gain(WISE, FOLDED)}. "
           f"Against the end that is better on the shifts: OOD {OOD[WISE] - OOD[best]:+.1f}; "
           f"--select chose {[run['wise_alpha'] for run in runs]}")
    points = [np.mean([run["ose_curve"][alpha] for run in runs], axis=0)
              for alpha in runs[0]["ose_curve"]]
    rivals = [ood for in_distribution, ood in points if in_distribution >= ID["VRF"]]
    against = f"OOD {OOD['VRF'] - max(rivals):+.1f}" if rivals else "no OSE has its ID"
    yield (f"- VRF against OSE with held-out alpha: {gain('VRF', OSE)}. Against the best OSE of "
           f"equal or better ID: {against}; against the best OSE on the shifts: OOD "
           f"{OOD['VRF'] - max(ood for _, ood in points):+.1f}")
    if "DRM mixture" in ID:
        yield (f"- DRM mixture against the ERM (FLYP) df head: {gain('DRM mixture', 'ERM df')}; "
               f"DRM df against cd: {gain('DRM df', 'DRM cd')}; mixture against df: "
               f"{gain('DRM mixture', 'DRM df')}")
        for beta, words in ((", beta 0.5,", "beta 0.5"), ("", "beta 1 / (1 + lambda)")):
            lambdas = ["DRM mixture", *(f"DRM lambda {lam}{beta} mixture" for lam in LAMBDAS)]
            values = [f"{ID[name]:.1f} / {OOD[name]:.1f}" for name in lambdas]
            yield f"- DRM mixture at lambda 1, 2, 3, 5 and {words}: {', '.join(values)}"
        values = [f"{ID[name]:.1f} / {OOD[name]:.1f}" for name in
                  ("DRM mixture", "DRM softmax mixture", "DRM onehot mixture")]
        yield f"- DRM mixture with --targets paper, softmax, onehot: {', '.join(values)}"


def show(experiment, plane=None):
    runs = list(experiment["runs"].values())
    table = Table(runs)
    print(*table.lines(), *differences(table, runs), sep="\n")
    if plane:
        draw(table, runs, plane)


def draw(table, runs, path):
    def point(name):
        return table.mean[name]["ID"], table.mean[name]["OOD"]
    wise = [name for name in table.mean if name.startswith("WiSE-FT")]
    ose = {alpha: np.mean([run["ose_curve"][alpha] for run in runs], axis=0)
           for alpha in runs[0]["ose_curve"]}
    line = {name.split()[-1]: point(name) for name in ("zero-shot", *wise, FOLDED)}
    common.plot_plane({name: point(name) for name in PLANE if name in table.mean},
                      {"OSE, alpha": ose, "WiSE-FT, alpha": line}, table.measure, path)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--out", type=Path, default=Path("runs/results"))
    p.add_argument("--json", type=Path, help="file to which the scores are added")
    p.add_argument("--plane", type=Path, help="PNG of the figure")
    p.add_argument("--from", type=Path, dest="scores", help="scores to print, nothing is run")
    args, flags = p.parse_known_args()
    if args.scores:
        for name, experiment in json.loads(args.scores.read_text()).items():
            print(f"\n## {name}\n")
            show(experiment, args.plane)
            args.plane = None  # of the first
        return
    runs = {str(seed): compare(seed, args.out, flags) for seed in args.seeds}
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        known[" ".join(flags) or "shapes"] = {"runs": runs}
        text = json.dumps(known, separators=(",", ":")).replace('},"', '},\n"')
        args.json.write_text(text + "\n")
    show({"runs": runs}, args.plane or args.out / "plane.png")


if __name__ == "__main__":
    main()
