// kvreplay sweep, status and merge: plans of any size, done once, by any number of processes.
#pragma once
namespace CLI {
class App;
}
namespace kvreplay {
void add_sweep_commands(CLI::App& app);
}
