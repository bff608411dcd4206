#!/usr/bin/env python3
"""Side-by-side benchmark of programs that expose a qcow2 image as a flat file through FUSE.

    benchmark                                   every present target, every job, 3 rounds
    benchmark --targets qsd72,qcowfs --jobs 'randread*,zlib*' --rounds 7
    benchmark --targets 'qcowfs,old=qcowfs[bin=../old/qcowfs]' --ref old --quick
    benchmark --list

Each round measures every target once (A B C, B C A, ...), each measurement on a fresh mount, with
the image in memory (tmpfs; the *-disk job: a real file system). Ratios are medians over the rounds
of target / reference of the same round, so above 1.00 is always better. Contents are verified once
per kind of image, write jobs end with qemu-img check and compare, and the daemon's anonymous memory
is held against its bound. A target against itself gives 0.85 to 1.07 in three rounds: believe
ratios outside of 0.8 to 1.2, or use seven. Exit status: 0 all well, 1 a target misbehaved (wrong
data, an error, a timeout, too much memory), 2 usage.
"""
import argparse
import contextlib
import fnmatch
import json
import os
import shutil
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import jobs as jb     # noqa: E402
import report         # noqa: E402
import targets as tg  # noqa: E402
from harness import Bench  # noqa: E402

# Kinds whose files are deleted after their last job, so that memory suffices.
LARGE_KINDS = ("over", "half", "huge", "metadata", "million", "ext4", "empty", "cow", "chain8")


def arguments():
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--targets", default=",".join(tg.TYPES), help="see targets.py; default: every one present")
    p.add_argument("--jobs", default="*", help="comma-separated patterns, a leading ! excludes")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="1 round, shorter random jobs: a smoke test")
    p.add_argument("--ref", default="qsd72", help="label of the reference target")
    p.add_argument("--ram", default="/dev/shm/qcowfs-benchmark", help="where the images go (needs 7 GiB)")
    p.add_argument("--disk", default=os.path.join(tempfile.gettempdir(), "qcowfs-benchmark"),
                   help="mount points, and the images of *-disk jobs")
    p.add_argument("--quiet-wait", type=float, default=3, help="longest wait for idle CPUs before a round")
    p.add_argument("--no-retry", dest="retry", action="store_false",
                   help="do not repeat a measurement that other programs disturbed")
    p.add_argument("--no-verify", action="store_true")
    p.add_argument("--keep", action="store_true", help="keep the images for the next run")
    p.add_argument("--json", metavar="FILE", help="write every result")
    p.add_argument("--markdown", action="store_true", help="print the table of the README")
    p.add_argument("--long", action="store_true", help="also print the long table")
    p.add_argument("--list", action="store_true")
    args = p.parse_args()
    if args.quick:
        jb.short_runs()
        args.rounds = 1
    return p, args


def wanted_jobs(text):
    patterns = text.split(",")
    wanted = [x for x in patterns if not x.startswith("!")] or ["*"]
    refused = [x[1:] for x in patterns if x.startswith("!")]
    return [j for j in jb.JOBS if any(fnmatch.fnmatch(j.name, x) for x in wanted)
            and not any(fnmatch.fnmatch(j.name, x) for x in refused)]


def run(bench, jobs, args):
    """Every job in turn; what a job needs is built before, and freed after its last use."""
    last_use = {j.kind: n for n, j in enumerate(jobs)}
    last_use["full"] = max(last_use.get(k, -1) for k in ("full", "over", "cow"))
    for n, j in enumerate(jobs):
        start = time.monotonic()
        bench.image(j)
        built = time.monotonic()
        bench.run_job(j)
        print(f"[{n + 1}/{len(jobs)}] {j.name}: {time.monotonic() - built:.0f} s"
              + (f" + {built - start:.0f} s for images" if built - start > 1 else ""),
              file=sys.stderr, flush=True)
        for kind, last in last_use.items():
            if last == n and not args.keep and kind in LARGE_KINDS:
                (bench.disk if j.disk else bench.ram).free(kind)


def main():
    parser, args = arguments()
    jobs = wanted_jobs(args.jobs)
    if args.list:
        for j in jobs:
            print(f"{j.name:22} {j.kind:9} {j.unit:5} {j.note}")
        return 0
    if not jobs:
        parser.error("no such job")
    bench = Bench(args)
    for t in tg.parse(args.targets, os.path.join(args.disk, "mnt")):
        if why := t.missing():
            print(f"skipping {t.label}: {why}", file=sys.stderr)
        else:
            bench.targets.append(t)
    if not bench.targets:
        parser.error("no target can run here")
    versions = {t.label: t.version() for t in bench.targets}
    for label, version in versions.items():
        print(f"{label}: {version}")

    began = time.monotonic()
    try:
        run(bench, jobs, args)
    finally:
        for t in bench.targets:
            with contextlib.suppress(tg.Failed):
                t.teardown()
        if not args.keep:
            bench.ram.clean()
            bench.disk.clean()
            shutil.rmtree(args.ram, ignore_errors=True)

    rows = list(bench.long_rows(jobs))
    labels = [t.label for t in bench.targets]
    print(report.compact_table(rows, labels, args.ref))
    if args.long:
        print("\n" + report.long_table(rows, args.ref))
    if args.markdown and "qcowfs" in labels:
        print("\n" + report.markdown(rows, labels))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"versions": versions, "rounds": args.rounds, "reference": args.ref,
                       "failures": bench.failures, "results": rows}, f, indent=1)
    print(f"{time.monotonic() - began:.0f} s; {len(bench.failures)} failures")
    for line in bench.failures:
        print("FAIL " + line)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
