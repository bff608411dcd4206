"""The programs under test: how each presents an image as a flat file, and its offline tools.

A target is written `[label=]type[key=val;key=val]`, for example
`qsdnew`, `two=qsdnew[iothreads=2;aio=threads]`, `old=qcowfs[bin=../old/qcowfs]`.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

PEERS = os.environ.get("PEERS_DIR") or os.path.expanduser("~/.cache/qcowfs-peers")
READY_TIMEOUT = 20


class Unsupported(Exception):
    """This target cannot do this job: shown as n/a, not as a failure."""


class Failed(Exception):
    """This target misbehaved."""


def tool(name):
    """A program of the peer lab, or of the system."""
    lab = os.path.join(PEERS, "bin", name)
    return lab if os.path.exists(lab) else shutil.which(name)


def mounted(path):
    with open("/proc/self/mounts") as f:
        return any(line.split()[1] == path for line in f)


class Target:
    """Presents one image at a time; subclasses define start() and stop()."""

    writes = True      # can present an image writable
    seeks = True       # answers SEEK_HOLE / SEEK_DATA
    kinds = None       # image kinds that it supports (None: all)
    img_tool = None    # its qemu-img, for the offline jobs
    defaults = {}

    def __init__(self, label, options, work):
        self.label = label
        self.opt = {**self.defaults, **options}
        self.dir = os.path.join(work, label)
        self.point = os.path.join(self.dir, "disk.raw")
        self.procs = []
        self.image = None
        os.makedirs(self.dir, exist_ok=True)

    def missing(self):
        """Why this target cannot run here at all, or None."""
        return None

    def memory_bound(self, job, pids):
        """The MiB of anonymous memory that it may take in this job."""
        return float("inf")

    def version(self):
        return "-"

    def spawn(self, *cmd):
        log = open(os.path.join(self.dir, "log"), "ab")
        self.procs.append(subprocess.Popen(cmd, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def call(self, *cmd):
        # Into memory, not into a pipe, of which we would be the slow end.
        with tempfile.TemporaryFile(dir="/dev/shm") as out:
            p = subprocess.run(cmd, stdout=out, stderr=subprocess.PIPE, text=True)
        if p.returncode:
            raise Failed(f"{' '.join(cmd[:3])}...: rc {p.returncode}: {p.stderr.strip()[-200:]}")

    def log_tail(self):
        with open(os.path.join(self.dir, "log")) as f:
            return f.read().strip()[-300:].replace("\n", " | ")

    def present(self, image, write):
        """Returns the path of the flat file, ready for use."""
        if write and not self.writes:
            raise Unsupported("read only")
        if self.kinds is not None and image.kind not in self.kinds:
            raise Unsupported(f"no support for {image.kind} images")
        self.image = image
        open(os.path.join(self.dir, "log"), "wb").close()
        path = self.start(image, write)
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                if os.stat(path).st_size == image.size:
                    return path
            except OSError:
                pass
            if any(p.poll() not in (None, 0) for p in self.procs):
                raise Failed("the daemon ended: " + self.log_tail())
            if time.monotonic() > deadline:
                raise Failed("not ready in time: " + self.log_tail())
            time.sleep(0.0005)

    def pids(self):
        return [p.pid for p in self.procs if p.poll() is None]

    def teardown(self):
        """Ends the daemon in its own way; after it the image is closed. Harmless when repeated."""
        try:
            if self.image:
                self.stop()
        finally:
            for p in self.procs:
                try:
                    p.wait(20)
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
            self.procs = []
            self.image = None
            for path in (self.point, self.dir):
                if mounted(path):
                    subprocess.run(["umount", "-l", path], capture_output=True)

    def kill(self):
        """For the watchdog: the kernel then fails every request in flight."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def start(self, image, write):
        raise NotImplementedError

    def stop(self):
        for p in self.procs:
            p.terminate()

    def mountpoint_file(self):
        open(self.point, "wb").close()
        return self.point

    def img(self, *args):
        """One offline command with this target's own image tool."""
        if not self.img_tool:
            raise Unsupported("no offline tool")
        self.call(tool(self.img_tool), *args)

    def convert(self, src, src_format, dst, dst_format, compress=None, fast=False):
        how = ["-c", "-o", "compression_type=" + compress] if compress else []
        self.img("convert", "-m", self.opt.get("m", "8"), "-W", *how,
                 "-f", src_format, "-O", dst_format, src, dst)

    def check(self, image):
        self.img("check", "-q", "-f", "qcow2", image)

    def map(self, image):
        self.img("map", "--output=json", "-f", "qcow2", image)

    def compare(self, image, raw):
        self.img("compare", "-q", "-f", "qcow2", "-F", "raw", image, raw)

    def info(self, image):
        self.img("info", image)


class Rawfile(Target):
    """The raw file itself: the upper bound."""

    def start(self, image, write):
        return image.raw

    def stop(self):
        pass

    def convert(self, src, src_format, dst, dst_format, compress=None, fast=False):
        if compress or dst_format != "raw":
            raise Unsupported("only raw")
        self.call("cp", "--sparse=auto", self.raw_of[src], dst)

    raw_of = {}     # qcow2 path -> equal raw path, set by the harness


