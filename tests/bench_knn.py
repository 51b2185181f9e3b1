"""vrf.knn_distance against faiss-cpu's IndexFlatL2.

    python tests/bench_knn.py [--bank 100000] [--queries 5000] [--k 100] [--threads 1]

Random unit-norm fp32 rows on the CPU; both searches get the same number of threads, alternate in
one run, must agree to 1e-5 (squared distances), and the ratio is of the medians. faiss's time
includes its index.add(). Peak memory: each runs once in a process of its own; printed is what its
peak resident set (ru_maxrss) grows by after imports and data.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vrf

try:
    import faiss
except ImportError:
    sys.exit("bench_knn: faiss is not installed, nothing to compare with: pip install faiss-cpu")


def unit(rows, width):
    x = torch.randn(rows, width)
    return x.div_(x.norm(dim=1, keepdim=True))  # in place: a copy would hide what a search takes


def with_faiss(queries, bank, k):
    """As the released knn_distance.py of VRF."""
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    return torch.from_numpy(index.search(queries.numpy(), k)[0][:, -1])


SEARCHES = {"ours": vrf.knn_distance, "faiss": with_faiss}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(bank=100_000, queries=5_000, width=512, k=100, rounds=3,
                              threads=torch.get_num_threads()).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--only", choices=SEARCHES, help="print the MiB that one search takes")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    memory = {}
    for name in [] if args.only else SEARCHES:  # before the data: a child starts at its parent's
        alone = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True,
                               stdout=subprocess.PIPE)
        memory[name] = int(alone.stdout)
    torch.manual_seed(0)
    bank, queries = unit(args.bank, args.width), unit(args.queries, args.width)
    if args.only:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        SEARCHES[args.only](queries, bank, args.k)
        return print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)

    print(f"bank {args.bank} x {args.width}, {args.queries} queries, k = {args.k}, {args.threads} "
          f"threads, torch {torch.__version__}, faiss {faiss.__version__}")
    seconds, d = {name: [] for name in SEARCHES}, {}
    for _ in range(args.rounds):
        for name, search in SEARCHES.items():
            begun = time.perf_counter()
            d[name] = search(queries, bank, args.k)
            seconds[name].append(time.perf_counter() - begun)
    for name, rounds in seconds.items():
        print(f"{name:6} {statistics.median(rounds):7.2f} s (rounds: "
              f"{', '.join(f'{x:.2f}' for x in rounds)}), peak memory +{memory[name]} MiB")
    speed = statistics.median(seconds["faiss"]) / statistics.median(seconds["ours"])
    difference = (d["ours"] - d["faiss"]).abs().max()
    print(f"speed of ours: {speed:.2f} x faiss; largest difference of d^2: {difference:.1e}")
    assert difference < 1e-5, "the two searches disagree"


if __name__ == "__main__":
    main()
