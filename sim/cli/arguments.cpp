#include "sim/cli/arguments.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "policies/errors.hpp"
#include "sim/cli/exit.hpp"
#include "sim/plugins.hpp"

namespace kvreplay {

std::vector<std::string> comma_list(const std::string& text) {
  std::vector<std::string> pieces;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    pieces.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return pieces;
}

void check_range(const CLI::Option* option, std::int64_t value, std::int64_t least, std::int64_t most) {
  const auto refuse = [&](const std::string& allowed) {
    throw ConfigError(fmt::format("{}: {} is not allowed, it must be {}", option->get_name(), value, allowed));
  };
  if (option->count() > 0 && value < least) {
    refuse(fmt::format("at least {}", least));
  }
  if (option->count() > 0 && value > most) {
    refuse(fmt::format("at most {}", most));
  }
}

void add_plugin_option(CLI::App* command) {
  command
      ->add_option_function<std::vector<std::string>>(
          "--plugin",
          [](const std::vector<std::string>& files) {
            for (const std::string& file : files) {
              load_plugin(file);
            }
          },
          "Shared object with more methods (docs/plugins.md); may be given several times")
      ->allow_extra_args(false);
}

int threads_or_all(int threads) {
  return threads > 0 ? threads : std::max(1, int(std::thread::hardware_concurrency()));
}

void fail(const std::vector<std::string>& failed, bool trace_failed, const std::string& more) {
  const std::string others = failed.size() > 1 ? fmt::format(" (and {} {})", failed.size() - 1, more) : "";
  std::fputs(fmt::format("kvreplay: {}{}\n", failed[0], others).c_str(), stderr);
  throw Exit{trace_failed ? kTrace : kOther};
}

}  // namespace kvreplay
