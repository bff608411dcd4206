"""Finds places in Swift sources where a small change should be noticed by a test.

One change a line at most, chosen by a seed and the line's text: both versions are compiled in, and
`Mutant.isOn(NUMBER)` chooses at run time.  The line count of a file stays, so that a compiler error
leads to the change that caused it; such changes are dropped.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

# A change of one token, by what it looks for.  Spaces around operators are the house style.
SWAPS = [
    (" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "),
    (" == ", " != "), (" != ", " == "), (" && ", " || "), (" || ", " && "),
    (" + ", " - "), (" - ", " + "), (" &+ ", " &- "), (" &- ", " &+ "),
    (" * ", " + "), (" &* ", " &+ "), (" / ", " * "), (" % ", " / "),
    (" &<< ", " &>> "), (" &>> ", " &<< "), (" << ", " >> "), (" >> ", " << "),
    (" & ", " | "), (" | ", " & "), ("min(", "max("), ("max(", "min("),
    ("true", "false"), ("false", "true"), (".isEmpty", ".isEmpty == false"),
]
# Memory may be aligned to more than it must be.
LITERAL = re.compile(r"(?<!alignment: )(?<![\w.$#])(\d+)(?![\w.])")
NEGATION = re.compile(r"(?<![\w!=])!(?=[a-z])")

# Lines that are no statement of their own, or whose change says nothing.
SKIPPED = re.compile(
    r"^\s*(//|/\*|\*|import|package import|internal import|@|#|case |default|\}|\{|for |switch |"
    r"(\w+ )*(func|struct|class|enum|extension|protocol|init|deinit|subscript|typealias) ?|"
    r"precondition|assert|fatalError|logger|throw |self\.|repeat|do |defer|else)"
)
CONDITION = re.compile(r"^(\s*(?:\} else )?(?:guard|if|while) )(.+?)( else \{.*| \{.*)$")
RETURN = re.compile(r"^(\s*return )(.+)$")
BINDING = re.compile(
    r"^(\s*(?:(?:package|private|fileprivate|public|internal|static) )*(?:let|var) \w+"
    r"(?:: [\w.<>\[\]? ]+)? = )(.+)$")
ASSIGNMENT = re.compile(r"^(\s*[\w.\[\]$!?()]+ (?:=|\+=|-=|&\+=|&-=|\|=|&=|&>>=|&<<=) )(.+)$")
CALL = re.compile(r"^\s*(?:try )?(?:_ = )?(?:try )?[\w.$!?\[\]]+\(.*\)$")
ONE_LINE_BODY = re.compile(r"^(.*(?:func|var) .*\{ )(?!get)([^{}]+)( \})$")
STORE = re.compile(r"^\s*(?:\w+\.)?(storeBigEndian|replace)\(")
CONTINUES = re.compile(r"^\s*(\.|\?|:|&&|\|\||[-+*/%&|<>=]|\{|else\b|as\b)")
OPEN_END = re.compile(r"([-+*/%&|<>=?:,({\[]|\breturn|\bin)$")


@dataclass
class Change:
    path: str
    line: int  # counted from 0
    kind: str
    before: str
    after: str
    # The lines that replace the old ones; `MUTANT` stands for the choice.
    lines: list


def is_balanced(text):
    depth = 0
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def split_clauses(text):
    """The clauses of a condition, cut at the commas outside of brackets."""
    clauses, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            clauses.append(text[start:index])
            start = index + 1
    return clauses + [text[start:]]


def altered(text):
    """Every version of an expression with one token changed."""
    for old, new in SWAPS:
        start = text.find(old)
        while start >= 0:
            around = text[max(0, start - 1):start + len(old) + 1]
            if old.strip().isalpha() and re.search(r"\w" + old.strip() + r"|" + old.strip() + r"\w", around):
                start = text.find(old, start + 1)
                continue
            yield text[:start] + new + text[start + len(old):]
            start = text.find(old, start + 1)
    for match in LITERAL.finditer(text):
        value = int(match.group(1))
        yield text[:match.start()] + str(value + 1) + text[match.end():]
        if value > 0:
            yield text[:match.start()] + str(value - 1) + text[match.end():]
    for match in NEGATION.finditer(text):
        yield text[:match.start()] + text[match.end():]


def choice(old, new):
    """An expression that is `new` in the mutant and `old` elsewhere."""
    hoisted = ""
    for word in ("try ", "await "):
        if old.startswith(word) and new.startswith(word):
            hoisted, old, new = hoisted + word, old[len(word):], new[len(word):]
    return f"{hoisted}(MUTANT ? ({new}) : ({old}))"


def is_whole(line, following):
    code = line.split(" // ")[0].rstrip()
    return (
        is_balanced(code) and not OPEN_END.search(code) and not CONTINUES.match(following or "")
    )


def is_statement(line, following):
    return (
        bool(CALL.match(line) or ASSIGNMENT.match(line)) and not SKIPPED.match(line)
        and '"' not in line and " // " not in line and is_whole(line, following)
    )


def changes_of_line(path, lines, index):
    line = lines[index]
    following = lines[index + 1] if index + 1 < len(lines) else ""
    if not line.strip() or '"' in line or " // " in line:
        return
    body = ONE_LINE_BODY.match(line)
    if body and is_balanced(body.group(2)):
        for new in altered(body.group(2)):
            yield Change(path, index, "expression", line.strip(), new,
                         [body.group(1) + choice(body.group(2), new) + body.group(3)])
        return
    if SKIPPED.match(line) and not re.match(r"^\s*\} else if ", line):
        return
    condition = CONDITION.match(line)
    if condition and is_balanced(condition.group(2)):
        clauses = split_clauses(condition.group(2))
        for number, clause in enumerate(clauses):
            lead = clause[:len(clause) - len(clause.lstrip())]
            text = clause.strip()
            if re.match(r"(let|var|case|#)\b", text):
                continue
            for new in [*altered(text), f"!({text})" if not text.startswith("try") else None]:
                if new is None:
                    continue
                parts = clauses[:number] + [lead + choice(text, new)] + clauses[number + 1:]
                yield Change(path, index, "condition", line.strip(), new,
                             [condition.group(1) + ",".join(parts) + condition.group(3)])
        return
    if not is_whole(line, following):
        return
    for pattern in (RETURN, BINDING):
        match = pattern.match(line)
        if match and not re.match(r"(if|switch|\[|\{|Mutex|Atomic)", match.group(2)):
            for new in altered(match.group(2)):
                yield Change(path, index, "expression", line.strip(), new,
                             [match.group(1) + choice(match.group(2), new)])
    assignment = ASSIGNMENT.match(line)
    if assignment:
        for new in altered(assignment.group(2)):
            yield Change(path, index, "expression", line.strip(), new,
                         [assignment.group(1) + choice(assignment.group(2), new)])
    if is_statement(line, following):
        indent = line[:len(line) - len(line.lstrip())]
        yield Change(path, index, "dropped", line.strip(), "",
                     [f"{indent}if !MUTANT {{ {line.strip()} }}"])
        # The order of two plain assignments, or of two stores to bytes, says nothing.
        does_something = any(CALL.match(one) and not STORE.match(one) for one in (line, following))
        if does_something and is_statement(
                following, lines[index + 2] if index + 2 < len(lines) else ""):
            if following[:len(indent) + 1] == indent + following.strip()[:1]:
                yield Change(
                    path, index, "swapped", f"{line.strip()}; {following.strip()}", "",
                    [f"{indent}if MUTANT {{ {following.strip()}; {line.strip()} }} else "
                     f"{{ {line.strip()}; {following.strip()} }}", ""])


def changes_of_file(path, text, seed):
    """At most one change a line; a statement that two of them share gets one.  What is chosen for
    a line stays the same while other lines change."""
    lines = text.split("\n")
    chosen, taken, seen = [], -1, Counter()
    for index in range(len(lines)):
        if index <= taken:
            continue
        candidates = list(changes_of_line(path, lines, index))
        if candidates:
            seen[lines[index]] += 1
            place = f"{seed} {path} {lines[index]} {seen[lines[index]]}"
            change = random.Random(place).choice(candidates)
            chosen.append(change)
            taken = index + len(change.lines) - 1
    return chosen
