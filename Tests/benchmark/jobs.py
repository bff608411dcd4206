"""The jobs: what is measured, on which kind of image, in which unit."""
import contextlib
import json
import mmap
import os
import random
import statistics
import subprocess
import time
from dataclasses import dataclass

import images as im
import targets as tg

MIB = im.MIB
SECONDS = 1.0          # run time of a time-based fio job


@dataclass
class Job:
    name: str
    kind: str           # image kind
    unit: str
    run: object         # f(path, image, target) -> (value, amount of work)
    write: bool = False
    offline: bool = False
    disk: bool = False  # images on a real file system instead of memory
    seeks: bool = False  # needs SEEK_HOLE / SEEK_DATA
    note: str = ""

    @property
    def lower(self):
        return self.unit in ("s", "ms")

    @property
    def fresh(self):
        return self.kind in ("empty", "cow")

    @property
    def compressed(self):
        return self.kind in ("zlib", "zstd")


JOBS = []


def job(name, kind, unit, **kw):
    """Registers the decorated function as one job."""
    def add(f):
        JOBS.append(Job(name, kind, unit, f, note=(f.__doc__ or "").strip(), **kw))
        return f
    return add


def fio(path, *args, seconds=None):
    """Runs fio on the file; returns its IOPS and the number of requests."""
    cmd = ["fio", "--name=j", "--filename=" + path, "--output-format=json", "--thread", "--group_reporting",
           "--allow_file_create=0", "--norandommap", "--randseed=7", "--bs=4k", "--ioengine=psync", *args]
    if seconds:
        cmd += ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
    p = subprocess.run(cmd, capture_output=True, text=True)
    if p.returncode:
        raise tg.Failed("fio: " + (p.stderr.strip() or p.stdout.strip())[:200])
    j = json.loads(p.stdout[p.stdout.index("{"):])["jobs"][0]
    if j["error"]:
        raise tg.Failed(f"fio: error {j['error']}")
    return (j["read"]["iops"] + j["write"]["iops"],
            j["read"]["total_ios"] + j["write"]["total_ios"])


def noise_buffer():
    buf = mmap.mmap(-1, 8 * MIB)    # page aligned, as O_DIRECT needs
    buf.write(random.Random(3).randbytes(8 * MIB))
    return memoryview(buf)


NOISE = noise_buffer()


