"""All four methods on one data set over several seeds: the README's tables and figure.

    python tests/results.py                                        # runs on shapes, five seeds
    python tests/results.py --data folder --data-dir MY_IMAGES     # the same comparison on your own images
    python tests/results.py --from tests/results.json              # print the tables of the committed scores, run nothing
Runs go to --out; finished ones are not run again. --json FILE keeps the scores. Other flags go to every script.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

LAMBDAS = [2, 3, 5]  # of DRM, beside its default 1
MAIN = ["zero-shot", "fine-tuned (unit head)", "Lipsum-FT", "Lipsum-FT + WiSE 0.5", "fine-tuned (folded head)", "WiSE-FT 0.5",
        "WSE, held-out alpha", "OSE, held-out alpha", "VRF", "VRF on Lipsum-FT", "zero-shot cd", "ERM df", "ERM mixture",
        "DRM df", "DRM cd", "DRM mixture", "DRM + WiSE 0.5 mixture"]


def run(out, script, *flags):
    """results.json of a run, which is made, resumed or found in `out`; None if the data has no descriptions."""
    if not (out / "results.json").exists():
        again = ["--resume", out] if (out / "args.json").exists() else [*flags, "--out", out]
        command = [sys.executable, ROOT / script, *again]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if "brings no descriptions" in done.stderr:
            print("no descriptions.json in the data: DRM is left out", file=sys.stderr)
            return None
        if done.returncode:
            sys.exit(f"{out.name}: {done.stderr}")
        print(f"{out.name}: done", file=sys.stderr, flush=True)
    return json.loads((out / "results.json").read_text())


def compare(seed, out, flags):
    """{row: {test: metrics}} of all methods with one seed, and what was chosen."""
    flags = [*flags, "--seed", seed]
    lipsum = run(out / f"lipsum-{seed}", "lipsum_ft.py", *flags, "--alpha", 0.5, "--baseline")
    wise = run(out / f"wise-{seed}", "wise_ft.py", *flags, "--select")
    vrf = run(out / f"vrf-{seed}", "vrf.py", "--finetuned", out / f"wise-{seed}" / "fine-tuned")
    both = run(out / f"vrf-lipsum-{seed}", "vrf.py", "--finetuned", out / f"lipsum-{seed}")
    drm = {"": run(out / f"drm-{seed}", "drm.py", *flags, "--alpha", 0.5, "--baseline")}
    if drm[""]:
        for lam in LAMBDAS:
            drm[f" lambda {lam}"] = run(out / f"drm-{seed}-lam{lam}", "drm.py", *flags, "--lam", lam, "--no-baseline")
        for kind in ("softmax", "onehot"):
            drm[f" {kind}"] = run(out / f"drm-{seed}-{kind}", "drm.py", *flags, "--targets", kind, "--no-baseline")

    names = {"fine-tuned": "fine-tuned (unit head)"}
    rows = {names.get(row["name"], row["name"]): row for row in lipsum["rows"]}
    for row in wise["rows"]:
        rows.setdefault({"fine-tuned": "fine-tuned (folded head)"}.get(row["name"], row["name"]), row)
    for row in vrf["rows"][2:]:
        rows[{"OSE": "OSE, held-out alpha", "WSE": "WSE, held-out alpha"}.get(row["name"], row["name"])] = row
    rows["VRF on Lipsum-FT"] = both["rows"][-1]
    for suffix, found in drm.items():
        for row in found["rows"] if found else []:
            rows.setdefault(row["name"].replace("DRM", f"DRM{suffix}"), row)
    chosen = {"wise_alpha": wise["saved_alpha"], "ose_curve": vrf["ose_curve"], "vrf": vrf["vrf"]}
    scores = {name: {test: shorter(values) for test, values in row["tests"].items()} for name, row in rows.items()}
    return {"measure": wise["measure"], "rows": scores, **chosen}


def shorter(values):
    return {key: round(value, 4) for key, value in values.items()}


class Table:
    """Means and deviations over seeds: mean[row][column], deviation[row][column]."""

    def __init__(self, runs):
        self.measure = runs[0]["measure"]
        id_test, *self.shifts = self.measure
        self.columns = ["ID", "OOD", *self.shifts, "NLL", "NLL OOD", "ECE", "ECE OOD"]
        self.mean, self.deviation = {}, {}
        for name in runs[0]["rows"]:
            values = np.array([self.cells(run["rows"][name]) for run in runs])
            self.mean[name] = dict(zip(self.columns, values.mean(0)))
            self.deviation[name] = dict(zip(self.columns, values.std(0, ddof=len(runs) > 1)))

    def cells(self, tests):
        found = list(common.id_ood(tests, self.measure)) + [tests[shift][self.measure[shift]] for shift in self.shifts]
        for metric in ("nll", "ece"):
            found += common.id_ood(tests, dict.fromkeys(self.measure, metric))
        return [np.nan if value is None else value for value in found]

    def lines(self):
        yield "| | " + " | ".join(self.columns) + " |"
        yield "|---" + "|---" * len(self.columns) + "|"
        for name in MAIN:
            if name in self.mean:
                cells = []
                for column in self.columns:
                    digits = 2 if column.startswith("NLL") else 1
                    cells.append(f"{self.mean[name][column]:.{digits}f} ± {self.deviation[name][column]:.{digits}f}")
                yield f"| {name} | " + " | ".join(cells) + " |"
        others = [f"{name} {row['ID']:.1f} / {row['OOD']:.1f}" for name, row in self.mean.items() if name not in MAIN]
        yield f"\nID / OOD of the other rows: {'; '.join(others)}."


def differences(table, runs, seeds):
    """Lines: what each method gains, in points."""
    ID, OOD = ({name: row[key] for name, row in table.mean.items()} for key in ("ID", "OOD"))
    unit, folded, wise = "fine-tuned (unit head)", "fine-tuned (folded head)", "WiSE-FT 0.5"

    def kept(name, end):
        return 100 * (ID[name] - ID["zero-shot"]) / (ID[end] - ID["zero-shot"])
    yield f"\nSeeds {seeds}. Differences in points:"
    yield f"- fine-tuning (unit head): ID {ID[unit] - ID['zero-shot']:+.1f}, OOD {OOD[unit] - OOD['zero-shot']:+.1f} against zero-shot"
    yield f"- Lipsum-FT: keeps {kept('Lipsum-FT', unit):.0f}% of the ID gain, OOD {OOD['Lipsum-FT'] - OOD[unit]:+.1f} against fine-tuning"
    yield (f"- {wise}: OOD {OOD[wise] - max(OOD['zero-shot'], OOD[folded]):+.1f} against the better end, "
           f"{kept(wise, folded):.0f}% of the ID gain; --select chose {[run['wise_alpha'] for run in runs]}")
    curve = {alpha: np.mean([run["ose_curve"][alpha] for run in runs], axis=0) for alpha in runs[0]["ose_curve"]}
    rivals = [point[1] for point in curve.values() if point[0] >= ID["VRF"]]
    against = f"{OOD['VRF'] - max(rivals):+.1f} against the best OSE of equal or better ID" if rivals else "no OSE has its ID"
    ose = "OSE, held-out alpha"
    yield (f"- VRF: OOD {against}, {OOD['VRF'] - OOD[ose]:+.1f} against OSE with held-out alpha (ID {ID['VRF'] - ID[ose]:+.1f}); "
           f"k {[run['vrf']['k'] for run in runs]}, |V| {[run['vrf']['failures'] for run in runs]}")
    if "DRM mixture" in ID:
        yield (f"- DRM mixture against the ERM (FLYP) df head: OOD {OOD['DRM mixture'] - OOD['ERM df']:+.1f}, "
               f"ID {ID['DRM mixture'] - ID['ERM df']:+.1f}; df against cd: ID {ID['DRM df'] - ID['DRM cd']:+.1f}, "
               f"OOD {OOD['DRM df'] - OOD['DRM cd']:+.1f}")
        lambdas = ["DRM mixture", *(f"DRM lambda {lam} mixture" for lam in LAMBDAS)]
        yield "- DRM mixture, lambda 1, 2, 3, 5: OOD " + ", ".join(f"{OOD[name]:.1f}" for name in lambdas)
    if "recolor" in table.measure:
        cells = table.mean["zero-shot"], table.mean["zero-shot cd"]
        yield ("- zero-shot, ID to recolor: df head {:+.1f}, cd head {:+.1f}".format(*[c["recolor"] - c["ID"] for c in cells]))


def draw(table, runs, path):
    names = ["zero-shot", "fine-tuned (unit head)", "Lipsum-FT", "Lipsum-FT + WiSE 0.5", "WiSE-FT 0.5", "VRF",
             "VRF on Lipsum-FT", "ERM df", "DRM mixture", "DRM + WiSE 0.5 mixture"]
    points = {name: (table.mean[name]["ID"], table.mean[name]["OOD"]) for name in names if name in table.mean}
    ose = [np.mean([run["ose_curve"][alpha] for run in runs], axis=0) for alpha in runs[0]["ose_curve"]]
    line = ["zero-shot", *(name for name in table.mean if name.startswith("WiSE-FT")), "fine-tuned (folded head)"]
    wise = [(table.mean[name]["ID"], table.mean[name]["OOD"]) for name in line]
    common.plot_plane(points, {r"OSE, $\alpha$ 0 to 1": ose, r"WiSE-FT, $\alpha$ 0 to 1": wise}, table.measure, path)


def show(experiment, path=None):
    runs, seeds = list(experiment["runs"].values()), [int(seed) for seed in experiment["runs"]]
    table = Table(runs)
    print(*table.lines(), *differences(table, runs, seeds), sep="\n")
    if path:
        draw(table, runs, path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--out", type=Path)
    p.add_argument("--json", type=Path, help="file to which the scores are added")
    p.add_argument("--from", type=Path, dest="scores", help="scores to print instead of running")
    args, flags = p.parse_known_args()
    if args.scores:
        for name, experiment in json.loads(args.scores.read_text()).items():
            print(f"\n## {name}\n")
            show(experiment)
        return
    out = args.out or Path("runs/results" + "".join(flags).replace("--", "-").replace("/", "_"))  # other flags, other runs
    experiment = {"runs": {str(seed): compare(seed, out, flags) for seed in args.seeds}}
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        known[" ".join(flags) or "shapes"] = experiment
        args.json.write_text(json.dumps(known, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    show(experiment, out / "plane.png")


if __name__ == "__main__":
    main()
