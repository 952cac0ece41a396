"""The rules hold for this repository, and each of them is noticed where a made-up tree breaks it."""
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from source_rules import broken_rules  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def broken_in(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return list(broken_rules(folder))


class ThisRepository(unittest.TestCase):
    def test_keeps_every_rule(self):
        broken = list(broken_rules(ROOT))
        self.assertEqual(broken, [], "\n" + "\n".join(broken))

    def test_is_what_was_read(self):
        self.assertTrue((ROOT / "policies/errors.hpp").exists())


class MadeUpTree(unittest.TestCase):
    def assert_broken(self, files, *words):
        broken = broken_in(files)
        self.assertEqual(len(broken), 1, broken)
        for word in words:
            self.assertIn(word, broken[0])

    def test_allowed_includes_pass(self):
        self.assertEqual(broken_in({
            "policies/a.hpp": "#include <vector>\n",
            "traces/b.hpp": "",
            "traces/b.cpp": '#include "traces/b.hpp"\n#include <hdf5.h>\n',
            "sim/c.cpp": '#include "policies/a.hpp"\n#include "traces/b.hpp"\n',
            "sim/cli/main.cpp": '#include <CLI/CLI.hpp>\n#include "sim/cli/run.hpp"\nint x = printf("hello");\n',
            "sim/cli/run.hpp": "",
        }), [])

    def test_leaves_do_not_know_each_other(self):
        self.assert_broken({"traces/b.hpp": "", "policies/a.cpp": '#include "traces/b.hpp"\n'}, "policies/a.cpp:1")
        self.assert_broken({"policies/a.hpp": "", "traces/b.cpp": '#include "policies/a.hpp"\n'}, "traces/b.cpp:1")

    def test_a_leaf_does_not_know_the_engine(self):
        self.assert_broken({"sim/c.hpp": "", "policies/a.cpp": '\n#include "sim/c.hpp"\n'}, "policies/a.cpp:2")

    def test_includes_are_written_from_the_root(self):
        self.assert_broken({"sim/c.hpp": "", "sim/d.cpp": '#include "../sim/c.hpp"\n'}, "from the root")
        self.assert_broken({"sim/c.hpp": "", "sim/d.cpp": '#include "c.hpp"\n'}, "from the root")

    def test_an_included_file_exists(self):
        self.assert_broken({"sim/d.cpp": '#include "sim/gone.hpp"\n'}, "does not exist")

    def test_nothing_includes_a_program(self):
        self.assert_broken({"sim/cli/run.hpp": "", "sim/d.cpp": '#include "sim/cli/run.hpp"\n'}, "program")

    def test_hdf5_does_not_leak_through_an_own_header(self):
        self.assert_broken({"traces/h5.hpp": "#include <hdf5.h>\n", "traces/b.hpp": '#include "traces/h5.hpp"\n',
                            "sim/d.cpp": '#include "traces/b.hpp"\n'},
                           "sim/d.cpp", "HDF5", "traces/b.hpp -> traces/h5.hpp")

    def test_cuda_and_cli_headers_stay_where_they_belong(self):
        self.assert_broken({"sim/d.cpp": "#include <cuda_runtime.h>\n"}, "CUDA")
        self.assert_broken({"sim/d.cpp": "#include <CLI/CLI.hpp>\n"}, "command-line")
        self.assert_broken({"traces/d.cpp": "#include <boost/program_options.hpp>\n"}, "command-line")

    def test_libraries_do_not_print_or_exit(self):
        for line in ("std::cout << 1;", "std::exit(1);", "fmt::print(\"x\");", "std::fprintf(stderr, \"x\");",
                     "abort();", "printf(\"x\");"):
            self.assert_broken({"traces/d.cpp": f"int a;\nvoid f() {{ {line} }}\n"}, "traces/d.cpp:2", "print")

    def test_prose_may_name_what_code_may_not(self):
        self.assertEqual(broken_in({"traces/d.cpp": '// never std::exit(1)\n/* printf( */ auto a = "std::cout";\n'}), [])


if __name__ == "__main__":
    unittest.main()
