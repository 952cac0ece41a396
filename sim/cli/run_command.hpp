// kvreplay run: replays traces under methods and writes a results folder.
#pragma once
namespace CLI {
class App;
}
namespace kvreplay {
void add_run_command(CLI::App& app);
}
