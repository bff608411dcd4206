#!/usr/bin/env python3
"""Counts the heap allocations of a mounted daemon per request.

The daemon runs with a library before glibc's malloc that counts each call.  After a warm-up, fio
sends 4 KiB requests with O_DIRECT; what the counter gained, divided by the requests, is printed.
libfuse makes one or two allocations of its own for a request, as its passthrough example shows.
"""
import argparse
import mmap
import os
import struct
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
import images as im   # noqa: E402
import jobs as jb     # noqa: E402
import targets as tg  # noqa: E402

PATHS = [("plain read", "over", "randread", ["--size=64m"]),
         ("overwrite", "over", "randwrite", ["--size=64m"]),
         ("compressed read, in the cache", "zlib", "randread", ["--size=12m"])]


class Counter:
    """The page that the counting library adds to."""

    def __init__(self, directory):
        here = os.path.dirname(os.path.abspath(__file__))
        self.library = os.path.join(directory, "count_allocations.so")
        im.run("cc", "-O2", "-shared", "-fPIC", os.path.join(here, "count_allocations.c"), "-o", self.library)
        self.path = os.path.join(directory, "count")
        with open(self.path, "wb") as f:
            f.write(bytes(4096))
        with open(self.path, "r+b") as f:
            self.page = mmap.mmap(f.fileno(), 4096)

    @property
    def value(self):
        return struct.unpack_from("<Q", self.page)[0]

    def __enter__(self):
        os.environ.update(LD_PRELOAD=self.library, ALLOCATION_COUNT=self.path)

    def __exit__(self, *_):
        del os.environ["LD_PRELOAD"], os.environ["ALLOCATION_COUNT"]


def measure(target, image, counter, rw, extra, requests):
    with counter:
        path = target.present(image, True)
    try:
        job = ["--rw=" + rw, *jb.THR16, *extra]
        jb.fio(path, *job, "--number_ios=2000")
        before = counter.value
        _, done = jb.fio(path, *job, f"--number_ios={requests // 16}", f"--io_size={requests // 16 * 4}k")
        return (counter.value - before) / done, done
    finally:
        target.teardown()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=1_000_000)
    p.add_argument("--targets", default="passthrough,qcowfs")
    p.add_argument("--ram", default="/dev/shm/qcowfs-allocations")
    args = p.parse_args()
    images = im.ImageSet(args.ram)
    try:
        with tempfile.TemporaryDirectory() as directory:
            counter = Counter(directory)
            for target in tg.parse(args.targets, directory):
                for name, kind, rw, extra in PATHS:
                    if why := target.missing():
                        print(f"{target.label}: {why}")
                        break
                    per, done = measure(target, images.get(kind), counter, rw, extra, args.requests)
                    print(f"{target.label:12} {name:30} {per:.4f} allocations a request ({done} requests)",
                          flush=True)
    finally:
        images.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
