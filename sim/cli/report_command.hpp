// `kvreplay report` and `kvreplay figure`: hand over to the Python package in analysis/.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay {

// Registers both commands. Each replaces this process by Python, so its exit code is the command's.
void add_report_command(CLI::App& app);

}  // namespace kvreplay
