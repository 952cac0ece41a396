// kvreplay policies [NAME]: what methods are made of.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay {

void add_policies_command(CLI::App& app);

}  // namespace kvreplay
