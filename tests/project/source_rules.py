"""Who may include whom, and what library code may not do. Reads the sources; compiles nothing.

source_rules.py [ROOT] prints every line that breaks a rule and exits 1 if there is one.
"""
import re
import sys
from pathlib import Path

# Every folder may include itself and what it names here; the arrows are those of the design, followed to the end.
MAY_INCLUDE = {
    "traces": set(),
    "policies": set(),
    "sim": {"policies", "traces"},
    "analysis": {"sim", "policies", "traces"},
    "trace_capture": {"traces", "policies"},
}
# The programs: they may include any folder, and no library may include them.
PROGRAMS = ("sim/cli/", "trace_capture/cli/", "trace_capture/main.cpp")
# Headers that may be seen (directly, or through an own header) only in these places.
CONFINED = {
    "HDF5": (re.compile(r"^(hdf5|hdf5_hl|H5\w+)\.h$"), ("traces/", "trace_capture/") + PROGRAMS),
    "CUDA": (re.compile(r"^(cuda\w*|cublas\w*|curand\w*|cooperative_groups)(\.h|\.hpp|/.*)?$"), ("trace_capture/",)),
    "command-line": (re.compile(r"^(CLI/.*|boost/program_options.*)$"), PROGRAMS),
}
FORBIDDEN_IN_LIBRARIES = re.compile(
    r"std::(cout|cerr|clog|abort|exit|quick_exit|terminate|puts|printf|fputs)\b"
    r"|(?<![\w:.>])(printf|puts|abort|exit)\s*\("
    r"|\bfprintf\s*\(\s*std(err|out)\b|\bfmt::print\b")

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')
SOURCES = {".hpp", ".cpp", ".cu", ".cuh", ".h"}


def without_comments_and_strings(text):
    """The code alone, line numbers kept: rules are about code, and prose may name what it forbids."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.S)
    return token.sub(lambda m: "\n" * m.group().count("\n"), text)


class Sources:
    """The source files of a tree, each with its includes as (line, quoted, name)."""

    def __init__(self, root):
        self.root = Path(root)
        self.text = {}
        for folder in [*MAY_INCLUDE, "tests"]:
            for path in sorted((self.root / folder).rglob("*")):
                if path.suffix in SOURCES:
                    self.text[path.relative_to(self.root).as_posix()] = path.read_text(encoding="utf-8")
        self.includes = {name: self._includes(text) for name, text in self.text.items()}

    @staticmethod
    def _includes(text):
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            match = INCLUDE.match(line)
            if match:
                found.append((number, match.group(1) == '"', match.group(2)))
        return found

    def foreign_headers(self, name):
        """Every <header> that including this file brings in, with the chain of own files that leads there."""
        seen, todo = set(), [(name, (name,))]
        while todo:
            current, chain = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            for _, quoted, header in self.includes.get(current, []):
                if quoted and header in self.includes:
                    todo.append((header, chain + (header,)))
                else:
                    yield header, chain


def is_program(name):
    return name.startswith(PROGRAMS)


def is_library(name):
    return name.split("/")[0] in MAY_INCLUDE and not is_program(name)


def broken_rules(root):
    sources = Sources(root)
    known = {*MAY_INCLUDE, "tests"}
    for name, includes in sources.includes.items():
        folder = name.split("/")[0]
        for number, quoted, header in includes:
            if not quoted:
                continue
            where = f"{name}:{number}"
            target = header.split("/")[0]
            if ".." in header.split("/") or target not in known or "/" not in header:
                yield f'{where}: "{header}" is not written from the root, as in "sim/replay.hpp"'
            elif header not in sources.includes:
                yield f'{where}: "{header}" does not exist'
            elif is_library(name) and is_program(header):
                yield f'{where}: "{header}" belongs to a program, which nothing includes'
            elif is_library(name) and target != folder and target not in MAY_INCLUDE[folder]:
                allowed = ", ".join(sorted(MAY_INCLUDE[folder])) or "no other folder"
                yield f'{where}: {folder} may include {allowed}, not "{header}"'

        for header, chain in sources.foreign_headers(name):
            for kind, (pattern, places) in CONFINED.items():
                if not pattern.match(header):
                    continue
                if is_library(name) and not name.startswith(places):
                    yield f"{name}: sees the {kind} header <{header}> through {' -> '.join(chain)}"

        if is_library(name):
            for number, line in enumerate(without_comments_and_strings(sources.text[name]).splitlines(), 1):
                match = FORBIDDEN_IN_LIBRARIES.search(line)
                if match:
                    yield f"{name}:{number}: a library does not print, exit or abort: {match.group().strip()}"


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else "."
    broken = list(broken_rules(root))
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
