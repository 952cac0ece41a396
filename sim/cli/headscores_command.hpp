// kvreplay headscores: how much each head copies from spans of the prompt, as tables for allocators over heads.
#pragma once
namespace CLI {
class App;
}

namespace kvreplay {

void add_headscores_command(CLI::App& app);

}  // namespace kvreplay
