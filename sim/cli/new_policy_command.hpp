// `kvreplay new-policy NAME`: a working method to start from, in a source tree or as a plug-in of its own.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay {

void add_new_policy_command(CLI::App& app);

}  // namespace kvreplay
