// Hands the process over to the Python package (analysis/kvreplay_analysis), which draws and compares.
#pragma once
#include <string>
#include <vector>

namespace kvreplay {

// Does not return: the process becomes `python -m kvreplay_analysis arguments...`, with $KVREPLAY_PYTHON, else the
// interpreter of the .venv that scripts/setup made. std::runtime_error names the set-up where there is none.
[[noreturn]] void become_python(std::vector<std::string> arguments);

}  // namespace kvreplay