def sequential(path, total, write=False, direct=False):
    """Reads or writes the first `total` bytes by the MiB, with a final fsync; MB/s."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_DIRECT if direct else 0)
    buf = memoryview(mmap.mmap(-1, MIB))
    start = time.perf_counter()
    fd = os.open(path, flags)
    try:
        for n in range(total // MIB):
            if write:
                at = n % 1024 * 4096
                done = os.pwrite(fd, NOISE[at:at + MIB], n * MIB)
            else:
                done = os.preadv(fd, [buf], n * MIB)
            if done != MIB:
                raise tg.Failed(f"short transfer: {done} bytes at {n} MiB")
        if write:
            os.fsync(fd)
    finally:
        os.close(fd)
    return total / 1e6 / (time.perf_counter() - start), total // MIB


def path_for(image, name):
    return os.path.join(os.path.dirname(image.qcow2), name)


def noise_file(image):
    path = path_for(image, "noise")
    if not os.path.exists(path):
        with open(path, "wb") as f:
            for _ in range(8):
                f.write(NOISE)
    return path


def timed(*cmd):
    start = time.perf_counter()
    p = subprocess.run(cmd, capture_output=True, text=True)
    if p.returncode:
        raise tg.Failed(f"{cmd[0]}: rc {p.returncode}: {p.stderr.strip()[-200:]}")
    return time.perf_counter() - start


def short_runs():
    global SECONDS
    SECONDS = 0.4


QD1 = ["--direct=1"]
THR16 = ["--direct=1", "--numjobs=16"]
AIO16 = ["--direct=1", "--ioengine=libaio", "--iodepth=16"]


def random_job(name, kind, *args, note="", write=False):
    """Registers random 4K requests, for as long as SECONDS."""
    def run(path, image, target):
        return fio(path, "--rw=randwrite" if write else "--rw=randread", *args, seconds=SECONDS)
    run.__doc__ = note
    job(name, kind, "IOPS", write=write)(run)


def sequential_job(name, kind, part=1, note="", **how):
    """Registers a pass through the disk, or through one part of so many, by the MiB."""
    def run(path, image, target):
        return sequential(path, image.size // part, **how)
    run.__doc__ = note
    job(name, kind, "MB/s", write=how.get("write", False))(run)


sequential_job("seqread-1M-buf", "full", note="Buffered sequential read, cold exposed file.")
sequential_job("seqread-1M-direct", "full", direct=True)


@job("reread-1M-buf", "full", "MB/s")
def _(path, image, target):
    """The same again through a new open: does the kernel keep the pages?"""
    sequential(path, image.size)
    return sequential(path, image.size)


@job("read-4k-buf", "full", "MB/s")
def _(path, image, target):
    """dd bs=4k, buffered, cold exposed file."""
    n = 128
    s = timed("dd", "if=" + path, "of=/dev/null", "bs=4k", f"count={n * 256}")
    return n * MIB / 1e6 / s, n


random_job("randread-4k-qd1", "full", *QD1)
random_job("randread-4k-thr16", "full", *THR16, note="16 threads, one request each.")
random_job("randread-4k-aio16", "full", *AIO16, note="One thread, libaio, depth 16.")
sequential_job("zlib-seqread", "zlib", part=2)
random_job("zlib-randread-qd1", "zlib", *QD1)
random_job("zlib-randread-12M", "zlib", *QD1, "--size=12m",
           note="A working set of 12 MiB, read for a second time and more.")
sequential_job("zstd-seqread", "zstd", part=2)
random_job("zstd-randread-qd1", "zstd", *QD1)
random_job("zstd-randread-12M", "zstd", *QD1, "--size=12m")
random_job("zstd-randread-thr16", "zstd", *THR16)
random_job("chain1-randread-qd1", "chain1", *QD1)
random_job("chain8-randread-qd1", "chain8", *QD1)
sequential_job("chain8-seqread", "chain8")
random_job("extl2-randread-qd1", "extl2", *QD1)
sequential_job("luks-seqread", "luks", part=2,
               note="AES-256-XTS, as qemu-img makes it; the kernel's cache is cold.")
random_job("luks-randread-qd1", "luks", *QD1)
random_job("luks-randread-thr16", "luks", *THR16)


@job("half-cp-sparse", "half", "MB/s")
def _(path, image, target):
    """cp --sparse=always of the half-allocated image, virtual bytes per second."""
    out = path_for(image, "copy.raw")
    try:
        s = timed("cp", "--sparse=always", path, out)
        if os.stat(out).st_blocks * 512 > image.size * 6 // 10:
            raise tg.Failed("the copy is not sparse")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out)
    return image.size / 1e6 / s, image.size // MIB


@job("huge-walk", "huge", "s", seeks=True)
def _(path, image, target):
    """A full SEEK_DATA/SEEK_HOLE walk of 1 TiB with 10,000 extents; the extents are checked."""
    found = []
    start = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while True:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(fd, data, os.SEEK_HOLE)
            found.append((data, at))
            if at >= image.size:
                break
    finally:
        os.close(fd)
    s = time.perf_counter() - start
    if found == [(0, image.size)]:
        raise tg.Unsupported("reports no holes")
    if found != [(x, x + im.CLUSTER) for x in im.huge_extents()]:
        raise tg.Failed(f"the walk found {len(found)} extents, or wrong ones")
    return s, len(found)


random_job("huge-randread-qd1", "huge", *QD1,
           note="4K reads all over 1 TiB: mostly holes, every L2 table in use (128 MiB of them).")


@job("mount-first-byte", "chain1", "ms")
def _(path, image, target):
    """Start of the program to the end of the first 4K read; median of 5."""
    target.teardown()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fd = os.open(target.present(image, False), os.O_RDONLY)
        got = len(os.pread(fd, 4096, image.size // 2))
        times.append(time.perf_counter() - start)
        os.close(fd)
        target.teardown()
        if got != 4096:
            raise tg.Failed("short first read")
    return statistics.median(times) * 1e3, 5


sequential_job("seqwrite-over-buf", "over", write=True)
sequential_job("seqwrite-over-direct", "over", write=True, direct=True)


@job("write-4k-buf", "over", "MB/s", write=True)
def _(path, image, target):
    """dd bs=4k, buffered, with fsync."""
    n = 64
    s = timed("dd", "if=" + noise_file(image), "of=" + path, "bs=4k", f"count={n * 256}", "conv=notrunc,fsync")
    return n * MIB / 1e6 / s, n


random_job("randwrite-4k-qd1", "over", *QD1, write=True)
random_job("randwrite-4k-thr16", "over", *THR16, write=True)
random_job("randwrite-4k-aio16", "over", *AIO16, write=True)


@job("seqwrite-alloc-buf", "empty", "MB/s", write=True)
def _(path, image, target):
    return sequential(path, 512 * MIB, write=True)


@job("seqwrite-alloc-direct", "empty", "MB/s", write=True)
def _(path, image, target):
    return sequential(path, 512 * MIB, write=True, direct=True)


@job("randwrite-alloc-qd1", "empty", "IOPS", write=True)
def _(path, image, target):
    """8192 random 4K writes into 4 GiB: almost each allocates a cluster."""
    return fio(path, "--rw=randwrite", *QD1, f"--io_size={8192 * 4}k")


@job("randwrite-alloc-thr16", "empty", "IOPS", write=True)
def _(path, image, target):
    return fio(path, "--rw=randwrite", *THR16, f"--io_size={256 * 4}k")


@job("randwrite-cow-qd1", "cow", "IOPS", write=True)
def _(path, image, target):
    """4096 random 4K writes into an empty overlay on a full base: copies clusters."""
    return fio(path, "--rw=randwrite", *QD1, f"--io_size={4096 * 4}k")


@job("randwrite-fsync-disk", "empty", "IOPS", write=True, disk=True)
def _(path, image, target):
    """512 allocating 4K writes on the real disk with fdatasync after each 16."""
    if isinstance(target, tg.Passthrough):
        raise tg.Unsupported("passes O_DIRECT on with unaligned buffers")
    return fio(path, "--rw=randwrite", *QD1, f"--io_size={512 * 4}k", "--fdatasync=16", "--size=256m")


@job("loop-ext4-mix", "ext4", "IOPS", write=True)
def _(path, image, target):
    """ext4 on a loop device on the exposed file; 70/30 4K direct, libaio depth 8."""
    loop = mnt = None
    try:
        loop = im.run("losetup", "-f", "--show", path).strip()
        point = os.path.join(target.dir, "ext4")
        os.makedirs(point, exist_ok=True)
        im.run("mount", "-o", "nodiscard", loop, point)
        mnt = point
        return fio(point + "/data", "--rw=randrw", "--rwmixread=70", "--direct=1", "--ioengine=libaio",
                   "--iodepth=8", seconds=2)
    finally:
        if mnt:
            im.run("umount", mnt)
        if loop:
            im.run("losetup", "-d", loop)
            while subprocess.run(["losetup", loop], capture_output=True).returncode == 0:
                time.sleep(0.01)


def offline(name, kind, unit="s"):
    return job(name, kind, unit, offline=True)


def converted(image, target, src, src_format, dst_format, compress=None, fast=False):
    """Times one conversion; returns the seconds and the virtual MiB.

    fast: qcowfs takes less time for a longer file; QEMU has no such option."""
    dst = path_for(image, "converted")
    start = time.perf_counter()
    target.convert(src, src_format, dst, dst_format, compress, fast)
    s = time.perf_counter() - start
    target.last_output = dst
    return s, image.size // MIB


@offline("convert-full-raw", "full")
def _(path, image, target):
    return converted(image, target, image.qcow2, "qcow2", "raw")


@offline("convert-zstd-raw", "zstd")
def _(path, image, target):
    return converted(image, target, image.qcow2, "qcow2", "raw")


@offline("convert-zlib-raw", "zlib")
def _(path, image, target):
    return converted(image, target, image.qcow2, "qcow2", "raw")


@offline("convert-half-raw", "half")
def _(path, image, target):
    return converted(image, target, image.qcow2, "qcow2", "raw")


@offline("convert-raw-qcow2", "full")
def _(path, image, target):
    return converted(image, target, image.raw, "raw", "qcow2")


@offline("convert-raw-zlib", "half")
def _(path, image, target):
    return converted(image, target, image.raw, "raw", "qcow2", "zlib")


@offline("convert-raw-zstd", "half")
def _(path, image, target):
    return converted(image, target, image.raw, "raw", "qcow2", "zstd")


@offline("convert-raw-zlib-fast", "half")
def _(path, image, target):
    return converted(image, target, image.raw, "raw", "qcow2", "zlib", fast=True)


@offline("convert-raw-zstd-fast", "half")
def _(path, image, target):
    return converted(image, target, image.raw, "raw", "qcow2", "zstd", fast=True)


def examined(kind, verb, name, note, *args):
    """Registers a look at an image."""
    def run(path, image, target):
        start = time.perf_counter()
        getattr(target, verb)(image.qcow2, *(getattr(image, x) for x in args))
        return time.perf_counter() - start, 1
    run.__doc__ = note
    offline(name, kind)(run)


examined("metadata", "check", "check-1T-metadata",
         "check of 1 TiB with all metadata: 2048 L2 tables, 512 refcount blocks.")
examined("million", "check", "check-million", "check of 1 TiB with 1,000,000 clusters in no order.")
examined("million", "map", "map-million", "map (JSON) of the same image.")
examined("huge", "map", "map-huge", "map (JSON) of 1 TiB with 10,000 extents.")
examined("full", "compare", "compare-full", "compare of an image with the equal raw file.", "raw")


@offline("info", "full", "ms")
def _(path, image, target):
    """info of an image; median of 9."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.info(image.qcow2)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3, 9
