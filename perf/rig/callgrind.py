"""Counts instructions with callgrind and reads which function and which line they belong to."""

import collections
import pathlib
import re
import subprocess
import tempfile

from network import Failure

COMMAND = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", "--dump-line=yes")
# Where a source file stands is of no interest, which file it is is.
PREFIXES = re.compile(r"^(.*/(?=(forwarder|config|library)/)|.*/registry/src/[^/]*/)")


def run(command, commands):
    """Runs a program that answers commands under callgrind. Returns for each what it counted, as `read` does."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out"
        full = [*COMMAND, f"--callgrind-out-file={out}", *map(str, command)]
        text = "".join(f"{line}\n" for line in commands)
        done = subprocess.run(full, input=text, capture_output=True, text=True, check=False)
        parts = [out.with_name(f"out.{number}") for number in range(1, len(commands) + 1)]
        if done.returncode != 0 or not all(part.exists() for part in parts):
            raise Failure(f"{' '.join(full)}: {done.stderr.strip()[-500:]}")
        return [read(part) for part in parts]


def read(path):
    """Own instructions by (function, file, line) of a callgrind.out file."""
    names, counts = {}, collections.Counter()
    function = file = ""
    line, is_call = 0, False

    def named(kind, text):
        number, _, name = text.partition(" ")
        if name:
            names[kind, number] = name
        return names.get((kind, number), text)

    for row in path.read_text().splitlines():
        key, _, value = row.partition("=")
        if key == "fn":
            function = named("fn", value)
        elif key in ("fl", "fi", "fe"):
            file = named("file", value)
        elif key in ("cfi", "cfl"):
            named("file", value)
        elif key == "cfn":
            named("fn", value)
        elif key == "ob" or key == "cob":
            named("object", value)
        elif key == "calls":
            is_call = True
        elif row[:1] in "+-*0123456789" and " " in row:
            place, count = row.split()[:2]
            line = line if place == "*" else line + int(place) if place[0] in "+-" else int(place)
            if not is_call:
                counts[function.split("'")[0], PREFIXES.sub("", file), line] += int(count)
            is_call = False
    return counts


def tables(counts, packets, functions=40, lines=80):
    """Instructions per packet by function, inlined code included, and by line."""
    by_function = collections.Counter()
    by_line = collections.Counter()
    for (function, file, line), count in counts.items():
        by_function[function] += count
        by_line[file, line, function] += count
    total = sum(counts.values())
    text = [f"{total / packets:8.1f}  instructions per packet", "", "by function (what is inlined into it included, what it calls not)", ""]
    text += [f"{count / packets:8.1f}  {function}" for function, count in by_function.most_common(functions)]
    text += ["", "by line, and the function that the line is in or was inlined into", ""]
    text += [f"{count / packets:8.1f}  {file}:{line}  {function}" for (file, line, function), count in by_line.most_common(lines)]
    return "\n".join(text) + "\n"
