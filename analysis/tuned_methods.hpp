// Reads back what was tuned.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace kvreplay {

// The methods that a tuned.json has chosen, for a run: their texts, the budgets of each, and where their tables lie.
struct TunedMethods {
  std::vector<std::string> methods, budgets;  // budgets: all of them, in order
  std::map<std::string, std::vector<std::string>> budgets_of;
  std::map<std::string, std::filesystem::path> tables;
};
TunedMethods read_tuned(const std::filesystem::path& file);  // ConfigError

}  // namespace kvreplay
