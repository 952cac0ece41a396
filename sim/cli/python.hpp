// Hands the process over to the Python package (analysis/kvreplay_analysis), which draws and compares.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace kvreplay {

// Options of a command that are handed over as they were written; one that was not given is left to Python's default.
class Forwarded {
 public:
  explicit Forwarded(CLI::App* command) : command_(command) {}
  CLI::Option* add(const std::string& name, const std::string& doc, const std::string& type);
  void add_flag(const std::string& name, const std::string& doc);
  void append_to(std::vector<std::string>& arguments) const;

 private:
  CLI::App* command_;
  std::vector<std::pair<std::string, CLI::Option*>> options_, flags_;
};

// Does not return: the process becomes `python -m kvreplay_analysis arguments...`, with $KVREPLAY_PYTHON, else the
// interpreter of the .venv that scripts/setup made. std::runtime_error names the set-up where there is none.
[[noreturn]] void become_python(std::vector<std::string> arguments);

}  // namespace kvreplay
