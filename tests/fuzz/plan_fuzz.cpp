// A sweep's plan: TOML, and the values that its grids give.
#include <cmath>

#include "policies/errors.hpp"
#include "sim/sweep/plan.hpp"
#include "tests/fuzz/fuzz.hpp"

using namespace kvreplay;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  fuzz::answered<ConfigError>([&] {
    const Plan plan = parse_plan(text, "plan.toml");
    fuzz::require(!plan.traces.empty() && !plan.methods.empty(), "a plan of nothing");
    for (const PlanMethod& method : plan.methods) {
      for (const auto& together : method.axes) {
        for (const GridAxis& axis : together) {
          for (const bool whole : {false, true}) {
            const std::vector<std::string> values = axis.texts(whole);
            fuzz::require(values.size() == together.front().texts(whole).size(), "a zip of unequal lengths");
            for (const std::string& value : values) {
              fuzz::require(!axis.range || std::isfinite(std::strtod(value.c_str(), nullptr)), "a value that is none");
            }
          }
        }
      }
    }
  });
  return 0;
}
