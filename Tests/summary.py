"""Reads what `swift test` recorded and counts it, for Tests/run.

The event stream names every test that began, ended, failed or was skipped, so that a process which
died leaves a test that began and never ended: it counts as failed.
"""

import json
import os
import sys


def events(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the last line of a process that died
    except OSError:
        return


def counted(path):
    """The names of what passed, failed and was skipped; each case of a test with arguments counts."""
    names, begun, ended, failed, skipped = {}, [], set(), set(), set()
    for event in events(path):
        payload = event.get("payload", {})
        kind = payload.get("kind")
        if event.get("kind") == "test" and kind == "function":
            names[payload["id"]] = payload.get("displayName") or payload.get("name")
        if event.get("kind") != "event":
            continue
        case = payload.get("_testCase") or {}
        key = (payload.get("testID"), case.get("id"))
        if case:
            names[key] = f"{names.get(key[0])}: {case.get('displayName')}"
        if kind in ("testStarted", "testCaseStarted"):
            begun.append(key)
        elif kind in ("testEnded", "testCaseEnded"):
            ended.add(key)
        elif kind == "testSkipped":
            skipped.add(key)
        elif kind == "issueRecorded":
            issue = payload.get("issue", {})
            if not issue.get("isKnown") and issue.get("severity", "error") == "error":
                failed.add(key)
    failed |= {key for key in begun if key not in ended}
    with_cases = {key[0] for key in begun if key[1]}
    passed = {
        key for key in ended - failed - skipped
        if key[0] in names and (key[1] or key[0] not in with_cases)
    }

    def called(keys):
        return sorted({names.get(key) or names.get(key[0]) or "the run" for key in keys})

    # A suite that a failure in it ends is not counted beside the failure.
    failed = {key for key in failed if key in names or key[0] in names} or failed
    return {
        "passed": [names.get(key) or names[key[0]] for key in passed],
        "failed": called(failed),
        "skipped": called({key for key in skipped if key[0] in names}),
    }


def show(folder, name, failed):
    """What the tests printed: their own lines always, everything where one failed."""
    has_events = os.path.exists(os.path.join(folder, name + ".jsonl"))
    with open(os.path.join(folder, name + ".log"), encoding="utf-8", errors="replace") as log:
        for line in log:
            mark = line[:1]
            if line.startswith(("↳ Testing Library", "↳ Target Platform")):
                continue
            if not has_events or mark in "✘↳" or line.startswith(("• ", "➜ ")):
                print("  " + line.rstrip())
            elif failed and mark not in "◇✔":
                print("  " + line.rstrip())


def report(name, status, folder):
    stream = os.path.join(folder, name + ".jsonl")
    result = counted(stream)
    if status == 0 and not os.path.exists(stream):
        result["passed"] = [name]  # a program of its own, one test
    if status != 0 and not result["failed"]:
        result["failed"] = [f"the process of part {name} ended with status {status}"]
    with open(os.path.join(folder, name + ".json"), "w", encoding="utf-8") as out:
        json.dump(result, out)
    show(folder, name, result["failed"])
    for test in result["failed"]:
        print(f"  FAILED: {test}")
    print("  %d passed, %d failed, %d skipped" % tuple(
        len(result[key]) for key in ("passed", "failed", "skipped")))
    return 1 if result["failed"] else 0


def total(folder):
    passed = failed = skipped = 0
    for file in sorted(os.listdir(folder)):
        if file.endswith(".json"):
            with open(os.path.join(folder, file), encoding="utf-8") as part:
                result = json.load(part)
            passed += len(result["passed"])
            failed += len(result["failed"])
            skipped += len(result["skipped"])
    if passed + failed == 0:
        failed = 1  # nothing ran: that is no success
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or skipped and os.environ.get("CI") == "true" else 0


if sys.argv[1] == "report":
    sys.exit(report(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
sys.exit(total(sys.argv[2]))