class Passthrough(Target):
    """libfuse's example passthrough_ll over the equal raw file: the floor of a plain FUSE daemon."""

    defaults = {"o": "writeback+cache=always"}

    def missing(self):
        return None if tool("passthrough_ll") else "no passthrough_ll"

    def version(self):
        return "passthrough_ll of the installed libfuse"

    def start(self, image, write):
        self.top = os.path.join(self.dir, "mnt")
        os.makedirs(self.top, exist_ok=True)
        src, name = os.path.split(image.raw)
        self.spawn(tool("passthrough_ll"), "-f", "-o", f"source={src}", "-o", self.opt["o"].replace("+", ","), self.top)
        return os.path.join(self.top, name)

    def stop(self):
        if mounted(self.top):
            self.call("umount", self.top)


class Qsd(Target):
    """qemu-storage-daemon's FUSE export."""

    bin, img_tool = "qemu-storage-daemon", "qemu-img"
    defaults = {"aio": "io_uring", "iothreads": "0"}

    def missing(self):
        return None if tool(self.bin) else "no " + self.bin

    def version(self):
        return subprocess.run([tool(self.bin), "--version"], capture_output=True, text=True).stdout.split("\n")[0]

    def start(self, image, write):
        n = int(self.opt["iothreads"])
        threads = [f"t{i}" for i in range(n)]
        args = [x for t in threads for x in ("--object", f"iothread,id={t}")]
        ro = "off" if write else "on"
        args += ["--blockdev", f"node-name=f,driver=file,filename={image.qcow2},aio={self.opt['aio']},"
                               f"cache.direct={self.opt.get('direct', 'off')},discard=unmap,read-only={ro}"]
        q = f"node-name=q,driver=qcow2,file=f,discard=unmap,read-only={ro}"
        if "l2" in self.opt:
            q += f",l2-cache-size={self.opt['l2']}"
        if image.passphrase:
            args += ["--object", f"secret,id=s,file={image.passphrase}"]
            q += ",encrypt.format=luks,encrypt.key-secret=s"
        args += ["--blockdev", q]
        export = {"type": "fuse", "id": "e", "node-name": "q", "mountpoint": self.mountpoint_file(),
                  "writable": write}
        if n == 1:
            export["iothread"] = threads[0]
        elif n > 1:
            export["iothread"] = threads
        self.spawn(tool(self.bin), *args, "--export", json.dumps(export))
        return self.point


class QsdNew(Qsd):
    bin, img_tool = "qemu-storage-daemon-new", "qemu-img-new"
    defaults = {"aio": "io_uring", "iothreads": "2"}   # the best of the settings tried


class Qcowfs(Target):
    """The subject: binary from bin=..., extra mount arguments from args=a+b."""

    defaults = {"bin": os.environ.get("QCOWFS_BIN", "qcowfs")}

    def missing(self):
        return None if shutil.which(self.opt["bin"]) else f"no {self.opt['bin']} (set QCOWFS_BIN)"

    def version(self):
        return self.run_verb("--version").stdout.split("\n")[0]

    def memory_bound(self, job, pids):
        """Its two caches (the second one is for compressed clusters), its threads, and 16 MiB."""
        threads = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                threads += len(os.listdir(f"/proc/{pid}/task"))
        return 32 + (32 if job.compressed else 0) + 2 * threads + 16

    def run_verb(self, *args):
        return subprocess.run([self.opt["bin"], *args], capture_output=True, text=True)

    def start(self, image, write):
        extra = [x for x in self.opt.get("args", "").split("+") if x]
        ro = [] if write else ["--read-only"]
        if image.passphrase:
            extra += ["--passphrase-file", image.passphrase]
        try:
            self.call(self.opt["bin"], "mount", *ro, *extra, image.qcow2, self.mountpoint_file())
        except Failed as e:
            if "not supported" in str(e):
                raise Unsupported("not done yet") from e
            raise
        return self.point

    def pids(self):
        return pids_with(self.point)

    def stop(self):
        if mounted(self.point):
            self.call(self.opt["bin"], "umount", self.point)
        if pids_with(self.point):
            raise Failed("the daemon still runs after umount returned")

    def convert(self, src, src_format, dst, dst_format, compress=None, fast=False):
        how = ["-c"] if compress else []
        if fast:
            how.append("--fast")
        if compress == "zstd":
            how += ["-o", "compression_type=zstd"]
        self.call(self.opt["bin"], "convert", *how, "-f", src_format, "-O", dst_format, src, dst)

    def check(self, image):
        self.call(self.opt["bin"], "check", image)

    def map(self, image):
        self.call(self.opt["bin"], "map", "--output=json", image)

    def compare(self, image, raw):
        self.call(self.opt["bin"], "compare", "-f", "qcow2", "-F", "raw", image, raw)

    def info(self, image):
        self.call(self.opt["bin"], "info", image)


def pids_with(path):
    """The processes whose command line names this mountpoint."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if path.encode() in f.read():
                    found.append(int(pid))
        except OSError:
            pass
    return found


TYPES = {"qcowfs": Qcowfs, "qsd72": Qsd, "qsdnew": QsdNew, "passthrough": Passthrough,
         "rawfile": Rawfile}


def parse(text, work):
    """Builds the targets that a --targets argument names."""
    out = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", text):
        m = re.fullmatch(r"(?:([\w.-]+)=)?(\w+)(?:\[(.*)\])?", item.strip())
        if not m or m[2] not in TYPES:
            raise SystemExit(f"bench: unknown target {item!r}; types: {', '.join(TYPES)}")
        options = dict(kv.split("=", 1) for kv in (m[3] or "").split(";") if kv)
        out.append(TYPES[m[2]](m[1] or m[2], options, work))
    return out
