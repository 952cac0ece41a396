// A sweep as its plan says it (docs/sweep.md): TOML, checked for what can be checked without traces.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "sim/sweep/grid.hpp"

namespace kvreplay {

struct PlanMethod {
  std::string text;
  std::vector<std::string> budgets;  // in place of the plan's, if `own_budgets`
  bool own_budgets = false;
  // Every combination of one entry's values with another's; the axes within one entry go together.
  std::vector<std::vector<GridAxis>> axes;
  std::string where;  // "plan.toml line 7", for messages
};

struct Plan {
  std::string name;                 // of the file, for messages
  std::filesystem::path folder;     // what the plan names is looked for from here
  std::vector<std::string> traces;  // globs
  std::vector<PlanMethod> methods;
  std::vector<std::string> budgets;
  std::vector<std::string> compensators{"mean", "moments", "gaussian"};
  bool compensators_given = false;
  std::string metrics = "all";
  std::vector<std::string> statistics{"mean"};  // in the order of kStatistics
  std::vector<int> layers;                      // empty: all
  int prompt_len = 0, max_steps = 0, checkpoints = 16;
  std::uint64_t seed = 0;
  bool heads = false, steps = false, retained = false, outputs = false;  // of `detail`
  std::vector<int> output_steps;
};

inline constexpr std::string_view kStatistics[] = {"mean", "std", "p50", "p90", "p99", "max"};

// ConfigError names the line, what is wrong, what is allowed and the nearest valid name.
Plan parse_plan(std::string_view toml, const std::string& name);
Plan read_plan(const std::filesystem::path& file);

}  // namespace kvreplay
