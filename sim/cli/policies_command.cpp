#include "sim/cli/policies_command.hpp"

#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "policies/help.hpp"
#include "sim/cli/arguments.hpp"
#include "sim/policies_json.hpp"

namespace kvreplay {

void add_policies_command(CLI::App& app) {
  struct Options {
    std::string name;
    bool json = false, markdown = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("policies", "Methods: parts, keys, papers, deviations");
  command->add_option("name", options->name, "a part or a preset; without it, all are listed");
  CLI::Option* json = command->add_flag("--json", options->json, "everything, for programs");
  command->add_flag("--markdown", options->markdown, "the tables of docs/methods.md")->excludes(json);
  add_plugin_option(command);
  command->callback([options] {
    if (options->json) {
      std::cout << policies_json(options->name) << "\n";
    } else if (options->markdown) {
      std::cout << markdown();
    } else if (options->name.empty()) {
      std::cout << list_text() << "\nkvreplay policies NAME says more about one of them.\n";
    } else {
      std::cout << help_text(options->name);
    }
  });
}

}  // namespace kvreplay
