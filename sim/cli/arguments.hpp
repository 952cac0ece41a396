// What the commands do alike with their arguments and with what went wrong.
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

namespace kvreplay {

// "a,b" -> {"a", "b"}
std::vector<std::string> comma_list(const std::string& text);
// ConfigError where the option was given with a value outside [least, most].
void check_range(const CLI::Option* option, std::int64_t value, std::int64_t least, std::int64_t most);
// --plugin FILE, repeatable: every command that parses methods has it. Loaded before the command itself runs.
void add_plugin_option(CLI::App* command);
std::string quoted(const std::string& text);  // for a shell, in quotes where it needs some
int threads_or_all(int threads);              // 0: as many as the machine has
// "kvreplay: SENTENCE" on stderr, on one line whatever names are in it.
void say(const std::string& sentence);
// Says the first of these sentences, and how many there are `more` of (as in "more, listed in F"); throws Exit.
[[noreturn]] void fail(const std::vector<std::string>& failed, bool trace_failed, const std::string& more);

}  // namespace kvreplay
