// kvreplay explain: what a method's error comes from, as a page.
#pragma once
namespace CLI {
class App;
}
namespace kvreplay {
void add_explain_command(CLI::App& app);
}
