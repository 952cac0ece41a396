"""Parts from shared objects, and what `kvreplay new-policy` writes: both compiled here, as a user would."""

import hashlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from harness import KVREPLAY, ROOT, assert_refused, final_files, good_run, kvreplay, make, rows, run

BUILD = pathlib.Path(KVREPLAY).resolve().parents[1]
ROLES = ("select", "read", "allocate", "rewrite", "compensate")
DOCUMENT = ROOT / "docs" / "plugins.md"
TEMPLATE = ROOT / "docs" / "plugin_template"

# The code of what plug-ins are compiled against, without comments and spaces. Where it changed: raise kPluginInterface
# of policies/plugin.hpp if a plug-in compiled before would misbehave, and write the new hash here.
CONTRACT = ("policy", "part", "params", "moments", "rotation", "plugin")
CONTRACT_HASH = "0c7abfe8aad7a63c"


def cached(name):
    """A variable of the build that is tested."""
    lists = BUILD / "CMakeCache.txt"
    if not lists.exists():
        pytest.skip(f"{BUILD} is not a build folder")
    return re.search(rf"^{name}:\w+=(.*)$", lists.read_text(), re.M).group(1)


def compile_flags():
    """Compiler and flags of kvreplay's own policies, fast to compile."""
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if entry["file"].endswith("/policies/select/knorm.cpp"):
            words = shlex.split(entry["command"])
            words = words[1:] if pathlib.Path(words[0]).name == "ccache" else words
            return [*words[:words.index("-o")], "-O0"]
    raise AssertionError("compile_commands.json has no policies")


def call(*words, **more):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


def compiled(source, out, *more):
    call(*compile_flags(), "-fPIC", "-shared", source, *more, "-o", out)
    return out


def exporting(folder, name, fields, code=""):
    """A shared object that says in plain C what a plug-in says of itself."""
    source = folder / f"{name}.c"
    source.write_text(code + (f"struct {{ int interface; const char* abi; int n; const void* parts; }} kvreplay_plugin = "
                              f"{{{fields}}};\n" if fields else "int nothing;\n"))
    call(cached("CMAKE_C_COMPILER"), "-shared", "-fPIC", source, "-o", folder / f"{name}.so")
    return folder / f"{name}.so"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def trace(folder):
    return make(folder / "t.h5", n_tokens=128, n_heads=4, n_kv_heads=2, layers=(0, 1), prompt_len=64)


def configured(template, package):
    call("cmake", "-S", template, "-B", template / "build", f"-Dkvreplay_DIR={package}",
         f"-DCMAKE_CXX_COMPILER={cached('CMAKE_CXX_COMPILER')}")
    return template / "build"


