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

std::string quoted(const std::string& text) {
  if (!text.empty() &&
      text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-+=:,@") ==
          std::string::npos) {
    return text;
  }
  std::string out = "'";
  for (const char c : text) {
    out += c == '\'' ? "'\\''" : std::string(1, c);
  }
  return out + "'";
}

int threads_or_all(int threads) {
  return threads > 0 ? threads : std::max(1, int(std::thread::hardware_concurrency()));
}

void say(const std::string& sentence) {
  std::string line = fmt::format("kvreplay: {}", sentence);
  // Names in a file are what its writer put there, and a terminal obeys them.
  std::replace_if(
      line.begin(), line.end(), [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; }, '?');
  // Where stderr cannot be written, the exit code still says what happened; fmt::print would throw.
  std::fputs((line + "\n").c_str(), stderr);
}

void fail(const std::vector<std::string>& failed, bool trace_failed, const std::string& more) {
  const std::string others = failed.size() > 1 ? fmt::format(" (and {} {})", failed.size() - 1, more) : "";
  say(failed[0] + others);
  throw Exit{trace_failed ? kTrace : kOther};
}

}  // namespace kvreplay
