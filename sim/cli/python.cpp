#include "sim/cli/python.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <system_error>

namespace kvreplay {
namespace {

const char* const kSource = KVREPLAY_SOURCE_DIR;

std::string environment(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
  return value ? value : "";
}

std::string python() {
  std::string asked = environment("KVREPLAY_PYTHON");
  if (!asked.empty()) {
    return asked;
  }
  std::string own = std::string(kSource) + "/.venv/bin/python";
  if (!std::filesystem::exists(own)) {
    throw std::runtime_error("this command needs Python and there is none at " + own +
                             "; run scripts/setup once, or set KVREPLAY_PYTHON to an interpreter that has the "
                             "packages of analysis/requirements.txt");
  }
  return own;
}

}  // namespace

CLI::Option* Forwarded::add(const std::string& name, const std::string& doc, const std::string& type) {
  options_.emplace_back(name, command_->add_option(name, doc)->type_name(type));
  return options_.back().second;
}

void Forwarded::add_flag(const std::string& name, const std::string& doc) {
  flags_.emplace_back(name, command_->add_flag(name, doc));
}

void Forwarded::append_to(std::vector<std::string>& arguments) const {
  for (const auto& [name, option] : options_) {
    for (const std::string& value : option->results()) {
      // One word, so that a value with a leading dash stays a value.
      arguments.push_back(name + "=" + value);
    }
  }
  for (const auto& [name, flag] : flags_) {
    if (flag->count() > 0) {
      arguments.push_back(name);
    }
  }
}

void become_python(std::vector<std::string> arguments) {
  const std::string interpreter = python();
  const std::string packages = std::string(kSource) + "/analysis";
  const std::string path = environment("PYTHONPATH");
  // NOLINTBEGIN(concurrency-mt-unsafe): no thread is left of this process
  setenv("PYTHONPATH", (path.empty() ? packages : packages + ":" + path).c_str(), 1);
  setenv("PYTHONSAFEPATH", "1", 1);  // a copy.py in the user's folder is not the library's
  // NOLINTEND(concurrency-mt-unsafe)
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

}  // namespace kvreplay
