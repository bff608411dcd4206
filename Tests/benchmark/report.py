"""Tables of results."""
import statistics

NOT_DONE = 0.1     # what a job counts in a mean that failed, or is not done


def short(x):
    """Four characters or so for any magnitude."""
    for unit in ("", "k", "M"):
        if abs(x) < 1000:
            return f"{x:.3g}{unit}" if abs(x) < 100 else f"{x:.0f}{unit}"
        x /= 1000
    return f"{x:.3g}G"


def by_job(rows):
    """job -> target -> row, in the order of the jobs."""
    table = {}
    for r in rows:
        table.setdefault(r["job"], {})[r["target"]] = r
    return table


def mean(rows, target, base):
    """The geometric mean of target / base over the online jobs that `base` can do, and their number."""
    ratios = []
    for cells in by_job(rows).values():
        mine, other = cells[target], cells[base]
        if not mine["offline"] and "median" in other:
            ratios.append((mine["x"][base] or NOT_DONE) if "median" in mine else NOT_DONE)
    return (statistics.geometric_mean(ratios), len(ratios)) if ratios else (None, 0)


def aligned(out):
    widths = [max(len(row[i]) for row in out) for i in range(len(out[0]))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in out]
    lines.insert(1, "-|-".join("-" * w for w in widths))
    return "\n".join(lines)


def compact_table(rows, labels, ref):
    """Jobs by targets: median, ratio to the reference, half of (max - min) / median."""
    out = [["job", "unit", *labels]]
    for job, cells in by_job(rows).items():
        line = [job, cells[labels[0]]["unit"]]
        for t in labels:
            r = cells[t]
            if "median" not in r:
                line.append(r["note"] or "-")
                continue
            x = f" x{r['x'][ref]:.2f}" if r["x"].get(ref) else ""
            spread = (r["max"] - r["min"]) / 2 / r["median"] * 100
            line.append(f"{short(r['median'])}{x} ±{spread:.0f}%")
        out.append(line)
    if ref in labels:
        means = [mean(rows, t, ref) for t in labels]
        out.append(["geometric mean, online", "", *(f"x{m:.2f} of {n}" if n else "-" for m, n in means)])
    memory = {t: max((r["rss"] for r in rows if r["target"] == t and "median" in r), default=0) for t in labels}
    out.append(["largest RssAnon", "MiB", *(f"{memory[t]:.0f}" for t in labels)])
    return aligned(out)


def long_table(rows, ref):
    head = (f"{'job':22} {'target':13} {'unit':5} {'median':>8} {'min':>8} {'max':>8} {'spread':>7} "
            f"{'x ref':>6} {'x pass':>6} {'x raw':>6} {'cpu/op':>8} {'RSS MiB':>8} {'foreign':>7}")
    lines = [head]
    for r in rows:
        if "median" not in r:
            lines.append(f"{r['job']:22} {r['target']:13} {r['note'] or '-'}")
            continue
        ratios = " ".join(f"{r['x'][k]:6.2f}" if r["x"].get(k) else "     -"
                          for k in (ref, "passthrough", "rawfile"))
        lines.append(f"{r['job']:22} {r['target']:13} {r['unit']:5} {short(r['median']):>8} {short(r['min']):>8} "
                     f"{short(r['max']):>8} {(r['max'] - r['min']) / r['median'] * 100:6.0f}% {ratios} "
                     f"{r['cpu_us']:6.0f}us {r['rss']:8.1f} {r['foreign'] * 100:6.0f}%"
                     + (f"  output {r['output_mib']} MiB" if "output_mib" in r else ""))
    return "\n".join(lines)


TITLES = {"qsd72": "QEMU of Debian", "qsdnew": "newest QEMU", "passthrough": "libfuse passthrough",
          "rawfile": "the raw file"}


def markdown(rows, labels):
    """The README's table: what qcowfs does in each job, and how many times that is what others do."""
    others = [t for t in labels if t in TITLES]
    out = ["| job | qcowfs | " + " | ".join("× " + TITLES[t] for t in others) + " |",
           "|---|---|" + "---|" * len(others)]
    for job, cells in by_job(rows).items():
        mine = cells["qcowfs"]
        value = f"{short(mine['median'])} {mine['unit']}" if "median" in mine else mine["note"] or "-"
        ratios = [f"{mine['x'][t]:.2f}" if "median" in mine and mine["x"].get(t) else "" for t in others]
        out.append(f"| {job} | {value} | " + " | ".join(ratios) + " |")
    means = [mean(rows, "qcowfs", t)[0] for t in others]
    out.append("| geometric mean, online jobs | | " + " | ".join(f"{m:.2f}" if m else "" for m in means) + " |")
    return "\n".join(out)