@pytest.fixture(scope="module")
def template(folder):
    """The template of docs/, built by CMake with what is installed."""
    cached("CMAKE_CXX_COMPILER")
    prefix = folder / "prefix"
    call("cmake", f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_INSTALL_LOCAL_ONLY=1", "-P", BUILD / "cmake_install.cmake")
    shutil.copytree(TEMPLATE, folder / "template")
    build = configured(folder / "template", next(prefix.rglob("kvreplayConfig.cmake")).parent)
    call("cmake", "--build", build)
    return build / "my_policy.so"


@pytest.fixture(scope="module")
def throws(folder):
    cached("CMAKE_CXX_COMPILER")
    return compiled(ROOT / "tests" / "cli" / "plugins" / "throws.cpp", folder / "throws.so")


def names(role):
    return f"my_{role}", f"My{role.capitalize()}"


@pytest.fixture(scope="module")
def tree(folder):
    """What new-policy edits of a source tree, with a part of every role added."""
    root = folder / "tree"
    for file in ("policies/catalogue.cpp", "policies/CMakeLists.txt", "tests/policies/CMakeLists.txt", "docs/methods.md"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    for role in ROLES:
        done = kvreplay("new-policy", names(role)[0], "--role", role, cwd=root / "policies")
        assert done.returncode == 0, done.stderr
        assert f"policies/{role}/my_{role}.cpp" in done.stdout and "docs/methods.md" in done.stdout
    return root


@pytest.fixture(scope="module")
def of_every_role(tree, folder):
    """One plug-in with the generated parts of all roles."""
    cached("CMAKE_CXX_COMPILER")
    source = folder / "roles.cpp"
    source.write_text('#include "policies/plugin.hpp"\n'
                      + "".join(f'#include "{tree}/policies/{role}/my_{role}.cpp"\n' for role in ROLES)
                      + f"KVREPLAY_PLUGIN({', '.join('kvreplay::' + names(role)[1] for role in ROLES)});\n")
    return compiled(source, folder / "roles.so")


def without_names(table, method):
    left_out = ("method", "label")
    return [{k: v for k, v in row.items() if k not in left_out} for row in table if row["label"] == method]


def test_the_interface_has_a_number_of_its_own():
    code = "".join((ROOT / "policies" / f"{name}.hpp").read_text() for name in CONTRACT)
    code = re.sub(r"//[^\n]*|\s+", "", code)
    assert hashlib.sha256(code.encode()).hexdigest()[:16] == CONTRACT_HASH, "see the comment at CONTRACT"


def test_the_template_is_what_new_policy_writes(folder):
    done = kvreplay("new-policy", "my_policy", "--plugin", folder / "fresh")
    assert done.returncode == 0, done.stderr
    assert final_files(folder / "fresh") == final_files(TEMPLATE) == ["CMakeLists.txt", "my_policy.cpp"]
    for file in final_files(TEMPLATE):
        assert (folder / "fresh" / file).read_text() == (TEMPLATE / file).read_text()
    assert_refused(kvreplay("new-policy", "my_policy", "--plugin", folder / "fresh"), 2, "is there already")


def test_the_build_folder_is_a_package_too(folder):
    shutil.copytree(TEMPLATE, folder / "in_build")
    cache = (configured(folder / "in_build", BUILD) / "CMakeCache.txt").read_text()
    assert re.search(r"^kvreplay_DIR:\w+=(.*)$", cache, re.M).group(1) == str(BUILD)


def test_the_template_is_h2o_to_the_last_bit(template, folder):
    sample = ROOT / "traces" / "samples" / "stories260k-512.h5"
    table = good_run(sample, folder / "sample", "--plugin", template, "--method", "h2o", "my_policy",
                     "my_policy:decay=0.5", "--budget", "32,25%", "--layers", "0,1")
    built_in = without_names(table, "h2o")
    assert len(built_in) > 100 and without_names(table, "my_policy") == built_in
    assert without_names(table, "my_policy:decay=0.5") != built_in
    assert {row["method"] for row in table} == {"h2o", "my_policy", "my_policy:decay=0.5"}
    recorded = json.loads((folder / "sample" / "run.json").read_text())["plugins"]
    assert recorded == [{"path": str(template), "parts": ["my_policy"],
                         "sha256": hashlib.sha256(template.read_bytes()).hexdigest()}]


def test_a_plugin_is_known_to_the_other_commands(template, folder):
    done = kvreplay("policies", "my_policy", "--plugin", template)
    assert done.returncode == 0 and "what a step leaves of older attention" in done.stdout
    assert_refused(kvreplay("policies", "my_policy"), 2, "my_policy")
    assert_refused(kvreplay("tune", "--plugin", template, "-m", "my_policy", "--param", "decoy=0:1", "-b", "32",
                            "--traces", "none.h5", "--out", folder / "tuned"), 2, "decoy", "decay")


def test_a_tuned_value_names_the_code_that_it_is_for(template, folder, trace, tmp_path):
    pytest.importorskip("matplotlib")
    done = kvreplay("tune", "--plugin", template, "-m", "my_policy", "--param", "decay=0.5:1", "-b", "8", "--candidates",
                    "3", "--traces", trace, "--threads", 1, "--out", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    plugin, = json.loads((tmp_path / "tuned" / "tuned.json").read_text())["plugins"]
    assert plugin == {"path": str(template), "parts": ["my_policy"],
                      "sha256": hashlib.sha256(template.read_bytes()).hexdigest()}


def test_a_sweep_knows_the_code_that_its_cells_came_from(template, folder, trace, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'traces = ["{trace}"]\nmethods = ["h2o", "my_policy"]\nbudgets = [8]\n')
    out = tmp_path / "sweep"
    assert_refused(kvreplay("sweep", plan, "--out", out), 2, "my_policy")
    assert not out.exists()
    done = kvreplay("sweep", plan, "--out", out, "--plugin", template)
    assert done.returncode == 0, done.stderr
    rows = (out / "cells.csv").read_text().splitlines()
    of = {name: [row.replace("my_policy", "h2o") for row in rows if f",{name}," in row] for name in ("h2o", "my_policy")}
    assert of["h2o"] and of["h2o"] == of["my_policy"]
    methods = json.loads((out / "sweep.json").read_text())["plan"]["methods"]
    digest = hashlib.sha256(template.read_bytes()).hexdigest()
    assert [m["files"] for m in methods] == [{}, {"plug-in my_policy": digest}]
    script = kvreplay("sweep", plan, "--out", out, "--plugin", template, "--emit-slurm=2")
    assert f"--plugin {template}" in script.stdout


def test_the_command_of_the_document_builds_a_compensator(folder, trace):
    command = next(block for block in re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.S | re.M)
                   if block.startswith("g++ "))
    if "GNU" not in kvreplay("--version").stdout or cached("KVREPLAY_NATIVE") != "ON":
        pytest.skip("the command is for g++ and -march=native")
    done = kvreplay("new-policy", "my_policy", "--role", "compensate", "--plugin", folder / "mean")
    assert done.returncode == 0, done.stderr
    call("sh", "-c", command.replace("g++", shlex.quote(cached("CMAKE_CXX_COMPILER")), 1), cwd=folder / "mean",
         env={"KVREPLAY": str(ROOT), "PATH": "/usr/bin:/bin"})
    table = good_run(trace, folder / "mean_out", "--plugin", folder / "mean" / "my_policy.so", "--method", "h2o",
                     "h2o+mean", "h2o+my_policy", "h2o+my_policy:mass=4", "--budget", "16", "--compensators", "none")
    def corrected(label):
        return [{**row, "compensator": ""} for row in without_names(table, label)]
    assert corrected("h2o+my_policy") == corrected("h2o+mean") != corrected("h2o")
    assert corrected("h2o+my_policy:mass=4") != corrected("h2o+mean")


def test_parts_of_every_role_work_and_are_documented(of_every_role, tree, folder, trace):
    methods = ["my_select", "my_select+my_allocate", "h2o+my_rewrite:bits=4,window=4", "h2o+my_compensate",
               "full+my_read:sink=1"]
    table = good_run(trace, folder / "roles", "--plugin", of_every_role, "--budget", "16", "--compensators",
                     "my_compensate", "--method", "full", "h2o", *methods)
    error = {m: [row["mean"] for row in table if row["label"] == m and row["metric"] == "error_output"]
             for m in ("full", "h2o", *methods)}
    assert all(len(means) == 8 for means in error.values())
    assert error["my_select"] == error["h2o"]
    for method in methods[1:]:
        assert 0 < sum(error[method]) < 100 and error[method] != error["h2o"], method
    done = kvreplay("policies", "--markdown", "--plugin", of_every_role)
    document = (tree / "docs" / "methods.md").read_text()
    begin = "<!-- begin: kvreplay policies --markdown -->\n"
    assert document[document.index(begin) + len(begin):document.index("<!-- end -->")] == done.stdout


def test_new_parts_compile_in_the_tree_and_pass_their_tests(tree, folder):
    libraries = [BUILD / "policies" / "libkvreplay_policies.a", BUILD / "tests" / "libkvreplay_catch_main.a"]
    if not all(library.exists() for library in libraries):
        pytest.skip("the tests are not built")
    for role in ROLES:
        for file, entry in ((tree / "policies" / "CMakeLists.txt", f"{role}/my_{role}.cpp"),
                            (tree / "tests" / "policies" / "CMakeLists.txt", f"my_{role}_test.cpp")):
            assert file.read_text().split().count(entry) == 1, entry
    parts, tests = folder / "parts.cpp", folder / "tests.cpp"
    parts.write_text("".join(f'#include "{tree}/policies/{role}/my_{role}.cpp"\n' for role in ROLES))
    tests.write_text("".join(f'#include "{tree}/tests/policies/my_{role}_test.cpp"\n' for role in ROLES))
    flags = compile_flags()
    makers = [subprocess.Popen([*flags, "-c", source, "-o", folder / f"{name}.o"], stderr=subprocess.PIPE, text=True)
              for name, source in (("parts", parts), ("catalogue", tree / "policies" / "catalogue.cpp"), ("tests", tests))]
    for maker in makers:
        said = maker.communicate(timeout=300)[1]
        assert maker.returncode == 0, said
    objects = [folder / f"{name}.o" for name in ("tests", "catalogue", "parts")]
    call(*flags, *objects, *libraries, "-o", folder / "tests")
    assert f"{len(ROLES)} test cases" in call(folder / "tests")


def test_what_new_policy_writes_keeps_the_style(tree):
    formatter = shutil.which("clang-format-14")
    if formatter is None:
        pytest.skip("there is no clang-format-14")
    shutil.copy(ROOT / ".clang-format", tree)
    call(formatter, "--dry-run", "-Werror", *sorted(tree.rglob("*.cpp")), TEMPLATE / "my_policy.cpp")


@pytest.mark.parametrize("arguments, words", [
    (["h2o"], ["h2o", "there already"]),
    (["momentkv"], ["there already"]),
    (["My-Policy"], ["My-Policy", "small letters"]),
    (["x" * 33], ["32"]),
    (["2fast"], ["a letter first"]),
    (["a__b"], ["single"]),
    (["double"], ["double", "another name"]),
    (["selector"], ["another name"]),
    (["mine", "--role", "selekt"], ["selekt", "'select'", "compensate"]),
    (["mine", "--plugin", ""], ["--plugin"]),
    (["mine"], ["source tree", "--plugin"]),
])
def test_new_policy_refuses(arguments, words, tmp_path):
    assert_refused(kvreplay("new-policy", *arguments, cwd=tmp_path), 2, *words)
    assert final_files(tmp_path) == []


def test_new_policy_changes_nothing_where_it_cannot_finish(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    before = {file: file.read_bytes() for file in (tmp_path / "tree").rglob("*") if file.is_file()}
    assert_refused(kvreplay("new-policy", "my_read", "--role", "read", cwd=tmp_path / "tree"), 2, "my_read.cpp")
    lists = tmp_path / "tree" / "tests" / "policies" / "CMakeLists.txt"
    lists.write_text("nothing\n")
    assert_refused(kvreplay("new-policy", "another", cwd=tmp_path / "tree"), 2, "CMakeLists.txt", "_test.cpp")
    before[lists] = lists.read_bytes()
    assert {file: file.read_bytes() for file in (tmp_path / "tree").rglob("*") if file.is_file()} == before


def test_what_is_no_plugin_is_refused(template, of_every_role, folder, trace):
    def refused(file, *words):
        assert_refused(run(trace, folder / "never", "--plugin", file, "--method", "h2o", "--budget", "16"), 2,
                       str(file), *words)
        assert not (folder / "never").exists()

    text = folder / "text.so"
    text.write_text("not a shared object, whatever its name says\n" * 100)
    refused(text, "cannot be loaded")
    refused(folder / "gone.so", "does not exist")
    for share in (0.01, 0.5, 0.9):  # a copy that was interrupted
        cut = folder / "cut.so"
        cut.write_bytes(template.read_bytes()[:int(share * template.stat().st_size)])
        refused(cut, "cut short")
    refused(folder, "is not a file")
    refused(exporting(folder, "nothing", ""), "no plug-in", "KVREPLAY_PLUGIN")
    refused(exporting(folder, "newer", '999, "who knows", 0, 0'), "interface 999", "has interface 2")
    refused(exporting(folder, "other", '2, "C++ ABI 1", 0, 0'), "(C++ ABI 1)", "Eigen")
    said = run(trace, folder / "never", "--plugin", folder / "other.so", "--method", "h2o").stderr
    abi = re.search(r"this kvreplay for \((.*?)\);", said).group(1)
    missing = 'extern void kvreplay_is_gone(void);\nvoid f(void) { kvreplay_is_gone(); }\n'
    refused(exporting(folder, "missing", f'2, "{abi}", 0, 0', missing), "kvreplay_is_gone")
    shutil.copy(template, folder / "copy.so")
    again = run(trace, folder / "never", "--plugin", template, "--plugin", folder / "copy.so", "--method", "my_policy")
    assert_refused(again, 2, "copy.so", "'my_policy' is there already")
    table = good_run(trace, folder / "twice", "--plugin", template, "--plugin", template, "--plugin", of_every_role,
                     "--method", "my_policy", "my_select", "--budget", "16", "--compensators", "none")
    assert without_names(table, "my_policy") == without_names(table, "my_select")
    assert len(json.loads((folder / "twice" / "run.json").read_text())["plugins"]) == 2


def test_explain_wants_the_plugin_of_the_run(template, folder, trace):
    good_run(trace, folder / "explained", "--plugin", template, "--method", "my_policy", "--budget", "16",
             "--compensators", "none")
    assert_refused(kvreplay("explain", folder / "explained", "--method", "my_policy"), 2, f"--plugin {template}")
    other = folder / "other_my_policy.so"
    other.write_bytes(template.read_bytes() + b"\0")
    assert_refused(kvreplay("explain", folder / "explained", "--method", "my_policy", "--plugin", other), 2,
                   "not the one that the run had", template)


@pytest.mark.parametrize("where", ["constructor", "prefill", "observe", "score", "evicted"])
def test_what_a_part_throws_ends_its_cell_alone(where, throws, folder, trace):
    kinds = {"config": "thrown on purpose, as a configuration", "standard": "thrown on purpose",
             "silent": "did not say why", "number": "no std::exception"}
    methods = [f"throws:where={where},kind={kind}" for kind in kinds]
    out = folder / f"throws_{where}"
    done = run(trace, out, "--plugin", throws, "--method", *methods, "h2o", "--budget", "16", "--compensators", "mean",
               threads=4)
    assert_refused(done, 1, "thrown on purpose", "(and 7 more, listed in")
    record = json.loads((out / "run.json").read_text())
    assert record["complete"] is False and len(record["failed"]) == 8  # four methods in two layers
    for kind, sentence in kinds.items():
        own = [text for text in record["failed"] if f"kind={kind}" in text or (kind == "standard" and "kind" not in text)]
        assert len(own) == 2 and all(sentence in text for text in own), record["failed"]
    alone = good_run(trace, folder / f"alone_{where}", "--method", "h2o", "--budget", "16", "--compensators", "mean")
    assert rows(out) == alone


def test_what_a_rewriter_throws_ends_its_cell_alone(throws, folder, trace):
    out = folder / "throws_step"
    done = run(trace, out, "--plugin", throws, "--method", "h2o+throws_when_rewriting", "h2o", "--budget", "16")
    assert_refused(done, 1, "thrown on purpose", "h2o+throws_when_rewriting")
    assert {row["label"] for row in rows(out)} == {"h2o"}


def test_what_a_check_throws_is_a_refusal(throws, folder, trace):
    def checked(kind):
        return run(trace, folder / "unchecked", "--plugin", throws, "--method", f"throws:where=check,kind={kind}",
                   "--budget", "16")

    assert_refused(checked("config"), 2, "thrown on purpose, as a configuration")
    assert_refused(checked("standard"), 1, "thrown on purpose")
    assert_refused(checked("number"), 1, "says nothing")
    assert not (folder / "unchecked" / "run.json").exists()
