#include "sim/cli/compare_command.hpp"

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sim/cli/python.hpp"

namespace kvreplay {

void add_compare_command(CLI::App& app) {
  CLI::App* compare = app.add_subcommand("compare", "Set two methods, or two runs, against each other, step by step");
  auto a = std::make_shared<std::string>();
  auto b = std::make_shared<std::string>();
  auto options = std::make_shared<Forwarded>(compare);
  compare->add_option("A", *a, "Results folder, and a method of it as typed or canonical: out:h2o")
      ->required()
      ->type_name("DIR[:METHOD]");
  compare->add_option("B", *b, "The other side; without methods, every method that both have")
      ->required()
      ->type_name("DIR[:METHOD]");
  options->add("--metric", "Metrics, as error_corrected.moments, or all (default error_output)", "NAMES")->take_all();
  options->add("--budget", "Only these budgets as they were asked, separated by commas", "BUDGETS");
  options->add("--trace", "Only these traces, by their names in A, separated by commas", "NAMES");
  options->add("--by", "Also one line for each layer, head, step or trace", "LEVEL");
  options->add("--tolerance", "Exit 1 where the means of a cell are more than this share apart", "X");
  options->add("--out", "Also draw the differences: pdf, svg or png by its ending", "FILE");
  options->add("--style", "Width of the figure: single or double column (default double)", "STYLE");
  options->add_flag("--json", "The numbers as JSON");
  compare->callback([a, b, options] {
    // Behind "--", so that a folder may be called anything.
    std::vector<std::string> arguments{"compare"};
    options->append_to(arguments);
    arguments.insert(arguments.end(), {"--", *a, *b});
    become_python(std::move(arguments));
  });

  CLI::App* league = app.add_subcommand("league", "Rank a run's methods at equal tokens or at equal bytes");
  auto folder = std::make_shared<std::string>();
  auto league_options = std::make_shared<Forwarded>(league);
  league->add_option("DIR", *folder, "Results folder that `kvreplay run --out` wrote")->required();
  league_options->add("--at", "What is equal: tokens or bytes (default tokens)", "UNIT");
  league_options->add("--base", "What methods are an improvement over (default streaming, else random)", "METHOD");
  league_options->add("--budget", "Only these budgets as they were asked, separated by commas", "BUDGETS");
  league_options->add("--trace", "Only these traces, separated by commas (default: what the report opens on)", "NAMES");
  league_options->add("--head-type", "Only heads of this type: sink, local, retrieval or diffuse", "TYPE");
  league_options->add("--gpu", "Whose decode latency is estimated (default H100-SXM)", "NAME");
  league_options->add_flag("--json", "The table as JSON");
  league_options->add_flag("--csv", "The table as CSV");
  league->callback([folder, league_options] {
    std::vector<std::string> arguments{"league"};
    league_options->append_to(arguments);
    arguments.insert(arguments.end(), {"--", *folder});
    become_python(std::move(arguments));
  });
}

}  // namespace kvreplay
