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
  league_options->add_flag("--best", "Only the best of each class: eviction, merging, encoding, correction, selection");
  league_options->add_flag("--json", "The table as JSON");
  league_options->add_flag("--csv", "The table as CSV");
  league->callback([folder, league_options] {
    std::vector<std::string> arguments{"league"};
    league_options->append_to(arguments);
    arguments.insert(arguments.end(), {"--", *folder});
    become_python(std::move(arguments));
  });

  CLI::App* tradeoffs =
      app.add_subcommand("tradeoffs", "Set fidelity beside bytes, latency, energy and capacity of a GPU");
  auto run = std::make_shared<std::string>();
  auto costs = std::make_shared<Forwarded>(tradeoffs);
  tradeoffs->add_option("DIR", *run, "Results folder that `kvreplay run --out` wrote")->required();
  costs->add("--gpu",
             "A100-80GB, H100-SXM (default), H200, RTX-4090, a beginning of these, or "
             "bandwidth=B/S,peak=FLOP/S,memory=B",
             "NAME");
  costs->add("--batch", "Sequences decoded together, for the table (default 1)", "N");
  costs->add("--launch-us", "Microseconds of a launch, per layer and step (default 0)", "X");
  costs->add("--pj-per-bit", "Energy of memory traffic (default 5.5, the middle of HBM's 4 to 7)", "X");
  costs->add("--pj-per-flop", "Energy of an operation (default 0: left out)", "X");
  costs->add("--static-watts", "Power drawn whatever is done (default 0: left out)", "X");
  costs->add("--weights-gb", "The model's weights, read once per step and held in memory (default 0)", "X");
  costs->add("--model-layers", "Layers of the whole model (default: those of the run)", "N");
  costs->add("--budget", "Only these budgets as they were asked, separated by commas", "BUDGETS");
  costs->add("--trace", "Only these traces, separated by commas (default: what the report opens on)", "NAMES");
  costs->add("--batches", "Batches of the winner map (default 1,8,64)", "LIST");
  costs->add("--contexts", "Contexts of the winner map beside those measured, as 8k,32k: costs alone", "LIST");
  costs->add("--least-fidelity", "What a winner has to have (default 0.9)", "F");
  costs->add("--out", "Also draw it: pdf, svg or png by its ending", "FILE");
  costs->add("--style", "Width of the figure: single or double column (default double)", "STYLE");
  costs->add_flag("--json", "Everything as JSON");
  costs->add_flag("--csv", "The table as CSV");
  tradeoffs->callback([run, costs] {
    std::vector<std::string> arguments{"tradeoffs"};
    costs->append_to(arguments);
    arguments.insert(arguments.end(), {"--", *run});
    become_python(std::move(arguments));
  });
}

}  // namespace kvreplay
