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

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vrf  # noqa: E402

try:
    import faiss
except ImportError:
    sys.exit("bench_knn: faiss is not installed, nothing to compare with: pip install faiss-cpu")


def unit(rows, width, seed):
    x = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    x /= np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]  # np.linalg.norm would square a copy
    return x


def ours(queries, bank, k):
    return vrf.knn_distance(torch.from_numpy(queries), torch.from_numpy(bank), k).numpy()


def with_faiss(queries, bank, k):
    """As the released knn_distance.py of VRF."""
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    return index.search(queries, k)[0][:, -1]


SEARCHES = {"ours": ours, "faiss": with_faiss}


def peak():
    """MiB that this process has had at most."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_alone(name):
    """MiB by which one search makes its process grow."""
    command = [sys.executable, *sys.argv, "--only", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bank", type=int, default=100_000)
    p.add_argument("--queries", type=int, default=5_000)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--k", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", choices=list(SEARCHES),
                   help="run one search once and print the MiB that its peak grew by")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    memory = {}
    if not args.only:  # before the data: a child's peak starts at its parent's size
        memory = {name: peak_alone(name) for name in SEARCHES}
    queries, bank = unit(args.queries, args.width, 1), unit(args.bank, args.width, 0)
    if args.only:
        before = peak()
        SEARCHES[args.only](queries, bank, args.k)
        return print(f"{peak() - before:.0f}")

    print(f"bank {args.bank} x {args.width}, {args.queries} queries, k = {args.k}, {args.threads} "
          f"threads, torch {torch.__version__}, faiss {faiss.__version__}")
    seconds, found = {name: [] for name in SEARCHES}, {}
    for _ in range(args.rounds):
        for name, search in SEARCHES.items():
            begun = time.perf_counter()
            found[name] = search(queries, bank, args.k)
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rounds = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name:6} {median[name]:7.2f} s (rounds: {rounds}), peak memory "
              f"+{memory[name]} MiB")
    difference = np.abs(found["ours"] - found["faiss"]).max()
    print(f"speed of ours: {median['faiss'] / median['ours']:.2f} x faiss; largest difference of "
          f"d^2: {difference:.1e}")
    assert difference < 1e-5, "the two searches disagree"


if __name__ == "__main__":
    main()
