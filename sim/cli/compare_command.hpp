// `kvreplay compare` and `kvreplay league`: hand over to the Python package in analysis/.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay {

// Registers both commands. Each replaces this process by Python, so its exit code is the command's.
void add_compare_command(CLI::App& app);

}  // namespace kvreplay
