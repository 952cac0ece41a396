#include "sim/cli/report_command.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace kvreplay {
namespace {

const char* const kSource = KVREPLAY_SOURCE_DIR;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string python() {
  const std::string asked = environment("KVREPLAY_PYTHON");
  if (!asked.empty()) {
    return asked;
  }
  const std::string own = std::string(kSource) + "/.venv/bin/python";
  if (!std::filesystem::exists(own)) {
    throw std::runtime_error("reports need Python and there is none at " + own +
                             "; run scripts/setup once, or set KVREPLAY_PYTHON to an interpreter that has the "
                             "packages of analysis/requirements.txt");
  }
  return own;
}

// Does not return: the process becomes `python -m kvreplay_analysis arguments...`.
[[noreturn]] void become_python(std::vector<std::string> arguments) {
  const std::string interpreter = python();
  const std::string packages = std::string(kSource) + "/analysis";
  const std::string path = environment("PYTHONPATH");
  setenv("PYTHONPATH", (path.empty() ? packages : packages + ":" + path).c_str(), 1);
  arguments.insert(arguments.begin(), {interpreter, "-m", "kvreplay_analysis"});
  std::vector<char*> argv;
  for (std::string& argument : arguments) {
    argv.push_back(argument.data());
  }
  argv.push_back(nullptr);
  execvp(interpreter.c_str(), argv.data());
  throw std::runtime_error("cannot start " + interpreter + ": " + std::generic_category().message(errno) +
                           "; run scripts/setup, or set KVREPLAY_PYTHON to a Python interpreter");
}

// Options that are handed over as they were written; an option that was not given is left to Python's default.
class Forwarded {
 public:
  explicit Forwarded(CLI::App* command) : command_(command) {}

  CLI::Option* add(const std::string& name, const std::string& doc, const std::string& type) {
    options_.emplace_back(name, command_->add_option(name, doc)->type_name(type));
    return options_.back().second;
  }

  void append_to(std::vector<std::string>& arguments) const {
    for (const auto& [name, option] : options_) {
      for (const std::string& value : option->results()) {
        // One word, so that a value with a leading dash stays a value.
        arguments.push_back(name + "=" + value);
      }
    }
  }

 private:
  CLI::App* command_;
  std::vector<std::pair<std::string, CLI::Option*>> options_;
};

}  // namespace

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
  figure->add_option("NAME", *name, "error_resident, correction, mismatch, mass_error, heads or decode")->required();
  figure->add_option("DIR", *from, "Results folder that `kvreplay run --out` wrote")->required();
  figure_options->add("--format", "pdf, svg or png (default: by the ending of --out, else pdf)", "FORMAT");
  figure_options->add("--style", "Width: single or double column (default double)", "STYLE");
  figure_options->add("--out", "File to write (default NAME.FORMAT in the current folder)", "FILE");
  figure_options->add("--trace", "Only these traces, separated by commas (default: what the report opens on)", "NAMES");
  figure_options->add("--budget", "Budget as it was asked (default: the one most methods share)", "BUDGET");
  figure_options->add("--method", "Only this method as it was typed; may be given several times", "LABEL")->take_all();
  figure->callback([name, from, figure_options] {
    std::vector<std::string> arguments{"figure", *name, *from};
    figure_options->append_to(arguments);
    become_python(std::move(arguments));
  });
}

}  // namespace kvreplay
