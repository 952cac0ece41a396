// kvreplay info | verify | recover | repack | import | synth
#pragma once
#include <CLI/App.hpp>

namespace kvreplay {

// Registers the commands that look at traces or make them. Results go to stdout; an error leaves as
// a ConfigError or a TraceError.
void add_trace_commands(CLI::App& app);

}  // namespace kvreplay
