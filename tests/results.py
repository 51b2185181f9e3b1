"""The README's results on `shapes`: python tests/results.py [--seeds 0 1 2 3 4] [--out runs/results] [flags of a method].

Runs every method for every seed, in processes as a user would, then prints one table (mean and standard deviation over
the seeds) and the statements that the README makes of it, and draws all methods in one ID-OOD plane. Finished runs
in --out are not run again.
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

p = argparse.ArgumentParser()
p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
p.add_argument("--out", type=Path)
a, more = p.parse_known_args()
a.out = a.out or Path("runs/results" + "".join(more).replace("--", "-").replace("/", "_"))  # other flags, other runs


def run(name, script, *flags):
    """Rows of a run, {row name: {test: metrics}}; results.json as a whole under None."""
    out = a.out / name
    if not (out / "results.json").exists():
        again = ["--resume", str(out)] if (out / "args.json").exists() else [*map(str, flags), *more, "--out", str(out)]
        done = subprocess.run([sys.executable, str(ROOT / script), *again], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        print(f"{name}: done", file=sys.stderr, flush=True)
    results = json.loads((out / "results.json").read_text())
    return {None: results, **{r["name"]: r["tests"] for r in results["rows"]}}


rows, curves = {}, {}
for s in a.seeds:
    lipsum = run(f"lipsum-{s}", "lipsum_ft.py", "--seed", s, "--alpha", 0.5)
    wise = run(f"wise-{s}", "wise_ft.py", "--seed", s, "--select")
    vrf = run(f"vrf-{s}", "vrf.py", "--seed", s, "--finetuned", a.out / f"wise-{s}" / "fine-tuned")
    both = run(f"vrf-lipsum-{s}", "vrf.py", "--seed", s, "--finetuned", a.out / f"lipsum-{s}")
    drm = run(f"drm-{s}", "drm.py", "--seed", s, "--alpha", 0.5, "--ablate")
    table = [("zero-shot", lipsum, "zero-shot"), ("fine-tuned (unit head)", lipsum, "fine-tuned"),
             ("Lipsum-FT", lipsum, "Lipsum-FT"), ("Lipsum-FT + WiSE 0.5", lipsum, "Lipsum-FT + WiSE 0.5"),
             ("fine-tuned (folded head)", wise, "fine-tuned"), *((n, wise, n) for n in wise if n and n.startswith("WiSE")),
             ("OSE, held-out alpha", vrf, "OSE"), ("WSE, held-out alpha", vrf, "WSE"), ("VRF", vrf, "VRF"),
             ("VRF on Lipsum-FT", both, "VRF"), *((n, drm, n) for n in drm if n)]
    for name, source, row in table:
        rows.setdefault(name, []).append(source[row])
    curves.setdefault("OSE", []).append(vrf[None]["ose_curve"])
    curves.setdefault("selected", []).append(wise[None]["selected"]["alpha"])
    curves.setdefault("vrf", []).append(vrf[None]["vrf"])

tests = list(rows["zero-shot"][0])
columns = {"ID": lambda t: t[tests[0]]["acc"], "OOD": lambda t: np.mean([t[k]["acc"] for k in tests[1:]]),
           **{k: (lambda t, k=k: t[k]["acc"]) for k in tests[1:]},
           "NLL": lambda t: t[tests[0]]["nll"], "NLL OOD": lambda t: np.mean([t[k]["nll"] for k in tests[1:]]),
           "ECE": lambda t: t[tests[0]]["ece"], "ECE OOD": lambda t: np.mean([t[k]["ece"] for k in tests[1:]])}
values = {name: np.array([[f(t) for f in columns.values()] for t in runs]) for name, runs in rows.items()}
MAIN = ["zero-shot", "fine-tuned (unit head)", "Lipsum-FT", "Lipsum-FT + WiSE 0.5", "fine-tuned (folded head)", "WiSE-FT 0.5",
        "WSE, held-out alpha", "OSE, held-out alpha", "VRF", "VRF on Lipsum-FT", "zero-shot cd", "ERM mixture", "DRM mixture",
        "DRM + WiSE 0.5 mixture"]
print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
for name in MAIN:
    cells = [f"{m:.{d}f} ± {sd:.{d}f}" for d, m, sd in zip([2 if c.startswith("NLL") else 1 for c in columns],
                                                           values[name].mean(0), values[name].std(0, ddof=len(a.seeds) > 1))]
    print(f"| {name} | " + " | ".join(cells) + " |")
rest = [n for n in values if n not in MAIN and not n.endswith((" df", " cd"))]
print("\nID / OOD of the other rows: " + "; ".join(f"{n} {values[n][:, 0].mean():.1f} / {values[n][:, 1].mean():.1f}"
                                                  for n in rest) + ".")

ID, OOD = ({n: v[:, i].mean() for n, v in values.items()} for i in (0, 1))
ose = {float(k): np.mean([c[k] for c in curves["OSE"]], axis=0) for k in curves["OSE"][0]}
rival = max((p for p in ose.values() if p[0] >= ID["VRF"]), key=lambda p: p[1], default=None)
gain = lambda name, end: 100 * (ID[name] - ID["zero-shot"]) / (ID[end] - ID["zero-shot"])
wise_rows = [n for n in ID if n.startswith("WiSE-FT") and gain(n, "fine-tuned (folded head)") >= 85]
best = max(wise_rows, key=lambda n: OOD[n])
unit, folded = "fine-tuned (unit head)", "fine-tuned (folded head)"
recolor = list(columns).index("recolor") if "recolor" in columns else 1
print(f"""
Seeds {a.seeds}. Differences in points:
- fine-tuning (unit head): ID {ID[unit] - ID['zero-shot']:+.1f}, OOD {OOD[unit] - OOD['zero-shot']:+.1f} against zero-shot
- Lipsum-FT: keeps {gain('Lipsum-FT', unit):.0f}% of the ID gain, OOD {OOD['Lipsum-FT'] - OOD[unit]:+.1f} against fine-tuning
- {best}: OOD {OOD[best] - max(OOD['zero-shot'], OOD[folded]):+.1f} against the better end, {gain(best, folded):.0f}% of the ID gain; \
alpha 0.5: {OOD['WiSE-FT 0.5'] - max(OOD['zero-shot'], OOD[folded]):+.1f}, {gain('WiSE-FT 0.5', folded):.0f}%; --select chose {curves['selected']}
- VRF: OOD {'no OSE of equal or better ID' if rival is None else f'{OOD["VRF"] - rival[1]:+.1f} against the best OSE of equal or better ID'}, \
{OOD['VRF'] - OOD['OSE, held-out alpha']:+.1f} against OSE with held-out alpha (ID {ID['VRF'] - ID['OSE, held-out alpha']:+.1f}); \
k {[v['k'] for v in curves['vrf']]}, |V| {[v['failures'] for v in curves['vrf']]}
- DRM mixture against ERM mixture: OOD {OOD['DRM mixture'] - OOD['ERM mixture']:+.1f}, ID {ID['DRM mixture'] - ID['ERM mixture']:+.1f}
- zero-shot, ID to recolor: df head {values['zero-shot df'][0, recolor] - ID['zero-shot df']:+.1f}, \
cd head {values['zero-shot cd'][0, recolor] - ID['zero-shot cd']:+.1f}""")

plt = common.pyplot()
if plt:
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    ax.plot(*zip(*ose.values()), "-", color="tab:grey", label=r"OSE, $\alpha$ 0 to 1")
    line = ["zero-shot", *(n for n in ID if n.startswith("WiSE-FT")), folded]
    ax.plot([ID[n] for n in line], [OOD[n] for n in line], "-o", markersize=3, label=r"WiSE-FT, $\alpha$ 0 to 1")
    names = ["zero-shot", unit, "Lipsum-FT", "Lipsum-FT + WiSE 0.5", "WiSE-FT 0.5", "VRF", "VRF on Lipsum-FT", "ERM mixture",
             "DRM mixture", "DRM + WiSE 0.5 mixture"]
    for name, marker in zip(names, "*sPXDv^<>h"):
        ax.plot(ID[name], OOD[name], marker, markersize=10, linestyle="none", label=name)
    ax.set(xlabel="ID accuracy, %", ylabel="mean accuracy on six shifts (OOD), %")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(a.out / "plane.png", dpi=150)
