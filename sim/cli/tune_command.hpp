// kvreplay tune: looks for the best values of a method's parameters and says how sure that is.
#pragma once
namespace CLI {
class App;
}
namespace kvreplay {
void add_tune_command(CLI::App& app);
}
