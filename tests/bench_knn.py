"""vrf.knn_distance against faiss-cpu's IndexFlatL2: python tests/bench_knn.py [--bank 100000] [--queries 5000] ...

Random unit-norm fp32 rows on the CPU; both searches get the same number of threads, alternate in one run, must agree to
1e-5 (squared distances), and the ratio is of the medians. faiss's time includes its index.add(). Peak memory: each runs
once in a process of its own; printed is what its peak resident set (ru_maxrss) grows by after imports and data.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vrf

try:
    import faiss
except ImportError:
    sys.exit("bench_knn: faiss is not installed, nothing to compare with: pip install faiss-cpu")

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--bank", type=int, default=100_000)
p.add_argument("--queries", type=int, default=5_000)
p.add_argument("--width", type=int, default=512)
p.add_argument("--k", type=int, default=100)
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--threads", type=int, default=torch.get_num_threads())
p.add_argument("--only", choices=["ours", "faiss"], help="run one search once and print the MiB that its peak grew by")
a = p.parse_args()


def unit(rows, seed):
    x = np.random.default_rng(seed).standard_normal((rows, a.width), dtype=np.float32)
    x /= np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]  # np.linalg.norm would square a copy: a peak of its own
    return x


def ours(queries, bank):
    return vrf.knn_distance(torch.from_numpy(queries), torch.from_numpy(bank), a.k).numpy()


def with_faiss(queries, bank):  # as the released knn_distance.py of VRF
    index = faiss.IndexFlatL2(a.width)
    index.add(bank)
    return index.search(queries, a.k)[0][:, -1]


peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
searches = {"ours": ours, "faiss": with_faiss}
torch.set_num_threads(a.threads)
faiss.omp_set_num_threads(a.threads)
if a.only:
    data = unit(a.queries, 1), unit(a.bank, 0)
    before = peak()
    searches[a.only](*data)
    sys.exit(print(f"{peak() - before:.0f}"))

print(f"bank {a.bank} x {a.width}, {a.queries} queries, k = {a.k}, {a.threads} threads, torch {torch.__version__}, "
      f"faiss {faiss.__version__}")
alone = lambda name: subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, stdout=subprocess.PIPE)
memory = {name: int(alone(name).stdout) for name in searches}  # before the data: a child's peak starts at ours
queries, bank = unit(a.queries, 1), unit(a.bank, 0)
seconds, found = {name: [] for name in searches}, {}
for _ in range(a.rounds):
    for name, search in searches.items():
        begun = time.perf_counter()
        found[name] = search(queries, bank)
        seconds[name].append(time.perf_counter() - begun)
difference = np.abs(found["ours"] - found["faiss"]).max()
median = {name: statistics.median(s) for name, s in seconds.items()}
for name in searches:
    print(f"{name:6} {median[name]:7.2f} s (rounds: {', '.join(f'{s:.2f}' for s in seconds[name])}), peak memory "
          f"+{memory[name]} MiB")
print(f"speed of ours: {median['faiss'] / median['ours']:.2f} x faiss; largest difference of d^2: {difference:.1e}")
assert difference < 1e-5, "the two searches disagree"
