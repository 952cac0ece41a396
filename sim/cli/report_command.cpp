#include "sim/cli/report_command.hpp"

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sim/cli/python.hpp"

namespace kvreplay {
void add_report_command(CLI::App& app) {
  CLI::App* report = app.add_subcommand("report", "Write one self-contained HTML page, and its figures as PDF and SVG");
  auto folder = std::make_shared<std::string>();
  auto report_options = std::make_shared<Forwarded>(report);
  report->add_option("DIR", *folder, "Results folder that `kvreplay run --out` wrote")->required();
  report_options->add("--out", "The page (default DIR/report.html); figures/ is written beside it", "FILE");
  report->callback([folder, report_options] {
    std::vector<std::string> arguments{"report", *folder};
    report_options->append_to(arguments);
    become_python(std::move(arguments));
  });

  CLI::App* figure = app.add_subcommand("figure", "Draw one figure of a results folder for a paper");
  auto name = std::make_shared<std::string>();
  auto from = std::make_shared<std::string>();
  auto figure_options = std::make_shared<Forwarded>(figure);
  figure
      ->add_option(
          "NAME", *name,
          "error_resident, league, pareto, correction, mismatch, mass_error, layers, heads, head, raster, pca, "
          "taxonomy, decode or ranks")
      ->required();
  figure->add_option("DIR", *from, "Results folder that `kvreplay run --out` wrote")->required();
  figure_options->add("--format", "pdf, svg or png (default: by the ending of --out, else pdf)", "FORMAT");
  figure_options->add("--style", "Width: single or double column (default double)", "STYLE");
  figure_options->add("--out", "File to write (default NAME.FORMAT in the current folder)", "FILE");
  figure_options->add("--trace", "Only these traces, separated by commas (default: what the report opens on)", "NAMES");
  figure_options->add("--budget", "Budget as it was asked (default: the one most methods share)", "BUDGET");
  figure_options->add("--method", "Only this method as it was typed; may be given several times", "LABEL")->take_all();
  figure_options->add("--layer",
                      "Of head, raster and pca: the model's layer number (default: where the error is greatest)", "N");
  figure_options->add("--head", "Of head, raster and pca: the query head", "N");
  figure_options->add("--step", "Of pca: one of the run's --steps", "N");
  figure->callback([name, from, figure_options] {
    std::vector<std::string> arguments{"figure", *name, *from};
    figure_options->append_to(arguments);
    become_python(std::move(arguments));
  });
}

}  // namespace kvreplay
