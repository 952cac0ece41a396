// Parts with values of their keys by name, as tests of single parts make them.
#pragma once
#include <catch2/catch.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "policies/part.hpp"

namespace kvreplay::test {

using Settings = std::vector<std::pair<std::string, double>>;

inline std::shared_ptr<void> configured(const PartInfo& part, const Settings& settings) {
  const std::shared_ptr<void> config = part.config();
  for (const auto& [name, value] : settings) {
    bool found = false;
    for (const ParamInfo& p : part.params) {
      if (p.name == name) {
        p.set(config.get(), {value, false, {}});
        found = true;
      }
    }
    REQUIRE(found);
  }
  return config;
}

}  // namespace kvreplay::test
