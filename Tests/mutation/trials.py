"""Runs tests of a build against one of its changes.

Time is counted on the processor, so that a busy machine makes no difference.
"""

import os
import re
import resource
import select
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

# Those of the library, but for those that look at the sources; and those that use the program
# without a mount, which a change may leave behind.
LEFT_OUT = {"QCOW2Tests.HousekeepingTests", "QCOW2Tests.TrapCatalogueTests"}
PROGRAM = {
    "qcowfsTests." + name
    for name in (
        "AuditTests", "CommitVerbTests", "ConvertPipeTests", "ConvertTests", "DehydrateTests",
        "ExplainTests", "ImageVerbTests", "ProgressTests", "RebaseVerbTests")
}

# Seconds in which a test says nothing and does nothing before it counts as hanging.
PATIENCE = 40

TOO_LONG = "it took too long"


def binary(target):
    return next((target / ".build/release").glob("*.xctest"))


def tests_of(target):
    """The tests by their names, `QCOW2Tests.Suite/function(label:)`."""
    listed = subprocess.run(
        [binary(target), "--testing-library", "swift-testing", "--list-tests"], cwd=target,
        text=True, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    return sorted(
        name for name in listed
        if (suite := name.split("/")[0]) not in LEFT_OUT
        and (suite.startswith("QCOW2Tests.") or suite in PROGRAM))


def run_tests(target, tests, seconds, number=0, reached=None):
    """What the tests say of a change: None where all pass, or the first failure, which ends them.
    Returns that and the seconds it took of the processor.

    - seconds: more is a failure."""
    # Tests that are ended leave their files behind.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="qcowfs-mutants-", dir=memory) as scratch:
        return run_tests_in(scratch, target, tests, seconds, number, reached)


def run_tests_in(scratch, target, tests, seconds, number, reached):
    def limits():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))

    environment = {
        **os.environ, "QCOWFS_MUTANT": str(number), "SWIFT_DETERMINISTIC_HASHING": "1",
        "QCOWFS": str(target / ".build/release/qcowfs"), "QCOWFS_TEST_SCRATCH": scratch,
    }
    if reached:
        environment["QCOWFS_REACHED"] = str(reached)
    process = subprocess.Popen(
        [binary(target), "--testing-library", "swift-testing", "--no-parallel",
         "--filter", "^(" + "|".join(map(re.escape, tests)) + ")/"],
        cwd=target, env=environment, preexec_fn=limits, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    failure = first_failure(process)
    os.kill(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if failure is None and process.returncode != 0:
        failure = "it ended" if process.returncode != -24 else TOO_LONG
    return failure, usage.ru_utime + usage.ru_stime


def first_failure(process):
    """Reads until a failure is reported, or the process ends, or nothing happens for long."""
    output, idle, before = b"", 0, None
    while idle < PATIENCE:
        if not select.select([process.stdout], [], [], 1)[0]:
            now = processor_time(process.pid)
            idle = idle + 1 if now == before else 0
            before = now
            continue
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            # The pipe is closed: the process is at its end.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            return None
        output = output[-4096:] + data
        failed = re.search(r"✘\S* Test (case )?(.*)".encode(), output)
        if failed:
            return failed.group(2).decode(errors="replace").split(" recorded ")[0]
    return "it hangs"


def processor_time(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[11:15]


def survey(target, tests, jobs, longest):
    """How many seconds each test takes, and which changes it reaches; one that takes longer than
    `longest` is left out."""

    def measure(test):
        with tempfile.NamedTemporaryFile() as reached:
            reached.truncate(1 << 13)
            for _ in range(2):
                failure, seconds = run_tests(target, [test], longest, reached=reached.name)
                if failure in (None, TOO_LONG) or seconds > longest:
                    break
                print(f"{test} fails without any change: {failure}", flush=True)
            return failure, seconds, {n for n, byte in enumerate(reached.read()) if byte}

    with ThreadPoolExecutor(jobs) as pool:
        return {
            test: (seconds, numbers)
            for test, (failure, seconds, numbers) in zip(tests, pool.map(measure, tests))
            if failure is None and seconds <= longest
        }


def noticed(target, number, measured):
    """What notices the change, or nothing: the quickest tests first, in ever larger groups."""
    reaching = sorted((t, test) for test, (t, numbers) in measured.items() if number in numbers)
    room = 1
    while reaching:
        group = [reaching.pop(0)]
        while reaching and sum(t for t, _ in group) + reaching[0][0] < room:
            group.append(reaching.pop(0))
        failure, _ = run_tests(
            target, [test for _, test in group], 20 + 10 * sum(t for t, _ in group), number)
        if failure:
            return failure
        room *= 3
    return None
