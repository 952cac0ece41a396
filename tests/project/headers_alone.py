"""Every header of the product compiles on its own, included twice, with exactly the flags of the folder it lives in.

headers_alone.py BUILD_DIR takes compiler and flags from BUILD_DIR/compile_commands.json, so a header that needs a
library its folder does not link to fails here as it would fail its users.
"""
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("policies", "traces", "sim", "analysis", "trace_capture")
OPTIONAL = {Path("sim/python")}  # not always built, and of no use to other folders


def syntax_check(command):
    """The command that compiled a source file, turned into one that checks standard input and writes nothing."""
    words = shlex.split(command["command"])
    if Path(words[0]).name == "ccache":
        words = words[1:]
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("-o", "-MF", "-MT", "-MQ", "-c"):
            skip = True
        elif word not in ("-MD", "-MMD"):
            kept.append(word)
    return [*kept, "-O0", "-fsyntax-only", "-x", "c++", "-"]


def flags_by_folder(build):
    commands = json.loads((build / "compile_commands.json").read_text())
    found = {}
    for command in commands:
        source = Path(command["file"])
        if source.suffix == ".cpp" and source.is_relative_to(ROOT) and not source.is_relative_to(build):
            found.setdefault(source.relative_to(ROOT).parent, []).append(command)
    # A folder may hold more than one library; its headers may need what the one with the most libraries links to.
    return {folder: max(several, key=lambda c: c["command"].count("-isystem")) for folder, several in found.items()}


def command_for(header, by_folder):
    """The flags of the nearest folder with a source file: its own, one below it, or one above."""
    folder = header.parent
    below = [other for other in by_folder if other.is_relative_to(folder)]
    for candidate in [folder, *sorted(below), *folder.parents]:
        if candidate in by_folder:
            return by_folder[candidate]
    return None


def main():
    build = Path(sys.argv[1]).resolve()
    by_folder = flags_by_folder(build)
    headers = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.hpp"))
    headers = [header for header in headers if header.parent in by_folder or header.parent not in OPTIONAL]

    def check(header):
        command = command_for(header, by_folder)
        if command is None:
            return f"{header}: no source file near it is compiled, so its flags are unknown"
        text = f'#include "{header.as_posix()}"\n' * 2
        result = subprocess.run(syntax_check(command), input=text, text=True, capture_output=True,
                                cwd=command["directory"], check=False)
        return f"{header} does not compile alone:\n{result.stderr}" if result.returncode else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [failure for failure in pool.map(check, headers) if failure]
    for failure in failures:
        print(failure)
    print(f"{len(headers) - len(failures)} of {len(headers)} headers compile alone")
    return 1 if failures or not headers else 0


if __name__ == "__main__":
    sys.exit(main())
