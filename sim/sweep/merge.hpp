// Joins what several jobs did of one sweep.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "sim/sweep/state.hpp"

namespace kvreplay {

// Takes the finished items of all folders into `out`, which is then a folder of the sweep like any other (and may be
// one of them), and writes its tables. ConfigError where the folders are of different plans or schemas, which it names.
SweepState merge(const std::vector<std::filesystem::path>& folders, const std::filesystem::path& out,
                 const std::vector<std::string>& argv);

}  // namespace kvreplay
