"""Runs jobs against targets, a fresh mount for each measurement, and verifies the contents."""
import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time

import images as im
import targets as tg

MIB = im.MIB
TIMEOUT = 45           # seconds for one measurement
CPUS = os.cpu_count()


def cpu_of(pids):
    """CPU seconds that these processes have used."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        except OSError:
            pass
    return total / os.sysconf("SC_CLK_TCK")


def rss_of(pids):
    """Anonymous resident MiB of these processes together (a mapped image is page cache, not memory of theirs)."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status") as f:
                total += sum(int(line.split()[1]) for line in f if line.startswith("RssAnon"))
        except OSError:
            pass
    return total / 1024


def machine_busy():
    """CPU seconds that this machine has been busy (stolen time included)."""
    with open("/proc/stat") as f:
        v = [int(x) for x in f.readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def own_cpu():
    return sum(os.times()[:4])


def wait_quiet(limit):
    """Waits until other programs leave the CPUs mostly idle, at most `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        busy, start = machine_busy(), time.monotonic()
        time.sleep(0.2)
        if (machine_busy() - busy) / (time.monotonic() - start) / CPUS < 0.15 or time.monotonic() > end:
            return


class Bench:
    def __init__(self, args):
        self.args = args
        self.ram = im.ImageSet(os.path.join(args.ram, "images"))
        self.disk = im.ImageSet(os.path.join(args.disk, "images"))
        self.targets = []
        self.results = {}     # job -> target -> list of measurements
        self.notes = {}       # (job, target) -> why there is none
        self.failures = []
        self.verified = set()

    def image(self, job):
        images = self.disk if job.disk else self.ram
        image = images.get(job.kind)
        if job.fresh:
            images.fresh(image)
        tg.Rawfile.raw_of[image.qcow2] = image.raw
        return image

    def fail(self, where, target, why):
        line = f"{where}: {target.label}: {why}"
        self.failures.append(line)
        print("FAIL " + line, file=sys.stderr, flush=True)

    def measure(self, job, target):
        """One measurement on a fresh mount."""
        image = self.image(job)
        stuck = threading.Event()

        def expire():
            stuck.set()
            target.kill()

        watchdog = threading.Timer(TIMEOUT, expire)
        watchdog.start()
        target.last_output = None
        try:
            path = None if job.offline else target.present(image, job.write)
            pids = [] if job.offline else target.pids()
            cpu, own, busy, start = cpu_of(pids), own_cpu(), machine_busy(), time.monotonic()
            value, work = job.run(path, image, target)
            elapsed = time.monotonic() - start
            cpu = cpu_of(pids) - cpu
            foreign = (machine_busy() - busy - cpu - (own_cpu() - own)) / elapsed / CPUS
            rss = rss_of(pids)
            if pids and rss > (bound := target.memory_bound(job, pids)):
                self.fail(job.name, target, f"{rss:.0f} MiB of memory (RssAnon), {bound:.0f} are the bound")
            if job.offline and target.last_output:
                self.verify_output(job, target, image)
            if not job.offline:
                target.teardown()
            return {"value": value, "cpu_us": max(0, cpu) / work * 1e6, "rss": rss, "foreign": max(0, foreign)}
        except (tg.Failed, OSError, RuntimeError, subprocess.SubprocessError) as e:
            raise tg.Failed(f"timeout after {TIMEOUT} s" if stuck.is_set() else str(e)) from e
        finally:
            watchdog.cancel()
            with contextlib.suppress(tg.Failed):
                target.teardown()
            if target.last_output and os.path.exists(target.last_output):
                os.unlink(target.last_output)

    def run_job(self, job):
        rows = self.results[job.name] = {t.label: [] for t in self.targets}
        active = list(self.targets)
        if job.seeks:
            for t in [t for t in active if not t.seeks]:
                self.notes[job.name, t.label] = "no SEEK_HOLE"
                active.remove(t)
        if not self.args.no_verify and not job.offline:
            for t in active:
                self.verify(job, t)
        for r in range(self.args.rounds):
            order = active[r % len(active):] + active[:r % len(active)] if active else []
            wait_quiet(self.args.quiet_wait)
            for t in order:
                try:
                    m = self.measure(job, t)
                    if m["foreign"] > 0.15 and self.args.retry:
                        m = min(m, self.measure(job, t), key=lambda x: x["foreign"])
                    rows[t.label].append(m)
                except tg.Unsupported as e:
                    self.notes[job.name, t.label] = str(e)
                    active.remove(t)
                except tg.Failed as e:
                    self.fail(job.name, t, e)
                    self.notes[job.name, t.label] = "FAILED"
                    active.remove(t)

    # -- correctness -------------------------------------------------------

    def verify(self, job, target):
        """Compares the exposed content with the equal raw file, once per kind and target."""
        if (job.kind, target.label) in self.verified or isinstance(target, tg.Rawfile):
            return
        self.verified.add((job.kind, target.label))
        image = self.image(job)
        try:
            if job.kind == "cow" and isinstance(target, tg.Passthrough):
                return      # its raw file has no backing content
            if job.kind in ("empty", "cow"):
                self.verify_writes(job, target, image)
            else:
                path = target.present(image, False)
                ranges = ([(x - im.CLUSTER if x else 0, 3 * im.CLUSTER) for x in im.huge_extents()[::10]]
                          if job.kind == "huge" else [(x, MIB) for x in range(0, image.size, MIB)])
                with open(path, "rb", buffering=0) as a, open(image.raw, "rb", buffering=0) as b:
                    for offset, length in ranges:
                        if os.pread(a.fileno(), length, offset) != os.pread(b.fileno(), length, offset):
                            raise tg.Failed(f"wrong data within {length} bytes at {offset}")
        except tg.Unsupported:
            pass
        except (tg.Failed, OSError) as e:
            self.fail("verify " + job.kind, target, e)
        finally:
            with contextlib.suppress(tg.Failed):
                target.teardown()

    def verify_writes(self, job, target, image):
        """Random buffered writes, read back, then qemu-img check and compare of the closed image."""
        rng, expect = random.Random(9), image.qcow2 + ".expect"
        if job.kind == "cow":
            im.copy(self.ram.get("full").raw, expect)
        else:
            with open(expect, "wb") as f:
                f.truncate(image.size)
        try:
            path = target.present(image, True)
            with open(path, "r+b", buffering=0) as a, open(expect, "r+b", buffering=0) as b:
                for _ in range(300):
                    offset, length = rng.randrange(256 * MIB), rng.choice((1, 512, 4096, 65536, 200_001))
                    chunk = rng.randbytes(length)
                    for f in (a, b):
                        os.pwrite(f.fileno(), chunk, offset)
                os.fsync(a.fileno())
                for offset in range(0, 257 * MIB, MIB):
                    if os.pread(a.fileno(), MIB, offset) != os.pread(b.fileno(), MIB, offset):
                        raise tg.Failed(f"read back wrong data in the MiB at {offset}")
            target.teardown()
            if isinstance(target, tg.Passthrough):
                return
            for cmd in (["check", "-q", "-f", "qcow2", image.qcow2],
                        ["compare", "-q", "-f", "qcow2", "-F", "raw", image.qcow2, expect]):
                p = subprocess.run(["qemu-img", *cmd], capture_output=True, text=True)
                if p.returncode:
                    raise tg.Failed(f"after writes: qemu-img {cmd[0]}: rc {p.returncode} {p.stderr.strip()[-150:]}")
        finally:
            os.unlink(expect)

    def verify_output(self, job, target, image):
        """Compares the output of a conversion with the raw file, once per job and target."""
        if self.args.no_verify or (job.name, target.label) in self.verified:
            return
        self.verified.add((job.name, target.label))
        fmt = "raw" if job.name.endswith("-raw") else "qcow2"
        p = subprocess.run(["qemu-img", "compare", "-q", "-f", fmt, "-F", "raw", target.last_output, image.raw])
        if p.returncode:
            raise tg.Failed("the converted image differs")
        if fmt == "qcow2":
            self.notes[job.name, target.label, "size"] = os.stat(target.last_output).st_blocks // 2048

    # -- reports -----------------------------------------------------------

    def ratio(self, job, label, base):
        """Median over the rounds of target / base, above 1 when better; None when unknown."""
        rows = self.results[job.name]
        pairs = list(zip(rows.get(label, []), rows.get(base, [])))
        if not pairs:
            return None
        return statistics.median((b["value"] / a["value"]) if job.lower else (a["value"] / b["value"])
                                 for a, b in pairs)

    def long_rows(self, jobs):
        """One row per job and target, for the tables and the JSON."""
        for job in jobs:
            for t in self.targets:
                got = self.results[job.name][t.label]
                row = {"job": job.name, "target": t.label, "unit": job.unit, "offline": job.offline,
                       "note": self.notes.get((job.name, t.label), "")}
                if got:
                    values = [m["value"] for m in got]
                    row.update(median=statistics.median(values), min=min(values), max=max(values),
                               cpu_us=statistics.median(m["cpu_us"] for m in got),
                               rss=max(m["rss"] for m in got), foreign=max(m["foreign"] for m in got),
                               x={base.label: self.ratio(job, t.label, base.label) for base in self.targets},
                               values=values)
                    if (job.name, t.label, "size") in self.notes:
                        row["output_mib"] = self.notes[job.name, t.label, "size"]
                yield row
